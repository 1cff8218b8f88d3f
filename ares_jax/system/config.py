"""Loads config files and turns them into frozen records; every mistake is one clear line.

A config file is Python with `get_config()`, which returns an `ml_collections.ConfigDict`. The
records are hashable, so `jax.jit` takes them as static arguments.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import math
import os
import traceback
import types
import typing
from collections.abc import Mapping

from ml_collections import config_dict

_OPTIONAL = "optional"  # mark of a setting


class ConfigError(ValueError):
  """A mistake in a config file or on the command line; the message is one line."""


def setting(**marks):
  """A field of a config record with marks, which say how the setting is used.

  Marks of a section hold for every field in it that has no other; `inside`, {name: marks}, is for
  single fields of the section.
  """
  return dataclasses.field(metadata=marks)


def optional(default, **marks):
  """A `setting` that may be left out: one that runs of older versions do not have."""
  return dataclasses.field(default=default, metadata=marks | {_OPTIONAL: True})


def setting_marks(cls, prefix="", inherited=None):
  """{dotted key: marks} of all settings of the frozen dataclass `cls` and of its sections.

  `prefix` begins every key; `inherited` are the marks of the section that `cls` is.
  """
  found = {}
  inherited = dict(inherited or {})
  inside = inherited.pop("inside", {})
  for field, sections in _fields(cls):
    key = prefix + field.name
    marks = inherited | inside.get(field.name, {}) | field.metadata
    found[key] = {name: value for name, value in marks.items()
                  if name not in ("inside", _OPTIONAL)}
    for section in sections:
      found |= setting_marks(section, f"{key}.", marks)
  return found


def setting_defaults(cls, prefix=""):
  """{dotted key: default} of the `optional` settings of `cls` and of its sections.

  All settings of an optional section are optional themselves.
  """
  found = {}
  for field, sections in _fields(cls):
    if _OPTIONAL in field.metadata and not sections:
      found[prefix + field.name] = field.default
    for section in sections:
      found |= setting_defaults(section, f"{prefix}{field.name}.")
  return found


def _fields(cls):
  """Yields (field, the dataclasses it may hold) of the frozen dataclass `cls`."""
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    is_union = typing.get_origin(hints[field.name]) in (typing.Union, types.UnionType)
    choices = typing.get_args(hints[field.name]) if is_union else [hints[field.name]]
    yield field, [choice for choice in choices if dataclasses.is_dataclass(choice)]


def load(path):
  """The locked `ConfigDict` that `get_config()` of the Python file `path` returns.

  "FILE:ARGUMENT" calls `get_config("ARGUMENT")`. Raises ConfigError if there is no such file, it
  does not import, or it has no `get_config()`.
  """
  if not path:
    raise ConfigError("no config given; pass --config=FILE, for example configs/ares_tiny.py")
  file, *argument = path.split(":", 1)
  if os.path.isdir(file):
    raise ConfigError(f"config file {file!r} is a folder; give a Python file (.py) in it")
  if not os.path.isfile(file):
    raise ConfigError(f"config file {file!r} does not exist{_suggest_file(file)}")
  if not file.endswith(".py"):
    raise ConfigError(f"config file {file!r} is not a Python file (.py)")
  spec = importlib.util.spec_from_file_location("config_file", file)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise ConfigError(f"config file {file!r} does not define get_config()")
    config = module.get_config(*argument)
  except ConfigError:
    raise
  except (Exception, SystemExit) as error:
    # Any exception of a user's file is a mistake in that file; its line says more than our stack.
    raise ConfigError(f"config file {file!r}{_line_in(error, file)}: {type(error).__name__}: "
                      f"{one_line(error)}") from error
  if not isinstance(config, config_dict.ConfigDict):
    raise ConfigError(f"get_config() of {file!r} returns {type(config).__name__}; return an "
                      "ml_collections.ConfigDict")
  return config.lock()


def build(cls, values, where):
  """Makes the frozen dataclass `cls` from `values`, checking every key and type.

  Annotations may be bool, int, float, str, `tuple[...]`, `Literal[...]`, `X | None` and other
  dataclasses; a float may be given as an int and a tuple as a list. Only `optional` fields may be
  left out. A class with `from_text` may be given as a text. `where` is the path of `values`, e.g.
  "config.aepo".

  Raises ConfigError for an unknown or missing key, a wrong type, or a ValueError of
  `cls.__post_init__`.
  """
  if isinstance(values, str) and hasattr(cls, "from_text"):
    values = cls.from_text(values)
  if not isinstance(values, Mapping | config_dict.ConfigDict):
    raise ConfigError(f"{where} is {values!r}; expected the fields of {cls.__name__}")
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  names = list(fields)
  for key in values:
    if key not in names:
      raise ConfigError(f"{where}.{key} is not a field of {cls.__name__}{suggest(key, names)}")
  built = {}
  for name in names:
    if name not in values and _OPTIONAL in fields[name].metadata:
      continue
    if name not in values:
      raise ConfigError(f"{where}.{name} is missing; {cls.__name__} has no defaults, set it")
    try:
      value = values[name]
    except config_dict.RequiredValueError:
      raise ConfigError(f"{where}.{name} must be set; pass --{where}.{name}=VALUE") from None
    built[name] = _convert(hints[name], value, f"{where}.{name}")
  try:
    return cls(**built)
  except ValueError as error:
    # `group is 1 ...` becomes `config.aepo.group is 1 ...`, any other message gets `where: `.
    message = one_line(error)
    names_field = message.split(" ")[0].split("[")[0].split(".")[0] in names
    raise ConfigError(f"{where}{'.' if names_field else ': '}{message}") from error


def suggest(word, known):
  """'; did you mean "x"?' with the word of `known` that is nearest, else the list of `known`."""
  near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
  return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def one_line(error):
  """The message of `error` on one line."""
  return " ".join((str(error) or type(error).__name__).split())


_ACCEPTED = {bool: bool, int: int, float: int | float, str: str}  # annotation: types of values


def _convert(hint, value, where):
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if dataclasses.is_dataclass(hint):
    return build(hint, value, where)
  if origin is typing.Literal:
    for choice in arguments:
      if type(value) is type(choice) and value == choice:
        return value
    choices = [str(choice) for choice in arguments]
    near = suggest(value, choices) if isinstance(value, str) else f"; known: {', '.join(choices)}"
    raise ConfigError(f"{where} is {value!r}, not one of its values{near}")
  if origin in (typing.Union, types.UnionType):
    return _convert_union(hint, value, where)
  if origin is tuple:
    return _convert_tuple(hint, value, where)
  if hint not in _ACCEPTED:
    raise TypeError(f"{where}: the annotation {hint} is not supported in a config record")
  if not isinstance(value, _ACCEPTED[hint]) or (hint is not bool and isinstance(value, bool)):
    raise ConfigError(_wrong_type(hint, value, where))
  if hint is float and math.isnan(value):
    raise ConfigError(f"{where} is nan; expected a number")
  return hint(value)


def _convert_union(union, value, where):
  if value is None and type(None) in typing.get_args(union):
    return None
  others = [hint for hint in typing.get_args(union) if hint is not type(None)]
  if len(others) == 1:
    return _convert(others[0], value, where)
  for hint in others:
    with contextlib.suppress(ConfigError):
      return _convert(hint, value, where)
  raise ConfigError(_wrong_type(union, value, where))


def _convert_tuple(hint, value, where):
  arguments = typing.get_args(hint)
  if not isinstance(value, list | tuple):
    raise ConfigError(_wrong_type(hint, value, where))
  hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
  if len(hints) != len(value):
    raise ConfigError(f"{where} has {len(value)} values {tuple(value)!r}; expected {len(hints)}")
  return tuple(_convert(hint, value[i], f"{where}[{i}]") for i, hint in enumerate(hints))


def _wrong_type(hint, value, where):
  expected = hint.__name__ if isinstance(hint, type) else str(hint)
  return f"{where} is {value!r} ({type(value).__name__}); expected {expected}"


def _suggest_file(file):
  folder, name = os.path.split(file)
  if not os.path.isdir(folder or "."):
    return f"; there is no folder {folder!r}"
  near = difflib.get_close_matches(name, os.listdir(folder or "."), n=1, cutoff=0.6)
  return f"; did you mean {os.path.join(folder, near[0])!r}?" if near else ""


def _line_in(error, file):
  """' line N': the line of `file` that raised `error`; '' if none did."""
  if isinstance(error, SyntaxError):
    return f" line {error.lineno}"
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
           if frame.filename == file]
  return f" line {lines[-1]}" if lines else ""
