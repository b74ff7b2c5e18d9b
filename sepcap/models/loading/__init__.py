"""A model from the embedded default, a folder, the hub or memory: read, checked, and hooked."""
