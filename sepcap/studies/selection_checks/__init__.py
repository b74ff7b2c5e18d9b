"""Complementary checks of a selection: keep only, step size, layers, meeting point."""
