"""Checkpoints that are verified when they are written and when they are read."""
