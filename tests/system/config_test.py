import dataclasses
import re
from typing import Literal

import ml_collections
import pytest
from ml_collections import config_dict

from ares_jax.system import config
from ares_jax.system.config import setting, setting_marks


@dataclasses.dataclass(frozen=True)
class Vision:
  depth: int
  full_attention: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Model:
  layers: int
  theta: float
  sections: tuple[int, int, int]
  dtype: Literal["float32", "bfloat16"]
  tied: bool
  name: str
  limit: int | None
  vision: Vision

  def __post_init__(self):
    if self.layers < 1:
      raise ValueError(f"layers is {self.layers}; must be >= 1")
    if sum(self.sections) != 6:
      raise ValueError(f"sections {self.sections} must add up to 6")
    if self.name == "bad":
      raise ValueError("that is a bad name")


def values(**changes):
  base = dict(
    layers=2, theta=1e6, sections=(1, 2, 3), dtype="float32", tied=True, name="tiny", limit=None,
    vision=dict(depth=4, full_attention=(1, 3)),
  )  # fmt: skip
  return base | changes


def test_builds_a_hashable_record_from_a_config_dict():
  record = config.build(Model, ml_collections.ConfigDict(values()), "config.model")
  assert record == Model(2, 1e6, (1, 2, 3), "float32", True, "tiny", None, Vision(4, (1, 3)))
  assert hash(record) == hash(config.build(Model, values(), "config.model"))


def test_an_int_becomes_a_float_and_a_list_a_tuple():
  record = config.build(Model, values(theta=10000, sections=[2, 2, 2], limit=3), "config.model")
  assert type(record.theta) is float and record.theta == 10000.0
  assert record.sections == (2, 2, 2) and record.limit == 3


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(layer=2), "config.model.layer is not a field of Model; did you mean 'layers'?"),
    (dict(layers=True), "config.model.layers is True (bool); expected int"),
    (dict(layers=2.0), "config.model.layers is 2.0 (float); expected int"),
    (dict(layers="2"), "config.model.layers is '2' (str); expected int"),
    (dict(layers=None), "config.model.layers is None (NoneType); expected int"),
    (dict(layers=0), "config.model.layers is 0; must be >= 1"),
    (dict(theta=True), "config.model.theta is True (bool); expected float"),
    (dict(theta="1e6"), "config.model.theta is '1e6' (str); expected float"),
    (dict(theta=float("nan")), "config.model.theta is nan; expected a number"),
    (dict(sections=(1, 2)), "config.model.sections has 2 values (1, 2); expected 3"),
    (dict(sections=(1, 2, "3")), "config.model.sections[2] is '3' (str); expected int"),
    (dict(sections=6), "config.model.sections is 6 (int); expected tuple[int, int, int]"),
    (dict(sections=(1, 2, 4)), "config.model.sections (1, 2, 4) must add up to 6"),
    (dict(dtype="float33"), "config.model.dtype is 'float33', not one of its values; did you mean"),
    (dict(dtype=1), "config.model.dtype is 1, not one of its values; known: float32, bfloat16"),
    (dict(tied=1), "config.model.tied is 1 (int); expected bool"),
    (dict(name=3), "config.model.name is 3 (int); expected str"),
    (dict(name="bad"), "config.model: that is a bad name"),
    (dict(limit="3"), "config.model.limit is '3' (str); expected int"),
    (dict(vision=3), "config.model.vision is 3; expected the fields of Vision"),
    (
      dict(vision=dict(depth=True, full_attention=(1,))),
      "config.model.vision.depth is True (bool); expected int",
    ),
    (
      dict(vision=dict(depth=1, full_atention=(1,))),
      "config.model.vision.full_atention is not a field of Vision; did you mean 'full_attention'?",
    ),
  ],
)
def test_a_mistake_is_one_line_that_names_the_key(change, message):
  with pytest.raises(config.ConfigError) as error:
    config.build(Model, values(**change), "config.model")
  assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_missing_or_unset_key_is_an_error_though_the_field_has_a_default():
  @dataclasses.dataclass(frozen=True)
  class Defaulted:
    steps: int = 3

  with pytest.raises(config.ConfigError, match=r"config\.a\.steps is missing"):
    config.build(Defaulted, {}, "config.a")
  unset = ml_collections.ConfigDict(dict(steps=config_dict.required_placeholder(int)))
  with pytest.raises(config.ConfigError, match=r"pass --config\.a\.steps=VALUE"):
    config.build(Defaulted, unset, "config.a")


def test_an_optional_setting_may_be_left_out():
  @dataclasses.dataclass(frozen=True)
  class Newer:
    path: str
    columns: tuple[str, ...] = config.optional(("a",), free=True)

  assert config.build(Newer, {"path": "x"}, "config.a") == Newer("x", ("a",))
  assert config.build(Newer, {"path": "x", "columns": ["b"]}, "config.a").columns == ("b",)
  assert config.setting_marks(Newer) == {"path": {}, "columns": {"free": True}}

  @dataclasses.dataclass(frozen=True)
  class Outer:
    new: Newer | None

  assert config.setting_defaults(Outer) == {"new.columns": ("a",)}


def test_an_annotation_it_cannot_check_is_a_bug_not_a_user_error():
  @dataclasses.dataclass(frozen=True)
  class Odd:
    table: dict

  with pytest.raises(TypeError, match="not supported"):
    config.build(Odd, {"table": {}}, "config")


def test_load_returns_the_locked_config_of_the_file(tmp_path):
  file = tmp_path / "c.py"
  file.write_text(
    "import ml_collections\n"
    "def get_config(size='1'):\n  return ml_collections.ConfigDict({'steps': int(size)})\n"
  )
  loaded = config.load(str(file))
  assert loaded.steps == 1 and loaded.is_locked
  assert config.load(f"{file}:7").steps == 7


@pytest.mark.parametrize(
  "text, message",
  [
    ("def get_config(\n", "line 1: SyntaxError: "),
    ("x = 1\nimport no_such_module_here\n", "line 2: ModuleNotFoundError: "),
    ("def get_config():\n  x = 1\n  return nothing\n", "line 3: NameError: "),
    ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),
    ("x = 1\n", "does not define get_config()"),
    ("def get_config():\n  pass\n", "returns NoneType; return an ml_collections.ConfigDict"),
  ],
)
def test_a_broken_file_is_one_line_with_its_line_number(tmp_path, text, message):
  file = tmp_path / "broken.py"
  file.write_text(text)
  with pytest.raises(config.ConfigError, match=re.escape(message)) as error:
    config.load(str(file))
  assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named_with_the_nearest_file_name(tmp_path):
  (tmp_path / "ares_tiny.py").write_text("")
  with pytest.raises(config.ConfigError, match=r"does not exist; did you mean .*ares_tiny\.py"):
    config.load(str(tmp_path / "ares_tinny.py"))
  with pytest.raises(config.ConfigError, match="there is no folder"):
    config.load(str(tmp_path / "nowhere" / "a.py"))
  with pytest.raises(config.ConfigError, match="pass --config=FILE"):
    config.load("")


@dataclasses.dataclass(frozen=True)
class Inner:
  size: int
  speed: int = setting(free=True)


@dataclasses.dataclass(frozen=True)
class Outer:
  plain: Inner
  marked: Inner | None = setting(stage=2, inside={"size": dict(stage=1)})
  several: tuple[Inner, ...] = setting(stage=3)


def test_marks_of_a_section_hold_for_its_fields_unless_they_have_others():
  assert setting_marks(Outer) == {
    "plain": {}, "plain.size": {}, "plain.speed": {"free": True},
    "marked": {"stage": 2}, "marked.size": {"stage": 1}, "marked.speed": {"stage": 2, "free": True},
    "several": {"stage": 3}}
