"""The folder of a run: one run at a time, its stages, what makes it another run, whole files."""

import contextlib
import fcntl
import glob
import json
import os
import socket
import threading
import time

import jax
import numpy as np
from absl import logging

from ares_jax import mesh
from ares_jax.checkpoint_files import newest
from ares_jax.whole_file import whole

STAGES = ("warmup", "adacs", "aepo")  # in the order of a run; each saves in a folder of its name

# Settings that may change when a run goes on, and sections of them: how it reads, where it runs,
# how often it saves. None is meant to change what comes out, though a mesh changes how sums round
# and grade.timeout which slow answers count.
FREE = ("threads", "hosts.", "mesh.", "engine.", "grade.workers", "grade.timeout",
        "grade.timeout_share", "stall_minutes", "wandb.", *(f"{stage}.loop." for stage in STAGES))

# Settings and digests that decide the pass rates of stage 1, besides what the warm-up reads; its
# probe answers at the length of stage 2.
CURATION = ("curate.pass_rates", "curate.problems", "curate.samples", "aepo.sampling.max_tokens",
            "data.curated", "data.files.curated", "data.digits.curated")

# Settings and digests that a stage after the first reads, and none before it: of two rows the
# upper counts. All others are read by the first stage already.
_READ_BY = {"adacs": ("adacs.", "curate.", *CURATION),
            "aepo": ("aepo.", "data.prompts", "data.files.prompts", "data.digits.prompts")}

# Settings that hosts of one run may have each for itself.
OWN = ("threads", "grade.workers", "grade.timeout", "stall_minutes")

_RECORDS = ("config.json", "fingerprint.json", "base.json")  # what a run was made with
_ALLOWED = "allowed.json"  # {key: values that it had before a change was allowed}
_BATCHES = 3  # dumped batches kept
_RENEW = 20.0  # seconds between two signs of life of a lock
_GONE = 6 * _RENEW  # a lock of another host without one for so long is stale


def latest_stage(workdir):
  """Name of the last stage of a run that has a checkpoint.

  Raises:
    ValueError: none has.
  """
  for stage in reversed(STAGES):
    if newest(os.path.join(workdir, stage)) is not None:
      return stage
  raise ValueError(f"{workdir} has no checkpoint of {', '.join(STAGES)} yet; train there first")


def flat(values, prefix=""):
  """{"aepo.loss.clip_low": 0.2, ...} of nested dicts."""
  found = {}
  for key, value in values.items():
    found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return found


def among(key, names):
  """Whether a key is one of `names`, or in a section among them, which end in a point."""
  return key in names or key.startswith(tuple(name for name in names if name.endswith(".")))


def write_text(path, text):
  """Writes a file that is there whole or not at all; a disk that refuses it keeps no part of it."""
  with whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
    file.write(text)


def write_json(path, value):
  """`write_text` of a JSON object."""
  write_text(path, json.dumps(value, indent=1) + "\n")


def check(workdir, records, allow=()):
  """Refuses a folder that was made with something else; writes nothing.

  Only how often a run saves, how it reads and where it runs (FREE) may change.

  Args:
    workdir: folder of the run.
    records: {"config.json": nested dict, "fingerprint.json": {name: digest}} or one of them, of
      JSON values.
    allow: keys that may differ all the same.

  Returns:
    {key: value there was} of what differs and may.

  Raises:
    ValueError: names the keys that differ.
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


def keep(workdir, records, allow=()):
  """Writes what a run is made with, after `check` of all of it."""
  changed = check(workdir, records, allow)
  os.makedirs(workdir, exist_ok=True)
  if changed:
    logging.warning("%s: %s changed, as allowed", workdir, ", ".join(changed))
    allowed = read_json(workdir, _ALLOWED)
    for key, value in changed.items():
      allowed[key] = [*allowed.get(key, ()), value]
    write_json(os.path.join(workdir, _ALLOWED), allowed)
  for name, record in records.items():
    write_json(os.path.join(workdir, name), record)


def later(stage, key):
  """Whether only what comes after `stage` reads a setting or digest."""
  first = next((name for name, starts in _READ_BY.items() if key.startswith(starts)), STAGES[0])
  return STAGES.index(first) > STAGES.index(stage)


def marks(workdir):
  """{key: JSON of its value} of what the run in a folder is made with, but for what is FREE.

  Goes into every checkpoint; {} where nothing was kept.
  """
  found = {}
  for name in _RECORDS:
    found |= _marks(read_json(workdir, name))
  return found


def check_marks(workdir, stage, found, where):
  """Refuses a checkpoint that says it was made with something else than the folder's run.

  What only later stages read may differ: several runs may go on from copies of one cold start.

  Args:
    workdir: folder of the run.
    stage: whose checkpoint it is.
    found: the checkpoint's `marks`; {} is believed.
    where: its name.

  Raises:
    ValueError: names what differs and was never allowed to change.
  """
  now, allowed = marks(workdir), read_json(workdir, _ALLOWED)
  different = [key for key in _different(found, now)
               if not later(stage, key) and found.get(key) not in allowed.get(key, ())]
  if found and now and different:
    raise ValueError(f"{where} was made with another config or other files than {workdir}: "
                     f"{', '.join(different)} differ; move it away or use another --workdir")


def _marks(record):
  return {key: json.dumps(value) for key, value in flat(record).items()
          if not among(key, FREE)}


def _different(before, after):
  return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def read_json(workdir, name):
  """The object in a file of the folder; {} where there is none."""
  path = os.path.join(workdir, name)
  if not os.path.exists(path):
    return {}
  with open(path, encoding="utf-8") as file:
    return json.load(file)


def dump_batch(workdir, stage, step, batch):
  """Writes WORKDIR/nonfinite/STAGE-STEP.npz, a step's batch under the paths of its arrays.

  Only the newest three files are kept.
  """
  folder = os.path.join(workdir, "nonfinite")
  arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(mesh.fetch(batch))}
  if jax.process_index():
    return
  try:
    os.makedirs(folder, exist_ok=True)
    with whole(os.path.join(folder, f"{stage}-{step}.npz")) as path, open(path, "wb") as file:
      np.savez_compressed(file, **arrays)
  except OSError as error:
    # The run is worth more than the batch.
    logging.warning("the batch of %s step %d is not kept: %s", stage, step, error)
  for old in sorted(glob.glob(os.path.join(folder, "*.npz")), key=os.path.getmtime)[:-_BATCHES]:
    os.remove(old)


@contextlib.contextmanager
def lock(workdir):
  """Holds WORKDIR/lock: host, process id and time of the one run in the folder.

  The system lets go of a lock with its process, however that ends. Where a file system does not
  tell other hosts of locks, the file's time does, which is renewed all along.

  Raises:
    ValueError: another run works there; names it.
    OSError: the folder cannot be written.
  """
  os.makedirs(workdir, exist_ok=True)
  path = os.path.join(workdir, "lock")
  with open(path, "a+", encoding="utf-8") as file:
    quiet = time.time() - os.fstat(file.fileno()).st_mtime
    file.seek(0)
    holder = _holder(file.read())
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f"{workdir} is in use by {holder['text']}; stop that run or use another "
                       "--workdir") from None
    if holder["host"] not in ("", socket.gethostname()) and quiet < _GONE:
      raise ValueError(f"{workdir} is in use by {holder['text']}, seen {quiet:.0f} s ago; stop "
                       f"that run, or wait {_GONE:.0f} s if it is gone, or use another --workdir")
    if holder["host"]:
      logging.warning("%s: the lock of %s is stale: that run was killed", workdir, holder["text"])
    file.truncate(0)
    json.dump({"host": socket.gethostname(), "pid": os.getpid(),
               "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}, file)
    file.flush()
    os.fsync(file.fileno())  # other hosts of the run read it at once
    over = threading.Event()
    renewing = threading.Thread(target=_renew, args=(over, path), daemon=True, name="lock")
    renewing.start()
    try:
      yield
    finally:
      over.set()
      renewing.join()
      file.truncate(0)


def read_lock(workdir):
  """What stands in the lock of a folder; "" where there is none."""
  path = os.path.join(workdir, "lock")
  if not os.path.exists(path):
    return ""
  with open(path, encoding="utf-8") as file:
    return file.read()


def _holder(text):
  """Host and description of who wrote a lock; host "" when nobody holds it."""
  try:
    record = json.loads(text)
    return {"host": record["host"], "text":
            f"process {record['pid']} on {record['host']} since {record['time']}"}
  except (ValueError, KeyError, TypeError):
    return {"host": "", "text": "another process"}


def _renew(over, path):
  while not over.wait(_RENEW):
    with contextlib.suppress(OSError):  # a file server that is away for a while
      os.utime(path)
