"""Prints the table of docs/data.md: what training reads of published files, and what it refuses.

    ARES_PUBLIC_FILES=FOLDER python -m tests.bench.read_public

Rows are examined as training examines them: read, encoded with their images, truths graded. Of the
images that rows name as files, "images found" counts those that are in the folder.
"""

import collections
import os
import pathlib

from ares_jax.data import digits, validation
from ares_jax.data.chat import Chat
from ares_jax.data.prompts import Encoder, PromptConfig
from ares_jax.data.sources import FileSource, SourceConfig
from ares_jax.grading.pool import GradingPool
from ares_jax.system.config import build

# (data set, file, settings of its source besides path, split and weight)
SOURCES = (
  ("GSM8K", "gsm8k/test.jsonl", dict(schema="gsm8k")),
  ("GSM8K", "gsm8k/train_head.jsonl", dict(schema="gsm8k")),
  ("MATH-500", "math500/test.jsonl", dict(schema="math")),
  ("SVAMP", "svamp/SVAMP.json", dict(schema="plain", columns=dict(
    id="ID", question=("Body", "Question"), answer="Answer", source="Type"))),
  ("MathVision", "mathvision/data/testmini.jsonl", dict(
    schema="plain", images="mathvision", columns=dict(source="subject"))),
  ("MathVerse", "mathverse/testmini_text_only.json", dict(
    schema="plain", columns=dict(id="sample_index", question="query_cot"))),
  ("MathVista", "mathvista/testmini.json", dict(
    schema="plain", join=("mathvista/query_testmini.json",), columns=dict(
      id="pid", question="query_testmini", options="choices", images="image"))),
  ("DynaMath", "dynamath/dataset.json", dict(schema="plain", columns=dict(source="subject"))),
  ("CharXiv", "charxiv/reasoning_val.json", dict(schema="plain", columns=dict(question="query"))),
  ("CharXiv, images by figure_id", "charxiv/reasoning_val.json", dict(
    schema="plain", columns=dict(question="query", images="figure_id"))),
  ("CharXiv, images by figure_path", "charxiv/reasoning_val.json", dict(
    schema="plain", join=("charxiv/image_metadata_val.json",), columns=dict(
      question="query", images="figure_path", source="category"))),
  ("MMMU-Pro", "mmmu_pro/standard10_text_head.jsonl", dict(schema="plain")),
  ("Geometry3K, raw", "geometry3k_raw", dict(schema="geometry3k")),
  ("LLaMA-Factory's demo", "llamafactory_demo/mllm_demo.json", dict(schema="sharegpt")),
  ("the same, learnt", "llamafactory_demo/mllm_demo.json", dict(schema="sharegpt", learnt=True)),
  ("its parts, learnt", "llamafactory_demo/v1_multimodal_demo.jsonl", dict(
    schema="sharegpt", learnt=True)),
  ("Qwen's demo, learnt", "qwen_vl_finetune_demo/single_images.json", dict(
    schema="sharegpt", learnt=True)),
)


def table(folder):
  """Lines of Markdown: each file of SOURCES in the folder of published files."""
  lines = ["| data set | file | rows read | images found | rows used | refused |",
           "| --- | --- | --- | --- | --- | --- |"]
  with GradingPool(workers=1) as grader:
    for name, file, settings in SOURCES:
      lines.append(f"| {name} | {file} | {_cells(folder, file, settings, grader)} |")
  return lines


def _cells(folder, file, settings, grader):
  learnt = settings.get("learnt", False)
  values = {key: value for key, value in settings.items() if key != "learnt"}
  values["join"] = [str(folder / path) for path in values.get("join", ())]
  values["images"] = str(folder / values["images"]) if "images" in values else ""
  values |= dict(path=str(folder / file), split="", weight=1.0)
  config = build(SourceConfig, values, "source")
  try:
    source = FileSource(config, truths=not learnt)
  except ValueError as error:
    return f"0 | 0 | 0 | {_short(error, folder)}"
  tokenizer = digits.tokenizer()
  chat = Chat(tokenizer, "", tokenizer.convert_tokens_to_ids("<|image_pad|>"))
  encoder = Encoder(chat, PromptConfig("", (100_000,), (10_000,), 784, 2**20), window=112, patch=14,
                    merge=2)
  images = []

  def check(row):
    images.extend(map(os.path.isfile, row["images"]))
    return encoder.encode(row)

  examined = list(validation.examine(source, numbers=range(len(source)), check=check, threads=2,
                                     grader=None if learnt else grader))
  reasons = collections.Counter(found.bad.code for found in examined if found.bad)
  read = sum(found.id is not None for found in examined)
  firsts = {found.bad.code: found.bad.reason for found in reversed(examined) if found.bad}
  why = "; ".join(f"{count} {code}, the first: {_short(firsts[code], folder)}"
                  for code, count in reasons.most_common())
  found = f"{sum(images)} of {len(images)}" if images else "none named"
  return (f"{read} of {len(source)} | {found} | {len(source) - reasons.total()} | {why or '-'}")


def _short(reason, folder):
  """The reason without the remedy, and without the path of the published files."""
  return str(reason).replace(str(folder) + os.sep, "").partition(";")[0].replace("|", "/")


if __name__ == "__main__":
  print("\n".join(table(pathlib.Path(os.environ["ARES_PUBLIC_FILES"]))))
