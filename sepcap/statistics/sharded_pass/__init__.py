"""A collection cut into shards: what the driver does, and what a worker does."""
