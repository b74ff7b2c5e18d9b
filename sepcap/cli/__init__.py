"""The command line: the same dataclasses as the Python interface, as commands."""
