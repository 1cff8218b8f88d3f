"""How fast answers are graded: 4096 ordinary ones, as a batch of 512 prompts x 8 has them.

    python -m tests.bench.grade [--workers=2] [--grader=layered]

Half are numbers, a quarter options, words and lists, a quarter formulas that need a worker; of the
8 answers to a prompt, 5 say the same in the same words. Workers are started before the clock.
"""

import argparse
import statistics
import time

from ares_jax.grading.pool import GradingPool


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--grader", default="layered")
  options = parser.parse_args()
  seconds = []
  for repeat in range(3):
    texts, truths = batch(repeat)
    with GradingPool(options.workers, 2.0, grader=options.grader) as pool:
      pool.grade([r"\boxed{x+1}"] * options.workers, [f"1+{n}+x" for n in range(options.workers)])
      began = time.perf_counter()
      correct, _, timed_out = pool.grade(texts, truths)
      seconds.append(time.perf_counter() - began)
  print(f"{len(texts)} answers, {options.workers} workers, {options.grader}: median "
        f"{statistics.median(seconds):.2f} s of 3 (from {min(seconds):.2f} to {max(seconds):.2f}), "
        f"{correct.mean():.0%} right, {timed_out} timed out")


def batch(seed):
  """(texts, truths) of 512 prompts x 8."""
  texts, truths = [], []
  for prompt in range(512):
    number = 1000 * seed + prompt
    truth, right, wrong = (
      (str(number), f"{number}.0", "{0}1"),
      (f"{number} cm", f"{number} \\text{{ cm}}", "{0}2 cm"),
      ("ABCD"[prompt % 4], f"({'ABCD'[prompt % 4]}) {number}", "E. {0}"),
      (f"{number}\\sqrt{{3}}", f"\\sqrt{{3}} \\cdot {number}", "{0}\\sqrt{{{{2}}}}"),
    )[prompt % 4]
    working = "<think> " + "we add the two angles and find " * 200 + "</think> "
    for sample in range(8):
      said = right if sample < 5 else wrong.format(f"{number}{sample}").replace("{{", "{").replace(
        "}}", "}")
      texts.append(f"{working}\\boxed{{{said}}}")
      truths.append(truth)
  return texts, truths


if __name__ == "__main__":
  main()
