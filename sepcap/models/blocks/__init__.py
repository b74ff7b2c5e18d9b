"""What one block of a model computes: its parts, the places with vectors between them, and its weights."""
