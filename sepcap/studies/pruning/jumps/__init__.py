"""Jumps of accuracy from one step of a run to the next: their target tokens, and the part that the bigram path explains."""
