"""How often problems are solved: from a column of the data, or what a probe left in files.

A file has a line a problem: {"problem": its number, "id", "source", "passes": right answers of
CurateConfig.samples, "tokens": [length of each response, null for a wrong one]}. It stands in the
run's folder, or, where shards were made apart, in folders of their own under curation/.
"""

import json
import os
import re

from ares_jax.data.bad_row import BadRow

FILE = "curation.jsonl"


def column_passes(row, samples):
  """Right answers of `samples` that the row's "pass_rate", 0 to 1, comes nearest to.

  Raises:
    BadRow: the row has none (below 0 is not measured), or no such number.
  """
  rate = row.get("pass_rate")
  if rate is None or isinstance(rate, float | int) and rate < 0:
    raise BadRow(row["id"], "pass_rate", f"its pass rate is {rate}: not measured; leave the row "
                 "out, or set curate.pass_rates = 'probe'")
  if isinstance(rate, bool) or not isinstance(rate, float | int) or not rate <= 1:
    raise BadRow(row["id"], "pass_rate", f"its pass rate is {rate!r}; a number from 0 to 1 is "
                 "needed")
  return round(rate * samples)


def candidate_responses(row):
  """The teacher's responses of a row, one or several; BadRow without any."""
  found = row.get("responses") or ([row["response"]] if row.get("response") else [])
  if not found:
    raise BadRow(row["id"], "response", "has no 'responses', a list of a teacher's candidate "
                 "answers, nor a 'response'; AdaCS selects among them")
  if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
    raise BadRow(row["id"], "response", "its candidate answers are no list of texts; 'responses' "
                 "is a list, one answer is a 'response'")
  return found


def complete_lines(path):
  """(whole lines of a file, bytes they take): a last one may be part of what is being written."""
  count = end = 0
  if os.path.exists(path):
    with open(path, "rb") as file:
      for line in file:
        if line.endswith(b"\n"):
          count, end = count + 1, end + len(line)
  return count, end


def drop_torn_line(path):
  """How many lines one's own file has, after what a stop left of a last one is cut off."""
  count, end = complete_lines(path)
  if os.path.exists(path):
    os.truncate(path, end)
  return count


def shard_numbers(problems, shard):
  """Numbers of the problems of a shard (number, shards): neighbours, as files are read by groups.

  Raises:
    ValueError: there is no such shard, or nothing for it.
  """
  number, shards = shard
  if not 0 <= number < shards <= problems:
    raise ValueError(f"shard {number} of {shards}: the number must be below {shards}, which must "
                     f"be at most the {problems} problems; change --curate")
  return range(problems * number // shards, problems * (number + 1) // shards)


def shard_folder(workdir, shard):
  """Folder of a shard (number, shards) of a curation."""
  return os.path.join(workdir, "curation", "{:05d}-of-{:05d}".format(*shard))


def finished_shards(workdir, problems, same):
  """Files of the shards that were made apart, in the order of their problems; [] without any.

  Only reads: a shard may be at work on another machine.

  Args:
    workdir: folder of the run.
    problems: of the curation.
    same: function of a shard's folder that raises ValueError where it is of another curation.

  Raises:
    ValueError: shards are missing or not finished, or of several divisions; says which.
  """
  root = os.path.join(workdir, "curation")
  names = sorted(name for name in (os.listdir(root) if os.path.isdir(root) else ())
                 if re.fullmatch(r"\d{5}-of-\d{5}", name))
  if not names:
    return []
  counts = sorted({int(name.rpartition("-")[2]) for name in names})
  if len(counts) > 1:
    raise ValueError(f"{root} holds shards of {', '.join(map(str, counts))}; keep one division")
  files, missing = [], []
  for number in range(counts[0]):
    folder = shard_folder(workdir, (number, counts[0]))
    files.append(os.path.join(folder, FILE))
    if complete_lines(files[-1])[0] < len(shard_numbers(problems, (number, counts[0]))):
      missing.append(f"{number}/{counts[0]}")
    else:
      same(folder)
  if missing:
    raise ValueError(f"{root}: the shards {', '.join(missing)} are missing or not finished; "
                     f"train with --curate={missing[0]} makes one")
  return files


def read_problems(files):
  """The problems of files, one after the other."""
  for path in files:
    with open(path, encoding="utf-8") as file:
      yield from map(json.loads, file)
