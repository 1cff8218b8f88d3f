"""Digests of the files that a run reads: data, tokenizer, chat template and first weights.

A file may change while its path stays the same; resumed with it, a run would silently become
another run. Image files are not digested, only their names in the rows. Of a large file the size
and three pieces are.
"""

import hashlib
import json

import numpy as np
from etils import epath

from ares_jax.run.data import STAGE_OF

_ROWS = 3  # digested rows of generated data: the first, the middle and the last one
_SAMPLE = 2**20  # bytes of a piece; a file of at most three pieces is digested completely


def fingerprint(run):
  """{name: digest} of the files and generated rows that a setup.Run reads."""
  tokenizer, config = run.tokenizer, run.config
  marks = {
    "tokenizer": _sha256(tokenizer.backend_tokenizer.to_str()),
    "template": _sha256(str(tokenizer.chat_template)),
  }
  if config.model.path:
    marks["weights"] = _folder(config.model.path)
  drawn = [name for name, stage in STAGE_OF.items() if getattr(config, stage).steps]
  for name in (*drawn, "eval"):
    marks[f"data.{name}"] = _source(run, name)
  return marks


def _source(run, name):
  source = run.source(name)
  if run.config.data.files is not None:
    files = [_file(path) for part in source.parts for path in part.files]
    return f"{len(source)} rows, {_sha256(json.dumps(files))}"
  numbers = np.linspace(0, len(source) - 1, _ROWS).astype(int)
  rows = [json.dumps(source[int(number)], sort_keys=True, default=_pixels) for number in numbers]
  return f"{len(source)} rows, {_sha256(chr(10).join(rows))}"


def _file(path):
  """Name, size, and digests of a file's first, middle and last _SAMPLE bytes."""
  size = path.stat().length
  digests = []
  with path.open("rb") as file:
    for place in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
      file.seek(place)
      digests.append(hashlib.sha256(file.read(_SAMPLE)).hexdigest())
  return [path.name, size, digests]


def _pixels(array):
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _folder(path):
  """Digest of a Hugging Face folder: its config.json and the files of its weights."""
  files = [_file(file) for file in sorted(epath.Path(path).glob("*.safetensors"))]
  return _sha256((epath.Path(path) / "config.json").read_text() + json.dumps(files))


def _sha256(text):
  return hashlib.sha256(text.encode()).hexdigest()[:16]
