"""Drawing: styles, files, pages. Takes arrays and tables, returns `go.Figure` or HTML, and depends on no study."""
