"""Every public op has an example that runs."""

import doctest

import pytest

import ares_jax
from ares_jax import ops


@pytest.mark.parametrize("name", ops.__all__)
def test_example_in_the_docstring_runs(name):
  function = getattr(ares_jax, name)
  (example,) = doctest.DocTestFinder(recurse=False).find(function.__wrapped__, name, globs={})
  assert example.examples
  example.globs = {name: function}
  results = doctest.DocTestRunner().run(example)
  assert results.failed == 0
