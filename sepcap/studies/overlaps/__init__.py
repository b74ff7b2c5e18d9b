"""Overlap of the neuron sets of several tasks."""
