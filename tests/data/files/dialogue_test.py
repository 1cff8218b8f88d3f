"""Dialogues as LLaMA-Factory, Qwen, OpenAI and ShareGPT write them, whole or refused."""

import json

import numpy as np
import pytest
from public import public

from ares_jax.data.bad_row import BadRow
from ares_jax.data.files.records import open_records
from ares_jax.data.files.schema import read_row, read_schemas, with_columns

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def read(messages, *, truth=False, schema="sharegpt", **columns):
  return read_row(read_schemas()[schema], {"messages": messages, **columns}, location="d.jsonl:0",
                  name="d", folder="f", truth=truth)


def test_a_dialogue_keeps_its_turns():
  row = read([{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"},
              {"from": "gpt", "value": "Hello"}, USER, ANSWER])
  assert row["question"] == "Why?" and row["response"] == "Because." and row["answer"] == []
  assert row["history"] == [{"role": "system", "content": "Be brief."},
                            {"role": "user", "content": "Hi"},
                            {"role": "assistant", "content": "Hello"}]
  assert read([USER, ANSWER], system="Be brief.")["history"] == [
    {"role": "system", "content": "Be brief."}]
  own = {"role": "system", "content": "Be kind."}
  assert read([own, USER, ANSWER], system="")["history"] == [own]
  assert "history" not in read([USER, ANSWER]) and "response" not in read([USER])


def test_messages_may_be_json_in_a_text():
  for text in (json.dumps([USER, ANSWER]), str([USER, ANSWER]), f" {[USER, ANSWER]}",
               json.dumps([USER, ANSWER]).encode()):
    assert read(text) == read([USER, ANSWER])
  with pytest.raises(BadRow, match="its messages .* are no list: SyntaxError"):
    read(str(np.array([USER, ANSWER])))
  assert read('[{"a": 1}]', schema="ares_coldstart")["question"] == '[{"a": 1}]'


def test_an_answer_without_a_box_is_no_truth():
  with pytest.raises(BadRow, match="has no .boxed.* by the schema plain .*Only data.files.warmup"):
    read([USER, ANSWER], truth=True)
  plain = with_columns(read_schemas()["plain"], {"question": ["messages"], "answer": ["truth"]})
  row = read_row(plain, {"messages": [USER, ANSWER], "truth": 3}, location="", name="", folder="f")
  assert (row["question"], row["answer"], row["response"]) == ("Why?", ["3"], "Because.")
  text = f"{[USER]} What does this print?"
  row = read_row(plain, {"messages": text, "truth": 3}, location="", name="", folder="f")
  assert row["question"] == text
  assert read([USER, {"role": "assistant", "content": "\\boxed{3}"}], truth=True)["answer"] == ["3"]


@pytest.mark.parametrize("image", [
  {"type": "image", "image": "a.png"}, {"type": "image_url", "value": "a.png"}, {"image": "a.png"},
  {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "image", "path": "a.png"},
  {"type": "image", "image": None, "url": "file:///f/a.png"}])
def test_a_part_may_hold_its_image(image):
  if image.get("url"):
    row = read_row(read_schemas()["sharegpt"], {"messages": [
      {"role": "user", "content": [image]}]}, location="", name="", folder="/f", truth=False)
    assert row["images"] == ["/f/a.png"]
    return
  row = read([{"role": "user", "content": [{"type": "text", "text": "See "}, image, "?"]}, ANSWER])
  assert row["question"] == "See <image>?" and row["images"] == ["f/a.png"]


def test_a_part_may_stand_for_the_next_image_of_the_column():
  row = read([{"role": "user", "content": [{"type": "image"}, {"type": "text", "value": "?"}]}],
             images=["a.png"])
  assert row["question"] == "<image>?" and row["images"] == ["f/a.png"]


@pytest.mark.parametrize("messages, code, words", [
  ([USER, USER], "question", "its turns are user, user"),
  ([ANSWER, USER], "question", "its turns are assistant, user"),
  ([{"role": "system", "content": "s"}], "question", "its turns are system"),
  ([], "question", "its turns are none"),
  ([USER, {"role": "assistant", "content": ""}, USER], "question", "a turn before .* is empty"),
  ([{"role": "tool", "content": "3"}], "question", "of the role 'tool' is not read"),
  ([{"content": "3"}], "question", "of the role None"),
  ([{"role": {"a": 1}, "content": "3"}], "question", "of the role {'a': 1}"),
  (["q"], "question", "a message is 'q' .str."),
  ([{"role": "user", "content": None}], "question", "content of a turn is None"),
  ([USER, ANSWER | {"tool_calls": [{"id": 1}]}], "question", "calls of tools are not read"),
  ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "video", "'video'"),
  ([{"role": "user", "content": [{"type": "input_audio"}]}], "video", "not supported"),
  ([{"role": "user", "content": [{"type": "file", "file": "x"}]}], "question", "the type 'file'"),
  ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "question", "one text is needed"),
  ([{"role": "user", "content": "<video>Why?"}], "video", "the mark <video>"),
  ([{"role": "user", "content": "<audio>Why?"}, ANSWER, USER], "video", "the mark <audio>"),
  ([USER, {"role": "assistant", "content": [{"image": "a.png"}]}], "marks", "'assistant' holds an"),
  ([{"role": "system", "content": [{"image": "a.png"}]}, USER], "marks", "'system' holds an image"),
])
def test_a_turn_that_cannot_be_read_is_a_bad_row(messages, code, words):
  with pytest.raises(BadRow, match=words) as error:
    read(messages)
  assert error.value.code == code


def test_an_image_mark_outside_of_questions_is_a_bad_row_where_it_would_move_the_image():
  system, shown = {"role": "system", "content": "<image>"}, ANSWER | {"content": "See <image>."}
  for messages in ([system, USER], [USER, shown], [USER, shown, USER, ANSWER]):
    with pytest.raises(BadRow, match="an image mark stands in the system turn or in an answer"):
      read(messages, images=["a.png"])
    assert read(messages)["images"] == []  # without images a mark is a text
  marked = USER | {"content": "<image>Why?"}
  assert read([marked, shown], images=["a.png"])["images"] == ["f/a.png"]


def test_images_in_parts_and_in_a_column_are_a_bad_row():
  with pytest.raises(BadRow, match="its messages hold 1 images and its columns 1"):
    read([{"role": "user", "content": [{"image": "a.png"}]}], images=["b.png"])


def test_keys_of_messages_that_are_not_read_are_counted():
  row = read([USER | {"name": "Jo", "weight": None}, ANSWER | {"loss_weight": 0.5}], tag="x")
  assert row["left_out"] == ["'name' of messages", "'loss_weight' of messages", "column 'tag'"]
  row = read([USER | {"from": "gpt", "value": "What?"}, ANSWER])
  assert row["question"] == "Why?" and row["left_out"] == [
    "'from' of messages", "'value' of messages"]
  row = read([{"role": "user", "content": [{"image": "a.png", "max_pixels": 9}]}])
  assert row["left_out"] == ["'max_pixels' of parts of messages"]


@pytest.mark.parametrize("name, rows, histories", [
  ("llamafactory_demo/mllm_demo.json", 6, 6),
  ("llamafactory_demo/v1_multimodal_demo.jsonl", 24, 24),
  ("qwen_vl_finetune_demo/single_images.json", 3, 0)])
def test_published_dialogues_are_learnt_whole(name, rows, histories):
  records = open_records(public(name))
  found = [read_row(read_schemas()["sharegpt"], records[number], truth=False, name="demo",
                    location=records.location(number), folder=records.folder)
           for number in range(len(records))]
  assert len(found) == rows and sum("history" in row for row in found) == histories
  for number, row in enumerate(found):
    turns = [*row.get("history", ()), {"content": row["question"]}, {"content": row["response"]}]
    texts = [turn["content"] for turn in turns]
    told = json.dumps(records[number], ensure_ascii=False)
    assert all(json.dumps(text, ensure_ascii=False)[1:-1].replace("<image>", "") in
               told.replace("<image>", "") for text in texts)
    assert sum(text.count("<image>") for text in texts) == len(row["images"]) >= 1
    assert not row["left_out"]
