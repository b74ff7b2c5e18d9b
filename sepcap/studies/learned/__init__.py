"""Learned order of neurons: how much of the separability of two tasks the fixed scores find."""
