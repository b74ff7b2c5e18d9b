"""Accuracy on every task after pruning each one."""
