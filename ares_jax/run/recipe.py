"""The recipe of ARES: the settings that all files in configs/ have in common, each set once here.

A config starts from `recipe()` and sets its own numbers; a key that neither sets is an error. The
recipe is a module of the package, so that a copy of a config works in any folder.
"""

import math
import os
import pathlib

from ml_collections import ConfigDict

from ares_jax.system.config import ConfigError, load, suggest

_ADAM = dict(b1=0.9, eps=1e-8, clip=1.0, moments="float32")
# AEPO without its two parts: accuracy as the reward, one fixed weight of the KL term.
_GRPO = {"aepo.reward.kind": "accuracy", "aepo.kl.dynamic": False}

_UNCLIPPED = {"aepo.loss.clip_low": 1.0, "aepo.loss.clip_high": math.inf,
              "aepo.loss.clip_dual": math.inf}

# The settings in which AEPO's baselines differ from it, by the name that follows --config=FILE:
PRESETS = {
  "aepo": {},
  "grpo": _GRPO,
  # DAPO, arXiv 2503.14476: clip-higher, token average, dynamic sampling, no KL term, a penalty on
  # overlong answers. Its accuracy is 1 or -1, ours 1 or 0, so its penalty counts half; the last
  # fifth of an answer is its 4,096 of 20,480 tokens.
  "dapo": _GRPO | {
    "reward.weights": "accuracy=1, overlong=0.5", "reward.overlong": 0.2,
    "aepo.kl.beta": (0.0, 0.0, 0.0), "aepo.loss.clip_low": 0.2, "aepo.loss.clip_high": 0.28,
    "aepo.loss.average": "token", "aepo.filter.batches": 20, "aepo.filter.low": 0.01,
    "aepo.filter.high": 0.99},
  # Dr. GRPO, arXiv 2503.20783: advantages are not divided by the deviation, nor an answer's loss by
  # its length, but by the longest one's. No KL term.
  "drgrpo": _GRPO | {
    "aepo.kl.beta": (0.0, 0.0, 0.0), "aepo.loss.advantage": "none", "aepo.loss.clip_low": 0.2,
    "aepo.loss.clip_high": 0.2, "aepo.loss.clip_dual": math.inf, "aepo.loss.average": "constant"},
  # RLOO, arXiv 2402.14740: REINFORCE of whole answers, the mean reward of a group's others as the
  # baseline. The k2 estimator's gradient is that of a KL term in the reward, token by token.
  "rloo": _GRPO | _UNCLIPPED | {
    "aepo.kl.estimator": "k2", "aepo.loss.advantage": "leave_one_out", "aepo.loss.average": "sum"},
  # GSPO, arXiv 2507.18071: one ratio for an answer, clipped as in section 5.1. No KL term.
  "gspo": _GRPO | {
    "aepo.kl.beta": (0.0, 0.0, 0.0), "aepo.loss.ratio": "sequence", "aepo.loss.clip_low": 3e-4,
    "aepo.loss.clip_high": 4e-4, "aepo.loss.clip_dual": math.inf, "aepo.loss.average": "sequence"},
  # CISPO, arXiv 2506.13585: the weight is clipped from above, no token's gradient is cut. No KL
  # term. The paper prints no bound: 5 is ours.
  "cispo": _GRPO | _UNCLIPPED | {
    "aepo.kl.beta": (0.0, 0.0, 0.0), "aepo.loss.clip": "weight", "aepo.loss.clip_high": 4.0,
    "aepo.loss.average": "token"},
}


def recipe():
  """ConfigDict with the numbers of the method (paper, section 3) and of how every run runs."""
  c = ConfigDict()
  c.seed = 0
  # Of several processes: s until all are there; s without a sign of one until the others end.
  c.hosts = dict(join=300.0, heartbeat=30.0)
  c.mesh = dict(slice=1, data=-1, model=1)
  # Rank 0 trains all weights; configs/aepo_3b_lora_colab.py trains adapters.
  c.model = dict(lora=dict(rank=0, alpha=32.0,
                           targets=("q", "k", "v", "o", "gate", "up", "down")))
  c.data = dict(bad_rows="error")
  c.grade = dict(timeout=2.0, timeout_share=0.1, grader="layered")  # s an answer
  c.reward = dict(function="", arguments="", weights="", accuracy="", threshold=0.5, overlong=0.2,
                  failure="stop", timeout=60.0,  # s a batch
                  judge=dict(concurrency=16, timeout=60.0, retries=3, budget=0))
  loop = dict(strict=False, max_skipped=5, keep_best="", patience=0)

  c.warmup = dict(epochs=0.0, loop=loop, optimizer=dict(schedule="cosine", **_ADAM))
  # pass_rates="column" takes each row's own "pass_rate", in eighths, instead of asking a probe.
  c.curate = dict(selection="adacs", pass_rates="probe", samples=8)
  c.adacs = dict(shuffle=True, epochs=0.0, loop=loop, optimizer=dict(schedule="cosine", **_ADAM))

  c.prompt = dict(turn_images=True)
  c.engine = dict(slots=0, read=0, chunk=0, int8_pages=False)  # 0 = follows from the sizes
  c.aepo = dict(group=8, branches=0, frozen=("vision",), loop=loop, terms_every=0,
                validate=(0, 64, 1), validate_on=(), epochs=0.0, share_prompts=False)
  c.aepo.sampling = dict(temperature=1.0, top_k=0, min_tokens=0)
  c.aepo.filter = dict(low=0.01, high=0.99, key="accuracy")
  c.aepo.entropy = dict(window=4, quantile=0.95, quantile_of="window", reduce="mean", decay=0.9,
                        detector="window", cover="window", watch=0.0)
  c.aepo.reward = dict(
    kind="aepo", easy=0.75, medium=0.375, rule="signed", target="ema", target_scale=(0.8, 1.0, 1.2),
    target_decay=0.9, var_floor=1.0, cap=0.5, penalize="wrong", alpha_rate=0.05, token_bonus=0.0,
    bonus_sign="plus", placebo=False)
  c.aepo.loss = dict(advantage="std", equal_groups="zero", clip_low=0.2, clip_high=0.3,
                     clip_dual=3.0, average="token", importance_cap=2.0, ratio="token",
                     clip="loss")
  # beta, rho and the controller's numbers are ours: the paper does not print them.
  c.aepo.kl = dict(estimator="k3", dynamic=True, start=(1.0, 1.0, 1.0), beta=(0.01, 0.01, 0.01),
                   rho=0.5, rate=0.1, low=0.1, high=10.0)
  c.aepo.optimizer = dict(schedule="constant", warmup_steps=0, final_fraction=1.0, b2=0.999,
                          weight_decay=0.01, **_ADAM)

  c.evaluate = dict(samples=8, batch=64, temperature=1.0, top_p=1.0)
  c.wandb = dict(project="", name="")  # Weights & Biases; no project: nothing is sent
  return c


def choose_preset(config, name):
  """Changes a ConfigDict by PRESETS[name] and returns it; ConfigError for an unknown name."""
  if name not in PRESETS:
    raise ConfigError(f"there is no algorithm {name!r}{suggest(name, list(PRESETS))}")
  config.update_from_flattened_dict(PRESETS[name])
  return config


def load_config(name, file):
  """The unlocked config `name`, such as "aepo_7b.py:grpo", from which the config `file` starts.

  It is read from the folder of `file`, or from the repository's configs/ if it is not there.
  """
  folder = os.path.dirname(os.path.abspath(file))
  base = name.partition(":")[0]
  if not os.path.exists(os.path.join(folder, base)):
    folder = pathlib.Path(__file__).parents[2] / "configs"
    if not os.path.exists(folder / base):  # ares_jax is installed without its repository
      raise ConfigError(f"{file} starts from {base}, which is not beside it; copy it there from "
                        "the repository's configs/")
  return load(os.path.join(folder, name)).unlock()
