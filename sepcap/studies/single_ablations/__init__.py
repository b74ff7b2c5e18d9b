"""The exact effect of every neuron, ablated alone."""
