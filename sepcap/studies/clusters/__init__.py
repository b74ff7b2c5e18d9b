"""Whether the neurons of a task are concentrated in clusters of neurons with similar input weights (MoEfication)."""
