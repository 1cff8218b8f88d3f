"""The identity of a run: the settings and files it was made with, and which of them may change.

WORKDIR/config.json, fingerprint.json and base.json record them, and every checkpoint has a copy.
fingerprint.json has digests of the files that a run reads, for a file may change while its path
stays the same. Image files are not digested, only their names in the rows.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Literal

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util

from ares_jax.run.checkpoint import digest
from ares_jax.run.checkpoint.reader import newest_step
from ares_jax.run.config import TrainConfig
from ares_jax.run.data import STAGE_OF, FilesData
from ares_jax.run.files import current_names, read_json, write_json
from ares_jax.system import hosts
from ares_jax.system.config import setting_defaults, setting_marks

STAGES = ("warmup", "adacs", "aepo")  # in the order of a run; each saves in WORKDIR/STAGE

_RECORDS = ("config.json", "fingerprint.json", "base.json")  # what a run was made with
_ALLOWED = "allowed.json"  # {key: values that it had before a change was allowed}
_ROWS = 3  # digested rows of generated data: the first, the middle and the last one
_SAMPLE = 2**20  # bytes of a piece; a file of at most three pieces is digested completely


@dataclasses.dataclass(frozen=True)
class Use:
  """How a run uses a setting or a digest. The fields of TrainConfig are marked with it."""

  # The first stage that uses it. Checkpoints of earlier stages do not depend on it.
  first_read_by: Literal["warmup", "adacs", "aepo"]
  # It may change when a run resumes: how it reads, where it runs, how often it saves. None of these
  # is meant to change a result, but a mesh changes how sums round, and grade.timeout decides which
  # slow answers count.
  free: bool = False
  per_host: bool = False  # hosts of one run may have different values
  curation: bool = False  # the pass rates of stage 1 depend on it


def use_of(key):
  """Use of a key of config.json, fingerprint.json or base.json.

  A key of an older run that is no setting today has the use of its section.
  """
  uses = _uses()
  while key and key not in uses:
    key = key.rpartition(".")[0]
  return uses.get(key, Use("warmup"))


@functools.cache
def _uses():
  uses = {key: Use(**{"first_read_by": "warmup"} | marks)
          for key, marks in setting_marks(TrainConfig).items()}
  # The digest of data files has the use of the setting that names them.
  for field in dataclasses.fields(FilesData):
    uses[f"data.{field.name}"] = uses[f"data.files.{field.name}"]
  return uses | dict.fromkeys(("tokenizer", "template", "weights"), uses["model"])


def is_read_later(stage, key):
  """Whether only stages after `stage` read a setting or digest."""
  return STAGES.index(use_of(key).first_read_by) > STAGES.index(stage)


def stage_folder(workdir, stage):
  """The folder of a stage's checkpoints; of a bucket.BucketFolder it is in the bucket."""
  return os.path.join(str(workdir), stage)


def latest_stage(workdir):
  """Name of the last stage of a run that has a checkpoint; ValueError where none has."""
  for stage in reversed(STAGES):
    if newest_step(stage_folder(workdir, stage)) is not None:
      return stage
  raise ValueError(f"{workdir} has no checkpoint of {', '.join(STAGES)} yet; train there first")


# {"aepo.loss.clip_low": 0.2, ...} of nested dicts.
flatten = functools.partial(traverse_util.flatten_dict, sep=".")


def check_records(workdir, records, allow=()):
  """Refuses a folder that was made with other settings or files; writes nothing.

  Args:
    workdir: folder of the run.
    records: {name: JSON object} of config.json, fingerprint.json or base.json, or several.
    allow: keys that may differ, besides the settings marked as free.

  Returns:
    {key: JSON of the old value} of the keys in `allow` that differ.

  Raises:
    ValueError: names the other keys that differ.
  """
  before, after = {}, {}
  for name, record in records.items():
    if os.path.exists(os.path.join(workdir, name)):
      before |= _marks(read_json(workdir, name))
      after |= _marks(record)
  different = _different(before, after)
  refused = [key for key in different if key not in allow]
  if refused:
    raise ValueError(f"{workdir} was made with another config or other files: {', '.join(refused)} "
                     f"differ; use another --workdir, or go on all the same with "
                     f"--allow_change={','.join(refused)}")
  return {key: before.get(key) for key in different}


def keep_records(workdir, records, allow=()):
  """Writes the records of a run, after `check_records` of all of them."""
  changed = check_records(workdir, records, allow)
  os.makedirs(workdir, exist_ok=True)
  if changed:
    logging.warning("%s: %s changed, as allowed", workdir, ", ".join(changed))
    allowed = read_json(workdir, _ALLOWED)
    for key, value in changed.items():
      allowed[key] = [*allowed.get(key, ()), value]
    write_json(os.path.join(workdir, _ALLOWED), allowed)
  for name, record in records.items():
    write_json(os.path.join(workdir, name), record)


def keep_base(workdir, base, allow=()):
  """Writes WORKDIR/base.json, digests of the weights under adapters; refuses another base."""
  records = {"base.json": {"base": digest.digest_tree(base.weights)}}
  hosts.on_process_0(lambda: keep_records(workdir, records, allow))


def check_equal(values, workdir, flag_values):
  """Refuses processes of one run that were started with different settings, folders or versions.

  `flag_values` is {flag: value} of the flags besides --config that decide what a run does. The
  ValueError names a process and a setting that differs.
  """
  files = sorted(pathlib.Path(__file__).parent.parent.rglob("*.py"))
  code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
  record = {key: value for key, value in flatten(json.loads(values.to_json_best_effort())).items()
            if not use_of(key).per_host}
  record |= {f"--{name}": value for name, value in flag_values.items()}
  record |= {"--workdir": workdir, "version of jax": jax.__version__, "code of ares_jax": code}
  hosts.check_same(record, "was started with another config")


def run_marks(workdir):
  """{key: JSON of its value} of all settings and digests of a run that are not free.

  Every checkpoint contains them. A folder without records gives {}.
  """
  return {key: value for name in _RECORDS
          for key, value in _marks(read_json(workdir, name)).items()}


def check_marks(workdir, stage, found, where):
  """Refuses a checkpoint that was made with other settings or files than the folder's run.

  Settings that only stages after `stage` read may differ: several runs may continue copies of one
  cold start. `found` are the `run_marks` in the checkpoint; {}, of a version that kept none, is
  accepted. The ValueError names what differs and was never allowed to change.
  """
  found = current_names(found)
  now, allowed = run_marks(workdir), read_json(workdir, _ALLOWED)
  different = [key for key in _different(found, now)
               if not is_read_later(stage, key) and found.get(key) not in allowed.get(key, ())]
  if found and now and different:
    raise ValueError(f"{where} was made with another config or other files than {workdir}: "
                     f"{', '.join(different)} differ; move it away or use another --workdir")


def check_curation(workdir, shard):
  """Refuses a shard of a curation whose settings or files would give other pass rates.

  Raises:
    ValueError: names those that differ between the records in the folders `workdir` and `shard`.
  """
  here, there = (
    {key: json.dumps(value) for name in ("config.json", "fingerprint.json")
     for key, value in flatten(read_json(folder, name)).items() if use_of(key).curation}
    for folder in (workdir, shard))
  different = _different(here, there)
  if different:
    raise ValueError(f"{shard} was made with other values of {', '.join(different)}; make it "
                     "again, or give the run the same values")


def _marks(record):
  return {key: json.dumps(value) for key, value in flatten(record).items()
          if not use_of(key).free}


def _different(before, after):
  """Keys of {key: JSON of its value} that differ; an older run's missing setting is its default."""
  defaults = _defaults()
  return sorted(key for key in before.keys() | after.keys()
                if before.get(key, defaults.get(key)) != after.get(key, defaults.get(key)))


@functools.cache
def _defaults():
  return {key: json.dumps(value) for key, value in setting_defaults(TrainConfig).items()}


def fingerprint(run):
  """{name: digest} of the files and generated rows that a setup.Run reads."""
  tokenizer, config = run.tokenizer, run.config
  marks = {"tokenizer": _sha256(tokenizer.backend_tokenizer.to_str()),
           "template": _sha256(str(tokenizer.chat_template))}
  if config.model.path:
    marks["weights"] = _model_digest(epath.Path(config.model.path))
  kinds = [kind for kind, stage in STAGE_OF.items() if getattr(config, stage).steps]
  return marks | {f"data.{kind}": _data_digest(run, kind) for kind in (*kinds, "eval")}


def _data_digest(run, kind):
  source = run.source(kind)
  if run.config.data.files is not None:
    files = [_file_digest(path) for part in source.parts for path in part.files]
    return f"{len(source)} rows, {_sha256(json.dumps(files))}"
  numbers = np.linspace(0, len(source) - 1, _ROWS).astype(int)
  rows = [json.dumps(source[int(number)], sort_keys=True, default=_pixels) for number in numbers]
  return f"{len(source)} rows, {_sha256(chr(10).join(rows))}"


def _file_digest(path):
  """Name, size, and digests of a file's first, middle and last _SAMPLE bytes."""
  size = path.stat().length
  digests = []
  with path.open("rb") as file:
    for offset in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
      file.seek(offset)
      digests.append(hashlib.sha256(file.read(_SAMPLE)).hexdigest())
  return [path.name, size, digests]


def _pixels(array):
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _model_digest(folder):
  """Digest of a Hugging Face folder: its config.json and the files of its weights."""
  files = [_file_digest(file) for file in sorted(folder.glob("*.safetensors"))]
  return _sha256((folder / "config.json").read_text() + json.dumps(files))


def _sha256(text):
  return hashlib.sha256(text.encode()).hexdigest()[:16]
