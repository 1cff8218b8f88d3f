"""Compares runs that shape all problems alike with runs that shape by difficulty (section 3.2.2).

Uniform shaping has a single bucket: train with --config.aepo.reward.easy=1.0
--config.aepo.reward.medium=0.0. Buckets depend on a model's own answers, so the arms are compared
by the levels of the data: the lowest level counts as easy, the highest as hard.
"""

from ares_jax.evaluation.arms import arm_rows, collect_arms, interval_cell, mean_with_interval
from ares_jax.evaluation.scores import level_order
from ares_jax.run.files import require_json
from ares_jax.run.identity import STAGES, flatten, use_of
from ares_jax.run.starts import read_starts
from ares_jax.system import figures
from ares_jax.system.tables import text_table

UNIFORM, BY_DIFFICULTY = "uniform shaping", "difficulty shaping"
PARTS = ("easy", "hard", "all")


def measure_ablation(workdirs):
  """Accuracy and length of both arms on easy and hard problems, over seeds of finished runs.

  Raises ValueError if the runs cannot be compared.

  Returns:
    dict: "levels" ({"easy": ..., "hard": ...}), "arms" (a list of dicts with "arm", "seeds", and
    for "easy", "hard" and "all" the accuracy and the length, each a mean and the half-width of its
    95% t-interval, which is None for one seed), "shared" (the seeds of both arms), "difference"
    (accuracy of difficulty shaping minus uniform shaping over these seeds, for the same parts).
  """
  by_arm = {UNIFORM: [], BY_DIFFICULTY: []}
  for workdir, config in _comparable_configs(workdirs).items():
    by_arm[shaping_arm(config, workdir)].append(workdir)
  for arm, found in by_arm.items():
    if not found:
      raise ValueError(f"no run with {arm} among {', '.join(workdirs)}; uniform shaping is "
                       "--config.aepo.reward.easy=1.0 --config.aepo.reward.medium=0.0")
  results = {arm: _results_by_seed(found) for arm, found in by_arm.items()}
  _check_pairs(by_arm)
  rows = arm_rows(results)
  levels = sorted({level for row in rows for level in row["level"]}, key=level_order)
  if len(levels) < 2:
    raise ValueError("the evaluations have fewer than two levels; the check needs held-out data "
                     "with a column `level`")
  levels = {"easy": levels[0], "hard": levels[-1]}
  shared = sorted(results[UNIFORM].keys() & results[BY_DIFFICULTY].keys())
  return {"levels": levels, "arms": [_arm_summary(row, levels) for row in rows], "shared": shared,
          "difference": {part: _difference(results, shared, levels.get(part)) for part in PARTS}}


def _comparable_configs(workdirs):
  """{workdir: flat config}, after checking that the runs differ in their shaping alone."""
  configs = {workdir: flatten(require_json(workdir, "config.json")) for workdir in workdirs}
  first = configs[workdirs[0]]
  for workdir, config in configs.items():
    other = sorted(key for key in config.keys() | first.keys() if not _may_differ(key)
                   and config.get(key) != first.get(key))
    if other:
      raise ValueError(f"{workdir} differs from {workdirs[0]} in {', '.join(other[:5])}; compare "
                       "runs that differ in their shaping alone")
  return configs


def _may_differ(key):
  """Whether runs of both arms may have different values of a setting."""
  return (use_of(key).free or key in ("seed", "aepo.reward.easy", "aepo.reward.medium")
          or key.startswith("evaluate."))


def shaping_arm(config, workdir):
  """UNIFORM or BY_DIFFICULTY, from the flat config of a run."""
  if config["aepo.reward.kind"] != "aepo":
    raise ValueError(f"{workdir} shapes no rewards by buckets: config.aepo.reward.kind is "
                     f"{config['aepo.reward.kind']!r}, not 'aepo'")
  borders = config["aepo.reward.easy"], config["aepo.reward.medium"]
  return UNIFORM if borders == (1.0, 0.0) else BY_DIFFICULTY


def _results_by_seed(workdirs):
  """{seed: results of stage 2} of the runs of one arm."""
  found = {}
  for workdir in workdirs:
    # Stage 1 is an arm of its own here; the arms that shape rewards are named "... + ...".
    for arm, by_seed in collect_arms([workdir]).items():
      if " + " in arm:
        for seed in found.keys() & by_seed:
          raise ValueError(f"{workdir}: seed {seed} is there twice; give one folder a seed")
        found |= by_seed
  if not found:
    raise ValueError(f"{workdirs[0]}/results.json has no evaluation of stage 2 yet")
  return found


def _check_pairs(by_arm):
  """Raises ValueError where two runs of a seed, one an arm, do not share what came before AEPO."""
  folders = [{require_json(folder, "config.json")["seed"]: folder for folder in found}
             for found in by_arm.values()]
  for seed in sorted(folders[0].keys() & folders[1].keys()):
    pair = [folder[seed] for folder in folders]
    first, second = (require_json(folder, "results.json") for folder in pair)
    for stage in STAGES[:-1]:
      if stage in first and stage in second and first[stage]["sampled"] != second[stage]["sampled"]:
        raise ValueError(
          f"{pair[0]} and {pair[1]} have seed {seed}, but not one cold start: after {stage} they "
          "were evaluated differently; copy the folder of one run before AEPO, and train AEPO in "
          "both copies on one machine")
    machines = [{(start["cpu"], start["device"]) for start in read_starts(folder)}
                for folder in pair]
    if all(machines) and machines[0] != machines[1]:
      told = " and ".join("; ".join(f"{cpu}, {device}" for cpu, device in sorted(one))
                          for one in machines)
      raise ValueError(f"{pair[0]} and {pair[1]} have seed {seed}, but ran on different machines, "
                       f"where sums round differently: {told}; run both on one CPU type")


def _arm_summary(row, levels):
  summary = {"arm": row["arm"], "seeds": row["seeds"]}
  for name in PARTS:
    part = row["level"][levels[name]] if name in levels else row
    summary[name] = {"accuracy": part["accuracy"], "length": part["length"]}
  return summary


def _difference(results, seeds, level):
  """Mean and half-width of the difference in accuracy over seeds; level None: all problems."""
  def accuracy(result):
    return (result["sampled"] if level is None else result["level"][level])["accuracy"]

  return mean_with_interval([
    accuracy(results[BY_DIFFICULTY][seed]) - accuracy(results[UNIFORM][seed]) for seed in seeds])


def ablation_text(result):
  """The table and the verdict, for a terminal."""
  rows = [[row["arm"], len(row["seeds"]), *(
    f"{interval_cell(row[part]['accuracy'], 100)} / {interval_cell(row[part]['length'], 1)}"
    for part in PARTS)] for row in result["arms"]]
  lines = [f"easy: level {result['levels']['easy']}, hard: level {result['levels']['hard']}; "
           "accuracy in % / tokens, mean over seeds ± 95% t-interval", "",
           text_table(["arm", "seeds", *PARTS], rows), ""]
  told = ", ".join(f"{interval_cell(result['difference'][part], 100)} on {part}" for part in PARTS)
  lines.append(f"Difficulty shaping minus uniform shaping, points, same seeds "
               f"({len(result['shared'])}): {told}. {_verdict(result)}" if result["shared"] else
               "The arms share no seed, so their difference includes that of the seeds.")
  return "\n".join(lines)


def _verdict(result):
  said = []
  for part in ("easy", "hard"):
    mean, half = result["difference"][part]
    if half is None or abs(mean) <= half:
      said.append(f"on {part} problems the runs show no difference")
    else:
      said.append(f"on {part} problems difficulty shaping is {'better' if mean > 0 else 'worse'}")
  return f"{'; '.join(said)}.".capitalize()


def ablation_pictures(result):
  """{"ablation": figure}: accuracy of both arms on easy, hard and all problems."""
  figure, [panel] = figures.new_figure("Accuracy by shaping, mean over seeds and 95% t-interval",
                                       x_label="problems", y_labels=["%"])
  groups = [*(f"{part} (level {level})" for part, level in result["levels"].items()), "all"]
  figures.draw_grouped_bars(panel, groups, {
    f"{row['arm']}, {len(row['seeds'])} seeds": [
      tuple(None if value is None else 100 * value for value in row[part]["accuracy"])
      for part in PARTS] for row in result["arms"]})
  panel.set_ylim(0, 100)
  figures.draw_legend(panel)
  return {"ablation": figure}
