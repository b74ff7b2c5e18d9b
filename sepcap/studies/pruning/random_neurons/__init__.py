"""Random neurons to compare a run with: how they are matched, and the area beyond theirs."""
