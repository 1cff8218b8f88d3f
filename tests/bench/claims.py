"""Experiments on the method's claims; benchmarks.md registers them before they run.

    python -m tests.bench.claims a --seeds=0,1,2,3,4,5,6,7,8,9 --jobs=2
    python -m tests.bench.claims a --table
    python -m tests.bench.claims a --transfer --table

Every arm of a seed starts from the same warm-up and cold start (WORKDIR/start/SEED; those of b,
whose problem differs, are in WORKDIR/second_look/SEED). Each run is on one core. A run that was
stopped goes on where it was; finished ones are not repeated. --table prints what is finished.
With it, --picture=FILE.png draws the levels. --transfer evaluates the finished runs, one after the
other on all cores, on problems that they were not trained on.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import os
import pathlib
import queue
import shutil
import subprocess
import sys

from ares_jax.run.recipe import PRESETS
from ares_jax.system.figures import save_png
from tests.bench.claims_tables import level_figure, result_tables, transfer_table

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
  "levels 6 to 8": ({"data.digits.problem.levels": 8, "prompt.max_tokens": (38,),
                     "aepo.sampling.max_tokens": 120}, "678"),  # a check has 82 tokens
  "noise 0.1": ({"data.digits.problem.noise": 0.1}, "12345"),
  "+ and -": ({"data.digits.problem.operators": ("+", "-")}, "2345")}

# Longer chains with smudged cells, whose copies a second pass reads (docs/digits.md). All kinds of
# traces are frequent at all levels, so that stage 2 can choose between them.
SECOND_LOOK = {
  "data.digits.problem.levels": 8, "data.digits.problem.smudge": 0.3,
  "data.digits.problem.keys": (3, 7), "warmup.steps": 4000,
  "data.digits.teacher.captions": (0.8, 0.0), "data.digits.teacher.drills": (0.8, 0.3),
  "data.digits.teacher.first_captions": 0.05, "data.digits.teacher.first_drills": 0.125,
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
  parser.add_argument("--picture", help="with --table: a PNG of the differences by level")
  parser.add_argument("--transfer", action="store_true", help="evaluate what is finished elsewhere")
  options = parser.parse_args()
  experiment = EXPERIMENTS[options.experiment]
  chosen = options.arms.split(";") if options.arms else list(experiment.arms)
  unknown = set(chosen) - set(experiment.arms)
  if unknown:
    parser.error(f"no arm {', '.join(sorted(unknown))}; there are {'; '.join(experiment.arms)}")
  seeds = [int(seed) for seed in options.seeds.split(",")]
  if options.table:
    shown = dict.fromkeys((*map(experiment.baseline, chosen), *chosen))
    runs = finished_runs(options, shown, seeds)
    if options.transfer:
      print(transfer_table(runs, experiment.baseline, {
        problem: (folder_name(problem), levels) for problem, (_, levels) in TRANSFER.items()}))
    else:
      print(result_tables(runs, experiment.baseline))
    if options.picture:
      save_png(level_figure(runs, experiment.baseline), options.picture)
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
    # one seed ahead, so that later arms do not wait for theirs.
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
  folder = workdir / "transfer" / folder_name(problem)
  if not (folder / "results.json").exists():
    print(folder, file=sys.stderr, flush=True)
    run_command("evaluate", config, workdir, seed, settings | TRANSFER[problem][0],
                f"--out={folder}")


def run_command(name, config, workdir, seed, settings, *words, **options):
  command = [sys.executable, "-m", f"ares_jax.{name}", f"--config={config}",
             f"--workdir={workdir}", f"--config.seed={seed}", *words,
             *[f"--config.{key}={value}" for key, value in settings.items()]]
  with open(f"{workdir}.log", "ab") as log:
    subprocess.run(command, check=True, stdout=log, stderr=log, **options)


def finished_runs(options, arms, seeds):
  """{arm: {seed: folder}} of the runs that are finished."""
  found = {arm: {seed: options.workdir / options.experiment / str(seed) / folder_name(arm)
                 for seed in seeds} for arm in arms}
  return {arm: {seed: folder for seed, folder in by_seed.items() if (folder / "done.json").exists()}
          for arm, by_seed in found.items()}


if __name__ == "__main__":
  main()
