"""The teacher of the digits problem: its traces, and the rows of the warm-up and of the cold start.

The teacher writes three kinds of traces (digits.KINDS): direct, without working; stepwise, with
every digit read and every partial sum; and check, which is stepwise and then a second pass after
"wait check". It may slip in a sum and correct itself after "wait".

Where cells are smudged, it takes one of the two digits at random, so direct and stepwise traces may
end in a wrong answer. The second pass reads the copies of the cells and takes the key off:
"red8 =5" with the key 3. Its answer is right.
"""

import dataclasses

import numpy as np

from ares_jax.data.digits import KINDS, DigitsSource, encipher, partial_sums, question
from ares_jax.system.config import optional


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
  """How the teacher writes traces; triples are shares of direct, stepwise and check traces."""

  slip: float  # probability that a partial sum is first written wrong
  responses: int  # traces of each problem, for AdaCS to select from
  first_level: tuple[float, float, float]  # of kinds at level 1
  last_level: tuple[float, float, float]  # at the highest level; levels between are interpolated
  first_warmup: tuple[float, float, float]  # the same in the warm-up
  last_warmup: tuple[float, float, float]
  captions: tuple[float, float]  # share of warm-up rows that read cells; at the start, the end
  drills: tuple[float, float]  # share of the others without a picture, digits in the question
  # Shares of the warm-up at its beginning: first captions alone, then drills alone, both of the
  # problem without copies and smudges.
  first_captions: float = optional(0.0)
  first_drills: float = optional(0.0)
  varied: bool = optional(False)  # captions of three kinds, drills with small digits too
  # Share of smudged cells in the rest of the warm-up, at every level; 0 = those of the problem.
  # With few smudged cells the model learns to copy its first look, which is then mostly right.
  warmup_smudge: float = optional(0.0)

  def __post_init__(self):
    for name in ("first_level", "last_level", "first_warmup", "last_warmup"):
      shares = getattr(self, name)
      if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"{name} = {shares}: shares of {KINDS} must be >= 0 and add up to 1")
    shares = (self.slip, *self.captions, *self.drills, self.first_captions,
              self.first_drills, self.warmup_smudge)
    if self.responses < 1 or not all(0 <= share <= 1 for share in shares):
      raise ValueError(f"responses = {self.responses} must be >= 1, slip = {self.slip}, captions = "
                       f"{self.captions}, drills = {self.drills}, first_captions = "
                       f"{self.first_captions}, first_drills = {self.first_drills} and "
                       f"warmup_smudge = {self.warmup_smudge} in 0..1")


@dataclasses.dataclass(frozen=True)
class WarmupSource:
  """Rows that teach an untrained model to read and to add; their order matters.

  Captions, most of which name four digits each, and drills, which hold four sums each, become
  fewer and traces more. In this order reading was learnt in about 150 steps of 64 rows; with a
  quarter of captions throughout, one run had not learnt it after 1,200 steps of 32. Without drills
  some seeds did not learn sums, and in the mixture alone one of ten did not. So reading and then
  sums are learnt first, from `first_captions` and `first_drills`. In the other order reading was
  not learnt in 200 steps.
  """

  problems: DigitsSource
  teacher: TeacherConfig

  def __len__(self):
    return len(self.problems)

  def __getitem__(self, index):
    teacher, progress = self.teacher, index / max(len(self) - 1, 1)
    rng = np.random.default_rng([self.problems.seed, 2, index])
    plain = dataclasses.replace(self.problems, config=dataclasses.replace(
      self.problems.config, smudge=0.0))
    if index < teacher.first_captions * len(self):
      return self._caption(plain[index], rng)
    if index < (teacher.first_captions + teacher.first_drills) * len(self):
      return self._drill(plain, plain[index], rng)
    row = dataclasses.replace(self.problems, smudged=teacher.warmup_smudge or None)[index]
    if rng.random() < np.interp(progress, [0, 1], teacher.captions):
      return self._caption(row, rng)
    if rng.random() < np.interp(progress, [0, 1], teacher.drills):
      return self._drill(self.problems, row, rng)
    shares = _shares(teacher.first_warmup, teacher.last_warmup, row, self.problems)
    kind = KINDS[rng.choice(3, p=shares)]
    return row | {"response": trace(row, kind, slip=teacher.slip, rng=rng)}

  def _caption(self, row, rng):
    text, response = caption(row, rng, varied=self.teacher.varied)
    return row | {"question": text, "response": response}

  def _drill(self, problems, row, rng):
    text, response = drill(row, problems.config, self.teacher.slip, rng,
                           varied=self.teacher.varied)
    return row | {"question": text, "images": [], "response": response}


@dataclasses.dataclass(frozen=True)
class Teacher:
  """Rows with `responses`, traces for AdaCS to select from."""

  problems: DigitsSource
  teacher: TeacherConfig

  def __len__(self):
    return len(self.problems)

  def __getitem__(self, index):
    row, rng = self.problems[index], np.random.default_rng([self.problems.seed, 3, index])
    shares = _shares(self.teacher.first_level, self.teacher.last_level, row, self.problems)
    kinds = rng.choice(3, self.teacher.responses, p=shares)
    return row | {"responses": [trace(row, KINDS[kind], slip=self.teacher.slip, rng=rng)
                                for kind in kinds]}


def _shares(first, last, row, problems):
  """Shares of KINDS at the level of a row, between those of the first and the last level."""
  height = (row["level"] - 1) / max(problems.config.levels - 1, 1)
  return (1 - height) * np.array(first) + height * np.array(last)


def trace(row, kind, *, slip, rng):
  """A teacher's response to `row`, of one of KINDS.

  `slip` is the probability that a partial sum is first written wrong, then corrected.
  """
  if kind not in KINDS:
    raise ValueError(f"kind {kind!r} is not one of {KINDS}")
  seen = _first_look(row, rng)
  seen = [seen.get(colour, digit)
          for colour, digit in zip(row["colours"], row["digits"], strict=True)]
  working, answer = "", str(partial_sums(seen, row["operators"])[-1])
  if kind != "direct":
    working += _steps(row, seen, slip, rng)
  if kind == "check":
    working += " wait check" + _steps(row, row["digits"], slip, rng, row.get("key"))
    answer = row["answer"]
  return f"<think>{working} </think> \\boxed{{{answer}}}"


def _first_look(row, rng):
  """{colour: digit} of the smudged cells, as one looks first."""
  cells = dict(row["cells"])
  return {colour: cells[colour] if rng.random() < 0.5 else other
          for colour, other in row.get("smudges", {}).items()}


def _steps(row, digits, slip, rng, key=None):
  """All readings and partial sums; with a key the readings of the copies."""
  terms = [_reading(*term, key) for term in zip(row["colours"], digits, strict=True)]
  sums = partial_sums(digits, row["operators"])
  text = terms[0]
  for step in range(1, len(sums)):
    text += f" {row['operators'][step]}{terms[step]} ="
    if rng.random() < slip:
      text += f"{(sums[step] + rng.integers(1, 10)) % 10} wait"
    text += f"{sums[step]}"
  return text


def _reading(colour, digit, key):
  return f" {colour}{digit}" if key is None else f" {colour}{encipher(digit, key)} ={digit}"


def caption(row, rng, *, varied):
  """(question, response) that reads cells: "Describe" names all in any order, then their copies.

  If `varied`, a third does so in the order asked, "Describe red + blue", which teaches to copy
  colours from the question. Another third is a problem of one cell and its direct answer, which
  teaches to read without naming. Where traces alone taught these two, some runs did not learn them.
  """
  cells = [row["cells"][cell] for cell in rng.permutation(len(row["cells"]))]
  seen, key = _first_look(row, rng), row.get("key")
  kind = rng.integers(3) if varied else 2
  if kind == 0:
    name, digit = cells[0]
    return question([name], ["+"], key), f"<think> </think> \\boxed{{{seen.get(name, digit)}}}"
  asked = "Describe" + (" +".join(f" {name}" for name, _ in cells) if kind == 1 else "")
  text = "".join(_reading(name, seen.get(name, digit), None) for name, digit in cells)
  if key is None:
    return asked, f"<think>{text} </think>"
  text += " wait check" + "".join(_reading(name, digit, key) for name, digit in cells)
  return f"{asked} check{key}", f"<think>{text} </think>"


def drill(row, config, slip, rng, *, varied):
  """(question, response) of a chain of full length without a picture: "Compute red5 + blue4".

  With a key, half of the drills are in cipher and the response is a second pass.

  If `varied`, the digits are not those of the cells, but all below a limit that is drawn for the
  drill. One of two digits between 0 and 9 says nothing about their sum modulo 10, so nothing is
  learnt until both are used: two runs had not learnt sums after 300 steps of drills alone. Small
  digits say something each.
  """
  cells = row["cells"]
  if varied:
    drawn = rng.integers(0, rng.integers(2, 11), len(cells))
    cells = [(name, int(digit)) for (name, _), digit in zip(cells, drawn, strict=True)]
  chain = [cells[cell] for cell in rng.integers(0, len(cells), config.levels)]
  colours, digits = zip(*chain, strict=True)
  operators = ["+"] + [str(op) for op in rng.choice(list(config.operators), config.levels - 1)]
  in_cipher = row.get("key") is not None and rng.random() < 0.5
  key = row["key"] if in_cipher else None
  terms = [f"{colour}{encipher(digit, key or 0)}" for colour, digit in chain]
  problem = {"colours": colours, "operators": operators}
  working = " wait check" * in_cipher + _steps(problem, digits, slip, rng, key)
  answer = partial_sums(digits, operators)[-1]
  return question(terms, operators, key), f"<think>{working} </think> \\boxed{{{answer}}}"
