"""The paper's mathematics: arrays in, arrays out. Every function named here stands alone.

Each is jitted and also takes lists. Settings such as `window`, `quantile`, `rho`, `decay`, `rate`,
`cap` and `temperature` are compiled in: they must be Python numbers or concrete scalars, and each
new value compiles again, so a setting that changes every step is slow.

Five functions have the name of their module, `difficulty`, `entropy_reward`, `token_entropy`,
`token_kl` and `window_entropy`; `import ares_jax.ops.difficulty as d` gives the function too.
`ops/sampling.py` is the sampler's own: not jitted, not checked and not exported.
"""

from ares_jax.ops.difficulty import difficulty
from ares_jax.ops.entropy_reward import (
  continuous_reward,
  entropy_reward,
  release_reward,
  track_alpha,
)
from ares_jax.ops.grpo import (
  average_loss,
  group_advantage,
  importance_weight,
  policy_loss,
  token_bonus,
)
from ares_jax.ops.kl_controller import control_kl, track_kl_coefficient
from ares_jax.ops.lagrange import bucket_stats, hwe_multiplier, track_target
from ares_jax.ops.token_entropy import logprob_and_entropy, token_entropy
from ares_jax.ops.token_kl import kl_weight, token_kl
from ares_jax.ops.window_entropy import entropy_threshold, hwe_cover, hwe_flags, window_entropy

__all__ = [
  "average_loss", "bucket_stats", "continuous_reward", "control_kl", "difficulty",
  "entropy_reward", "entropy_threshold", "group_advantage", "hwe_cover", "hwe_flags",
  "hwe_multiplier", "importance_weight", "kl_weight", "logprob_and_entropy", "policy_loss",
  "release_reward", "token_bonus", "token_entropy", "token_kl", "track_alpha",
  "track_kl_coefficient", "track_target", "window_entropy",
]
