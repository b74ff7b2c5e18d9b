"""Studies: one folder each, with its configuration, its computation, its result and its figures."""
