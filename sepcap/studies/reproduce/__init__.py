"""Stored studies of papers, with published and measured values."""
