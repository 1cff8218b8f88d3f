"""Writes the problems of this example as JSON lines: GSM8K's and SVAMP's, to learn and to test.

    python examples/smollm2/problems.py --gsm8k=FOLDER --svamp=SVAMP.json --out=data

FOLDER is grade_school_math/data of github.com/openai/grade-school-math, with train.jsonl and
test.jsonl; SVAMP.json is that of github.com/arkilpatel/SVAMP. The files that are written:
  gsm8k_test.jsonl  the first 300 of GSM8K's test part
  svamp_test.jsonl  300 of SVAMP's 1000 problems
  solutions.jsonl   GSM8K's training part with its own solutions, for the warm-up
  sft.jsonl         training problems of both with one or two right responses each, for AdaCS
  rl.jsonl          SVAMP's of them
SVAMP varies about 100 problems, and SVAMP.json mixes the variants. Those with most of their words
in common are a group here, and a group is either learnt or tested.
"""

import argparse
import json
import pathlib
import random
import re

CALCULATED = re.compile(r"<<([^<>=]*)=([^<>]*)>>")  # GSM8K's notes for a calculator
TEST = 300  # problems of each set that are never trained on


def main():
  words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  words.add_argument("--gsm8k", required=True, help="folder with train.jsonl and test.jsonl")
  words.add_argument("--svamp", required=True, help="SVAMP.json")
  words.add_argument("--rows", type=int, default=500, help="training problems of GSM8K")
  words.add_argument("--out", required=True, help="folder to write")
  words = words.parse_args()
  write_all(pathlib.Path(words.gsm8k), pathlib.Path(words.svamp), pathlib.Path(words.out),
            rows=words.rows)


def write_all(gsm8k, svamp, out, *, rows):
  """Writes the files; `rows` is the number of GSM8K's training problems."""
  names = [gsm8k / name for name in ("train.jsonl", "train_head.jsonl")]
  train = read_lines(next(name for name in names if name.is_file()))[:rows]
  svamp = svamp_rows(json.loads(svamp.read_text("utf-8")))
  out.mkdir(parents=True)
  write(out / "gsm8k_test.jsonl", map(gsm8k_row, read_lines(gsm8k / "test.jsonl")[:TEST]))
  write(out / "svamp_test.jsonl", svamp[-TEST:])
  solutions = [gsm8k_row(line) for line in train]
  write(out / "solutions.jsonl", [row | {"response": row["responses"][0]} for row in solutions])
  tested = {row["group"] for row in svamp[-TEST:]}
  learnt = [row for row in svamp if row["group"] not in tested]
  write(out / "rl.jsonl", learnt)
  mixed = solutions + learnt
  random.Random(0).shuffle(mixed)
  write(out / "sft.jsonl", mixed)


def read_lines(path):
  return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def gsm8k_row(line):
  """A row of the schema "plain": its responses are the solution, and its calculations alone."""
  solution, _, answer = line["answer"].rpartition("\n####")
  answer = answer.strip().replace(",", "")
  steps = [f"{left} = {right}" for left, right in CALCULATED.findall(solution)]
  texts = [CALCULATED.sub("", solution), *(["\n".join(steps)] if steps else [])]
  return {"source": "GSM8K", "question": line["question"], "answer": answer,
          "responses": [response(text, answer) for text in texts]}


def svamp_rows(lines):
  """Rows of the schema "plain" in the order of their groups, which is random."""
  groups = grouped(lines)
  rows = [svamp_row(line) | {"group": group} for line, group in zip(lines, groups, strict=True)]
  names = sorted(set(groups))
  random.Random(0).shuffle(names)
  return sorted(rows, key=lambda row: names.index(row["group"]))


def grouped(lines, alike=0.55):
  """For each problem the id of the first one of its group.

  Two problems are of one group where `alike` of the words of both are in either, or where a third
  one joins them: 107 groups, about as many as the problems that SVAMP varies.
  """
  words = [frozenset(re.findall("[a-z]+", f"{line['Body']} {line['Question']}".lower()))
           for line in lines]
  first = list(range(len(lines)))
  for one in range(len(lines)):
    near = {first[other] for other in range(one)
            if len(words[one] & words[other]) >= alike * len(words[one] | words[other])}
    if near:
      first = [min(near) if number in {*near, one} else number for number in first]
  return [lines[number]["ID"] for number in first]


def svamp_row(line):
  """A row whose response is the equation."""
  answer = f"{line['Answer']:g}"
  equation = re.sub(r"\.0\b", "", line["Equation"]).removeprefix("( ").removesuffix(" )")
  return {"id": line["ID"], "source": "SVAMP", "level": line["Type"],
          "question": f"{line['Body'].rstrip(' .')}. {line['Question']}", "answer": answer,
          "responses": [response(f"{equation} = {answer}", answer)]}


def response(thought, answer):
  return f"<think>\n{thought}\n</think>\n\\boxed{{{answer}}}"


if __name__ == "__main__":
  main()
