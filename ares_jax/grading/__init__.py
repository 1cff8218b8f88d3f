"""Grading of responses. No jax: grading runs in worker processes."""
