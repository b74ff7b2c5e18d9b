"""One pair of tasks pruned in both directions, against random neurons."""
