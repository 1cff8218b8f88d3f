"""Our grader beside math-verify alone and mathruler, on published pairs and on attacks.

    ARES_PUBLIC_FILES=../shared/public python -m tests.bench.grade_public [--out=verdicts.jsonl]

The pairs are grader_pairs (labels of eight projects) and verdicts_mathvision (labels of a script of
MathVision's authors, from answers without spaces). Every grader gets the accepted texts: where a
row has options, the letter and the text of the right one; ours gets the options and, for the
attacks of tests/grading/attacks.jsonl, the question too. A verdict is made in a worker that is
ended after 5 s and counts as wrong then, with 5 s of CPU time. --out keeps the verdicts, so that
two versions can be compared line by line. Our grader keeps normalised texts and parsed formulas, as
in training, where a group of answers shares a truth; here a third of the formulas of grader_pairs
and most of MathVision's are parsed once for several pairs.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import time

import pebble

from ares_jax.grading import sandbox
from ares_jax.grading.answer import Truth, same_answer

LIMIT = 5.0  # seconds a verdict
ATTACKS = pathlib.Path(__file__).parents[1] / "grading" / "attacks.jsonl"


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="file for the verdicts")
  parser.add_argument("--every", type=int, default=1, help="grade every n-th pair only")
  options = parser.parse_args()
  sets = {name: pairs[::options.every] for name, pairs in read_sets().items()}
  kept = []
  print("| pairs | grader | right | accuracy | false accepts | false rejects | CPU ms a pair |")
  print("| --- | --- | --- | --- | --- | --- | --- |")
  for name, pairs in sets.items():
    for grader in GRADERS:
      verdicts = grade(grader, pairs)
      counts = collections.Counter((label, said) for (_, _, label), (said, _) in
                                   zip(pairs, verdicts, strict=True))
      right = counts[True, True] + counts[False, False]
      cpu = 1000 * sum(seconds for _, seconds in verdicts) / len(pairs)
      print(f"| {name}, {len(pairs)} | {grader} | {right} | {right / len(pairs):.1%} | "
            f"{counts[False, True]} | {counts[True, False]} | {cpu:.2f} |", flush=True)
      kept += [{"set": name, "grader": grader, "answer": answer, "truth": truth.accepted,
                "label": label, "verdict": said}
               for (answer, truth, label), (said, _) in zip(pairs, verdicts, strict=True)]
  if options.out:
    pathlib.Path(options.out).write_text("".join(json.dumps(line) + "\n" for line in kept),
                                         encoding="utf-8")


def read_sets():
  """{name: [(answer, Truth, label)]} of the published pairs and of the attacks."""
  folder = pathlib.Path(os.environ["ARES_PUBLIC_FILES"])
  pairs = [(row["answer"], Truth.of({"answer": row["gold"]}), row["equal"])
           for row in _lines(folder / "grader_pairs" / "pairs.jsonl")]
  verdicts = []
  for row in _lines(folder / "verdicts_mathvision" / "verdicts.jsonl"):
    accepted, options = [row["answer"]], row["options"]
    if options:
      text = options["ABCDE".index(row["answer"])]
      accepted += [text] * (len(text) > 1)
    verdicts.append((row["model_answer"], Truth.of({"answer": accepted, "options": options}),
                     row["correct"]))
  attacks = [(row["answer"], Truth.of({**row, "answer": row["truth"]}), False)
             for row in _lines(ATTACKS)]
  return {"grader_pairs": pairs, "verdicts_mathvision": verdicts, "attacks": attacks}


def _lines(path):
  with open(path, encoding="utf-8") as lines:
    return [json.loads(line) for line in lines]


def grade(grader, pairs):
  """[(verdict, CPU seconds)] of pairs."""
  verdicts = []
  with sandbox.make_pool(1, "ares_jax.grading.parsers") as pool:
    for start in range(0, len(pairs), 64):
      chunk = pairs[start : start + 64]
      futures = [pool.schedule(_timed, args=[grader, answer, truth], timeout=LIMIT)
                 for answer, truth, _ in chunk]
      for future in futures:
        try:
          verdicts.append(future.result())
        except (concurrent.futures.TimeoutError, pebble.ProcessExpired, MemoryError):
          verdicts.append((False, LIMIT))
  return verdicts


def _timed(grader, answer, truth):
  began = time.process_time()
  try:
    verdict = bool(answer) and bool(GRADERS[grader](answer, truth))
  except Exception:  # as a wrong answer, in all of them
    verdict = False
  return verdict, time.process_time() - began


def _math_verify(answer, truth):
  from math_verify import parse, verify

  said = parse(f"${answer}$", parsing_timeout=None)
  return any(verify(parse(f"${text}$", parsing_timeout=None), said, timeout_seconds=None)
             for text in truth.texts)


def _mathruler(answer, truth):
  from mathruler.grader import grade_answer

  return any(grade_answer(answer, text) for text in truth.texts)


GRADERS = {"ours": same_answer, "math-verify alone": _math_verify, "mathruler": _mathruler}


if __name__ == "__main__":
  from tests.bench import grade_public  # its workers do not import __main__

  grade_public.main()
