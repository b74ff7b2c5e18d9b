"""Where the documents of a task come from: the hub, files, Python objects, or the installation itself."""
