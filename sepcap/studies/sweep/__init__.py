"""A sweep: one study at every cell of a grid of its fields, in this process, in several, or on a cluster."""
