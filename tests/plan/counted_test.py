"""The check on a known program, for chips and with readers that do not know this version."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from ares_jax.plan import counted, hlo_text, jaxpr_cost
from ares_jax.system import chips

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs `pip install libtpu`")
PRODUCT = jax.jit(lambda x: x @ x).trace(jax.ShapeDtypeStruct((8, 8), jnp.float32))
TEXT = """ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %y = f32[8,8]{1,0} dot(%x, %x)
}"""


@pytest.fixture
def count_again():
  """The known program is counted anew, and once more after the test."""
  counted._count_known.cache_clear()
  yield
  counted._count_known.cache_clear()


@pytest.mark.parametrize("kind", sorted(chips.CHIPS))
def test_the_known_program_is_counted_right_for_every_kind_of_chip(kind):
  cost = counted.count(PRODUCT, TEXT, chips.CHIPS[kind])
  assert (cost.flops, cost.missing) == (2 * 8**3, ())
  assert cost.moved.sent == {} and cost.moved.memory == 3 * 8 * 8 * 4
  assert counted._count_known(kind).moved.sent == {"all-gather": 6 * 3 / 4 * 1024 * 1024 * 2}


def test_bytes_are_not_counted_if_those_of_the_known_program_are_wrong(count_again, monkeypatch):
  monkeypatch.setattr(hlo_text, "_LINE", re.compile(r"^    (ROOT )?%([\w.\-]+) = "))
  cost = counted.count(PRODUCT, TEXT, chips.CHIPS["v5e"])
  assert cost.moved is None and cost.flops == 2 * 8**3
  assert f"a known program comes out wrong with jax {jax.__version__}" in cost.missing[-1]
  assert f"instead of {counted.KNOWN_SENT} sent" in cost.missing[-1]


def test_flops_are_not_counted_if_those_of_the_known_program_are_wrong(count_again, monkeypatch):
  monkeypatch.setattr(jaxpr_cost, "_scan", lambda eqn, *_: (0, [None] * len(eqn.outvars)))
  cost = counted.count(PRODUCT, TEXT, chips.CHIPS["v5e"])
  assert cost.flops is None and cost.moved.memory == 3 * 8 * 8 * 4
  assert cost.missing == (f"a known program comes out wrong with jax {jax.__version__}: 0.0 FLOPs "
                          f"instead of {counted.KNOWN_FLOPS}",)


def test_a_loop_of_unknown_length_says_what_a_round_moves():
  text = TEXT.replace("ENTRY %main", "%body") + """
%more (x: f32[8,8]) -> pred[] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %again = pred[] custom-call(), custom_call_target="again"
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %loop = f32[8,8]{1,0} while(%x), condition=%more, body=%body
}"""
  cost = counted.count(PRODUCT, text, chips.CHIPS["v5e"])
  assert cost.moved.memory == 3 * 8 * 8 * 4 + 1
  assert cost.missing == ("bytes of all but one round of loop, a loop of unknown length "
                          "(0.000769 MB a round)",)


def test_a_program_that_cannot_be_read_says_why():
  endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x))
  cost = counted.count(endless.trace(jax.ShapeDtypeStruct((8, 8), jnp.float32)), None,
                       chips.CHIPS["v5e"])
  assert cost.flops is None and cost.moved is None
  assert "FLOPs: ValueError: a loop has no visible bound" in cost.missing[0]
  assert cost.missing[1] == ("bytes: ValueError: the compiler refused the program or wrote no text "
                             "of it")
