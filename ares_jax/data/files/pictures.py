"""Reads the images of a record, and matches them with the marks in its question.

An image that a record names and no field reads, a mark without an image, and video are errors: the
model would be asked about something it does not see.
"""

import base64
import binascii
import os
import re

import numpy as np
from etils import epath

from ares_jax.data.chat import IMAGE_MARK
from ares_jax.data.files.record import is_empty, is_list

_COUNTED = r"s?(_?(path|file|filename|url|uri|byte|data|name|list|id)s?)?(_?\d+)?"
_IMAGE_COLUMN = re.compile(
  rf"((decoded|raw|input)_)?(image|img|picture|pic){_COUNTED}|fig(ure)?_?(path|file|id)s?", re.I)
_VIDEO_COLUMN = re.compile(rf"(video|audio){_COUNTED}", re.I)
_VIDEO_MARK = re.compile("<(?:video|audio)>")
# Marks of other projects: Qwen-VL's <img>, Phi's <|image_1|>, InternLM's <ImageHere>.
_OTHER_MARK = re.compile(r"<img>|<\|image(?:_?[0-9]+)?\|>|<(?:Image|IMAGE)(?:[ _]?[0-9]+)?>"
                         r"|<image_(?:pad|placeholder|token)>|<ImageHere>")
_IMAGE_FILE = re.compile(r"[^\n]{1,400}\.(png|jpe?g|webp|bmp|gif|tiff?|ppm|avif|svg)", re.I)
_VIDEO_FILE = re.compile(r"[^\n]{1,400}\.(mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg)", re.I)
_HOLDS_IMAGE = ("bytes", "path", "url")  # keys of an object that is one image
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
# The beginning of PNG, JPEG, GIF, WebP, BMP, TIFF, PPM and AVIF files in base 64. A text that goes
# on like this names no file: it would have 40 letters without a dot.
_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK|UD[UY][Kg]"
                     r"|AAAA.GZ0eXBhdm)[A-Za-z0-9+/]{40}")
_ENDS = (".jpg", ".png", ".jpeg", ".webp")  # of the file of a numbered image
_LONGEST_NAME = 1024  # letters of a file name


def read_images(record, more):
  """The images of a record and `more`, those of its messages: pixels, encoded bytes or paths.

  BadRow where one is no image, lies outside the folder, or is in a column that no field reads.
  """
  found = []
  for column in record.schema["columns"].get("images", ()):
    value = record.value("images", column)
    if _is_blank(value) or (found and not column[-1].isdigit()):
      continue  # columns without a number are other names of the first image
    # TFDS gives one image as uint8 [H, W, 3], several as an array of bytes.
    several = is_list(value) and not (isinstance(value, np.ndarray) and value.dtype != object)
    found += list(value) if several else [value]
  found = [value for value in found if not _is_blank(value)]
  if found and more:
    raise record.bad("marks", f"its messages hold {len(more)} images and its columns "
                     f"{len(found)}; one of both is read")
  images = [_image(record, value) for value in found or more]
  _check_unread(record, images)
  if not images and record.schema.get("needs_images"):
    raise record.bad("image_missing", f"{record.name!r} has an image in every row, this row has "
                     f"none in the columns {record.schema['columns']['images']}")
  return images


def _is_blank(value):
  """Whether there is no image: MathVerse writes "" for none."""
  return value is None or isinstance(value, str) and not value.strip()


def _check_unread(record, images):
  for name, value in record.unread().items():
    if _VIDEO_COLUMN.fullmatch(name) or _names_file(value, _VIDEO_FILE):
      raise record.bad("video", f"its column {name!r} holds video or sound, which is not supported")
    if not images and (column := _image_column(name, value)):
      raise record.bad("unread", f"no image is read, but the column {column!r} looks like images; "
                       f"name it: columns=dict(images={column!r})")
    record.left_out.append(f"column {name!r}")


def _image_column(name, value):
  """The name of the column that looks like images, "a.b" for one inside of an object; or None."""
  if isinstance(value, dict) and not any(key in value for key in _HOLDS_IMAGE):
    inside = (_image_column(f"{name}.{key}", item) for key, item in value.items()
              if not is_empty(item))
    return next(filter(None, inside), None)
  return name if _looks_like_images(name.rpartition(".")[2], value) else None


def _looks_like_images(name, value):
  named = bool(_IMAGE_COLUMN.fullmatch(name))
  if isinstance(value, int):  # CharXiv's figures are numbered
    return named and not isinstance(value, bool)
  if isinstance(value, str):
    return named or value.startswith("data:image/") or _names_file(value, _IMAGE_FILE) or (
      bool(_BASE64.match(value)))
  if isinstance(value, bytes):
    return named or value.startswith(_MAGIC)
  if isinstance(value, dict):
    return any(_looks_like_images(key, item) for key, item in value.items() if item is not None)
  if isinstance(value, np.ndarray) and value.dtype != object:
    return named or value.dtype == np.uint8 and value.ndim == 3
  return is_list(value) and any(
    _looks_like_images(name, item) for item in value if not is_empty(item))


def _names_file(value, pattern):
  """Whether a value is a file name of a pattern, or a list of some."""
  if is_list(value) and len(value) and isinstance(value[0], str):
    value = value[0]
  return isinstance(value, str) and bool(pattern.fullmatch(value))


def _image(record, value):
  """Pixels, encoded bytes, or the path of a file inside the folder."""
  if isinstance(value, dict):
    value = next((value[key] for key in (*_HOLDS_IMAGE, "image") if value.get(key)), value)
    if isinstance(value, str) and value.startswith("base64,"):
      return base64.b64decode(value[7:])
  if isinstance(value, bytes | np.ndarray):
    return value
  if isinstance(value, int | np.integer) and not isinstance(value, bool):
    return _numbered(record, value)
  if not isinstance(value, str):
    raise record.bad("image_missing", f"an image is {value!r}; bytes or a file name are needed")
  if value.startswith("data:") or _BASE64.match(value):
    return _decoded(record, value)
  return _path(record, value)


def _numbered(record, number):
  """The path of the image file NUMBER.jpg, or of another format, in the folder."""
  paths = [_path(record, f"{number}{end}") for end in _ENDS]
  found = next((path for path in paths if epath.Path(path).exists()), None)
  if found is None:
    raise record.bad("image_missing", f"{record.folder} has no file {number}.jpg, .png, .jpeg or "
                     ".webp; name the folder that has: images=FOLDER")
  return found


def _decoded(record, value):
  head, mark, data = value.rpartition(";base64,")
  if value.startswith("data:") and not mark:
    raise record.bad("image", f"an image is {value[:40]!r}...: a data address in base 64 is needed")
  try:
    return base64.b64decode(data)
  except binascii.Error as error:
    raise record.bad("image", f"an image in base 64 cannot be decoded: {error}") from error


def _path(record, name):
  if len(name) > _LONGEST_NAME:
    raise record.bad("image", f"an image is a text of {len(name)} letters, {name[:40]!r}...: no "
                     "file name, and no image in base 64")
  scheme, mark, folder = str(record.folder).rpartition("://")
  if name.startswith("file://"):
    name = name.removeprefix("file://")
  if "://" in name and not mark:
    raise record.bad("image_missing", f"image {name!r} is an address, which is not fetched; "
                     "download it and name the file")
  # Compares names, not resolved links: folders of the hub are made of links to other folders.
  path = os.path.normpath(os.path.join(folder, name.removeprefix(f"{scheme}://") if mark else name))
  if os.path.relpath(path, folder or ".").split(os.sep)[0] == os.pardir:
    raise record.bad("image", f"image {name!r} is outside the folder {folder}; name a folder "
                     "that holds it: images=FOLDER")
  return f"{scheme}{mark}{path}"


def match_marks(record, question, images):
  """(question, images) with one `<image>` in the question for each image, in the same order.

  A published question may name only some of its images, or one image twice: the others are left
  out, and counted. Without any mark all images come first. BadRow where a mark has no image.
  """
  marks = [mark or "" for mark in IMAGE_MARK.findall(question)]
  if not marks:
    return question, images
  numbers = [int(number) for number in marks if number]
  if not numbers and len(marks) == len(images):
    return IMAGE_MARK.sub("<image>", question), images
  if len(numbers) < len(marks) or not 1 <= min(numbers) <= max(numbers) <= len(images):
    raise record.bad("marks", f"the question has the image marks "
                     f"{', '.join(mark[0] for mark in IMAGE_MARK.finditer(question))} but "
                     f"{len(images)} images")
  record.left_out.extend(f"image {number}, which no mark names"
                         for number in range(1, 1 + len(images)) if number not in numbers)
  return IMAGE_MARK.sub("<image>", question), [images[number - 1] for number in numbers]


def check_marks(record, question, history, response, images):
  """BadRow where a turn has a mark of video or sound, or of an image that would not be shown."""
  asked = [question, *(turn["content"] for turn in history if turn["role"] == "user")]
  others = [turn["content"] for turn in history if turn["role"] != "user"]
  for text in asked + others:
    if found := _VIDEO_MARK.search(text):
      raise record.bad("video", f"the question has the mark {found[0]}; video and sound are not "
                       "supported")
    if found := _OTHER_MARK.search(text):
      raise record.bad("marks", f"the question has the mark {found[0]}; write <image>, and name "
                       "the file in a column of images")
  if images and any(map(IMAGE_MARK.search, [*others, response or ""])) and not any(
      map(IMAGE_MARK.search, asked)):
    raise record.bad("marks", "an image mark stands in the system turn or in an answer; only "
                     "questions can have images")
