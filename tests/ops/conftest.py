"""Shared by the tests of the ops: strict broadcasting, the release's vectors, a mesh."""

import json
import pathlib

import jax
import pytest
from jax.sharding import AxisType


@pytest.fixture(autouse=True)
def no_silent_broadcasting():
  with jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture(scope="session")
def release():
  """Inputs and outputs of the public release's own functions."""
  return json.loads(pathlib.Path(__file__).with_name("release_vectors.json").read_text())


@pytest.fixture(scope="session")
def mesh():
  return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
