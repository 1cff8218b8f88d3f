"""Turns data files into numpy batches. Only sharded.py imports jax: worker processes stay light."""
