"""Measures how much of a run's updates comes from the entropy term and from the KL term.

The numbers are those of metrics.jsonl: `reward/shaped_size` compares advantages, `gradient/...`
gradients, the latter only in runs with config.aepo.terms_every > 0.
"""

import numpy as np

from ares_jax.ops.difficulty import BUCKETS
from ares_jax.system import figures
from ares_jax.system.figures import Curve
from ares_jax.system.tables import format_number, text_table

PARTS = ("first third", "second third", "last third")
SMALL = 0.05  # a term below this share of the accuracy's hardly moves the policy
_BY_BUCKET = {"entropy term / accuracy, in advantages": "reward/shaped_size",
              "share of answers it changes": "reward/shaped",
              "HWE tokens an answer, above tau": "hwe/count",
              "HWE tokens an answer, above entropy.watch": "hwe/watched",
              "KL coefficient kappa": "kl/kappa"}
_OVERALL = {"tau, nats": "hwe/threshold", "entropy, nats": "response/entropy",
            "gradient of accuracy": "gradient/accuracy",
            "gradient of the entropy term": "gradient/shaping",
            "gradient of the KL term": "gradient/kl",
            "the same with a fixed weight": "gradient/kl_grpo",
            "cosine to GRPO's gradient": "gradient/cosine_to_grpo"}


def measure_terms(records):
  """Means of the terms' sizes over each third of a run's AEPO iterations.

  Returns:
    dict: "kind" (config.reward.kind), "iterations", "rows" (a list of dicts: name, bucket or None,
    thirds: three means, None where nothing was measured), "steps" and "curves" ({bucket or "all":
    reward/shaped_size of every iteration}), "advice" (a list of sentences).
  """
  lines = [line for _, line in sorted(records.metrics["aepo"].items())]
  if not lines:
    raise ValueError(f"{records.workdir}/metrics.jsonl has no AEPO iterations yet")
  keys = [(name, None, key) for name, key in _OVERALL.items()]
  keys += [(name, bucket, key if bucket is None else f"{key}/{bucket}")
           for name, key in _BY_BUCKET.items() for bucket in (None, *BUCKETS)]
  rows = [{"name": name, "bucket": bucket, "thirds": _thirds(lines, key)}
          for name, bucket, key in keys if any(line.get(key) is not None for line in lines)]
  result = {"workdir": str(records.workdir), "kind": records.aepo_config().reward.kind,
            "iterations": len(lines), "rows": rows,
            "steps": [line["step"] for line in lines],
            "curves": {bucket or "all": [line.get(_size_key(bucket)) for line in lines]
                       for bucket in (None, *BUCKETS)}}
  return result | {"advice": terms_advice(result)}


def _size_key(bucket):
  return "reward/shaped_size" if bucket is None else f"reward/shaped_size/{bucket}"


def _thirds(lines, key):
  values = np.array([np.nan if line.get(key) is None else line[key] for line in lines], float)
  parts = (part[np.isfinite(part)] for part in np.array_split(values, 3))
  return [float(part.mean()) if len(part) else None for part in parts]


def terms_advice(result):
  """A list of sentences: what the terms do in the last third, and what would change it."""
  last = {(row["name"], row["bucket"]): row["thirds"][-1] for row in result["rows"]}
  size = last.get(("entropy term / accuracy, in advantages", None))
  if result["kind"] == "accuracy":
    found = ["reward.kind is \"accuracy\", so there is no entropy term."]
  elif size is None:
    found = ["reward/shaped_size was not logged; runs of older versions do not have it."]
  elif size < SMALL:
    found = [f"The entropy term changes the advantages by {_percent(size)} of their size, so the "
             "run is nearly one of accuracy alone; see docs/ablations.md for settings under which "
             "a penalty is seen."]
  else:
    found = [f"The entropy term changes the advantages by {_percent(size)} of their size."]
  accuracy, kl = (last.get((name, None)) for name in ("gradient of accuracy",
                                                      "gradient of the KL term"))
  if accuracy and kl is not None:
    found.append(f"The KL term's gradient is {_percent(kl / accuracy)} of that of accuracy"
                 + ("; raise kl.beta if it is meant to hold the policy."
                    if kl < SMALL * accuracy else "."))
  else:
    found.append("Gradients were not measured; train with config.aepo.terms_every > 0.")
  return found


def _percent(share):
  return f"{100 * share:.2g}%"


def terms_text(result):
  """The table and the advice, for a terminal."""
  rows = [[row["name"], row["bucket"] or "all", *map(format_number, row["thirds"])]
          for row in result["rows"]]
  return "\n".join([f"{result['iterations']} iterations; means over each third of them",
                    text_table(["", "bucket", *PARTS], rows), "", *result["advice"]])


def terms_pictures(result):
  """{name: figure}: the entropy term's share of the advantages over the run, by bucket."""
  curves = [Curve(name, result["steps"], values) for name, values in result["curves"].items()
            if any(value is not None for value in values)]
  if not curves:
    return {}
  return {"terms_shaped": figures.curve_figure(
    "Change of the advantages by the entropy term", curves, y_label="share of their mean size")}
