"""Singular values of the Jacobian of attention and mlp blocks."""
