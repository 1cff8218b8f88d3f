"""Prints what a folder of run.sh has so far, as Markdown tables; "-" is not measured yet.

    python examples/smollm2/table.py FOLDER
"""

import json
import pathlib
import sys

# Name, folder of its run, stage of results.json; the published model has no stage.
ROWS = (("published", "base", None), ("warm-up", "cold", "warmup"), ("AdaCS", "cold", "adacs"),
        ("AEPO", "aepo", "aepo"), ("GRPO", "grpo", "aepo"))
BUCKETS = ("easy", "medium", "hard")
# Of stage 2, the mean over its first and over its last iterations: metrics of metrics.jsonl.
COURSE = ("reward/accuracy", "response/tokens", "response/entropy", "hwe/share", "kl/mean",
          *(f"{name}/{bucket}" for name in ("hwe/multiplier", "kl/kappa") for bucket in BUCKETS))
SHOWN = 5  # iterations of each end


def main(folder):
  folder = pathlib.Path(folder)
  print(accuracy(folder))
  print("\n" + seconds(folder))
  print("\n" + course(folder))


def accuracy(folder):
  """Accuracy with 95% intervals, and sampled tokens of SVAMP by difficulty."""
  rows = []
  for name, run, stage in ROWS:
    result = read(folder / run / "results.json").get(stage, {})
    last = stage in (None, "aepo") or name == "AdaCS"
    gsm8k = published(folder / run, "file_gsm8k_test") if last else "-"
    greedy, sampled = share(result.get("greedy")), share(result.get("sampled"))
    if stage is None:
      greedy, sampled = (published(folder / run, name) for name in ("file_svamp_test", "test"))
    buckets = [result.get("bucket", {}).get(bucket) for bucket in BUCKETS]
    rows.append([name, greedy, sampled, gsm8k,
                 *(f"{part['n']} / {part['length']:.0f}" if part and part["n"] else "-"
                   for part in buckets)])
  return table(["weights", "SVAMP greedy", "temperature 1", "GSM8K greedy",
                *(f"{bucket}: problems / tokens" for bucket in BUCKETS)], rows)


def published(run, benchmark):
  """The accuracy that an evaluation wrote."""
  result = read(run / "evaluate" / benchmark / "results.json")
  return f"{result['score']:.1%} ± {100 * result['score_half_width']:.1f}" if result else "-"


def share(part):
  return f"{part['accuracy']:.1%} ± {100 * part['interval']:.1f}" if part else "-"


def seconds(folder):
  """Finished steps and seconds of each stage, by phase."""
  phases, rows = ("data", "rollout", "grading", "update", "step"), []
  for name, run, stage in ROWS[1:]:
    lines = metrics(folder / run, stage)
    rows.append([name, str(len(lines)), *(
      f"{sum(line[f'seconds/{phase}'] for line in lines):.0f}"
      if lines and f"seconds/{phase}" in lines[0] else "-" for phase in phases)])
  return table(["stage", "steps", *(f"s {phase}" for phase in phases)], rows)


def course(folder):
  """Means of the first and the last iterations of stage 2, by arm."""
  arms = [(name, metrics(folder / run, stage)) for name, run, stage in ROWS[-2:]]

  def mean(lines, key):
    known = [line[key] for line in lines if line.get(key) is not None]
    return f"{sum(known) / len(known):.3g}" if known else "-"

  head = [f"{name} {end} {SHOWN} of {len(lines)}" for name, lines in arms
          for end in ("first", "last")]
  return table(["mean of iterations", *head],
               [[f"`{key}`", *(mean(part, key) for _, lines in arms
                               for part in (lines[:SHOWN], lines[-SHOWN:]))] for key in COURSE])


def metrics(run, stage):
  """The lines of a stage; of a step that was done twice the last one."""
  path = run / "metrics.jsonl"
  lines = map(json.loads, path.read_text("utf-8").splitlines()) if path.is_file() else ()
  return list({line["step"]: line for line in lines if line["stage"] == stage}.values())


def read(path):
  return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def table(head, rows):
  return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
  main(*sys.argv[1:])
