"""One HTML page, and pictures, of what a run did: `python -m ares_jax.report --workdir=DIR`."""
