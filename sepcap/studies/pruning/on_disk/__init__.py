"""A run as it is stored: its folder, and the files of every step."""
