"""The plan of tiny models for two kinds of chips, compiled without a TPU."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
import tiny

from ares_jax.models import flops
from ares_jax.plan import __main__ as plan_command
from ares_jax.plan import counted, iteration, programs
from ares_jax.plan.hlo_cost import hlo_cost
from ares_jax.plan.suggestions import larger_cache, suggestions
from ares_jax.run import config as run_config
from ares_jax.run import model as model_lib
from ares_jax.system import chips, mesh
from ares_jax.system import config as config_lib

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs `pip install libtpu`")


@pytest.fixture(scope="module")
def small():
  """(TrainConfig, ModelConfig) of 2 layers."""
  config = tiny.read()
  return config, model_lib.model_config(config.model)


@needs_libtpu
@pytest.mark.parametrize("topology, only", [("v5e:2x2", ("reshard", "decode")),
                                            ("v6e:2x2", ("decode",))])
def test_a_plan_has_memory_work_and_a_floor_for_each_program(small, topology, only):
  config, model = small
  lines = []
  result = iteration.plan_iteration(config, model, topology, only=only, note=lines.append)
  assert result.fits and not result.suggestions
  assert [part.name for part in result.programs] == list(only)
  assert len(lines) == 2 * len(only)
  for part in result.programs:
    memory = part.memory
    assert memory.total == pytest.approx(memory.arguments + memory.outputs + memory.temporaries
                                         - memory.aliases + memory.beside)
    assert memory.over == memory.total - result.chip.memory < 0
    assert part.not_counted == ()
    assert part.memory_bytes > 0 and part.sent is not None  # jaxlib alone does not read v6e's text
    assert part.name == "reshard" or 1 <= part.flops / part.model_flops < 4
  decode = next(part for part in result.programs if part.name == "decode")
  # The cache is updated in place.
  assert decode.memory.aliases > 0
  assert result.hours == pytest.approx(result.floor / 3.6)
  assert json.loads(json.dumps(dataclasses.asdict(result)))["chips"] == result.chips
  text = iteration.plan_table(result)
  assert all(f"| {name} |" in text for name in only) and "It does not fit" not in text


@needs_libtpu
def test_bytes_between_slices_are_those_by_hand():
  _, devices = chips.describe_slice("2xv5e:2x2")
  with jax.set_mesh(mesh.make_mesh(4, 1, devices, slices=2)):
    x = jax.ShapeDtypeStruct((2, 1024, 1024), jnp.float32, sharding=mesh.sharding("slice", "data"))
    total = jax.jit(lambda x: x.sum(0), out_shardings=mesh.sharding("data"))
    _, text = counted.compile_for_chips(total.trace(x))
  cost = hlo_cost(text)
  # Of two, each sends half of its quarter, and half of the sum.
  assert cost.across == 1024 * 1024 * 4 / 4 and cost.sent == {}


@needs_libtpu
@pytest.mark.parametrize("topology", ["v6e:8x8", "v5e:8x8", "v5p:4x4x4"])
def test_a_mesh_may_split_the_axes_of_a_slice(topology):
  _, devices = chips.describe_slice(topology)
  made = mesh.make_mesh(16, 4, devices)
  assert made.devices.shape == (1, 16, 4) and set(made.devices.flat) == set(devices)


@needs_libtpu
def test_slices_are_the_outer_axis():
  _, devices = chips.describe_slice("2xv5e:4x4")
  made = mesh.make_mesh(-1, 4, devices[::-1], slices=2)  # in whatever order they come
  assert dict(made.shape) == {"slice": 2, "data": 4, "model": 4}
  for number, part in enumerate(made.devices):
    assert {device.slice_index for device in part.flat} == {number}
  with pytest.raises(ValueError, match="32 devices are of 2 slices; set config.mesh.slice=2"):
    mesh.make_mesh(-1, 4, devices)


@pytest.mark.parametrize("topology, message", [
  ("v5e", "is not KIND:SIZES"), ("v5e:", "is not KIND:SIZES"), ("2xv5e", "several slices are"),
  ("v5e:16x32", "has 512 chips; the largest slice of v5e has 256"),
  ("v5e:0x8", "with sizes >= 1"), ("V5E:8x8", "no chip 'V5E' here; did you mean 'v5e'"),
  ("v5x:2x2", "no chip 'v5x' here; did you mean"), ("h200:1", "can be compiled on that GPU only"),
  ("v5p:4x4", "has 2 sizes, but the torus of v5p has 3 axes; write for example v5p:4x4x4"),
  pytest.param("v5e:3x3", "topology 'v5e:3x3': .*not divisible", marks=needs_libtpu)])
def test_an_unknown_slice_is_refused(topology, message):
  with pytest.raises(ValueError, match=message):
    chips.describe_slice(topology)


@pytest.mark.parametrize("words", [
  "Ran out of memory on HBM, the total memory required for HLO temporaries (18.26G) exceeds "
  "available HBM (15.75G). HLO module: jit_f.",
  "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.26G of 15.75G "
  "hbm. Exceeded hbm capacity by 2.51G.\n\nTotal hbm usage >= 18.52G:\n    reserved   258.12M"])
def test_the_compilers_refusal_says_how_much_memory_a_program_needs(small, words):
  config, model = small
  chip = chips.CHIPS["v5e"]
  program = programs.Program("decode", 1, None, beside=2.0**30)
  error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: {words}")
  memory = iteration._refused_memory(error, program, chip)
  assert memory.total == pytest.approx(19.26 * 2**30)
  assert memory.over == pytest.approx((19.26 - 15.75) * 2**30)
  part = iteration.ProgramPlan("decode", 3, memory, 1e15, 2e15, None, None, None, ("no text",),
                               0.5, "compute", 9.0)
  found = suggestions(["decode"], config, dataclasses.replace(model, kv_heads=2), 4)
  assert any("--config.mesh.model=2" in text for text in found)
  text = iteration.plan_table(iteration.Plan("v5e:2x2", chip, 4, (1, 4, 1), (part,), False, 1.5,
                                             0.4, found))
  assert "| 1.00 | 19.26 | **3.51 too many** |" in text
  assert "decode: not counted, and left out of the floor: no text." in text
  assert "It does not fit. Try first:\n- --config.mesh.model=2" in text
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    iteration._refused_memory(jax.errors.JaxRuntimeError("INTERNAL: no"), program, chip)


@needs_libtpu
@pytest.mark.parametrize("slots, offered", [(0, True), (4, False)])
def test_memory_that_rollouts_leave_is_offered_to_keys_and_values(small, slots, offered):
  config, model = small
  config = dataclasses.replace(
    config, engine=dataclasses.replace(config.engine, cache_gib=2**-13, slots=slots),
    aepo=dataclasses.replace(config.aepo, prompts=16, minibatch=64))
  result = iteration.plan_iteration(config, model, "v5e:2x2", only=("prefill", "decode"))
  text = iteration.plan_table(result)
  assert ("It fits. For more speed:\n- --config.engine.cache_gib=1 (" in text) == offered


def test_a_larger_cache_is_offered_only_where_it_is_half_as_large_again():
  chip = chips.CHIPS["v5p"]  # 95.7 GiB, of which a tenth stays free
  engine = dataclasses.replace(tiny.read().engine, cache_gib=6.0)
  assert larger_cache(engine, 40, 10 * 2**30, chip) == ()
  assert larger_cache(engine, 1, 65 * 2**30, chip) == ()
  (flag,) = larger_cache(engine, 40, 65 * 2**30, chip)
  assert flag.startswith("--config.engine.cache_gib=61 (") and "65.0 GiB of a chip are free" in flag
  (flag,) = larger_cache(engine, 3, 65 * 2**30, chip)  # holds all
  assert flag.startswith("--config.engine.cache_gib=18 (")


@pytest.mark.parametrize("name, kv_heads, parts, wider", [
  ("decode", 2, 1, 2), ("decode", 1, 1, None), ("aepo_step", 1, 1, 2), ("aepo_step", 1, 2, 4),
  ("aepo_step", 1, 4, None)])
def test_a_wider_mesh_is_suggested_if_it_divides_a_slice(small, name, kv_heads, parts, wider):
  config, model = small
  layout = dataclasses.replace(config.mesh, slice=2, model=parts)
  # Two slices of 4; neither 1 nor 2 heads divide over those.
  flags = suggestions([name], dataclasses.replace(config, mesh=layout),
                      dataclasses.replace(model, kv_heads=kv_heads), 8)
  found = [flag.split()[0] for flag in flags if "mesh.model" in flag]
  assert found == ([f"--config.mesh.model={wider}"] if wider else [])


def test_the_sizes_of_a_published_model_follow_from_its_name(small, tmp_path):
  section = dataclasses.replace(small[0].model, path="models/Qwen2.5-VL-7B-Instruct", remat="dots")
  model = model_lib.model_config(section)
  assert (model.layers, model.heads, model.remat) == (28, 28, "dots")
  with pytest.raises(ValueError, match="is no folder and ends in no name .*Qwen2.5-VL-3B-Instruct"):
    model_lib.model_config(dataclasses.replace(section, path="Qwen2-VL"))


def test_model_flops_are_those_of_a_known_model(small):
  """By hand for 2 layers of width 32: what the table of the paper's recipe rests on."""
  config, model = small
  found = programs.needed_flops(config, model)
  prompts, rows = config.aepo.prompts, config.aepo.prompts * config.aepo.group
  prompt, answer = config.prompt.max_tokens[-1], config.aepo.sampling.max_tokens
  token = 2 * model.layers * (32 * 16 * 2 * (2 + 1) + 3 * 32 * 64)
  head = 2 * model.vocab * 32
  # A query of 2 heads of 16 meets on average prompt + answer / 2 keys.
  scores = 4 * model.layers * 32 * (prompt + answer / 2)
  assert found["decode"] == rows * answer * (token + head + scores)
  assert found["prefill"] < prompts * (prompt * (token + head) * 20)
  assert found["reshard"] == 0
  # Prompts pass through the layers, not through the head; policy and reference, and gradients.
  row = prompt + answer
  patches = config.prompt.windows[-1] * model.vision.window_patches
  image = flops.tower_flops(model.vision, patches, patches**2)
  assert config.aepo.minibatch == rows and config.aepo.frozen == ("vision",)
  assert found["aepo_step"] == pytest.approx(
    4 * rows * (row * token + answer * head + 4 * model.layers * 32 * row**2 / 2)
    + prompts * image)


def recipe(**changes):
  """TrainConfig of configs/aepo_7b.py; `changes` are dotted keys with `__` for the dot."""
  values = config_lib.load(str(tiny.ROOT / "configs" / "aepo_7b.py"))
  values.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in changes.items()})
  return config_lib.build(run_config.TrainConfig, values, "config")


@needs_libtpu
@pytest.mark.parametrize("changes, message", [
  ({"mesh__model": 7}, "mesh model=7 does not divide 64 devices; change config.mesh"),
  ({}, "config.aepo.microbatch = 8 does not divide over 64 devices"),
  ({"mesh__model": 8, "aepo__microbatch": 64, "engine__cache_gib": 1.0},
   "config.aepo.prompts = 512: keys and values .*more than engine.cache_gib = 1.0")])
def test_sizes_that_do_not_divide_are_named_before_anything_compiles(changes, message):
  config = recipe(**changes)
  with pytest.raises(ValueError, match=message):
    iteration.plan_iteration(config, model_lib.model_config(config.model), "v5e:8x8")


@needs_libtpu
def test_the_commands_shown_are_accepted():
  lines = plan_command.__doc__.replace("\\\n", " ").splitlines()
  commands = [line.split()[3:] for line in lines if line.strip().startswith("python -m")]
  assert len(commands) == 4
  for words in commands:
    given = dict(word.removeprefix("--").split("=") for word in words if "=" in word)
    config = recipe(**{name.removeprefix("config."): int(value) for name, value in given.items()
                       if name.startswith("config.")})
    iteration.plan_iteration(config, model_lib.model_config(config.model), given["topology"],
                             only=())
