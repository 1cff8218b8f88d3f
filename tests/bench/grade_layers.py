"""What each layer of the grader decides: the verdicts that change without it.

    ARES_PUBLIC_FILES=../shared/public python -m tests.bench.grade_layers

Counts are of right verdicts that become wrong: on the published pairs of tests.bench.grade_public,
on the pairs of tests/grading that were judged by hand, and on its attacks, which are accepted then.
Verdicts that become right are printed with a minus. Layers overlap: without its rule, a formula may
still be the truth as it is written.
"""

import contextlib
import functools
import re
import signal
from unittest import mock

from ares_jax.grading import answer, formula, notation, option, quantity, rewrite, words
from tests.bench import grade_public
from tests.grading import answer_test

_NEVER = re.compile("(?!)()()()")  # with as many groups as any pattern that it stands for


def without(module, name, value):
  return mock.patch.object(module, name, value)


def without_rule(rule):
  """The rules of answer.py but one, which is named by its function."""
  table = next(name for name in ("_RULES", "_RULES_FOR_COMPLETE_TEXTS")
               if rule in getattr(answer, name))
  return without(answer, table, tuple(each for each in getattr(answer, table) if each != rule))


def layers():
  """[(what a layer reads, context in which it does nothing)]"""
  return [
    ("characters: √, π, ², full width", without(notation, "with_plain_characters", str)),
    (r"delimiters: $x$, \(x\)", without(notation, "_without_delimiters", str)),
    (r"\boxed{x} in the answer or truth", without(notation, "_unbox", str)),
    (r"\text{x}, \mathrm{x}", without(notation, "_TEXT", _NEVER)),
    (r"commands: \dfrac, \left, \leq", without(notation, "_SAME_COMMANDS", {})),
    (r"other writings: 10{,}236, ^\circ, {cm}", without(notation, "_WRITINGS", ())),
    ("x}. The answer is x", without(notation, "_said_once", str)),
    ("2或3, 2、3", without(notation, "_CHINESE_WORD", _NEVER)),
    ("2, 3, ...", without(notation, "_ELLIPSIS", _NEVER)),
    ("the row's options", without(option, "choices", lambda *_: option.Choices({}, set(), False))),
    ("The answer is B", without(option, "ANNOUNCED", _NEVER)),
    ("A, 12 or 12 (A)", without(option.Choices, "with_letter", lambda *_: None)),
    ("A, C", without_rule(answer._same_letters)),
    ("A. 12 where no options are known", without_rule(answer._same_behind_letter)),
    ("Yes, it is", without_rule(answer._same_yes_no)),
    ("2516_8", without_rule(answer._same_in_base)),
    ("9 + 9 = 18", without_rule(answer._same_chain)),
    ("-2 < x < 7 and (-2, 7)", without(rewrite, "_as_intervals", lambda *pair: pair)),
    ("seventy-two, about 72", without(words, "spell_numbers", str)),
    ("x = 5, Area = 5", without(rewrite, "_without_name", lambda said, wanted, _: (said, wanted))),
    ("3:1, 3 to 1", without(rewrite, "_RATIO", _NEVER)),
    ("numbers: 0.5, 1/2, 50%", without_rule(answer._same_quantity)),
    ("units: 5 cm, 0.05 m", without(quantity, "_find_unit", lambda _: None)),
    ("4 + 4 for 8", without_rule(answer._leaves_arithmetic)),
    ("sets, tuples, intervals, matrices", without_rule(answer._same_collection)),
    ("words", without_rule(answer._same_words)),
    ("formulas", without_rule(answer._same_formula)),
    ("the question restated", without(answer, "restates", lambda *_: False)),
  ]


def main():
  sets = grade_public.read_sets()
  pairs = {"published": sets["grader_pairs"] + sets["verdicts_mathvision"],
           "judged by hand": [
             (pair["answer"], answer.Truth.of({"answer": pair["truth"], **{
               "question": pair.get("question")}}), pair["same"]) for pair in answer_test.PAIRS],
           "attacks": sets["attacks"]}
  full = {name: verdicts(some) for name, some in pairs.items()}
  print(f"| layer | {' | '.join(f'{name}, {len(some)}' for name, some in pairs.items())} |")
  print("| --- | --- | --- | --- |")
  for name, context in layers():
    with context:
      cells = [change(pairs[each], full[each], verdicts(pairs[each])) for each in pairs]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def change(pairs, before, after):
  """How many right verdicts become wrong, and with a minus how many wrong ones right."""
  changed = [was == label for (_, _, label), was, now in zip(pairs, before, after, strict=True)
             if was != now]
  worse, better = sum(changed), len(changed) - sum(changed)
  return f"{worse}{f', -{better}' if better else ''}"


def verdicts(pairs):
  """The grader's verdicts, without what it remembers of other layers."""
  notation.normalise.cache_clear()
  notation.tight.cache_clear()
  found = {pair[:2]: bool(pair[0]) and answer.same_answer(*pair[:2], symbolic=_same_formula)
           for pair in dict.fromkeys(pairs)}
  return [found[pair[:2]] for pair in pairs]


@functools.cache
def _same_formula(said, wanted):
  """The verdict of formula.py, within 5 s of CPU."""
  def stop(*_):
    raise TimeoutError

  signal.signal(signal.SIGVTALRM, stop)
  signal.setitimer(signal.ITIMER_VIRTUAL, grade_public.LIMIT)
  try:
    with contextlib.suppress(Exception):  # as a wrong answer
      return formula.same_formula(said, wanted)
  finally:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
  return False


if __name__ == "__main__":
  main()
