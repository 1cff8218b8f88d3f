"""Counts what a program computes and moves, and says why where it cannot.

jaxprs and the text of compiled programs differ between versions of jax and libtpu, so a count may
be wrong without an error. A small program whose numbers are known by hand is counted first, once
for a kind of chip; if it comes out wrong, nothing is counted.
"""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp

from ares_jax.plan.hlo_cost import HloCost, hlo_cost
from ares_jax.plan.jaxpr_cost import traced_flops
from ares_jax.system import chips, mesh
from ares_jax.system.config import one_line

LOOP = "a loop of unknown length"  # in the reason why its bytes are not counted
LAYERS, SIZE, DEVICES = 6, 1024, 4  # of the known program
KNOWN_FLOPS = LAYERS * 2 * SIZE**3
# Of each layer's bfloat16 weights every chip holds a quarter, and sends it to three others.
KNOWN_SENT = {"all-gather": LAYERS * SIZE**2 * 2 * (DEVICES - 1) / DEVICES}
# It reads its quarter at least; the gathered weights may be written and read, or stay on the chip.
KNOWN_MEMORY = LAYERS * SIZE**2 * 2 / DEVICES, LAYERS * SIZE**2 * 2 * DEVICES


@dataclasses.dataclass(frozen=True)
class Counted:
  """The cost of one run of a program. What is not counted is None and has a line in `missing`."""

  flops: float | None  # of all chips
  moved: HloCost | None  # by a chip
  missing: tuple[str, ...]


def count(traced, text, chip):
  """Counted of a `jax.stages.Traced` for a Chip.

  `text` is the one that `compile_for_chips` returns; None if the compiler refused the program.
  """
  known, found = _count_known(chip.name), _count(traced, text)
  low, high = KNOWN_MEMORY
  moved = known.moved
  if known.flops != KNOWN_FLOPS:
    found = _without(found, "flops", f"{known.flops} FLOPs instead of {KNOWN_FLOPS}")
  if known.missing or moved.sent != KNOWN_SENT or not low <= moved.memory <= high:
    found = _without(found, "moved", f"{moved or known.missing} instead of {KNOWN_SENT} sent and "
                     f"{low:g} to {high:g} bytes of memory")
  return found


def _without(found, field, difference):
  reason = f"a known program comes out wrong with jax {jax.__version__}: {difference}"
  return dataclasses.replace(found, **{field: None}, missing=(*found.missing, reason))


def _count(traced, text):
  values, missing = [], []
  for name, number in (("FLOPs", lambda: float(traced_flops(traced.jaxpr, platform="tpu"))),
                       ("bytes", lambda: hlo_cost(text))):
    try:
      values.append(number())
    except Exception as error:  # whatever another version's jaxpr or text leads to
      values.append(None)
      missing.append(f"{name}: {type(error).__name__}: {one_line(error)[:300]}")
  if values[1]:
    missing += [f"bytes of all but one round of {loop}, {LOOP} ({size / 1e6:.4g} MB a round)"
                for loop, size in values[1].unbounded.items()]
  return Counted(*values, tuple(missing))


@functools.cache
def _count_known(name):
  """Counted of the known program, for four chips of a kind: a scan over layers whose weights are
  split over the chips, so that every layer gathers its own."""
  torus = "x".join(["2", "2", "1"][:chips.CHIPS[name].axes])
  _, devices = chips.describe_slice(f"{name}:{torus}")
  with jax.set_mesh(mesh.make_mesh(DEVICES, 1, devices)):
    weights = mesh.abstract(jnp.bfloat16, (LAYERS, SIZE, SIZE), None, "data")
    x = mesh.abstract(jnp.bfloat16, (SIZE, SIZE), "data")

    def layers(x, weights):
      return jax.lax.scan(lambda x, w: (jnp.tanh(x @ mesh.shard(w)), None), x, weights)[0]

    traced = jax.jit(layers, out_shardings=x.sharding).trace(x, weights)
    return _count(traced, compile_for_chips(traced)[1])


def compile_for_chips(traced):
  """Compiles a `jax.stages.Traced`: (compiled program, its text or None).

  The text is libtpu's dump, because with jax 0.10 `compiled.as_text()` fails for large programs of
  v5p and v6e: jaxlib cannot parse asynchronous calls with late operands.
  """
  with tempfile.TemporaryDirectory() as folder:
    compiled = traced.lower().compile(
      compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    found = list(pathlib.Path(folder).glob("*.after_optimizations.txt"))
    return compiled, found[0].read_text() if len(found) == 1 else None
