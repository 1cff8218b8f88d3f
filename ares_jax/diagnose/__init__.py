"""The paper's own checks on a run: `python -m ares_jax.diagnose hwe|kl|passk --workdir=DIR`."""
