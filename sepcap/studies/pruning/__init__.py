"""A pruning run: configuration, steps, folder, areas, random baselines, trackers, page."""
