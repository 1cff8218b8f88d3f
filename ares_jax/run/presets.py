"""Named algorithms: the settings in which AEPO's baselines differ from it.

    python -m ares_jax.train --config=configs/aepo_7b.py:dapo
"""

from ares_jax.system.config import ConfigError, suggest

# Without AEPO's two parts: accuracy as the reward, one fixed weight of the KL term.
_GRPO = {"aepo.reward.kind": "accuracy", "aepo.kl.dynamic": False}

PRESETS = {
  "aepo": {},
  "grpo": _GRPO,
  # DAPO, arXiv 2503.14476: clip-higher, token average, dynamic sampling, no KL term. Its penalty
  # on overlong answers is not implemented.
  "dapo": _GRPO | {
    "aepo.kl.beta": (0.0, 0.0, 0.0), "aepo.loss.clip_low": 0.2, "aepo.loss.clip_high": 0.28,
    "aepo.loss.average": "token", "aepo.filter.batches": 20, "aepo.filter.low": 0.01,
    "aepo.filter.high": 0.99},
}


def choose_preset(config, name):
  """Changes a config to one of PRESETS and returns it.

  Args:
    config: ml_collections ConfigDict with a section `aepo`.
    name: of the algorithm.

  Raises:
    ConfigError: there is no such algorithm.
  """
  if name not in PRESETS:
    raise ConfigError(f"there is no algorithm {name!r}{suggest(name, list(PRESETS))}")
  config.update_from_flattened_dict(PRESETS[name])
  return config
