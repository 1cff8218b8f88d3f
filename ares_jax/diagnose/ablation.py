"""Is it worth it to shape by difficulty? Finished runs with one pressure for all problems against
runs with one for each bucket (section 3.2.2), easy and hard problems apart.

Uniform shaping is a single bucket for whatever has a wrong answer: train with
--config.aepo.reward.easy=1.0 --config.aepo.reward.medium=0.0. Buckets follow from a model's own
answers, so arms are compared by the levels of the data: the lowest is easy, the highest hard.
"""

import os

from ares_jax.diagnose.tables import text_table
from ares_jax.evaluation import arms as arms_lib
from ares_jax.evaluation.arms import interval_cell
from ares_jax.evaluation.scores import level_order
from ares_jax.run.files import read_json
from ares_jax.run.identity import flatten, use_of

KINDS = ("uniform shaping", "difficulty shaping")


def measure_ablation(workdirs):
  """Accuracy and length of both arms on easy and hard problems, over seeds.

  Args:
    workdirs: folders of finished runs, of both kinds.

  Returns:
    dict: levels (the easy and the hard one), arms: a list of dicts with arm, seeds, and for
    "easy", "hard" and "all" accuracy and length, a mean and the half-width of its 95% t-interval
    (None of one seed) each; less: what difficulty shaping has more on "easy", "hard" and "all",
    over the seeds of both.

  Raises:
    ValueError: a run that is not finished or shapes no rewards, runs that differ in more than
      their shaping, an arm that is missing, or an evaluation without two levels.
  """
  configs = {workdir: _config(workdir) for workdir in workdirs}
  first = {key: value for key, value in next(iter(configs.values())).items()
           if not _may_differ(key)}
  by_kind = {kind: [] for kind in KINDS}
  for workdir, config in configs.items():
    other = sorted(key for key in config.keys() | first.keys() if not _may_differ(key)
                   and (key not in first or key not in config or config[key] != first[key]))
    if other:
      raise ValueError(f"{workdir} differs from {workdirs[0]} in {', '.join(other[:5])}: runs that "
                       "differ in their shaping alone tell what it does")
    by_kind[shaping_kind(config, workdir)].append(workdir)
  for name, found in by_kind.items():
    if not found:
      raise ValueError(f"no run with {name} among {', '.join(workdirs)}; uniform shaping is "
                       "--config.aepo.reward.easy=1.0 --config.aepo.reward.medium=0.0")
  arms = {name: _finished(found) for name, found in by_kind.items()}
  rows = {row["arm"]: row for row in arms_lib.arm_rows(arms)}
  levels = sorted({level for row in rows.values() for level in row["level"]}, key=level_order)
  if len(levels) < 2:
    raise ValueError("the evaluations have fewer than two levels; easy and hard apart need held-out"
                     " data with a column `level`")
  levels = {"easy": levels[0], "hard": levels[-1]}
  uniform, ours = (arms[name] for name in KINDS)
  shared = sorted(uniform.keys() & ours.keys())
  return {
    "levels": levels, "arms": [{"arm": name, "seeds": row["seeds"], **{
      part: {"accuracy": row["level"][level]["accuracy"], "length": row["level"][level]["length"]}
      for part, level in levels.items()},
      "all": {"accuracy": row["accuracy"], "length": row["length"]}} for name, row in rows.items()],
    "shared": shared, "less": {part: arms_lib.mean_with_interval(
      [_accuracy(ours[seed], level) - _accuracy(uniform[seed], level) for seed in shared])
      for part, level in (levels | {"all": None}).items()}}


def shaping_kind(config, workdir):
  """Which of KINDS the flat config of a run is."""
  if config["aepo.reward.kind"] != "aepo":
    raise ValueError(f"{workdir} shapes no rewards: config.aepo.reward.kind is "
                     f"{config['aepo.reward.kind']!r}")
  borders = config["aepo.reward.easy"], config["aepo.reward.medium"]
  return KINDS[0] if borders == (1.0, 0.0) else KINDS[1]


def ablation_text(result):
  """The table and the verdict."""
  parts = "easy", "hard", "all"
  rows = []
  for row in result["arms"]:
    cells = [" / ".join((interval_cell(row[part]["accuracy"], 100),
                         interval_cell(row[part]["length"], 1))) for part in parts]
    rows.append([row["arm"], len(row["seeds"]), *cells])
  lines = [f"easy: level {result['levels']['easy']}, hard: level {result['levels']['hard']}; "
           "accuracy in % / tokens, mean over seeds ± 95% t-interval", "",
           text_table(["arm", "seeds", *parts], rows), ""]
  if not result["shared"]:
    return "\n".join([*lines, "The arms share no seed: their difference is that of the seeds too."])
  told = ", ".join(f"{interval_cell(result['less'][part], 100)} on {part}" for part in parts)
  return "\n".join([*lines, f"Difficulty shaping less uniform shaping, points, same seeds "
                            f"({len(result['shared'])}): {told}. {_verdict(result)}"])


def _verdict(result):
  said = []
  for part in ("easy", "hard"):
    mean, half = result["less"][part]
    if half is None or abs(mean) <= half:
      said.append(f"on {part} problems the runs do not tell them apart")
    else:
      said.append(f"on {part} problems difficulty shaping is {'better' if mean > 0 else 'worse'}")
  return f"{'; '.join(said)}.".capitalize()


def _finished(workdirs):
  """{seed: results of stage 2} of runs of one arm."""
  found = {}
  for workdir in workdirs:
    # Arms of a collection are stages too; the one that shapes rewards is the last.
    for arm, by_seed in arms_lib.collect_arms([workdir]).items():
      if " + " in arm:
        for seed, result in by_seed.items():
          if seed in found:
            raise ValueError(f"{workdir}: seed {seed} is there twice; give one folder a seed")
          found[seed] = result
  if not found:
    raise ValueError(f"{workdirs[0]}/results.json has no evaluation of stage 2 yet")
  return found


def _may_differ(key):
  """Whether runs of both arms may have different values of a setting."""
  return (use_of(key).free or key in ("seed", "aepo.reward.easy", "aepo.reward.medium")
          or key.startswith("evaluate."))


def _config(workdir):
  config = read_json(workdir, "config.json")
  if not config:
    raise ValueError(f"{os.path.join(workdir, 'config.json')} does not exist; give folders of "
                     "finished runs")
  return flatten(config)


def _accuracy(result, level):
  part = result["sampled"] if level is None else result["level"][level]
  return part["accuracy"]
