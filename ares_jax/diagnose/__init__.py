"""The paper's own checks: `python -m ares_jax.diagnose hwe|kl|terms|passk|ablation`."""
