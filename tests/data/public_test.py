"""The table of docs/data.md is what its command prints."""

import pathlib

import pytest
from bench import read_public
from public import public

DATA_MD = pathlib.Path(__file__).parents[2] / "docs" / "data.md"


@pytest.mark.slow
def test_the_page_on_data_shows_what_is_read_of_published_files():
  folder = public("svamp").parent
  assert "\n".join(read_public.table(folder)) in DATA_MD.read_text(encoding="utf-8")
