import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from models import golden_batch, make_golden
from models.qwen25_vl_test import load

from ares_jax.data.prompts import Encoder, PromptConfig
from ares_jax.diagnose import replay
from ares_jax.models import qwen25_vl
from ares_jax.models.vision import VisionInput
from ares_jax.run import files, setup
from ares_jax.run.checkpoint.manager import Checkpoints
from ares_jax.system import mesh
from ares_jax.training import sft_step


class Prepared:
  """Packed warm-up rows and one supervised step on them."""

  def __init__(self, devices=1, slices=1, model=1):
    self.mesh = mesh.make_mesh(-1, model, devices=jax.devices()[:devices], slices=slices)
    config = tiny.read()
    with jax.set_mesh(self.mesh), setup.open_run(config) as run:
      self.run, self.config = run, config.warmup
      self.params = run.init_params()
      warmup = run.source("warmup")
      self.batch = tiny.trace_batch(run.generator.encoder, [warmup[i] for i in range(8)],
                               row_tokens=(80,), row_windows=24, row_multiple=8)

  def step(self, *, step=sft_step.sft_step, **changes):
    config = dataclasses.replace(self.config, **changes)
    with jax.set_mesh(self.mesh):
      params = jax.tree.map(jnp.copy, self.params)
      state = sft_step.init_state(config, params)
      return step(self.run.model, config, state, sft_step.to_device(self.batch))


@pytest.fixture(scope="module")
def prepared():
  return Prepared()


@pytest.fixture(scope="module")
def stepped(prepared):
  return prepared.step()


def test_loss_is_the_mean_over_response_tokens_of_the_whole_batch(prepared, stepped):
  batch, model = prepared.batch, prepared.run.model

  @jax.jit
  def log_softmax(params):
    features = qwen25_vl.vision_features(model, params, VisionInput(**batch.vision))
    embeds = qwen25_vl.embed(model, params, batch.tokens, batch.unit, features)
    hidden = qwen25_vl.hidden(model, params, embeds, batch.positions, batch.segment)
    return jax.nn.log_softmax(hidden @ qwen25_vl.unembedding(model, params).T)

  logp = np.float64(log_softmax(prepared.params))
  nll = [-logp[row, column - 1, batch.tokens[row, column]]
         for row, column in zip(*np.nonzero(batch.loss_mask), strict=True)]
  _, metrics = stepped
  np.testing.assert_allclose(metrics["loss"], np.mean(nll), rtol=1e-5)
  assert metrics["tokens"] == len(nll) > 50


@pytest.mark.slow
def test_loss_of_packed_rows_is_torchs():
  cases = {name: make_golden.case(name) for name in golden_batch.NAMES}
  starts = {name: make_golden.response_start(tokens) for name, (tokens, _) in cases.items()}
  chat = types.SimpleNamespace(
    image_token=make_golden.IMAGE, order=lambda name, images, history: range(images),
    pieces=lambda name, _, history: [(cases[name][0][: starts[name]].tolist(), False)],
    response=lambda name: cases[name][0][starts[name] :])
  encoder = Encoder(chat, PromptConfig("", (88,), (23,), 784, 10**6), window=56, patch=14, merge=2)
  rows = [{"id": name, "question": name, "images": pictures, "response": name}
          for name, (_, pictures) in cases.items()]
  batch = tiny.trace_batch(encoder, rows, row_tokens=(88,), row_windows=32, row_multiple=2)
  assert len(batch.tokens) == 2 and batch.segment.max() > 1  # four examples in two rows
  nll = []
  with golden_batch.references("tied") as reference:
    for name, (tokens, _) in cases.items():
      logits = np.float64(reference[f"{name}/logits"])
      logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      nll += [-logp[index - 1, tokens[index]] for index in range(starts[name], len(tokens))]
  config = dataclasses.replace(tiny.read().adacs, microbatch=1, frozen=("vision",))
  with jax.set_mesh(mesh.make_mesh(1, 1, devices=jax.devices()[:1])):
    params = jax.tree.map(jnp.array, load("tied"))  # copies: the step takes its state's buffers
    state = sft_step.init_state(config, params)
    _, metrics = sft_step.sft_step(golden_batch.config("tied"), config, state,
                                   sft_step.to_device(batch))
  assert metrics["tokens"] == len(nll)
  np.testing.assert_allclose(metrics["loss"], np.mean(nll), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_microbatches_do_not_change_the_gradient(prepared, stepped):
  state, metrics = prepared.step(microbatch=8)
  np.testing.assert_allclose(metrics["grad_norm"], stepped[1]["grad_norm"], rtol=1e-4)
  for one, other in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(stepped[0].opt_state),
                        strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.slow
def test_frozen_parts_stay(prepared):
  state, _ = prepared.step(frozen=("vision",))
  jax.tree.map(np.testing.assert_array_equal, state.params["vision"], prepared.params["vision"])
  assert (state.params["embed"] != prepared.params["embed"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("slices, model", [(1, 1), (2, 1), (2, 2)])
def test_one_device_and_four_give_the_same_first_step(stepped, slices, model):
  traced = []

  def step(*arguments):
    traced.append(sft_step.sft_step.trace(*arguments))
    traced.append(traced[0].lower().compile())
    return traced[1](*arguments[2:])

  _, metrics = Prepared(devices=4, slices=slices, model=model).step(step=step)
  for name, value in stepped[1].items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
  # The logits of each device's own tokens: the form that TPU kernels and a split vocabulary need.
  assert "shard_map" in str(traced[0].jaxpr)
  meetings = between(traced[1].as_text())
  inside = [line for line in meetings if "while/body" in line]
  # Of slices none is in the loop over microbatches.
  assert meetings and bool(inside) == (slices == 1)


@pytest.mark.parametrize("written, groups", [
  ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]), ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
  ("mesh['slice'=2,'data'=2] {'data'}", [[0, 1], [2, 3]]),
  ("mesh['data'=4] {'data':(1)2}", [[0, 2], [1, 3]]),
  ("mesh['data'=4] {'data':(2)2}", [[0, 1], [2, 3]]),
  ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
  ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]])])
def test_groups_are_read_however_they_are_written(written, groups):
  assert groups_of(f"all-reduce(%x), replica_groups={written}, metadata={{}}") == groups


def between(text):
  """Lines of a program of 4 devices in which the first two meet the others."""
  return [line for line in text.splitlines()
          if re.search(r" (?:replica_groups|source_target_pairs)=", line)
          and any(min(group) < 2 <= max(group) for group in groups_of(line))]


def groups_of(line):
  """Devices that meet, in any of XLA's three ways to write them."""
  lists = re.search(r"(?:replica_groups|source_target_pairs)=(\{\{.*?\}\})", line)
  if lists:
    return [[int(device) for device in group.split(",")]
            for group in re.findall(r"[\d,]*\d", lists[1])]
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
  if iota:
    shape, *order = map(numbers, iota.groups())
    return devices_in(*order).reshape(shape).tolist()
  sizes, shape, order, axes = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
    r"\{([^}]*)\}", line).groups()
  # 'data':(2)4 is the middle one of 3 axes that "data" is split into, of 2, 4 and the rest.
  parts = {name: (int(before or 1), size) for name, before, size in re.findall(
    r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)}
  split = []
  for name, whole in re.findall(r"'(\w+)'=(\d+)", sizes):
    before, size = parts.get(name, (1, 1))
    split += [before, int(size or whole), int(whole) // before // int(size or whole)]
  devices = devices_in(numbers(shape) or [4], numbers(order)).reshape(split)
  together = [*range(1, len(split), 3)]
  return np.moveaxis(devices, together, range(-len(together), 0)).reshape(
    -1, np.prod(np.take(split, together))).tolist()


def numbers(text):
  return [int(number) for number in text.split(",")] if text else None


def devices_in(shape, order):
  return np.arange(4).reshape(shape).transpose(order)


def test_weights_that_are_not_finite_are_named_from_a_dumped_batch(prepared, tmp_path):
  run, broken = prepared.run, prepared.params | {
    "final_norm": prepared.params["final_norm"] * np.nan}
  with jax.set_mesh(prepared.mesh):
    batch = sft_step.to_device(prepared.batch)
    files.dump_batch(str(tmp_path), "warmup", 3, {"batch": batch})
    state = sft_step.init_state(prepared.config, broken).replace(step=mesh.put(jnp.int32(2)))
    with Checkpoints(str(tmp_path / "warmup"), 1) as checkpoints:
      checkpoints.save(2, state, {})
    terms, step = replay.replay(run, str(tmp_path), str(tmp_path / "nonfinite" / "warmup-3.npz"))
  assert step == 2 and list(terms) == ["weights/final_norm", "logits", "logprob"]
