"""A misspelt, missing, null or wrongly typed leaf of a config gives one line that names it."""

import os
import subprocess
import sys

import pytest
import tiny

from ares_jax.run import config
from ares_jax.system.config import ConfigError, build, setting_defaults

VALUES = tiny.values().to_dict()
NULLABLE = {"data.files"}  # None where the data are generated
OPTIONAL = setting_defaults(config.TrainConfig)  # runs of older versions do not have them


def leaves(node, path=()):
  for key, value in node.items():
    if isinstance(value, dict):
      yield from leaves(value, (*path, key))
    else:
      yield ".".join((*path, key)), value


LEAVES = dict(leaves(VALUES))


def copied(node):
  """A copy in which no two sections are the same object, as loop and adam are in the file."""
  return {key: copied(value) if isinstance(value, dict) else value for key, value in node.items()}


def read(path, change):
  """The config with the parent of one leaf changed by `change(parent, key)`."""
  values = copied(VALUES)
  *parents, key = path.split(".")
  node = values
  for parent in parents:
    node = node[parent]
  change(node, key)
  with pytest.raises(ConfigError) as error:
    build(config.TrainConfig, values, "config")
  assert "\n" not in str(error.value)
  return str(error.value)


def wrong(value):
  """Values of other types, True for an int among them, which Python takes for 1."""
  if isinstance(value, bool):
    return [1, "yes"]
  if isinstance(value, int):
    return [True, "1", 1.5]
  if isinstance(value, float):
    return [True, "1", float("nan")]
  if isinstance(value, str):
    return [3, True]
  return [7, "(1, 2)"]


def test_the_config_has_over_100_leaves():
  assert len(LEAVES) > 100


@pytest.mark.parametrize("path", LEAVES)
def test_a_misspelt_leaf_is_named_with_the_right_one(path):
  def misspell(node, key):
    node[key + key[-1]] = node.pop(key)

  message = read(path, misspell)
  key = path.rpartition(".")[2]
  assert f"config.{path}{key[-1]} is not a field" in message and f"mean {key!r}?" in message


@pytest.mark.parametrize("path", LEAVES)
def test_a_missing_null_or_wrongly_typed_leaf_is_named(path):
  if path not in OPTIONAL:
    assert f"config.{path} is missing" in read(path, lambda node, key: node.pop(key))
  if path in NULLABLE:
    return
  for value in (None, *wrong(LEAVES[path])):
    message = read(path, lambda node, key, value=value: node.update({key: value}))
    assert f"config.{path} is " in message, (value, message)


@pytest.mark.parametrize("word, message", [
  ("--config.aepo.minibatch=100", "config.aepo: 32 prompts x 8 samples = 256 sequences: minibatch"),
  ("--config.model.path=/nowhere", "config.model.path '/nowhere' is no folder")])
def test_the_command_refuses_in_one_line_before_it_touches_a_device(tmp_path, word, message):
  done = subprocess.run(
    [sys.executable, "-m", "ares_jax.train", "--config=configs/ares_tiny.py",
     f"--workdir={tmp_path / 'run'}", word], cwd=tiny.ROOT, capture_output=True, text=True,
    timeout=300, env=os.environ | {"JAX_PLATFORMS": "none_such"})
  assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "run").exists()
  _, error = done.stderr.splitlines()  # below the command's first line
  assert error.startswith(f"error: {message}")
