"""Both kinds of stages on adapters: what is trained, saved, read and written."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from ares_jax import adacs, aepo, evaluate, export
from ares_jax.models import lora, weights
from ares_jax.plan import programs
from ares_jax.run import files, identity, restore, setup
from ares_jax.run import model as model_lib
from ares_jax.run.checkpoint import digest, reader
from ares_jax.run.setup import StageContext
from ares_jax.system import mesh
from ares_jax.training import aepo_step

pytestmark = pytest.mark.slow

CHANGES = dict(
  model__lora__rank=2, model__lora__alpha=4.0, model__lora__targets=("q", "o", "down"),
  model__compute_dtype="bfloat16", warmup__steps=1, warmup__optimizer__warmup_steps=0,
  adacs__steps=0, aepo__steps=2, aepo__optimizer__learning_rate=3e-3)


class Trained:
  """A warm-up of adapters and two iterations on top of it, and what was passed on the way."""

  def __init__(self, workdir):
    self.workdir, self.config = str(workdir), tiny.read(**CHANGES)
    files.write_json(f"{workdir}/config.json",
                     json.loads(tiny.values(**CHANGES).to_json_best_effort()))
    self.devices = mesh.make_mesh(1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(self.devices), setup.open_run(self.config) as self.run:
      first, self.base = self.run.start()
      self.base_before = jax.device_get(self.base.weights)
      identity.keep_base(self.workdir, self.base)
      self.cold = adacs.fine_tune(first, self.run.source("warmup"), self.config.warmup,
                                  self.context(self.workdir), stage="warmup")
      self.end = self.go_on(self.workdir)

  def context(self, workdir):
    return StageContext(self.run.generator, workdir, seed=0, threads=1, base=self.base)

  def go_on(self, workdir):
    with jax.set_mesh(self.devices):
      return jax.device_get(aepo.train_aepo(self.cold, self.run.source("rl"), self.config.aepo,
                                            self.context(workdir), trigger_V=self.run.trigger_V))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return Trained(tmp_path_factory.mktemp("lora"))


def steps(workdir):
  with open(f"{workdir}/metrics.jsonl", encoding="utf-8") as file:
    return [line for line in map(json.loads, file) if line["stage"] == "aepo"]


def test_adapters_move_and_the_base_keeps_its_bits(trained):
  jax.tree.map(np.testing.assert_array_equal, trained.base.weights, trained.base_before)
  assert set(trained.end) == {"q", "o", "down"}
  for name, pair in trained.end.items():
    assert all((pair[part] != trained.cold[name][part]).any() for part in ("a", "b"))


def test_the_reference_is_where_stage_2_started_not_the_base(trained):
  assert any((np.asarray(pair["b"]) != 0).any() for pair in trained.cold.values())
  first, second = steps(trained.workdir)
  assert first["kl/mean"] < 1e-12 < second["kl/mean"]  # two programs may round differently
  assert first["loss/sampler_gap"] < 0.02  # bfloat16; the rollouts' policy has the same adapters


def test_a_checkpoint_holds_adapters_and_their_moments_alone(trained):
  leaves = reader.read_record(f"{trained.workdir}/aepo", 2)["leaves"]
  held = {name.split("/")[1] for name in leaves if name.startswith("params/")}
  assert held == {"q", "o", "down"}
  largest = max(int(np.prod(shape)) for _, shape, _ in leaves.values())
  assert largest == max(leaf.size for leaf in jax.tree.leaves(trained.end))


def test_a_run_cut_off_ends_like_one_that_was_not(trained, tmp_path, monkeypatch):
  step, calls = aepo.aepo_step, []

  def cut(*args):
    calls.append(1)
    if len(calls) == 2:
      raise RuntimeError("power cut")
    return step(*args)

  monkeypatch.setattr(aepo, "aepo_step", cut)
  with pytest.raises(RuntimeError, match="power cut"):
    trained.go_on(str(tmp_path))
  jax.tree.map(np.testing.assert_array_equal, trained.go_on(str(tmp_path)), trained.end)


def test_a_gradient_that_is_not_finite_leaves_adapters_and_moments(trained, tmp_path, monkeypatch):
  step, seen = aepo.aepo_step, []

  def broken(model, config, state, reference, batch, trigger_V, base):
    rows = batch.rows.replace(sampler_logprob=batch.rows.sampler_logprob + np.nan)
    before = jax.device_get((state.params, state.opt_state, state.controllers))
    state, metrics = step(model, config, state, reference, batch.replace(rows=rows), trigger_V,
                          base)
    after = jax.device_get((state.params, state.opt_state, state.controllers))
    seen.append((before, after, float(metrics["update/skipped"])))
    return state, metrics

  monkeypatch.setattr(aepo, "aepo_step", broken)
  trained.go_on(str(tmp_path))
  assert len(seen) == 2
  for before, after, skipped in seen:
    assert skipped == 1
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_what_was_saved_is_read_merged_and_written(trained, tmp_path):
  with jax.set_mesh(trained.devices):
    export.export(trained.workdir, str(tmp_path / "hf"))
  written = load_file(tmp_path / "hf" / "model.safetensors")
  base, adapters = jax.tree.map(np.float32, (trained.base_before["blocks"], trained.end))
  changed = 0
  for layer in range(2):
    for ours, theirs in (("q", "self_attn.q_proj"), ("o", "self_attn.o_proj"),
                         ("down", "mlp.down_proj"), ("gate", "mlp.gate_proj")):
      matrix = base[ours][layer]
      if ours in adapters:
        change = 2 * np.tensordot(adapters[ours]["a"][layer], adapters[ours]["b"][layer], 1)
        changed += np.abs(change).max() > 1e-3
        matrix = np.float32((matrix + change).astype(trained.base_before["blocks"][ours].dtype))
      # Theirs is [outputs, inputs].
      outputs = matrix.size // (base["o"].shape[1] * 16 if ours == "o" else len(matrix))
      found = written[f"model.layers.{layer}.{theirs}.weight"]
      np.testing.assert_allclose(found, matrix.reshape(-1, outputs).T, rtol=2**-8, atol=1e-6)
      if ours not in adapters:
        np.testing.assert_array_equal(found, matrix.T)
  assert changed == 6


def test_adapters_are_read_over_their_base_and_over_no_other(trained, tmp_path, monkeypatch):
  monkeypatch.setattr(restore, "first_weights", lambda *_: trained.base.weights)
  with jax.set_mesh(trained.devices):
    name, joined = evaluate.newest_weights(trained.run, trained.workdir)
  assert name.endswith("aepo step 2")
  jax.tree.map(np.testing.assert_array_equal, joined, lora.join(trained.base, trained.end))
  marks = digest.digest_tree(trained.base.weights)
  identity.keep_base(str(tmp_path), trained.base)
  other = trained.base.replace(weights=trained.base.weights | {
    "final_norm": trained.base.weights["final_norm"] * 2})
  with pytest.raises(ValueError, match="other files: base.final_norm differ"):
    identity.keep_base(str(tmp_path), other)
  identity.keep_base(str(tmp_path), other, ("base.final_norm",))
  for name in ("aepo", "config.json"):
    (tmp_path / name).symlink_to(f"{trained.workdir}/{name}")
  with jax.set_mesh(trained.devices), pytest.raises(ValueError, match="another base: final_norm"):
    evaluate.newest_weights(trained.run, str(tmp_path))
  assert json.loads((tmp_path / "base.json").read_text())["base"].keys() == marks.keys()


def test_adapters_are_not_read_with_another_alpha(trained):
  other = tiny.read(**CHANGES | {"model__lora__alpha": 8.0})
  with jax.set_mesh(trained.devices), pytest.raises(
      ValueError, match="was trained with model.lora.alpha = 4.0, not 8.0; set config.model.lora"):
    restore.restore_params(trained.workdir, "aepo", other, trained.run.model)


def test_a_plan_counts_the_base_once():
  """By hand, on one device: rollouts read the base where it is; full training holds all of it."""
  config = tiny.read(**CHANGES)
  model, section = model_lib.model_config(config.model), config.model.lora
  full = dataclasses.replace(config, model=dataclasses.replace(
    config.model, lora=dataclasses.replace(config.model.lora, rank=0)))
  count = weights.count(model)
  vision = sum(math.prod(leaf.shape) for leaf
               in jax.tree.leaves(weights.weight_table(model)["vision"]))
  with jax.set_mesh(mesh.make_mesh(1, 1, devices=jax.devices()[:1])):
    first = lora.init(model, section, jax.random.key(0))
    adapters = sum(leaf.size for leaf in jax.tree.leaves(first))
    held = {program.name: program.beside for program in programs.aepo_programs(config, model)}
    more = {program.name: program.beside for program in programs.aepo_programs(full, model)}
    params, base, _ = programs.abstract_policy(section, model)
    state, real = aepo_step.abstract_state(config.aepo, params, base), aepo_step.init_state(
      config.aepo, first, base)
  # Adapters, two moments and the reference's, 4 bytes each, and the tower that decoding is not
  # given; a few counts and controllers.
  assert held["decode"] == pytest.approx(4 * 4 * adapters + 2 * vision, abs=200)
  assert held["reshard"] == pytest.approx(3 * 4 * adapters + 2 * count, abs=200)
  # Weights and reference, and moments but for the frozen tower's.
  assert more["decode"] == pytest.approx(8 * count + 8 * (count - vision) + 2 * vision, abs=200)
  # Adapters' gradients are a small part of the work back: nothing is computed for the base.
  work = [programs.needed_flops(one, model)["aepo_step"] for one in (config, full)]
  assert 0.7 < work[0] / work[1] < 0.8
  jax.tree.map(lambda shape, leaf: np.testing.assert_equal((shape.shape, shape.dtype),
                                                           (leaf.shape, leaf.dtype)), state, real)
