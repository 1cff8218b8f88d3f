"""Published files, which are not part of the project; tests that read them skip without them."""

import os
import pathlib

import pytest

_BESIDE = pathlib.Path(__file__).parents[2] / "shared" / "public"


def public(name):
  """Path of a file or folder in $ARES_PUBLIC_FILES, or in ../shared/public beside the checkout."""
  path = pathlib.Path(os.environ.get("ARES_PUBLIC_FILES", _BESIDE)) / name
  if not path.exists():
    pytest.skip(f"published files: {path} is not here; set ARES_PUBLIC_FILES")
  return path
