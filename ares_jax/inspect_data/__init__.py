"""Summarises a config's data before training."""
