import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from models import golden_batch, make_golden
from models.qwen25_vl_test import load

from ares_jax import adacs, mesh, optimizer, replay, run_folder, setup
from ares_jax.checkpoint import Checkpoints
from ares_jax.data.prompts import Encoder, PromptConfig
from ares_jax.data.sources import Mixture
from ares_jax.data.traces import trace_batch
from ares_jax.models import qwen25_vl
from ares_jax.models.vision import VisionInput


class Prepared:
  """Packed lessons and one supervised step on them."""

  def __init__(self, devices=1):
    self.mesh = mesh.make_mesh(-1, 1, devices=jax.devices()[:devices])
    config = tiny.read()
    with jax.set_mesh(self.mesh), setup.open_run(config) as run:
      self.run, self.config = run, config.warmup
      self.params = run.init_params()
      lessons = run.source("lessons")
      self.batch = trace_batch(run.generator.encoder, [lessons[i] for i in range(8)],
                               row_tokens=(80,), row_windows=24, row_multiple=8)

  def step(self, *, step=adacs.sft_step, **changes):
    config = dataclasses.replace(self.config, **changes)
    with jax.set_mesh(self.mesh):
      params = jax.tree.map(jnp.copy, self.params)
      tx = optimizer.of(config.optimizer, params, frozen=config.frozen)
      state = adacs.SftState(mesh.put(jnp.int32(0)), params, optimizer.start(tx, params))
      return step(self.run.model, config, state, adacs.to_device(self.batch))


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


def test_loss_of_packed_rows_is_torchs():
  cases = {name: make_golden.case(name) for name in golden_batch.NAMES}
  starts = {name: make_golden.response_start(tokens) for name, (tokens, _) in cases.items()}
  chat = types.SimpleNamespace(
    image_token=make_golden.IMAGE, order=lambda name, images: range(images),
    prompt=lambda name, _: cases[name][0][: starts[name]],
    response=lambda name: cases[name][0][starts[name] :])
  encoder = Encoder(chat, PromptConfig("", (88,), (23,), 784, 10**6), window=56, patch=14, merge=2)
  rows = [{"id": name, "question": name, "images": pictures, "response": name}
          for name, (_, pictures) in cases.items()]
  batch = trace_batch(encoder, rows, row_tokens=(88,), row_windows=32, row_multiple=2)
  assert len(batch.tokens) == 2 and batch.segment.max() > 1  # four examples in two rows
  nll = []
  with golden_batch.references("tied") as reference:
    for name, (tokens, _) in cases.items():
      logits = np.float64(reference[f"{name}/logits"])
      logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      nll += [-logp[place - 1, tokens[place]] for place in range(starts[name], len(tokens))]
  config = dataclasses.replace(tiny.read().adacs, microbatch=1, frozen=("vision",))
  with jax.set_mesh(mesh.make_mesh(1, 1, devices=jax.devices()[:1])):
    params = jax.tree.map(jnp.array, load("tied"))  # copies: the step takes its state's buffers
    tx = optimizer.of(config.optimizer, params, frozen=config.frozen)
    state = adacs.SftState(mesh.put(jnp.int32(0)), params, optimizer.start(tx, params))
    _, metrics = adacs.sft_step(golden_batch.config("tied"), config, state,
                                adacs.to_device(batch))
  assert metrics["tokens"] == len(nll)
  np.testing.assert_allclose(metrics["loss"], np.mean(nll), rtol=0, atol=1e-4)


def test_microbatches_do_not_change_the_gradient(prepared, stepped):
  state, metrics = prepared.step(microbatch=8)
  np.testing.assert_allclose(metrics["grad_norm"], stepped[1]["grad_norm"], rtol=1e-4)
  for one, other in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(stepped[0].opt_state),
                        strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_frozen_parts_stay(prepared):
  state, _ = prepared.step(frozen=("vision",))
  jax.tree.map(np.testing.assert_array_equal, state.params["vision"], prepared.params["vision"])
  assert (state.params["embed"] != prepared.params["embed"]).any()


def test_one_device_and_four_give_the_same_first_step(stepped):
  four = Prepared(devices=4)
  _, metrics = four.step()
  for name, value in stepped[1].items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
  # The logits of each device's own tokens: the form that TPU kernels and a split vocabulary need.
  assert "shard_map" in str(four.step(step=adacs.sft_step.trace).jaxpr)


def test_weights_that_are_not_finite_are_named_from_a_dumped_batch(prepared, tmp_path):
  run, broken = prepared.run, prepared.params | {
    "final_norm": prepared.params["final_norm"] * np.nan}
  with jax.set_mesh(prepared.mesh):
    run_folder.dump_batch(str(tmp_path), "warmup", 3, {"batch": adacs.to_device(prepared.batch)})
    start = optimizer.start(optimizer.of(prepared.config.optimizer, broken, frozen=()), broken)
    with Checkpoints(str(tmp_path / "warmup"), 1) as checkpoints:
      checkpoints.save(2, adacs.SftState(mesh.put(jnp.int32(2)), broken, start), {})
    terms, step = replay.replay(run, str(tmp_path), str(tmp_path / "nonfinite" / "warmup-3.npz"))
  assert step == 2 and list(terms) == ["weights/final_norm", "logits", "logprob"]


class Source:
  """Problems whose teacher answers right briefly, right at length, and wrong."""

  def __len__(self):
    return 4

  def __getitem__(self, index):
    return {"id": str(index), "source": "s", "question": "1?", "images": [], "answer": "1",
            "pass_rate": [0, 1.0, 0.95, 0.5][index],
            "responses": ["<think> </think> \\boxed{1}", "<think> wait wait </think> \\boxed{1}",
                          "<think> </think> \\boxed{2}"]}


@pytest.fixture(scope="module")
def curate():
  """Function of (folder, config's changes) that curates the Source."""
  with setup.open_run(tiny.read(), check=False) as run:
    def curate(folder, shard=None, **changes):
      config = adacs.CurateConfig(**dict(selection="adacs", pass_rates="column", problems=4,
                                         samples=8, count=4, batch=3) | changes)
      shared = dict(generator=run.generator, max_tokens=8, seed=0)
      if shard:
        return adacs.measure(None, Source(), config, path=str(folder / "curation.jsonl"),
                             shard=shard, **shared)
      return adacs.curate(None, Source(), config, workdir=str(folder), **shared)

    yield curate


def probe(monkeypatch, passes):
  monkeypatch.setattr(adacs, "_pass_counts",
                      lambda params, prompts, *_: np.array(passes)[prompts.prompt_id])


@pytest.mark.parametrize("pass_rates", ["probe", "column"])
def test_curation_drops_wrong_answers_and_is_kept(curate, tmp_path, monkeypatch, pass_rates):
  probe(monkeypatch, [0, 8, 8, 4] if pass_rates == "probe" else None)
  selected = curate(tmp_path, pass_rates=pass_rates)
  report = json.loads((tmp_path / "curation.json").read_text())
  assert report["candidates"] == 8 and report["wrong_candidates_dropped"] == 4
  assert report["bracket_problems"] == [1, 0, 0, 0, 1, 0, 0, 0, 2]
  assert all("boxed{1}" in selected[index]["response"] for index in range(4))
  assert "<svg" in (tmp_path / "curation.html").read_text()
  probe(monkeypatch, None)
  again = curate(tmp_path, pass_rates=pass_rates)
  assert [again[i]["response"] for i in range(4)] == [selected[i]["response"] for i in range(4)]


@pytest.mark.parametrize("pass_rates", ["probe", "column"])
def test_a_stopped_curation_goes_on_after_its_last_whole_line(curate, tmp_path, monkeypatch,
                                                              pass_rates):
  probe(monkeypatch, [0, 8, 8, 4])
  curate(tmp_path, pass_rates=pass_rates)
  report, lines = (tmp_path / "curation.json"), (tmp_path / "curation.jsonl")
  whole, written = report.read_text(), lines.read_text()
  report.unlink()
  lines.write_text(written.splitlines(keepends=True)[0] + '{"problem": 1, "pas')
  probe(monkeypatch, [None, 8, 8, 4])  # the first is not asked
  curate(tmp_path, pass_rates=pass_rates)
  assert report.read_text() == whole and lines.read_text() == written


def test_shards_made_apart_are_the_curation_of_one(curate, tmp_path, monkeypatch):
  probe(monkeypatch, [0, 8, 8, 4])
  whole, apart = tmp_path / "whole", tmp_path / "apart"
  whole.mkdir()
  curate(whole, pass_rates="probe")

  def keep(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("config.json", {"seed": 0, "curate": {"samples": 8, "count": 4}}),
                         ("fingerprint.json", {"data.curated": "4 rows"})):
      (folder / name).write_text(json.dumps(values | {
        key: value for key, value in changes.items() if key in values}))

  keep(apart)
  for number in (2, 0):
    folder = apart / "curation" / f"0000{number}-of-00003"
    keep(folder, curate={"samples": 8, "count": 9})  # what is chosen is the run's own affair
    curate(folder, shard=(number, 3), pass_rates="probe")
  with pytest.raises(ValueError, match="the shards 1/3 are missing or not finished"):
    curate(apart, pass_rates="probe")
  folder = apart / "curation" / "00001-of-00003"
  keep(folder, **{"data.curated": "5 rows"})
  curate(folder, shard=(1, 3), pass_rates="probe")
  with pytest.raises(ValueError, match="00001-of-00003 was made with other values of data.curated"):
    curate(apart, pass_rates="probe")
  keep(folder)
  probe(monkeypatch, None)  # nobody is asked again
  curate(apart, pass_rates="probe")
  for name in ("curation.json", "curation.html"):
    assert (apart / name).read_text() == (whole / name).read_text()
  with pytest.raises(ValueError, match="shard 5 of 5: the number must be below 5, which must be"):
    curate(folder, shard=(5, 5))


def test_a_part_of_several_sources_is_refused(tmp_path):
  mixed = Mixture([Source(), Source()], [1.0, 3.0])
  config = adacs.CurateConfig(selection="adacs", pass_rates="column", problems=6, samples=8,
                              count=6, batch=3)
  with pytest.raises(ValueError, match="6 problems of 8 in 2 sources: .* curate.problems=8, or"):
    adacs.measure(None, mixed, config, generator=None, path=str(tmp_path / "curation.jsonl"),
                  max_tokens=8, seed=0)


def test_rows_without_candidates_are_named_before_the_probe(tmp_path):
  config = adacs.CurateConfig(selection="adacs", pass_rates="probe", problems=1, samples=8, count=1,
                              batch=1)
  with pytest.raises(ValueError, match="row 7: has no 'responses'"):
    adacs.curate(None, [{"id": "7"}], config, generator=None, workdir=str(tmp_path), max_tokens=8,
                 seed=0)
