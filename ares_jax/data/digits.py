"""A small visual reasoning problem with real handwriting, for runs without a data set.

The images are the 1,797 handwritten digits of scikit-learn (8x8 grey levels, UCI "Optical
Recognition of Handwritten Digits"), drawn as coloured cells of one picture. A cell is 28 x 28 px,
one visual token of Qwen2.5-VL. A question is a chain over cells, "Compute red + blue + green,
modulo 10"; a chain of k cells is level k. A response is `<think> ... </think> \\boxed{8}`.

A teacher, which may slip and correct itself after "wait", writes three kinds of traces (`KINDS`):
direct without working; stepwise with every digit read and every partial sum; and check, which is
stepwise and then a second pass after "wait check".
"""

import dataclasses
import functools

import numpy as np

CELL = 28
COLOURS = {"red": (200, 40, 40), "green": (30, 140, 60), "blue": (40, 70, 200),
           "orange": (225, 125, 20), "purple": (130, 50, 160), "teal": (20, 140, 150),
           "brown": (120, 75, 35), "grey": (110, 110, 110)}  # fmt: skip
KINDS = ("direct", "stepwise", "check")
SPLITS = ("train", "test")
_TEST_FRACTION = 0.2


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
  """Pictures and questions."""

  rows: int  # cells down
  columns: int  # cells across
  levels: int  # chains have 1..levels cells
  operators: tuple[str, ...]  # ("+",), or ("+", "-") for harder problems
  noise: float  # standard deviation of the pixel noise, where white is 1

  def __post_init__(self):
    if not 1 <= self.rows * self.columns <= len(COLOURS):
      raise ValueError(f"rows x columns = {self.rows * self.columns} is outside 1..{len(COLOURS)}, "
                       "the number of colours; make the picture smaller")
    if not 1 <= self.levels <= 8:
      raise ValueError(f"levels = {self.levels} is outside 1..8")
    if not self.operators or set(self.operators) - {"+", "-"}:
      raise ValueError(f"operators = {self.operators} must be chosen from '+' and '-'")


@functools.cache
def handwriting(split):
  """Images of one split, which has them alone: for each digit uint8 [n, 8, 8], values 0..16."""
  if split not in SPLITS:
    raise ValueError(f"split {split!r} is not one of {SPLITS}")
  from sklearn.datasets import load_digits  # 1 s to import, needed only here

  digits = load_digits()
  images, labels = digits.images.astype(np.uint8), digits.target
  order = np.random.default_rng(0).permutation(len(images))
  held_out = np.zeros(len(images), bool)
  held_out[order[: int(_TEST_FRACTION * len(images))]] = True
  chosen = held_out if split == "test" else ~held_out
  return [images[chosen & (labels == digit)] for digit in range(10)]


@dataclasses.dataclass(frozen=True)
class DigitsSource:
  """Random access to problems: row i depends on (config, split, seed, i) alone.

  A row is a dict as in sources.py: id, source, question, answer, images (uint8 [H, W, 3]), level;
  and colours, digits and operators of the chain, and all cells.
  """

  config: DigitsConfig
  split: str
  seed: int
  size: int

  def __len__(self):
    return self.size

  def __getitem__(self, index):
    if not 0 <= index < self.size:
      raise IndexError(f"row {index} of a source of {self.size}")
    config = self.config
    rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
    cells = config.rows * config.columns
    names = [str(name) for name in rng.choice(list(COLOURS), cells, replace=False)]
    digits = rng.integers(0, 10, cells)
    level = 1 + index % config.levels
    chain = rng.integers(0, cells, level)
    operators = ["+"] + [str(op) for op in rng.choice(list(config.operators), level - 1)]
    chain_digits = [int(digits[cell]) for cell in chain]
    chain_names = [names[cell] for cell in chain]
    return {
      "id": f"digits-{self.split}-{self.seed}-{index}",
      "source": "digits",
      "question": question(chain_names, operators),
      "answer": str(partial_sums(chain_digits, operators)[-1]),
      "images": [_draw(config, names, digits, handwriting(self.split), rng)],
      "level": level,
      "colours": chain_names,
      "digits": chain_digits,
      "operators": operators,
      "cells": [(name, int(digit)) for name, digit in zip(names, digits, strict=True)],
    }

  @staticmethod
  def mode_of(response):
    """Which of KINDS a response is written like."""
    working = response.partition("<think>")[2].partition("</think>")[0].strip()
    if not working:
      return "direct"
    return "check" if "wait check" in working else "stepwise"


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
  """How the teacher writes traces; triples are shares of direct, stepwise and check traces."""

  slip: float  # probability that a partial sum is first written wrong
  responses: int  # traces of each problem, for AdaCS to select from
  first_level: tuple[float, float, float]  # of kinds at level 1
  last_level: tuple[float, float, float]  # at the highest level; levels between are interpolated
  first_warmup: tuple[float, float, float]  # the same in the warm-up
  last_warmup: tuple[float, float, float]
  captions: tuple[float, float]  # share of warm-up rows that name the cells; at the start, the end
  drills: tuple[float, float]  # share of the others without a picture, digits in the question

  def __post_init__(self):
    for name in ("first_level", "last_level", "first_warmup", "last_warmup"):
      shares = getattr(self, name)
      if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"{name} = {shares}: shares of {KINDS} must be >= 0 and add up to 1")
    shares = (self.slip, *self.captions, *self.drills)
    if self.responses < 1 or not all(0 <= share <= 1 for share in shares):
      raise ValueError(f"responses = {self.responses} must be >= 1, slip = {self.slip}, captions = "
                       f"{self.captions} and drills = {self.drills} in 0..1")


@dataclasses.dataclass(frozen=True)
class WarmupSource:
  """Rows that teach an untrained model to read and to add; their order matters.

  Captions, which name four digits each, and drills, which hold four sums each, become fewer and
  traces more. In this order reading was learnt in about 150 steps of 64 rows; with a quarter of
  captions throughout, one run had not learnt it after 1,200 steps of 32. Without drills some seeds
  did not learn sums.
  """

  problems: DigitsSource
  teacher: TeacherConfig

  def __len__(self):
    return len(self.problems)

  def __getitem__(self, index):
    row, rng = self.problems[index], np.random.default_rng([self.problems.seed, 2, index])
    teacher, progress = self.teacher, index / max(len(self) - 1, 1)
    if rng.random() < np.interp(progress, [0, 1], teacher.captions):
      text, response = caption(row, rng)
      return row | {"question": text, "response": response}
    if rng.random() < np.interp(progress, [0, 1], teacher.drills):
      text, response = drill(row, self.problems.config, teacher.slip, rng)
      return row | {"question": text, "images": [], "response": response}
    shares = _shares(teacher.first_warmup, teacher.last_warmup, row, self.problems)
    kind = KINDS[rng.choice(3, p=shares)]
    return row | {"response": trace(row, kind, slip=teacher.slip, rng=rng)}


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


def question(colours, operators):
  """The question's text; the first operator is not written."""
  terms = [colours[0]]
  for operator, colour in zip(operators[1:], colours[1:], strict=True):
    terms += [operator, colour]
  return f"Compute {' '.join(terms)}, modulo 10"


def partial_sums(digits, operators):
  """The running value of a chain modulo 10, one for each cell."""
  sums, total = [], 0
  for operator, digit in zip(operators, digits, strict=True):
    total = (total + digit if operator == "+" else total - digit) % 10
    sums.append(total)
  return sums


def _draw(config, names, digits, pools, rng):
  image = np.zeros((config.rows * CELL, config.columns * CELL, 3), np.float32)
  for cell, (name, digit) in enumerate(zip(names, digits, strict=True)):
    top, left = CELL * (cell // config.columns), CELL * (cell % config.columns)
    stroke = pools[digit][rng.integers(len(pools[digit]))].astype(np.float32) / 16
    ink = np.zeros((CELL, CELL, 1), np.float32)
    ink[2:-2, 2:-2, 0] = stroke.repeat(3, 0).repeat(3, 1)  # 8 px -> 24 px, a border of 2
    paper = np.float32(COLOURS[name]) / 255
    image[top : top + CELL, left : left + CELL] = paper * (1 - ink) + ink
  image += rng.normal(0, config.noise, image.shape).astype(np.float32)
  return np.uint8(np.clip(np.round(image * 255), 0, 255))


def trace(row, kind, *, slip, rng):
  """A teacher's response to `row`, of one of KINDS, whose final answer is right.

  `slip` is the probability that a partial sum is first written wrong, then corrected.
  """
  if kind not in KINDS:
    raise ValueError(f"kind {kind!r} is not one of {KINDS}")
  working = "" if kind == "direct" else _steps(row, slip, rng)
  if kind == "check":
    working += " wait check" + _steps(row, slip, rng)
  return f"<think>{working} </think> \\boxed{{{row['answer']}}}"


def _steps(row, slip, rng):
  text = f" {row['colours'][0]}{row['digits'][0]}"
  sums = partial_sums(row["digits"], row["operators"])
  for step in range(1, len(sums)):
    text += f" {row['operators'][step]} {row['colours'][step]}{row['digits'][step]} ="
    if rng.random() < slip:
      text += f"{(sums[step] + rng.integers(1, 10)) % 10} wait"
    text += f"{sums[step]}"
  return text


def caption(row, rng):
  """(question, response) that names every cell in random order."""
  order = rng.permutation(len(row["cells"]))
  cells = [f" {row['cells'][cell][0]}{row['cells'][cell][1]}" for cell in order]
  return "Describe", f"<think>{''.join(cells)} </think>"


def drill(row, config, slip, rng):
  """(question, response) of a chain of full length without a picture: "Compute red5 + blue4"."""
  chain = [row["cells"][cell] for cell in rng.integers(0, len(row["cells"]), config.levels)]
  colours, digits = zip(*chain, strict=True)
  operators = ["+"] + [str(op) for op in rng.choice(list(config.operators), config.levels - 1)]
  problem = {"colours": colours, "digits": digits, "operators": operators,
             "answer": str(partial_sums(digits, operators)[-1])}
  terms = [f"{colour}{digit}" for colour, digit in chain]
  return question(terms, operators), trace(problem, "stepwise", slip=slip, rng=rng)


def tokenizer():
  """A word-level `transformers` fast tokenizer for this problem, with Qwen2.5's special tokens.

  Encoding and decoding a text of this problem gives the same text. Other words become `<unk>`.
  """
  import tokenizers
  import transformers

  special = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
  ]  # fmt: skip
  words = ["<unk>", "<think>", " </think>", " \\boxed{", "}", "\n", "system", "user", "assistant"]
  words += ["Compute", "Describe", ", modulo 10", " +", " -", " =", " wait", " check"]
  words += [f" {name}" for name in COLOURS]
  words += [str(digit) for digit in range(10)]
  vocabulary = {word: index for index, word in enumerate(special + words)}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
  pieces = tokenizers.Regex(
    r"<think>| </think>| \\boxed\{|, modulo 10| ?[A-Za-z]+|\d| ?[^\s\w]|\n")
  model.pre_tokenizer = tokenizers.pre_tokenizers.Split(pieces, behavior="isolated")
  model.decoder = tokenizers.decoders.Fuse()
  model.add_special_tokens(special)
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>")
  fast.chat_template = _CHAT_TEMPLATE
  return fast


# Qwen2.5-VL's turn format without its default system turn, which would double these short prompts.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
{%- endfor -%}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
