"""Comparison of unlearning methods: pruning beside gradient ascent, negative preference optimisation, and task arithmetic."""
