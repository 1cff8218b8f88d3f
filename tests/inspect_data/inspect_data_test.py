"""The command that shows a config's data, on the embedded problem and on hostile rows."""

import functools
import json
import re

import data_files as files
import pytest
import tiny
from PIL import Image

from ares_jax.data import digits, validation
from ares_jax.data.bad_row import BadRow
from ares_jax.data.chat import Chat
from ares_jax.data.prompts import Encoder, PromptConfig
from ares_jax.data.sources import FileSource, SourceConfig
from ares_jax.inspect_data import page, summary
from ares_jax.inspect_data.__main__ import STAGES, inspect
from ares_jax.run import setup

TOKENIZER = digits.tokenizer()
ENCODER = Encoder(Chat(TOKENIZER, "", TOKENIZER.convert_tokens_to_ids("<|image_pad|>")),
                  PromptConfig("", (40,), (4,), 28 * 28, 56 * 56), window=28, patch=14, merge=2)
EVIL = '</pre><script>alert("x")</script><img src=x onerror=alert(1)>'


class Truths:
  """A grader to which every truth is right."""

  name = "layered"

  def bad_truths(self, rows):
    return []


def examine(rows, numbers, measure):
  return validation.examine(rows, numbers=numbers, measure=measure, check=ENCODER.encode,
                            grader=Truths(), threads=2)


def summarize(rows, count):
  return summary.summarize(rows, ENCODER, rows=count, examine=functools.partial(examine, rows))


def example(rows):
  found, = examine(rows, [0], lambda row, prompt: (row, prompt))
  return page.example_html(found, ENCODER)


def source(folder, records):
  return FileSource(SourceConfig(files.jsonl(folder / "d.jsonl", records), "plain", "", 1.0))


def test_counts_lengths_images_and_bad_rows(tmp_path):
  (tmp_path / "a.png").write_bytes(files.png(7, (28, 56)))
  records = [{"question": "<image>red", "answer": "3", "images": ["a.png"], "source": "s"},
             {"question": "red", "answer": "3", "response": "red"}, {"question": "red"},
             {"question": "red " * 60, "answer": "3"}]
  rows = source(tmp_path, records)
  found = summarize(rows, 0)
  assert found.looked_at == 4 and dict(found.sources) == {"s": 1, "d": 1}
  assert {code: count for (code, _), count in found.bad.items()} == {"answer": 1, "length": 1}
  assert found.images == [(28, 56)] and found.image_tokens == [2, 0]
  assert found.tokens == [len(ENCODER.encode(rows[number]).tokens) for number in (0, 1)]
  assert found.responses == [2]
  words = summary.summary_text("warmup", rows, found, limit=40, group=8, answer=100)
  assert "warmup: 4 rows, 4 read" in words and "largest 56 x 28" in words
  assert "CANNOT BE USED (answer): 1 rows, the first: row d.jsonl:2: the answer is None" in words
  assert f"tokens in an epoch: {sum(found.tokens) + 2} of prompts and responses" in words


def test_what_is_not_read_is_listed(tmp_path):
  rows = source(tmp_path, [{"question": "red", "answer": "3", "kind": "x", "\x1b[2J": 1},
                           {"question": "red", "answer": "3", "kind": "y"}])
  words = summary.summary_text("rl", rows, summarize(rows, 0), limit=40, group=8, answer=100)
  assert "  not read: column 'kind': 2 rows" in words
  assert "  not read: column '\\x1b[2J': 1 rows" in words and "\x1b" not in words
  assert "images: 0 of 2 rows have images" in words


def test_a_truth_that_no_answer_meets_cannot_be_used(tmp_path):
  truths = ["<answer>3</answer>", "1 + 2\n#### 3", "3\n4", "The answer is 3.", "So it is 3."]
  fine = ["3", "\\begin{pmatrix} 1\n2 \\end{pmatrix}", "a < b > c", "It rains", "answer 3"]
  rows = source(tmp_path, [{"question": "red", "answer": truth} for truth in truths + fine])
  found = summarize(rows, 0)
  assert [(code, count) for (code, _), count in found.bad.items()] == [("truth", 5)]
  assert "has a tag; give the value alone" in next(iter(found.bad))[1]


def test_a_stage_without_a_row_to_use_ends_with_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(setup.RunData, "examine", lambda self, kind, numbers, measure: (
    validation.Examined(number, bad=BadRow(str(number), "answer", "none")) for number in numbers))
  with setup.open_run(tiny.read(), check=False) as parts:
    with pytest.raises(ValueError, match="^no row of rl, eval can be used"):
      inspect(parts, str(tmp_path), rows=2, stages=("rl", "eval"))


def test_a_sample_of_rows_is_spread_and_scaled_up(tmp_path):
  rows = source(tmp_path, [{"question": "red", "answer": "3"}] * 100)
  found = summarize(rows, 10)
  assert found.looked_at == 10 and list(summary.spread(100, 10)) == list(range(0, 100, 10))
  words = summary.summary_text("rl", rows, found, limit=40, group=8, answer=100)
  assert "at most 80.0 k of answers (8 of up to 100 to each prompt)" in words
  assert f"{found.tokens[0] * 100} of prompts" in words


def test_bars_have_the_counts_of_their_range():
  lines = summary.text_bars([1, 1, 1, 5])
  assert sum(int(line.split()[-1]) for line in lines) == 4 and lines[0].count("#") == 40
  assert len(summary.text_bars([3, 3])) == 1


@pytest.mark.parametrize("field", ["question", "answer", "id", "source", "response"])
def test_text_of_rows_is_escaped(tmp_path, field):
  record = {"question": "red", "answer": "3", "response": "r"} | {field: EVIL}
  shown = page.inspect_html({}, [(EVIL, EVIL, [example(source(tmp_path, [record]))])])
  assert "<script" not in shown and "onerror=alert(1)&gt;" in shown
  assert set(re.findall(r"<(/?\w+)", shown)) <= {
    "html", "/html", "meta", "title", "/title", "style", "/style", "h1", "/h1", "h2", "/h2", "h3",
    "/h3", "p", "/p", "pre", "/pre", "code", "/code", "article", "/article"}


def test_a_bad_row_is_shown_with_its_reason(tmp_path):
  shown = example(source(tmp_path, [{"question": "red", "answer": EVIL, "images": ["b.png"]}]))
  assert "cannot be used: row d.jsonl:0" in shown
  assert "b.png" in shown and "<script" not in shown


def test_the_command_shows_every_stage(tmp_path, capsys):
  with setup.open_run(tiny.read(), check=False) as parts:
    inspect(parts, str(tmp_path), rows=8, stages=STAGES)
  printed = capsys.readouterr().out
  for stage, rows in (("warmup", 16), ("sft", 8), ("rl", 64), ("eval", 8)):
    assert f"{stage}: {rows} rows, 8 read" in printed
    assert Image.open(tmp_path / f"{stage}_lengths.png").size == (1280, 640)
  shown = (tmp_path / "index.html").read_text()
  assert shown.count("<article>") == 10 + 8 + 10 + 8
  drills = len(re.findall(r"<pre>Compute [a-z]+\d", shown))  # of the warm-up, without a picture
  assert shown.count('src="data:image/png;base64,') == 10 + 8 + 10 + 8 - drills + len(STAGES)
  assert json.dumps("max_tokens").strip('"') in shown
