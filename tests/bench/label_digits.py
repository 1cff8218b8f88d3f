"""Labels the logged answers of a digits run by what the generator knows, for `diagnose hwe`.

    python -m tests.bench.label_digits --workdir=runs/ares_tiny --kind=turn > turns.jsonl
    python -m ares_jax.diagnose hwe --workdir=runs/ares_tiny --labels=turns.jsonl

turn: "wait" and the token after it, where an answer corrects or checks itself.
false: readings that are not what the picture shows, and sums that do not follow from the line.
"""

import argparse
import json
import pathlib

from ares_jax.data.digits import COLOURS, DigitsConfig, DigitsSource, encipher
from ares_jax.run.files import require_json


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--kind", choices=("turn", "false"), required=True)
  options = parser.parse_args()
  config = DigitsConfig(**require_json(options.workdir, "config.json")["data"]["digits"]["problem"])
  for text in (options.workdir / "rollouts.jsonl").open():
    line = json.loads(text)
    if options.kind == "turn":
      found = turns(line["tokens"])
    else:
      _, split, seed, index = line["id"].split("-")
      row = DigitsSource(config, split, int(seed), int(index) + 1)[int(index)]
      found = false_tokens(line["tokens"], row)
    print(json.dumps({key: line[key] for key in ("step", "id", "sample")} | {"triggers": found}))


def turns(tokens):
  """Indices of "wait" and of the token after each."""
  found = [index for index, token in enumerate(tokens) if token == " wait"]
  return sorted({*found, *(index + 1 for index in found if index + 1 < len(tokens))})


def false_tokens(tokens, row):
  """Indices of digits in the working that are false readings, or false sums of the line so far.

  A sum is compared with the readings as written, so that one error is one label.
  """
  cells, key = dict(row["cells"]), None
  found, colour, sign, total, term = [], None, "+", None, None
  for index, token in enumerate(tokens):
    before = tokens[index - 1] if index else ""
    if token == " </think>":
      break
    if token == " check" and before == " wait":
      key, sign, total, term = row.get("key"), "+", None, None
    elif token.strip() in COLOURS:
      colour = token.strip()
    elif token in (" +", " -"):
      sign = token.strip()
    elif token.isdigit():
      digit = int(token)
      if before.strip() in COLOURS:  # a reading
        shown = cells.get(colour) if key is None else encipher(cells.get(colour, 0), key)
        if digit != shown:
          found.append(index)
        term = digit if key is None else None
      elif key is not None and term is None:  # a copy without its key
        term = digit
        if digit != cells.get(colour):
          found.append(index)
      elif total is not None and term is not None:  # a sum, or its correction after "wait"
        if digit != (total + term if sign == "+" else total - term) % 10:
          found.append(index)
        if index + 1 == len(tokens) or tokens[index + 1] != " wait":
          total = digit
        continue
      if total is None:
        total = term
  return found


if __name__ == "__main__":
  main()
