"""Truths that no answer can meet are told from those that one can."""

import json

import pytest
from public import public

from ares_jax.data.validation import no_answer


@pytest.mark.parametrize("truth, words", [
  ("<answer> 3 </answer>", "tag"), ("<b>3</b>", "tag"), ("3</s>", "tag"), ("3<|im_end|>", "tag"),
  ("1 + 2\n#### 3", "####"), ("So $x = \\boxed{3}$.", "a box inside"), ("3\n4", "several lines"),
  ("First 1.\r\nThen 3.", "several lines"), ('{"answer": 3}', "an object or a list"),
  ("['3', '4']", "an object or a list"), ("= 3", "signs"), ("`3`", "signs"),
  ("Option B", "in words"), ("choice (c).", "in words"), ("The answer is 3", "sentence"),
  ("the final answer: 3", "sentence"), ("Answer: 3", "sentence"), ("答案是3", "sentence"),
  ("\\text{The answer is 3}", "sentence"), ("So the correct answer is 3.", "sentence"),
  ("nan", "missing"), ("NaN", "missing"), ("null", "missing"), ("<NA>", "missing"),
  ("\\boxed{}", "missing"), ("$\\text{ }$", "missing"), ("...", "missing"), ("?", "missing"),
  ("Therefore, 3", "sentence"), ("It is 3.", "sentence"), ("There are 12 apples.", "sentence")])
def test_a_text_around_a_value_is_no_answer(truth, words):
  assert words in no_answer(truth)


@pytest.mark.parametrize("truth", [
  "3", " 3\n", "\\boxed{3}", "$\\boxed{3}$", "\\begin{pmatrix} 1\n2 \\end{pmatrix}",
  "a < b > c", "x<y", "<br>", "[1, 2]", "\\{1, 2\\}", "{1, 2}",
  "Nan", "none", "None", "N/A", "NA", "undefined value", "<", ">", "+", "\\times", "{1}",
  "x = 3", "It rains", "answer 3", "so", "Sohail",
  "option", "the result", "He", "10:30", "B", "(B)", "yes", "1 < x <= 2", "f(x) = |x|", "C#",
  "A|B"])
def test_other_truths_are_left_to_the_grader(truth):
  assert no_answer(truth) is None


def test_published_truths_are_not_taken_for_sentences():
  with public("grader_pairs/pairs.jsonl").open(encoding="utf-8") as lines:
    golds = [json.loads(line)["gold"] for line in lines]
  texts = {text for gold in golds for text in ([gold] if isinstance(gold, str) else gold)}
  assert sum(map(bool, map(no_answer, texts))) <= 3 and len(texts) > 1000
