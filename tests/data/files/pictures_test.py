"""An image that a record has is shown, or the row is bad; nothing is dropped unseen."""

import base64
import io
import textwrap

import data_files as files
import numpy as np
import pytest
from PIL import Image
from public import public

from ares_jax.data.bad_row import BadRow
from ares_jax.data.files.records import open_records
from ares_jax.data.files.schema import read_row, read_schemas
from ares_jax.data.images import FORMATS

PNG = files.png()
TEXT = base64.b64encode(PNG).decode()
PUBLISHED = {"columns": {"question": ["question"], "answer": ["answer"],
                         "images": ["image", "image_1", "image_2", "image_3"]},
             "prompt": "{question}"}


def read(schema="plain", **values):
  if isinstance(schema, str):
    schema = read_schemas()[schema]
  asked = "question" if "question" in schema["columns"]["question"] else "problem"
  return read_row(schema, {asked: "q", "answer": "3"} | values,
                  location="d.jsonl:0", name="d", folder="/f")


@pytest.mark.parametrize("column, value", [
  ("imgs", ["a.png"]), ("img", "a"), ("image_path", "g/1"), ("image_paths", ["g/1"]),
  ("decoded_image", {"bytes": PNG, "path": None}), ("picture", b"x"), ("image_0", "x"),
  ("ImageFile", "x"), ("image_id", 5), ("figure_id", 0), ("img_url", "http://x/y"),
  ("figure", "plots/a.JPG"), ("file", "a.webp"), ("data", PNG),
  ("scan", {"path": "a.jpeg", "bytes": None}), ("x", [{"bytes": PNG}]),
  ("x", np.zeros((4, 4, 3), np.uint8)),
  ("x", f"data:image/png;base64,{TEXT}"), ("x", TEXT * 40)])
def test_an_unread_column_of_images_is_a_bad_row(column, value):
  with pytest.raises(BadRow, match=f"the column '{column}' looks like images; name it") as error:
    read(**{column: value})
  assert error.value.code == "unread"
  assert read(**{column: value}, image="b.png")["left_out"] == [f"column {column!r}"]


@pytest.mark.parametrize("value", [
  {"images": ["a.png"]}, {"n": 1, "images": [{"bytes": PNG}]}, {"images": "a"}])
def test_images_inside_of_an_object_are_named_with_its_column(value):
  with pytest.raises(BadRow, match="'x.images' looks like images.*dict.images='x.images'"):
    read(x=value)
  schema = read_schemas()["plain"]
  named = schema | {"columns": schema["columns"] | {"images": ["x.images"]}}
  row = read(named, x=value | {"other": 3})
  assert len(row["images"]) == 1 and "column 'x.other'" in row["left_out"]


@pytest.mark.parametrize("column, value", [
  ("image_width", "640"), ("image_width", 640), ("has_image", True), ("imgs", []),
  ("image_path", ""), ("img_type", "['Diagrams']"), ("picture", None), ("caption", "a.png shows b"),
  ("year", 2020), ("steps", ["a", "b"])])
def test_a_column_of_other_things_is_none(column, value):
  row = read(**{column: value})
  assert row["images"] == [] and row["left_out"] == (
    [] if value in (None, "", []) else [f"column {column!r}"])


@pytest.mark.parametrize("column, value", [
  ("video", "a.mp4"), ("videos", ["a.mp4"]), ("clip", "x/a.MP4"), ("clips", ["a.webm"]),
  ("video_path", "a"), ("audios", ["a.wav"])])
def test_video_and_sound_are_refused(column, value):
  for images in ([], ["a.png"]):
    with pytest.raises(BadRow, match=f"its column '{column}' holds video or sound") as error:
      read(**{column: value}, images=images)
    assert error.value.code == "video"
  assert read(videos=[])["left_out"] == []


@pytest.mark.parametrize("image", [
  f"data:image/png;base64,{TEXT}", {"bytes": f"base64,{TEXT}"}, {"bytes": PNG, "path": "x.png"},
  {"url": f"data:image/png;base64,{TEXT}"}, {"image": PNG}])
def test_an_image_may_be_in_the_record(image):
  assert read(images=[image])["images"] == [PNG]


@pytest.mark.parametrize("schema", ["virl39k", "geometry3k"])
def test_a_row_of_a_set_of_images_needs_one(schema):
  with pytest.raises(BadRow, match="has an image in every row, this row has none") as error:
    read(schema, answer="\\boxed{3}")
  assert error.value.code == "image_missing"


@pytest.mark.parametrize("form", FORMATS)
def test_base_64_without_a_head_is_told_by_how_it_begins(form):
  file = io.BytesIO()
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), np.uint8)).save(file, form)
  whole = base64.b64encode(file.getvalue()).decode()
  for text in (whole, "\n".join(textwrap.wrap(whole, 64))):
    for image in (text, {"bytes": text}):
      assert read(image=image)["images"] == [file.getvalue()]
    with pytest.raises(BadRow, match="the column 'x' looks like images"):
      read(x=text)
  assert read(image=TEXT[:50] + ".png")["images"] == [f"/f/{TEXT[:50]}.png"]


def test_a_file_address_is_a_path():
  assert read(images=["file:///f/a.png", "b.png"])["images"] == ["/f/a.png", "/f/b.png"]


@pytest.mark.parametrize("image, code, words", [
  ("http://host/a.png", "image_missing", "'http://host/a.png' is an address, which is not fetched"),
  ("gs://bucket/a.png", "image_missing", "is an address"),
  ("file:///etc/passwd", "image", "is outside the folder /f; name .* images=FOLDER"),
  ("x" * 5000, "image", "is a text of 5000 letters, 'x+'...: no file name"),
  ("data:image/svg+xml,<svg>", "image", "in base 64 is needed"),
  ("data:image/png;base64,abc", "image", "cannot be decoded"),
  (3, "image_missing", "/f has no file 3.jpg"), (True, "image_missing", "an image is True"),
  ({"bytes": None, "src": "a"}, "image_missing", "an image is {'bytes': None, 'src': 'a'}; bytes")])
def test_an_image_of_another_kind_is_a_bad_row(image, code, words):
  with pytest.raises(BadRow, match=words) as error:
    read(images=[image])
  assert error.value.code == code and len(str(error.value)) < 800


@pytest.mark.parametrize("question, images, words", [
  ("What does <image 1> show?", 0, "the image marks <image 1> but 0 images"),
  ("<image> or <image>?", 1, "the image marks <image>, <image> but 1 images"),
  ("<image>?", 2, "but 2 images"), ("<image 3>?", 2, "but 2 images"),
  ("<image 1> or <image>?", 2, "but 2 images"), ("<image 0>?", 1, "but 1 images")])
def test_a_mark_without_an_image_is_a_bad_row(question, images, words):
  with pytest.raises(BadRow, match=words) as error:
    read(PUBLISHED, question=question, **{f"image_{1 + n}": f"{n}.png" for n in range(images)})
  assert error.value.code == "marks"


def test_marks_choose_among_published_images_and_the_others_are_counted():
  row = read(PUBLISHED, question="<image2> or <image_1>, <image 2>?", image_1="1", image_2="2",
             image_3="3")
  assert row["question"] == "<image> or <image>, <image>?"
  assert row["images"] == ["/f/2", "/f/1", "/f/2"]
  assert row["left_out"] == ["image 3, which no mark names"]
  assert read(PUBLISHED, image="", question="no picture")["images"] == []


@pytest.mark.parametrize("name, schema, bad", [
  ("mmmu_pro/standard10_text_head.jsonl", "mmmu_pro", 400),
  ("mmmu_pro/data.jsonl", "mmmu_pro", 0)])
def test_published_questions_about_images_need_them(name, schema, bad):
  records = open_records(public(name))
  codes = []
  for number in range(len(records)):
    try:
      read_row(read_schemas("evaluation/benchmarks.json")[schema], records[number], name=schema,
               location=records.location(number), folder=records.folder)
    except BadRow as error:
      codes.append(error.code)
  assert codes == ["marks"] * bad


@pytest.mark.parametrize("mark", ["<img>a.png</img>", "<|image_1|>", "<|image|>", "<Image>",
                                  "<IMAGE 2>", "<image_placeholder>", "<ImageHere>"])
def test_a_mark_of_another_project_is_a_bad_row_with_or_without_images(mark):
  for images in ([], ["a.png"]):
    with pytest.raises(BadRow, match=r"the question has the mark <.*; write <image>") as error:
      read(question=f"{mark} What is shown?", images=images)
    assert error.value.code == "marks"
  for text in ("<img src='a.png'>", "<|image_pad|>", "an <imager>", "<Imagine>", "image 1"):
    assert read(question=text)["question"] == text
