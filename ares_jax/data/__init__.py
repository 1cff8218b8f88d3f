"""Everything between a file and a numpy batch. No module here imports jax: Grain workers and
grading workers stay light."""
