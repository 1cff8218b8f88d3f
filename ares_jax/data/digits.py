"""A small visual reasoning problem with real handwriting, for runs without a data set.

The images are the 1,797 handwritten digits of scikit-learn (8x8 grey levels, UCI "Optical
Recognition of Handwritten Digits"), drawn as coloured cells of one picture. A cell is 28 x 28 px,
one visual token of Qwen2.5-VL. A question is a chain over cells, "Compute red + blue + green,
modulo 10"; a chain of k cells is level k. A response is `<think> ... </think> \\boxed{8}`.

With `smudge`, a second look pays, and only on hard problems. Some cells show two digits over each
other, of which one is true: more of them the higher the level, none at level 1. Below the cells is
a clean copy of them in another hand, in white frames. It is in cipher: it shows each digit plus a
key, modulo 10. The question ends in the key: "modulo 10 check3". To read a copy takes a subtraction
that a model has to write down.
"""

import dataclasses
import functools

import numpy as np

from ares_jax.system.config import optional

CELL = 28
COLOURS = {"red": (200, 40, 40), "green": (30, 140, 60), "blue": (40, 70, 200),
           "orange": (225, 125, 20), "purple": (130, 50, 160), "teal": (20, 140, 150),
           "brown": (120, 75, 35), "grey": (110, 110, 110)}  # fmt: skip
KINDS = ("direct", "stepwise", "check")  # of responses
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
  # Share of smudged cells at the highest level, falling to none at level 1; 0 draws no copy either.
  smudge: float = optional(0.0)
  keys: tuple[int, ...] = optional(tuple(range(10)))  # of the copies' cipher

  def __post_init__(self):
    if not 1 <= self.rows * self.columns <= len(COLOURS):
      raise ValueError(f"rows x columns = {self.rows * self.columns} is outside 1..{len(COLOURS)}, "
                       "the number of colours; make the picture smaller")
    if not 1 <= self.levels <= 8:
      raise ValueError(f"levels = {self.levels} is outside 1..8")
    if not self.operators or set(self.operators) - {"+", "-"}:
      raise ValueError(f"operators = {self.operators} must be chosen from '+' and '-'")
    if not 0 <= self.smudge <= 1:
      raise ValueError(f"smudge = {self.smudge} is not a share in 0..1")
    if not self.keys or set(self.keys) - set(range(10)):
      raise ValueError(f"keys = {self.keys} must be digits, at least one")


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
  """Random access to problems: row i depends on (config, split, seed, i, smudged) alone.

  A row is a dict as in sources.py: id, source, question, answer, images (uint8 [H, W, 3]), level;
  and colours, digits and operators of the chain, and all cells. With `smudge` also the key, and
  smudges, {colour: the other digit that its cell shows}.
  """

  config: DigitsConfig
  split: str
  seed: int
  size: int
  smudged: float | None = None  # share of smudged cells at every level, in place of the config's

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
    key, smudges = None, {}
    if config.smudge:
      key = config.keys[rng.integers(0, len(config.keys))]
      share = self.smudged
      if share is None:
        share = config.smudge * (level - 1) / max(config.levels - 1, 1)
      smudges = {name: int((digit + rng.integers(1, 10)) % 10)
                 for name, digit in zip(names, digits, strict=True) if rng.random() < share}
    drawn = [_Cell(name, (digit, *([smudges[name]] if name in smudges else [])))
             for name, digit in zip(names, digits, strict=True)]
    if key is not None:
      drawn += [_Cell(name, (encipher(digit, key),), framed=True)
                for name, digit in zip(names, digits, strict=True)]
    return ({"key": key, "smudges": smudges} if config.smudge else {}) | {
      "id": f"digits-{self.split}-{self.seed}-{index}",
      "source": "digits",
      "question": question(chain_names, operators, key),
      "answer": str(partial_sums(chain_digits, operators)[-1]),
      "images": [_draw(config, drawn, handwriting(self.split), rng)],
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


def question(colours, operators, key=None):
  """The question's text; the first operator is not written, nor a key that is None."""
  terms = [colours[0]]
  for operator, colour in zip(operators[1:], colours[1:], strict=True):
    terms += [operator, colour]
  return f"Compute {' '.join(terms)}, modulo 10" + ("" if key is None else f" check{key}")


def encipher(digit, key):
  """The digit that the copy of a cell shows."""
  return int(digit + key) % 10


def partial_sums(digits, operators):
  """The running value of a chain modulo 10, one for each cell."""
  sums, total = [], 0
  for operator, digit in zip(operators, digits, strict=True):
    total = (total + digit if operator == "+" else total - digit) % 10
    sums.append(total)
  return sums


@dataclasses.dataclass(frozen=True)
class _Cell:
  colour: str
  digits: tuple[int, ...]  # over each other
  framed: bool = False


def _draw(config, cells, pools, rng):
  image = np.zeros((len(cells) // config.columns * CELL, config.columns * CELL, 3), np.float32)
  for number, cell in enumerate(cells):
    top, left = CELL * (number // config.columns), CELL * (number % config.columns)
    strokes = [pools[digit][rng.integers(len(pools[digit]))] for digit in cell.digits]
    stroke = np.mean(strokes, 0, np.float32) / 16
    ink = np.zeros((CELL, CELL, 1), np.float32)
    ink[[0, -1]] = ink[:, [0, -1]] = cell.framed
    ink[2:-2, 2:-2, 0] = stroke.repeat(3, 0).repeat(3, 1)  # 8 px -> 24 px, a border of 2
    paper = np.float32(COLOURS[cell.colour]) / 255
    image[top : top + CELL, left : left + CELL] = paper * (1 - ink) + ink
  image += rng.normal(0, config.noise, image.shape).astype(np.float32)
  return np.uint8(np.clip(np.round(image * 255), 0, 255))


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
