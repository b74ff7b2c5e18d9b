"""Jumps of accuracy from one step of a run to the next: which targets they come from, and what explains them."""
