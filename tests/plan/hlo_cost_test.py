import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ares_jax.plan.hlo_cost import hlo_cost

# As TPUs have it: the loop's length stands in its condition alone, one layer of the stack [7, 8, 8]
# is gathered from 4 devices an iteration, S(1) is memory on the chip.
LOOP = """
%slice_of (p0: bf16[7,2,8], p1: s32[]) -> bf16[1,2,8] {
  %p0 = bf16[7,2,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  ROOT %cut = bf16[1,2,8]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p0, %p1), dynamic_slice_sizes={}
}

%write_in (p0: f32[9,4], p1: f32[1,4], p2: s32[]) -> f32[9,4] {
  %p0 = f32[9,4]{1,0} parameter(0)
  %p1 = f32[1,4]{1,0:S(1)} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %put = f32[9,4]{1,0} dynamic-update-slice(%p0, %p1, %p2)
}

%body (carry: (s32[], bf16[7,2,8], f32[9,4])) -> (s32[], bf16[7,2,8], f32[9,4]) {
  %one = s32[] constant(1)
  %carry = (s32[], bf16[7,2,8]{2,1,0}, /*index=2*/f32[9,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %stack = bf16[7,2,8]{2,1,0} get-tuple-element(%carry), index=1
  %kept = f32[9,4]{1,0} get-tuple-element(%carry), index=2
  %part = bf16[1,2,8]{2,1,0:S(1)} fusion(%stack, %i), kind=kLoop, calls=%slice_of
  %all = bf16[1,8,8]{2,1,0:S(1)} all-gather(%part), replica_groups=mesh['a'=2,'b'=4] {'b'}
  %new = f32[1,4]{1,0:S(1)} custom-call(%all), custom_call_target="kernel"
  %out = f32[9,4]{1,0} fusion(%kept, %new, %i), kind=kLoop, calls=%write_in
  %next = s32[] add(%i, %one)
  ROOT %tuple = (s32[], bf16[7,2,8]{2,1,0}, f32[9,4]{1,0}) tuple(%next, %stack, %out)
}

%condition (carry: (s32[], bf16[7,2,8], f32[9,4])) -> pred[] {
  %seven = s32[] constant(7)
  %carry = (s32[], bf16[7,2,8]{2,1,0}, f32[9,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %less = pred[] compare(%i, %seven), direction=LT
}

ENTRY %main (w: bf16[7,2,8], x: f32[9,4]) -> f32[9,4] {
  %w = bf16[7,2,8]{2,1,0} parameter(0)
  %x = f32[9,4]{1,0} parameter(1)
  %start = s32[] constant(START)
  %init = (s32[], bf16[7,2,8]{2,1,0}, f32[9,4]{1,0}) tuple(%start, %w, %x)
  %loop = (s32[], bf16[7,2,8]{2,1,0}, f32[9,4]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %result = f32[9,4]{1,0} get-tuple-element(%loop), index=2
}
"""


@pytest.mark.parametrize("start, trips", [(0, 7), (2, 5)])
def test_a_loop_counts_as_often_as_its_condition_lets_it_run(start, trips):
  cost = hlo_cost(LOOP.replace("START", str(start)))
  # 3 of 4 parts of [8, 8] bfloat16 come from others; each device sends as much as it gets.
  assert cost.sent == {"all-gather": trips * 3 / 4 * 8 * 8 * 2}
  # A slice [2, 8] bfloat16 is read and a row of 4 float32 written; counters are 4 bytes each: the
  # slice's and the row's index are read, the next one is 1 + i, the comparison's is 7 and i.
  assert cost.memory == trips * (2 * 8 * 2 + 4 * 4 + (4 + 4) + 3 * 4 + (2 * 4 + 1))


def test_a_loop_without_a_limit_is_named_and_counted_once():
  text = LOOP.replace("START", "0").replace("direction=LT", "direction=NE")
  cost = hlo_cost(text)
  assert cost.sent == {"all-gather": 3 / 4 * 8 * 8 * 2}
  assert cost.unbounded == {"loop": cost.memory + cost.sent["all-gather"]}


def test_elements_of_a_tuple_may_be_written_where_they_are_used():
  old = LOOP.replace("START", "0")
  # As jax 0.11 has it. A tuple within a tuple gives an element of an element.
  new = re.sub(r"  %(i|stack|kept) = .*\n", "", old)
  for name, index in (("i", 0), ("stack", 1), ("kept", 2)):
    new = re.sub(rf"%{name}\b", f"%carry#{index}", new)
  assert new.count("#") == 7 and hlo_cost(new) == hlo_cost(old)
  nested = """ENTRY %main (x: ((f32[8,4], f32[2]), f32[3])) -> f32[2] {
  %x = ((f32[8,4]{1,0:T(8,128)}, /*index=1*/f32[2]{0}), f32[3]{0}) parameter(0)
  ROOT %y = f32[2]{0} negate(%x#0#1)
}"""
  assert hlo_cost(nested).memory == 2 * 2 * 4


@pytest.mark.parametrize("groups, size", [
  ("{{0,1},{2,3}}", 2), ("[2,4]<=[8]", 4), ("mesh['a'=2,'b'=4] {'a'}", 2),
  ("mesh['a'=2,'b'=4] {'a','b'}", 8), ("mesh['a'=2,'b'=4] {'a','b':(1)2}", 4),
  ("mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b':(2)2}", 2)])
@pytest.mark.parametrize("kind, share", [
  ("all-reduce", lambda n: 2 * (n - 1) / n), ("reduce-scatter", lambda n: (n - 1) / n),
  ("collective-permute", lambda n: 1)])
def test_a_collective_counts_the_bytes_that_a_ring_sends(kind, share, groups, size):
  text = f"""ENTRY %main (x: f32[8,4]) -> f32[8,4] {{
  %x = f32[8,4]{{1,0}} parameter(0)
  ROOT %y = f32[8,4]{{1,0}} {kind}(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}"""
  assert hlo_cost(text).sent == {kind: pytest.approx(share(size) * 8 * 4 * 4)}


@pytest.mark.parametrize("groups", ["{}", "rows[2,4]"])
def test_groups_that_cannot_be_read_are_refused(groups):
  text = f"""ENTRY %main (x: f32[8,4]) -> f32[8,4] {{
  %x = f32[8,4]{{1,0}} parameter(0)
  ROOT %y = f32[8,4]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}"""
  with pytest.raises(ValueError, match="cannot read how many devices a collective has: replica_gr"):
    hlo_cost(text)


# libtpu spreads this gather over three fusions, of which one also multiplies. Each fusion contains
# the gather and passes its buffers on. Every device keeps a slice of the last sum. S(1) is on-chip
# memory.
LASTING = """
%begin (p0: bf16[8,2]) -> (bf16[8,2], bf16[8,8], u32[]) {
  %p0 = bf16[8,2]{1,0} parameter(0)
  %all.1 = bf16[8,8]{1,0} all-gather(%p0), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0)
  ROOT %s = (bf16[8,2]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) custom-call(%all.1), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (p0: bf16[8,2], p1: bf16[8,8], p2: u32[], p3: f32[4,4]) -> (f32[4,4], bf16[8,2], bf16[8,8], bf16[8,8], u32[]) {
  %p0 = bf16[8,2]{1,0} parameter(0)
  %p1 = bf16[8,8]{1,0} parameter(1)
  %p2 = u32[]{:S(2)} parameter(2)
  %p3 = f32[4,4]{1,0} parameter(3)
  %all.2 = bf16[8,8]{1,0} all-gather(%p0), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0)
  %product = f32[4,4]{1,0} tanh(%p3)
  ROOT %t = (f32[4,4]{1,0}, bf16[8,2]{1,0}, bf16[8,8]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) tuple(%product, %p0, %p1, %all.2, %p2)
}

%end (p0: bf16[8,2], p1: bf16[8,8], p2: u32[]) -> bf16[8,8] {
  %p0 = bf16[8,2]{1,0} parameter(0)
  %p1 = bf16[8,8]{1,0} parameter(1)
  %p2 = u32[]{:S(2)} parameter(2)
  %all.3 = bf16[8,8]{1,0} all-gather(%p0), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0)
  ROOT %d = bf16[8,8]{1,0} custom-call(%p0, %p1, %all.3, %p2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (p0: f32[8,4]) -> f32[2,4] {
  %p0 = f32[8,4]{1,0:S(1)} parameter(0)
  %place = s32[] constant(0)
  %sum = f32[8,4]{1,0} all-reduce(%p0), channel_id=3, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %own = f32[2,4]{1,0:S(1)} dynamic-slice(%sum, %place, %place), dynamic_slice_sizes={2,4}
}

ENTRY %main (w: bf16[8,2], x: f32[4,4], g: f32[8,4]) -> f32[4,4] {
  %w = bf16[8,2]{1,0} parameter(0)
  %x = f32[4,4]{1,0} parameter(1)
  %g = f32[8,4]{1,0:S(1)} parameter(2)
  %start = (bf16[8,2]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%begin
  %w0 = bf16[8,2]{1,0} get-tuple-element(%start), index=0
  %w1 = bf16[8,8]{1,0} get-tuple-element(%start), index=1
  %w2 = u32[]{:S(2)} get-tuple-element(%start), index=2
  %both = (f32[4,4]{1,0}, bf16[8,2]{1,0}, bf16[8,8]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) fusion(%w0, %w1, %w2, %x), kind=kOutput, calls=%meanwhile
  %v0 = bf16[8,2]{1,0} get-tuple-element(%both), index=1
  %v1 = bf16[8,8]{1,0} get-tuple-element(%both), index=2
  %v2 = u32[]{:S(2)} get-tuple-element(%both), index=4
  %whole = bf16[8,8]{1,0} fusion(%v0, %v1, %v2), kind=kCustom, calls=%end
  %part = f32[2,4]{1,0:S(1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  ROOT %y = f32[4,4]{1,0} get-tuple-element(%both), index=0
}
"""  # noqa: E501


def test_a_gather_spread_over_fusions_counts_once():
  cost = hlo_cost(LASTING)
  assert cost.sent == {"all-gather": 3 / 4 * 8 * 8 * 2, "reduce-scatter": 3 / 4 * 8 * 4 * 4}
  # Read: the part; written: all of it; and the product's own 4 x 4 float32 in and out.
  assert cost.memory == 8 * 2 * 2 + 8 * 8 * 2 + 2 * 4 * 4 * 4


def test_a_copy_onto_the_chip_moves_memory_once():
  text = """ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %s = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%x)
  ROOT %y = f32[8,4]{1,0:S(1)} copy-done(%s)
}"""
  assert hlo_cost(text).memory == 8 * 4 * 4
  assert hlo_cost(text.replace("f32[8,4]{1,0:S(1)}", "f32[8,4]{1,0}")).memory == 2 * 8 * 4 * 4


def test_a_conditional_counts_the_branch_that_moves_more():
  branch = """%{0} (p: f32[{1}]) -> f32[] {{
  %p = f32[{1}]{{0}} parameter(0)
  ROOT %sum = f32[] custom-call(%p), custom_call_target="sum"
}}
"""
  text = branch.format("small", 10) + branch.format("large", 1000) + """
ENTRY %main (k: s32[], a: f32[10], b: f32[1000]) -> f32[] {
  %k = s32[] parameter(0)
  %a = f32[10]{0} parameter(1)
  %b = f32[1000]{0} parameter(2)
  ROOT %r = f32[] conditional(%k, %a, %b), branch_computations={%small, %large}
}"""
  assert hlo_cost(text).memory == 4 * 1000 + 4


@pytest.mark.parametrize("kind, slices, times", [
  ("ALL_REDUCE", "1,2", 1), ("ALL_REDUCE", "1:4", 2 * 3 / 4), ("ALL_GATHER", "1:3,7", 3)])
def test_transfers_to_other_slices_are_counted_apart(kind, slices, times):
  target = f"{{{slices}}}x{{0:3}}"
  text = f"""
ENTRY %main (x: f32[64,8]) -> f32[64,8] {{
  %x = f32[64,8]{{1,0}} parameter(0)
  %after = token[] after-all()
  %send = (f32[64,8]{{1,0}}, u32[], token[]) send(%x, %after), is_host_transfer=true, \
frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_target="{target}",_xla_megascale_transfer_type="{kind}"}}
  %done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  ROOT %r = f32[64,8]{{1,0}} copy(%x)
}}"""
  cost, size = hlo_cost(text), 64 * 8 * 4
  assert cost.across == times * size and cost.sent == {}
  # Read to be sent, and copied.
  assert cost.memory == 3 * size
  with pytest.raises(ValueError, match="has no _xla_megascale_transfer_type"):
    hlo_cost(text.replace("transfer_type", "type"))


def test_a_scan_costs_what_the_unrolled_loop_costs():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  split = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: E731
  weights = jax.ShapeDtypeStruct((3, 64, 64), jnp.float32, sharding=split(None, "data"))
  x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=split("data"))

  def cost(unroll):
    def layers(x, weights):
      def layer(x, weight):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ weight), split("data")), None

      return jax.lax.scan(layer, x, weights, unroll=unroll)[0]

    program = jax.jit(layers, out_shardings=split("data"))
    return hlo_cost(program.lower(x, weights).compile().as_text())

  scanned, unrolled = cost(1), cost(3)
  # Each layer's weights are gathered from the 4 devices that hold a part.
  assert scanned.sent == unrolled.sent == {"all-gather": 3 * 3 / 4 * 64 * 64 * 4}
  np.testing.assert_allclose(scanned.memory, unrolled.memory, rtol=0.5)


def test_a_text_without_a_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY computation"):
    hlo_cost("HloModule nothing")
