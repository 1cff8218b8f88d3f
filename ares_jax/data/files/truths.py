"""Reads the options of a record and its accepted truths."""

import ast
import hashlib
import json
import re

import numpy as np

from ares_jax.data.files.record import is_list
from ares_jax.grading.answer import same_answer
from ares_jax.grading.notation import normalise
from ares_jax.grading.option import parse_option
from ares_jax.grading.response import extract_boxed

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Longest text that holds a list of options. Python takes 470 bytes a character to parse a literal.
_LONGEST_LIST = 2**15
# Two texts without a comma between, as numpy prints a list; Python would read them as one.
_NO_COMMA = re.compile(r"""(['"])\s+\1(?![\s,\]])""")
_LABELLED = re.compile(r"\(?([A-Z])[.):]\s*(\S.*)", re.DOTALL)  # "A. one", "(A) one"
_BETWEEN_LETTERS = re.compile(r"[\s,;/&()\[\].]|and")


def read_options(record):
  """Texts of the options in the order they are shown; [] where the question has none.

  BadRow where the value is no list of texts, nor an object with a text for each letter.
  """
  if record.schema.get("answer") == "gpqa":
    texts = _gpqa_options(record)
  else:
    texts = _texts(record, _unpacked(record, record.first("options")))
  if len(texts) > len(LETTERS):
    raise record.bad("question", f"it has {len(texts)} options, there are {len(LETTERS)} letters")
  return texts


def _gpqa_options(record):
  columns = record.schema["columns"]
  texts = [record.values[column].strip() for column in columns["right"] + columns["wrong"]]
  # The question is the seed, so that the order does not depend on the location of the row.
  seed = hashlib.sha256(record.first("question").encode()).digest()[:8]
  order = np.random.default_rng(int.from_bytes(seed)).permutation(len(texts))
  return [texts[index] for index in order]


def _unpacked(record, options):
  """The options, from the text that holds their list where they are one."""
  if isinstance(options, bytes):
    options = options.decode()
  if not isinstance(options, str):
    return options
  if not options.strip():
    return None
  try:
    return list_in(options)
  except ValueError as error:
    raise record.bad("question",
                     f"its options {options!r} {error}; give a list of texts") from error


def list_in(text):
  """The list or object that a text holds as JSON or as Python prints it, or ValueError."""
  if len(text) > _LONGEST_LIST:
    raise ValueError(f"are a text of {len(text)} letters, at most {_LONGEST_LIST} are read")
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    pass
  try:
    found = ast.literal_eval(text)  # literals only, nothing runs
  except Exception as error:  # also MemoryError and RecursionError
    raise ValueError(f"are no list: {type(error).__name__}") from error
  if _NO_COMMA.search(text):
    raise ValueError("lack commas")
  return found


def _texts(record, options):
  if options is None:
    return []
  if isinstance(options, dict) and set(options) == {"label", "text"}:  # ARC, CommonsenseQA
    options = dict(zip(map(str, options["label"]), options["text"], strict=True))
  if isinstance(options, dict):
    named = {key: text for key, text in options.items() if text is not None}
    letters = [str(key).strip("(). ").upper() for key in named]
    if sorted(letters) != list(LETTERS[: len(letters)]):
      raise record.bad("question", f"its options have the names {', '.join(map(str, named))}; "
                       "A, B, C ... are read, or a list of texts")
    options = [text for _, text in sorted(zip(letters, named.values(), strict=True))]
  if is_list(options) and len(options) == 1 and is_list(options[0]):
    options = options[0]  # MMMU has "[['A', 'B']]"
  if not is_list(options):
    raise record.bad("question", f"its options are {options!r}; a list of texts is needed")
  texts = [record.scalar("option", option).strip() for option in options]
  own = [_LABELLED.fullmatch(text) for text in texts]
  if all(match and match[1] == letter for match, letter in zip(own, LETTERS, strict=False)):
    return [match[2] for match in own]  # the prompt writes the letters
  return texts


def accepted_truths(record, options, response):
  """The list of accepted truths; BadRow where there is none, or it is no text or number.

  `options` are the texts of the question's options, `response` the teacher's, if any.
  """
  kind = record.schema.get("answer")
  answer = record.first("right") if kind == "gpqa" else record.first("answer", response)
  answers = [_extracted(record, kind, record.scalar("answer", item)).strip()
             for item in (answer if is_list(answer) else [answer]) if answer is not None]
  if not answers or not all(answers):
    raise record.bad("answer", f"the answer is {answer!r}; a truth is needed")
  accepted = []
  for text in answers:
    named = _named_options(options, text, texts_only=kind == "text")
    if options and not (named or _may_be_right(text, options)):
      raise record.bad("answer", f"the answer {text!r} is none of its {len(options)} options; give "
                       "the letter or the text of one")
    accepted += [way for index in named for way in _letter_and_text(options, index)] or [text]
  return accepted


def _named_options(options, text, *, texts_only):
  """The numbers of the options that a truth names: by letter unless `texts_only`, text, or both."""
  same = [index for index, option in enumerate(options) if option == text]
  bare = re.fullmatch("[A-Z]", text.strip("().").upper())
  letter, rest = (bare[0], "") if bare else parse_option(normalise(text)) or ("", "")
  index = LETTERS.find(letter.upper()) if letter else len(options)
  if index >= len(options) or same and (texts_only or not bare):
    return same
  return [index] if not rest or normalise(options[index]) == rest else []


def _may_be_right(text, options):
  """Whether a truth that is no option as written is several letters, or an option's value."""
  letters = _BETWEEN_LETTERS.sub("", text)
  if len(letters) > 1 and set(letters) <= set(LETTERS[: len(options)]):  # "A, C", "ABD"
    return True
  letter, rest = parse_option(normalise(text)) or ("", "")
  if letter and letter in LETTERS[: len(options)]:  # of "A. two" A says which
    options, text = [options[LETTERS.index(letter)]], rest
  # Two formulas count as equal here: to compare them takes a worker with a limit of time.
  return any(option and same_answer(option, text, symbolic=lambda *_: True) for option in options)


def _extracted(record, kind, text):
  """The truth in the text of an answer, by the schema's kind of answers."""
  if kind == "gsm8k":
    return text.rpartition("####")[2]
  if kind == "boxed" and text:
    boxed = extract_boxed(text)
    if boxed is None:
      raise record.bad("answer", f"the answer {text[-80:]!r} has no \\boxed{{...}} with matching "
                       "braces; add one, or read a column of truths by the schema plain with "
                       "columns=dict(question=..., answer=...). Only data.files.warmup learns "
                       "answers without a truth")
    return boxed
  return text


def _letter_and_text(options, index):
  """An option's letter and text; the letter alone where the text could mean another option."""
  letter, text = LETTERS[index], options[index]
  # A text that is a letter (A. C), or the text of two options, would make a wrong letter right.
  if not text or re.fullmatch(r"[(\[]?[A-Za-z][)\].:]?", text) or options.count(text) > 1:
    return [letter]
  return [letter, text]


def read_tolerance(record):
  """The largest difference of a right number to the truth, from its decimals or as given.

  A list where the record has one for each part of the truth.
  """
  digits, tolerance = record.first("digits"), record.first("tolerance", 0)
  try:
    if digits is not None:  # number of decimals: 0.57 means 0.565 to 0.575
      return 0.5 * 10.0 ** -int(float(digits))
    parts = [float(part or 0) for part in str(tolerance or 0).split(",")]
    return parts if len(parts) > 1 else parts[0]
  except (TypeError, ValueError) as error:
    raise record.bad("answer", f"the tolerance {tolerance!r} (decimals {digits!r}) is not a "
                     "number") from error
