"""Shared parts of all studies: results, folders, intervals over seeds, sets of tasks, pages."""
