"""What the compiled program of a block computes again for the backward pass."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from models import golden_batch

from ares_jax.models import weights
from ares_jax.models.decoder import hidden

pytestmark = pytest.mark.slow

B, T = 2, 12
# One decoder block: q, k, v, o, gate, up, down; scores and values for each quarter of the queries.
MATRICES, MIXING = 7, 2 * 4


@pytest.mark.parametrize("remat, again", [
  ("none", 0),
  # All but the last one, whose result only the next block reads.
  ("block", MATRICES + MIXING - 1),
  ("dots", MIXING)])
def test_each_matmul_of_a_block_is_compiled_once_per_needed_pass(remat, again):
  config = dataclasses.replace(golden_batch.config("tied"), remat=remat)
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (3, B, T))

  def total(params, embeds):
    return hidden(config, params, embeds, positions, np.ones((B, T), np.int32)).sum()

  embeds = jax.ShapeDtypeStruct((B, T, config.embed), np.float32)
  program = jax.jit(jax.value_and_grad(total, (0, 1)))
  params = jax.eval_shape(
    functools.partial(weights.init, weights.weight_table(config)), jax.random.key(0))
  text = program.lower(params, embeds).compile().as_text()
  # The blocks are a loop, so the text has each of its matmuls once. The backward pass has two for
  # every matmul of the forward pass.
  assert len(re.findall(r" dot\(", text)) == 3 * (MATRICES + MIXING) + again
