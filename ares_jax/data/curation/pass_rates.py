"""Pass rates of problems: from a column of the data, or from files that a probe wrote.

A file has a line for each problem: {"problem": its number, "id", "source", "passes": right answers
of CurateConfig.samples, "tokens": [length of each response, null for a wrong one]}. It is in the
run's folder; files of shards that were made separately are in folders under curation/.
"""

import json
import os
import re

from ares_jax.data.bad_row import BadRow

FILE = "curation.jsonl"


def column_passes(row, samples):
  """Number of right answers of `samples` that is nearest to the row's "pass_rate", 0 to 1.

  BadRow where the pass rate is missing, below 0 (not measured), or not such a number.
  """
  rate = row.get("pass_rate")
  if rate is None or (isinstance(rate, float | int) and rate < 0):
    raise BadRow(row["id"], "pass_rate", f"its pass rate is {rate}: not measured; leave the row "
                 "out, or set curate.pass_rates = 'probe'")
  if isinstance(rate, bool) or not isinstance(rate, float | int) or not rate <= 1:
    raise BadRow(row["id"], "pass_rate", f"its pass rate is {rate!r}; a number from 0 to 1 is "
                 "needed")
  return round(rate * samples)


def candidate_responses(row):
  """The list of a teacher's responses of a row; BadRow where it has none."""
  found = row.get("responses") or ([row["response"]] if row.get("response") else [])
  if not found:
    raise BadRow(row["id"], "response", "has no 'responses', a list of a teacher's candidate "
                 "answers, nor a 'response'; AdaCS selects among them")
  if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
    raise BadRow(row["id"], "response", "its candidate answers are not a list of texts; "
                 "'responses' is a list, a single answer is a 'response'")
  return found


def complete_lines(path):
  """(number of complete lines of a file, their bytes); the last line may be partly written."""
  count = end = 0
  if os.path.exists(path):
    with open(path, "rb") as file:
      for line in file:
        if line.endswith(b"\n"):
          count, end = count + 1, end + len(line)
  return count, end


def drop_torn_line(path):
  """Number of lines of a file, after cutting off a last line that was not completely written."""
  count, end = complete_lines(path)
  if os.path.exists(path):
    os.truncate(path, end)
  return count


def shard_numbers(problems, shard):
  """Numbers of the problems of a shard (number, shards); ValueError where it can have none.

  They are contiguous, because files are read in groups of rows.
  """
  number, shards = shard
  if not 0 <= number < shards <= problems:
    raise ValueError(f"shard {number} of {shards}: the number must be below {shards}, which must "
                     f"be at most the {problems} problems; change --curate")
  return range(problems * number // shards, problems * (number + 1) // shards)


def shard_folder(workdir, shard):
  """The folder of a shard (number, shards)."""
  return os.path.join(workdir, "curation", "{:05d}-of-{:05d}".format(*shard))


def finished_shards(workdir, problems, check):
  """Files of shards that were made separately, in the order of their problems; [] without any.

  Changes nothing: another machine may still be writing a shard. `problems` is their number, and
  `check` raises ValueError of a shard's folder that belongs to another curation.

  Raises:
    ValueError: shards are missing or not finished, or their numbers of shards differ.
  """
  root = os.path.join(workdir, "curation")
  names = sorted(name for name in (os.listdir(root) if os.path.isdir(root) else ())
                 if re.fullmatch(r"\d{5}-of-\d{5}", name))
  if not names:
    return []
  counts = sorted({int(name.rpartition("-")[2]) for name in names})
  if len(counts) > 1:
    raise ValueError(f"{root} holds shards of {', '.join(map(str, counts))}; keep those of one")
  files, missing = [], []
  for number in range(counts[0]):
    folder = shard_folder(workdir, (number, counts[0]))
    files.append(os.path.join(folder, FILE))
    if complete_lines(files[-1])[0] < len(shard_numbers(problems, (number, counts[0]))):
      missing.append(f"{number}/{counts[0]}")
    else:
      check(folder)
  if missing:
    raise ValueError(f"{root}: the shards {', '.join(missing)} are missing or not finished; "
                     f"make one with train --curate={missing[0]}")
  return files


def read_problems(files):
  """Yields the problems of all files; ValueError, with the remedy, where a line is damaged."""
  for path in files:
    with open(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        try:
          yield json.loads(line)
        except ValueError as error:
          # A problem is found by the number of its line, so later lines have to go too.
          raise ValueError(f"{path} line {number} is not JSON ({error}); remove it and all lines "
                           "behind it: the same command measures them again") from error
