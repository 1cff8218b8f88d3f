"""The scripts in examples/ do what their pages say."""

import importlib.util
import json
import pathlib
import types

import numpy as np
import pytest
from public import public

from ares_jax.grading.answer import same_answer
from ares_jax.grading.response import extract_boxed, well_formed

SMOLLM2 = pathlib.Path(__file__).parent.parent / "examples" / "smollm2"


def module(name):
  spec = importlib.util.spec_from_file_location(name, SMOLLM2 / f"{name}.py")
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


def test_a_gsm8k_solution_is_a_response_in_words_and_one_in_calculations():
  row = module("problems").gsm8k_row({
    "question": "How many?", "answer": "He had 2*500=<<2*500=1000>>1000.\nThen 1.\n#### 1,000"})
  assert row["answer"] == "1000"
  assert row["responses"] == [
    "<think>\nHe had 2*500=1000.\nThen 1.\n</think>\n\\boxed{1000}",
    "<think>\n2*500 = 1000\n</think>\n\\boxed{1000}"]


def test_published_problems_have_right_responses_and_no_variant_is_learnt_and_tested(tmp_path):
  problems = module("problems")
  problems.write_all(public("gsm8k"), public("svamp") / "SVAMP.json", tmp_path / "data", rows=500)
  rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()]
          for path in (tmp_path / "data").iterdir()}
  assert {name: len(found) for name, found in rows.items()} == {
    "gsm8k_test": 300, "svamp_test": 300, "solutions": 500, "rl": 699, "sft": 1199}
  for row in rows["sft"] + rows["svamp_test"] + rows["gsm8k_test"]:
    for text in row["responses"]:
      assert well_formed(text) and same_answer(extract_boxed(text), row["answer"])
  assert not ({row["group"] for row in rows["rl"]} & {row["group"] for row in rows["svamp_test"]})


@pytest.mark.parametrize("response, right", [
  ("So 1,5 is 18 + 1,234 = 1,252.", True), ("#### 1252\nThe answer is: 1252", True),
  ("1252 of 3", False), ("none", False), ("", False)])
def test_the_last_number_of_an_answer_counts(response, right):
  assert module("last_number").verdicts([{"response": response, "truths": ["1252"]}]) == [right]


def test_rows_of_rotated_pairs_are_put_back_in_halves():
  # llama.cpp's row 2i and 2i + 1 of a head are Hugging Face's i and i + half.
  rows = np.arange(8)[:, None]
  np.testing.assert_array_equal(module("convert").unpaired(rows, heads=2)[:, 0],
                                [0, 2, 1, 3, 4, 6, 5, 7])


def test_the_tokenizer_of_a_gguf_file_splits_digits_and_knows_its_control_tokens():
  words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "1", "2", "Ġ", "aa", "12"]
  fields = {"tokens": words, "token_type": [3, 3, 3, 1, 1, 1, 1, 1, 1], "merges": ["a a", "1 2"],
            **{f"{name}_token_id": index for name, index in
               dict(bos=1, eos=2, padding=2, unknown=0).items()}}
  fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items()} | {
    "tokenizer.chat_template": "{{ messages }}"}
  reader = types.SimpleNamespace(fields={
    name: types.SimpleNamespace(contents=lambda value=value: value)
    for name, value in fields.items()})
  tokenizer = module("convert").tokenizer(reader)
  assert tokenizer("aa 12<|im_end|>")["input_ids"] == [7, 6, 4, 5, 2]
  assert tokenizer.decode([7, 6, 4, 5, 2], skip_special_tokens=True) == "aa 12"


def test_the_table_shows_what_there_is_and_that_the_rest_is_not_measured(tmp_path, capsys):
  folder = tmp_path / "cold"
  folder.mkdir()
  part = dict(accuracy=0.25, interval=0.05, n=30, length=41.6)
  (folder / "results.json").write_text(json.dumps({"warmup": {
    "greedy": part, "sampled": part, "bucket": {"easy": part, "medium": part | {"n": 0}}}}))
  (folder / "metrics.jsonl").write_text(json.dumps(
    {"stage": "warmup", "step": 1, "seconds/step": 3.0, "seconds/update": 2.0}) + "\n")
  module("table").main(tmp_path)
  lines = capsys.readouterr().out.splitlines()
  assert "| warm-up | 25.0% ± 5.0 | 25.0% ± 5.0 | - | 30 / 42 | - | - |" in lines
  assert "| AEPO | - | - | - | - | - | - |" in lines
  assert "| warm-up | 1 | - | - | - | 2 | 3 |" in lines
