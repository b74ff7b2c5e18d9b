"""Dimensions of the residual stream that separate categories of texts."""
