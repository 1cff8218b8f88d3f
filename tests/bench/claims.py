"""Experiments on the method's claims; benchmarks.md registers them before they run.

    python -m tests.bench.claims a --seeds=0,1,2,3,4,5,6,7,8,9 --jobs=2
    python -m tests.bench.claims a --table
    python -m tests.bench.claims a --transfer --table

Every arm of a seed starts from the same warm-up and cold start (WORKDIR/start/SEED; those of b,
whose problem differs, are in WORKDIR/second_look/SEED). Each run is on one core. A run that was
stopped goes on where it was; finished ones are not repeated. --table prints what is finished.
--transfer evaluates the finished runs on problems that they were not trained on.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys

import numpy as np
from scipy import stats

from ares_jax.run.recipe import PRESETS
from ares_jax.system.tables import markdown_table

GRPO = PRESETS["grpo"]
ALL = {"aepo.reward.penalize": "all", "aepo.loss.equal_groups": "normalize"}
RELEASE = {"aepo.reward.kind": "release", "aepo.reward.target": "batch",
           "aepo.reward.target_scale": (1.0, 1.0, 1.0), "aepo.loss.equal_groups": "normalize"}
FILTERED = {"aepo.filter.batches": 20}
WATCH = {"aepo.entropy.watch": 0.3}  # nats; near tau of the first iterations


def filtered(arms):
  """The arms, and each with groups filtered by what its advantages come from."""
  return arms | {
    f"{name}, filtered": arm | FILTERED | (
      {"aepo.filter.key": "reward"} if "aepo.loss.equal_groups" in arm else {})
    for name, arm in arms.items()}


def kl_arms():
  arms = {}
  for beta in (0.01, 0.1, 0.5):
    for name, changes in (("fixed", {"aepo.kl.dynamic": False}), ("rho 1", {"aepo.kl.rho": 1.0}),
                          ("rho 0.5", {"aepo.kl.rho": 0.5}), ("rho 0", {"aepo.kl.rho": 0.0})):
      arms[f"beta {beta}, {name}"] = {"aepo.reward.kind": "accuracy", "aepo.minibatch": 64,
                                      "aepo.kl.beta": (beta,) * 3} | changes
  return arms


def parts():
  """The parts of the method, and two readings under which a penalty reaches the advantages."""
  arms = {"GRPO": GRPO, "dynamic KL": {"aepo.reward.kind": "accuracy"},
          "shaping": {"aepo.kl.dynamic": False}, "AEPO": {}}
  return filtered(arms) | {"penalize all": ALL, "placebo": ALL | {"aepo.reward.placebo": True},
                           "penalize all, first tau": ALL | {"aepo.entropy.decay": 1.0}}


def group_sizes():
  """GRPO and penalties by bucket at equal numbers of answers, and difficulty without buckets."""
  arms = {}
  for group in (2, 4, 8, 16):
    size = {"aepo.group": group, "aepo.prompts": 256 // group}
    arms |= {f"GRPO, G {group}": GRPO | size, f"buckets, G {group}": ALL | size}
  return arms | {"continuous, G 8": ALL | {"aepo.reward.kind": "continuous"}}


def group_baseline(arm):
  kind, _, size = arm.partition(",")
  return {"GRPO": "GRPO, G 8", "buckets": f"GRPO,{size}", "continuous": f"buckets,{size}"}[kind]


# {name: (settings, levels that count)}: problems that the runs of a were not trained on.
TRANSFER = {
  "levels 6 to 8": ({"data.digits.problem.levels": 8, "prompt.max_tokens": (38,)}, "678"),
  "noise 0.1": ({"data.digits.problem.noise": 0.1}, "12345"),
  "+ and -": ({"data.digits.problem.operators": ("+", "-")}, "2345")}

# Longer chains with smudged cells, whose copies a second pass reads (docs/digits.md). All kinds of
# traces are frequent at all levels, so that stage 2 can choose between them.
SECOND_LOOK = {
  "data.digits.problem.levels": 8, "data.digits.problem.smudge": 0.3,
  "data.digits.problem.keys": (3, 7), "warmup.steps": 4000,
  "data.digits.teacher.captions": (0.8, 0.0), "data.digits.teacher.drills": (0.8, 0.3),
  "data.digits.teacher.first_captions": 0.05, "data.digits.teacher.first_drills": 0.075,
  "data.digits.teacher.warmup_smudge": 0.8,
  "data.digits.teacher.first_level": (0.4, 0.3, 0.3),
  "data.digits.teacher.last_level": (0.2, 0.4, 0.4),
  "data.digits.teacher.first_warmup": (0.5, 0.25, 0.25),
  "data.digits.teacher.last_warmup": (0.4, 0.3, 0.3),
  "prompt.max_tokens": (38,), "prompt.windows": (8,),
  "warmup.row_tokens": (300,), "warmup.row_windows": 56, "warmup.microbatch": 2,
  "adacs.row_tokens": (300,), "adacs.row_windows": 56, "adacs.microbatch": 2,
  "aepo.sampling.max_tokens": 120, "aepo.row_tokens": (320,), "aepo.microbatch": 4}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Arms that are compared."""

  arms: dict  # {name: settings}
  baseline: object  # function from an arm's name to that of the arm it is compared with
  problem: dict = dataclasses.field(default_factory=dict)  # settings of all arms and of the start
  start: str = "start"  # folder of the warm-ups and cold starts


EXPERIMENTS = {
  "a": Experiment(filtered({
    "GRPO": GRPO, "AEPO": {}, "AEPO, no std": {"aepo.loss.advantage": "none"},
    "penalize all": ALL, "placebo": ALL | {"aepo.reward.placebo": True},
    "penalize all, first tau": ALL | {"aepo.entropy.decay": 1.0}, "release": RELEASE}),
    lambda arm: "GRPO"),
  "b": Experiment(parts(), lambda arm: "GRPO", SECOND_LOOK, "second_look"),
  "c": Experiment(kl_arms(), lambda arm: arm.partition(",")[0] + ", fixed"),
  "d": Experiment(group_sizes(), group_baseline)}


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("experiment", choices=EXPERIMENTS)
  parser.add_argument("--config", default="configs/ares_tiny.py")
  parser.add_argument("--workdir", type=pathlib.Path, default="runs/claims")
  parser.add_argument("--seeds", default="0,1,2,3,4,5,6,7,8,9")
  parser.add_argument("--arms", help="names, with ';' between them; default all")
  parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on a core")
  parser.add_argument("--table", action="store_true", help="print what is finished; run nothing")
  parser.add_argument("--transfer", action="store_true", help="evaluate what is finished elsewhere")
  options = parser.parse_args()
  experiment = EXPERIMENTS[options.experiment]
  chosen = options.arms.split(";") if options.arms else list(experiment.arms)
  unknown = set(chosen) - set(experiment.arms)
  if unknown:
    parser.error(f"no arm {', '.join(sorted(unknown))}; there are {'; '.join(experiment.arms)}")
  seeds = [int(seed) for seed in options.seeds.split(",")]
  if options.table:
    table = transfer_table if options.transfer else tables
    print(table(options, experiment.baseline, chosen, seeds))
    return
  if options.transfer:
    for arm, by_seed in finished_runs(options, chosen, seeds).items():
      for seed, folder in by_seed.items():
        for problem in TRANSFER:
          evaluate_elsewhere(options.config, folder, problem, seed, experiment.arms[arm] | WATCH)
    return

  cores = queue.SimpleQueue()
  for core in sorted(os.sched_getaffinity(0))[:options.jobs]:
    cores.put(core)
  starts, begun = options.workdir / experiment.start, {}

  def run(seed, arm=None):
    """Trains an arm; without one, the start of the seed."""
    folder = starts / str(seed)
    settings = experiment.problem | {"aepo.steps": 0}
    if arm:
      begun[seed].result()
      folder = options.workdir / options.experiment / str(seed) / folder_name(arm)
      settings = experiment.problem | experiment.arms[arm] | WATCH
    core = cores.get()
    try:
      train(options.config, folder, seed, settings, core, start=arm and starts / str(seed))
    finally:
      cores.put(core)

  with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
    # A seed's arms run before the next seed's, so that what is finished can be compared. Starts are
    # one seed ahead, so that no arm waits for its own.
    begun[seeds[0]] = pool.submit(run, seeds[0])
    arms = []
    for seed, following in itertools.zip_longest(seeds, seeds[1:]):
      if following is not None:
        begun[following] = pool.submit(run, following)
      arms += [pool.submit(run, seed, arm) for arm in chosen]
    try:
      for future in arms:
        future.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def folder_name(arm):
  return arm.replace(", ", "-").replace(" ", "_")


def train(config, workdir, seed, settings, core, start=None):
  """A finished run in `workdir` on one core, from the stages in `start`."""
  done = workdir / "done.json"
  if done.exists():
    return
  if start and not (workdir / "results.json").exists():
    shutil.rmtree(workdir, ignore_errors=True)  # a copy that was cut off
    workdir.mkdir(parents=True)
    for name in ("warmup", "adacs"):
      shutil.copytree(start / name, workdir / name)
    for name in ("curation.json", "results.json"):
      shutil.copy(start / name, workdir / name)
  print(f"{workdir} on core {core}", file=sys.stderr, flush=True)
  workdir.parent.mkdir(parents=True, exist_ok=True)
  run_command("train", config, workdir, seed, settings,
              preexec_fn=lambda: os.sched_setaffinity(0, {core}))
  shutil.copy(workdir / "results.json", done)


def evaluate_elsewhere(config, workdir, problem, seed, settings):
  """Evaluates a finished run on a problem of TRANSFER, into WORKDIR/transfer/PROBLEM."""
  folder = transfer_folder(workdir, problem)
  if not (folder / "results.json").exists():
    print(folder, file=sys.stderr, flush=True)
    run_command("evaluate", config, workdir, seed, settings | TRANSFER[problem][0],
                f"--out={folder}")


def transfer_folder(workdir, problem):
  return workdir / "transfer" / folder_name(problem)


def run_command(name, config, workdir, seed, settings, *words, **options):
  command = [sys.executable, "-m", f"ares_jax.{name}", f"--config={config}",
             f"--workdir={workdir}", f"--config.seed={seed}", *words,
             *[f"--config.{key}={value}" for key, value in settings.items()]]
  with open(f"{workdir}.log", "ab") as log:
    subprocess.run(command, check=True, stdout=log, stderr=log, **options)


def finished_runs(options, arms, seeds):
  """{arm: {seed: folder}} of the runs that are finished."""
  return {arm: {seed: folder for seed in seeds
                if ((folder := options.workdir / options.experiment / str(seed)
                     / folder_name(arm)) / "done.json").exists()} for arm in arms}


def tables(options, baseline, arms, seeds):
  """Two Markdown tables of the finished seeds: in all, and by level."""
  arms = dict.fromkeys((*map(baseline, arms), *arms))
  finished = {arm: {seed: _result(folder) for seed, folder in by_seed.items()}
              for arm, by_seed in finished_runs(options, arms, seeds).items()}
  levels = sorted({level for by_seed in finished.values() for one in by_seed.values()
                   for level in one["level"]}, key=float)
  overall = {
    "temperature 1": lambda one: 100 * one["sampled"]["accuracy"],
    "greedy": lambda one: 100 * one["greedy"]["accuracy"],
    "pass@8": lambda one: 100 * one["sampled"]["pass_at_k"],
    "tokens": lambda one: one["sampled"]["length"],
    "shaped, %": lambda one: 100 * one["shaped"],
    "last fifth": lambda one: 100 * one["last_fifth"]}
  by_level = {f"{name}, {level}": functools.partial(value, level) for level in levels
              for name, value in {
    "right": lambda level, one: 100 * one["level"][level]["accuracy"],
    "tokens": lambda level, one: one["level"][level]["length"],
    "direct": lambda level, one: 100 * one["level"][level]["modes"].get("direct", 0),
    "check": lambda level, one: 100 * one["level"][level]["modes"].get("check", 0)}.items()}
  return "\n".join([
    *_paired_table(finished, baseline, overall), "", *_paired_table(finished, baseline, by_level),
    "", PAIRED, "\"shaped\" is the mean change of the advantages by the entropy term, over their "
    "mean size without it, \"last fifth\" the accuracy on training problems in the last fifth of "
    "the iterations less that in the fifth before, in points."])


def transfer_table(options, baseline, arms, seeds):
  """A Markdown table of the finished evaluations on the problems of TRANSFER."""
  arms = dict.fromkeys((*map(baseline, arms), *arms))
  finished = {arm: {seed: _levels_elsewhere(folder) for seed, folder in by_seed.items()
                    if all((transfer_folder(folder, problem) / "results.json").exists()
                           for problem in TRANSFER)}
              for arm, by_seed in finished_runs(options, arms, seeds).items()}

  def mean(problem, key, scale, one):
    return scale * np.mean([one[problem][level][key] for level in TRANSFER[problem][1]])

  columns = {f"{problem}: {name}": functools.partial(mean, problem, key, scale)
             for problem in TRANSFER for name, key, scale in (
               ("right", "accuracy", 100), ("tokens", "length_mean", 1))}
  return "\n".join([*_paired_table(finished, baseline, columns), "", PAIRED])


def _levels_elsewhere(folder):
  """{problem: {level: scores}} of a run's evaluations on the problems of TRANSFER."""
  return {problem: json.loads((transfer_folder(folder, problem) / "results.json").read_text())[
    "by_level"] for problem in TRANSFER}


PAIRED = ("Means over seeds; in brackets the difference to the experiment's baseline, paired by "
          "seed, with its 95% t-interval.")


def _paired_table(finished, baseline, columns):
  """Lines of a table: `finished` is {arm: {seed: result}}, `columns` {name: value of a result}."""
  rows = [[arm, len(by_seed), *(_cell(value, by_seed, finished[baseline(arm)])
                                for value in columns.values())]
          for arm, by_seed in finished.items()]
  return markdown_table(["arm", "seeds", *columns], rows)


def _result(folder):
  """The evaluation after AEPO, and two numbers of its iterations.

  "shaped" is the mean of `reward/shaped_size`, "last_fifth" the accuracy on training problems in
  the last fifth of the iterations less that in the fifth before.
  """
  lines = [line for line in map(json.loads, (folder / "metrics.jsonl").open())
           if "reward/shaped_size" in line]
  accuracies = [line["reward/accuracy"] for line in lines]
  fifth = len(lines) // 5
  return json.loads((folder / "done.json").read_text())["aepo"] | {
    "shaped": np.mean([line["reward/shaped_size"] for line in lines
                       if line["reward/shaped_size"] is not None]),
    "last_fifth": np.mean(accuracies[-fifth:]) - np.mean(accuracies[-2 * fifth:-fifth])}


def _cell(value, by_seed, reference):
  if not by_seed:
    return "-"
  text = f"{np.mean([value(one) for one in by_seed.values()]):.1f}"
  differences = [value(one) - value(reference[seed]) for seed, one in by_seed.items()
                 if seed in reference]
  if len(differences) > 1 and by_seed is not reference:
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    text += f" ({np.mean(differences):+.1f} ± {half:.1f})"
  return text


if __name__ == "__main__":
  main()
