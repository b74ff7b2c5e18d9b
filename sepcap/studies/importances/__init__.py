"""Comparison of importances: every score against the exact effect of every neuron, labels, and pruning trajectories."""
