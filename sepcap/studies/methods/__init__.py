"""Comparison of pruning methods: populations, importances, bases, offsets."""
