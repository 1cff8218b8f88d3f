"""Published files of benchmarks, whole; skipped where these files are not at hand."""

import json
import re

import pytest
import writings
from public import public

from ares_jax.evaluation.benchmarks import benchmark_schemas, open_benchmark
from ares_jax.evaluation.graded import within_tolerance
from ares_jax.grading.answer import Truth, same_answer

# benchmark, file or folder, rows, rows with images
FILES = [
  ("mathverse", "mathverse", 788, 0),
  ("mathverse", "mathverse/output_testmini_5rows.json", 5, 5),
  ("mathverse_v", "mathverse/output_testmini_5rows.json", 1, 1),
  ("mathvision", "mathvision", 304, 304),
  ("mathvision", "mathvision/data/odd_rows.jsonl", 6, 6),
  ("mathvista", "mathvista", 1000, 1000),
  ("dynamath", "dynamath", 501, 501),
  ("charxiv", "charxiv", 1000, 1000),
  ("charxiv_descriptive", "charxiv", 4000, 4000),
  ("mmmu_pro", "mmmu_pro/data.jsonl", 21, 21),
  ("math500", "math500", 500, 0),
  ("gsm8k", "gsm8k", 1319, 0),
  ("svamp", "svamp", 1000, 0),
]


def read(name, place, folder):
  """The Benchmark of a published file; images that are not at hand are empty files in `folder`."""
  path = public(place)
  for file in ([path] if path.is_file() else [*path.glob("*.json*"), *path.glob("data/*.json*")]):
    text = file.read_text(encoding="utf-8")
    loaded = (json.loads(text) if file.suffix == ".json"
              else [json.loads(line) for line in text.splitlines()])
    for record in loaded.values() if isinstance(loaded, dict) else loaded:
      if not isinstance(record, dict):
        continue
      columns = ["image", *(f"image_{number}" for number in range(1, 8))]
      named = [record[column] for column in columns if record.get(column)]
      for image in named or [f"{record.get('figure_id')}.jpg"]:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).touch()
  return open_benchmark(name, str(path), str(folder))


@pytest.mark.parametrize("name, place, rows, with_images", FILES)
def test_every_published_row_is_read(tmp_path, name, place, rows, with_images):
  benchmark = read(name, place, tmp_path)
  assert (len(benchmark.rows), len(benchmark.skipped)) == (rows, 0)
  assert sum(bool(row["images"]) for row in benchmark.rows) == with_images
  assert len({row["id"] for row in benchmark.rows}) == rows
  assert "columns" in benchmark_schemas()[name] and all(row["answer"] for row in benchmark.rows)


def test_dynamaths_numbers_are_right_with_the_three_decimals_it_asks_for(tmp_path):
  count = 0
  for row in read("dynamath", "dynamath", tmp_path).rows:
    if re.fullmatch(r"-?[0-9.]+", row["answer"][0]) and not row["options"]:
      number, count = float(row["answer"][0]), count + 1
      assert within_tolerance(row, f"\\boxed{{{number:.3f}}}")
      assert not within_tolerance(row, f"\\boxed{{{number + 0.002:.4f}}}")
  assert count == 297


@pytest.mark.parametrize("name, place, words", [
  ("charxiv", "charxiv", "1000 of 1000 rows of 'charxiv' lack an image; the first: row "
                         "reasoning_val.json:0: image '0.jpg' is in none of the folders"),
  ("mmmu_pro", "mmmu_pro/standard10_text_head.jsonl",
   "400 of 400 rows of 'mmmu_pro' lack an image; the first: row standard10_text_head.jsonl:0: "),
  ("mathvision", "mathvision", "103 of 304 rows of 'mathvision' lack an image; the first: row "
                               "testmini.jsonl:1: image 'images/5.jpg'"),
])
def test_published_files_without_their_images_are_refused(name, place, words):
  with pytest.raises(ValueError, match=words):
    open_benchmark(name, str(public(place)))


def is_right(said, row):
  return same_answer(said, Truth.of(row)) or within_tolerance(row, f"\\boxed{{{said}}}")


@pytest.mark.slow
@pytest.mark.parametrize("name, place", [file[:2] for file in FILES])
def test_other_writings_of_each_truth_are_right_and_other_options_wrong(tmp_path, name, place):
  refused, accepted = [], []
  for row in read(name, place, tmp_path).rows:
    said = writings.right_writings(row)
    assert len(said) >= 2, row["answer"]
    refused += [(row["id"], text, row["answer"]) for text in said if not is_right(text, row)]
    accepted += [(row["id"], text, row["answer"]) for text in writings.wrong_writings(row)
                 if is_right(text, row)]
  assert (refused, accepted) == ([], [])
