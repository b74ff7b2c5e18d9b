"""Comparison of ablation kinds: on heads, and on random neurons in steps."""
