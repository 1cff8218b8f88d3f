"""The paper's table 4 in small: cold starts and what reinforcement learning makes of each.

    python -m tests.bench.table4 --workdir=runs/table4 --seeds=0,1,2 [--ablations]

For every seed one warm-up is shared by all arms; then vanilla and AdaCS cold starts, AEPO from
each, and from vanilla GRPO with the same seeds, and as much more supervised training as AEPO took
time (on its own longer schedule, from the warm-up on). Everything is a run of `ares_jax.train` with
configs/ares_tiny.py and a few switches. Finished runs in WORKDIR are not repeated. Prints a
Markdown table.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np

from ares_jax.run.recipe import PRESETS

GRPO, DAPO = ([f"{key}={value}" for key, value in PRESETS[name].items()]
              for name in ("grpo", "dapo"))
ABLATIONS = {
  "DAPO": DAPO,
  # DAPO's filtering of groups whose answers are all right or all wrong, for AEPO.
  "AEPO, groups filtered": ["aepo.filter.batches=20"],
  "entropy shaping only": ["aepo.kl.dynamic=False"],
  "dynamic KL only": ["aepo.reward.kind=accuracy"],
  # Where correct or all-wrong groups carry a reward of their own, their advantage must count.
  "release reward": ["aepo.reward.kind=release", "aepo.loss.equal_groups=normalize",
                     "aepo.reward.target_scale=(1.0,1.0,1.0)"],
  "penalize all": ["aepo.reward.penalize=all", "aepo.loss.equal_groups=normalize"],
}


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", default="runs/table4")
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--ablations", action="store_true", help="also the parts of AEPO")
  options = parser.parse_args()
  workdir, rows = pathlib.Path(options.workdir), {}

  def add(name, result):
    rows.setdefault(name, []).append(result)

  for seed in options.seeds.split(","):
    base = workdir / seed
    vanilla = train(base / "vanilla", seed, ["curate.selection=vanilla"])
    adacs = train(base / "adacs", seed, [], base / "vanilla", ["warmup"])
    start = ["warmup", "adacs", "curation.json"]
    add("warm-up", vanilla["warmup"])
    add("vanilla", vanilla["adacs"])
    add("AdaCS", adacs["adacs"])
    add("vanilla + GRPO", train(base / "vanilla_grpo", seed, ["curate.selection=vanilla", *GRPO],
                                base / "vanilla", start)["aepo"])
    add("vanilla + AEPO", vanilla["aepo"])
    add("vanilla + more SFT", more_sft(base, seed, vanilla)["adacs"])
    add("AdaCS + AEPO", adacs["aepo"])
    for name, switches in ABLATIONS.items() if options.ablations else ():
      result = train(base / name.replace(",", "").replace(" ", "_"), seed,
                     ["curate.selection=vanilla", *switches], base / "vanilla", start)
      add(f"vanilla + {name}", result["aepo"])
  print(markdown(rows))


def train(workdir, seed, switches, start=None, stages=()):
  """results.json of a run, which begins with the named finished stages of another."""
  done = workdir / "done.json"
  if not done.exists():
    if start and not (workdir / "results.json").exists():
      shutil.rmtree(workdir, ignore_errors=True)  # a copy that was cut off
      workdir.mkdir(parents=True)
      for stage in stages:
        copy = shutil.copytree if (start / stage).is_dir() else shutil.copy
        copy(start / stage, workdir / stage)
      results = json.loads((start / "results.json").read_text())
      kept = {stage: results[stage] for stage in stages if stage in results}
      (workdir / "results.json").write_text(json.dumps(kept))
    command = [sys.executable, "-m", "ares_jax.train", "--config=configs/ares_tiny.py",
               f"--workdir={workdir}", f"--config.seed={seed}",
               *[f"--config.{switch}" for switch in switches]]
    print(" ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.copy(workdir / "results.json", done)
  return json.loads(done.read_text())


def more_sft(base, seed, vanilla):
  """Vanilla fine-tuning for as many more seconds as AEPO's rollouts, grading and updates took."""
  lines = [json.loads(line) for line in (base / "vanilla" / "metrics.jsonl").open()]
  seconds = [line["seconds/step"] for line in lines if line["stage"] == "adacs"]
  # The first step holds the compilation.
  steps = len(seconds) + round(sum(line["seconds/step"] for line in lines
                                   if line["stage"] == "aepo") / np.median(seconds[1:]))
  switches = ["curate.selection=vanilla", "aepo.steps=0", f"adacs.steps={steps}"]
  return train(base / "more_sft", seed, switches, base / "vanilla", ["warmup", "curation.json"])


def markdown(rows):
  levels = list(next(iter(rows.values()))[0]["level"])
  head = ["arm", "greedy", "temperature 1", "pass@8", "format", "tokens", "with working"]
  head += [f"level {level}: acc. / tokens / working" for level in levels]
  lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
  for name, results in rows.items():
    cells = [name, spread(results, lambda r: 100 * r["greedy"]["accuracy"])]
    cells += [spread(results, lambda r, k=key, f=factor: f * r["sampled"][k])
              for key, factor in (("accuracy", 100), ("pass_at_k", 100), ("format_ok", 100),
                                  ("length", 1), ("shows_work", 100))]
    for level in levels:
      parts = [result["level"][level] for result in results]
      cells.append(f"{100 * mean(parts, 'accuracy'):.0f}% / {mean(parts, 'length'):.1f} / "
                   f"{100 * mean(parts, 'shows_work'):.0f}%")
    lines.append("| " + " | ".join(cells) + " |")
  seeds = len(next(iter(rows.values())))
  first = next(iter(rows.values()))[0]
  lines.append(f"\nMean ± standard deviation over {seeds} seeds; {first['n']} held-out problems x "
               f"{first['samples']} samples each.")
  return "\n".join(lines)


def mean(parts, key):
  return np.mean([part[key] for part in parts])


def spread(results, value):
  values = [value(result) for result in results]
  deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
  return f"{np.mean(values):.1f}{deviation}"


if __name__ == "__main__":
  main()
