"""Sampling of responses, and the rollouts made of them."""
