"""Held-out and benchmark scores, and finished runs compared by arm."""
