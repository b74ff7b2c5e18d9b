"""Similarity of activations within and between categories of texts."""
