"""Everything between a file and a numpy batch. No module here but the command `inspect` imports
jax: grading workers stay light."""
