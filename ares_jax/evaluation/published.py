"""Reads options, truths, lists and image marks as benchmarks write them inside texts."""

import re

from ares_jax.data.chat import IMAGE_MARK
from ares_jax.data.files import truths

_LETTERS = "ABCDEFGHIJ"
_OPTION = re.compile(r"(?:^|(?<=[\s;,:]))\(?([A-J])[).:]\s*")  # "A. 12", "(A) 12", "A: 12", "A) 12"
_MATHS = re.compile(r"\$\$?([^$]*)\$\$?")
_REWRITES = (
  (re.compile(r"\{\}(?=\^)"), ""),  # 30{}^\circ
  (re.compile(r"^\{(\d+)\}\{(\d+)\}"), r"\\frac{\1}{\2}"),  # a lost \frac
  (re.compile(r"^(\$?)\s*=\s*"), r"\1"),
  (re.compile(r"^\$(\\\$[^$]*)\$$"), r"\1"),  # $\$20$
  # A true bearing, 315°T.
  (re.compile(r"(\d\s*(?:°|\^\s*\{?\s*\\circ\s*\}?))\s*T$"), r"\1"),
  (re.compile(r"^(?:about|approx(?:imately|\.)?|around)\s+(?=[-$\\\d])", re.IGNORECASE), ""),
  (re.compile(r"(?<=\S)\s*\((?:approx|rounded|to the nearest)[^()]*\)$"), ""),
  (re.compile(r"^The [a-z ]{1,60} (?:is|are) (?=[-$\\(\[\d])"), ""),
)
# Text in UTF-8 that was read in another encoding: "°" as "掳" (Chinese) or "Â°" (Western).
_WRONG_ENCODINGS = ("gbk", "cp1252")
_SIGNS = "°′″²×±≤≥√π−–"


def options_in(text):
  """The options that stand in a text, "Choices: (A) yes (B) no"; [] where it has none.

  They are the last run of marks A, B, C ... in a row.
  """
  marks = list(_OPTION.finditer(text))
  start = max((number for number, mark in enumerate(marks) if mark[1] == "A"), default=len(marks))
  run = [mark for place, mark in enumerate(marks[start:]) if mark[1] == _LETTERS[place:place + 1]]
  if len(run) < 2 or run != marks[start:start + len(run)]:
    return []
  ends = [mark.start() for mark in run[1:]] + [len(text)]
  return [text[mark.end():end].strip(" \n\t;") for mark, end in zip(run, ends, strict=True)]


def accepted_truths(text):
  """A published truth and, where it is written in a way that no model would, what it says.

  Signs that were decoded wrongly are restored. The others are added, so the truth itself stays
  right: see `_REWRITES`; mathematics in the middle of a text, "Area $=9$", without delimiters;
  lines as a list; "8.75 (or fill in 35/4)" as both.
  """
  text = _decoded(text).strip()
  first, _, second = text.partition("(or")
  if second.endswith(")"):
    second = re.sub(r"^ (?:fill in )?", "", second[:-1])
    return list(dict.fromkeys([text, *accepted_truths(first), *accepted_truths(second)]))
  plain = text
  if plain.count("$") % 2 == 0 and not re.fullmatch(r"\$[^$]*\$|\$\$[^$]*\$\$", plain):
    plain = _MATHS.sub(r"\1", plain)
  for pattern, replacement in _REWRITES:
    plain = pattern.sub(replacement, plain)
  plain = ", ".join(line.strip() for line in plain.splitlines() if line.strip())
  return [text, plain] if plain != text and re.search(r"\w", plain) else [text]


def _decoded(text):
  """The text without characters that come of decoding UTF-8 in another encoding."""
  for encoding in _WRONG_ENCODINGS:
    try:
      decoded = text.encode(encoding).decode("utf-8")
    except UnicodeError:
      continue
    # A Chinese word may be UTF-8 by chance; "掳" beside digits is a degree.
    if re.fullmatch(rf"[\x00-\x7f{_SIGNS}]*[0-9][\x00-\x7f{_SIGNS}]*", decoded):
      return decoded
  return text


def list_in(value):
  """The list of texts that a text such as "['24/7', '3.429']" holds; another value as it is."""
  if not isinstance(value, str) or not value.startswith("["):
    return value
  try:
    return [str(item) for item in truths.list_in(value)]
  except ValueError:
    return value


def with_marked_images(record, columns):
  """The record with "_marked", the images that OlympiadBench's texts of `columns` name in marks.

  The mark <img_3362> stands for the file img_3362.jpg, and becomes one of ours.
  """
  texts = {column: record.get(column) or "" for column in columns}
  named = re.findall(r"<(img_\d+)>", "".join(texts.values()))
  if not named:
    return record
  return record | {"_marked": [f"{name}.jpg" for name in named]} | {
    column: re.sub(r"<img_\d+>", "<image>", text) for column, text in texts.items()}


def with_marks_as_words(record):
  """The record, whose texts say "[image 2]" where they mark several parts of its one image."""
  texts = [record["question"], *(record.get("options") or ())]
  if sum(len(IMAGE_MARK.findall(str(text))) for text in texts) < 2:
    return record
  question, *options = [IMAGE_MARK.sub(r"[image \1]", str(text)) for text in texts]
  return record | {"question": question, "options": options}
