"""Figures of pruning runs: arrays and tables of one run or several in, `go.Figure` out."""
