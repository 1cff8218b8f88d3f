"""A summary of a config's data, before anything trains on them."""
