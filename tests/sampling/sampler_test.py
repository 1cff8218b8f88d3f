import dataclasses
import re
import zlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from models import golden_batch, make_golden

from ares_jax.grading.pool import GraderError, GradingPool
from ares_jax.models import qwen25_vl, weights
from ares_jax.models.vision import VisionInput
from ares_jax.run import setup
from ares_jax.sampling import sampler, scheduler, slots
from ares_jax.sampling.branching import Branching
from ares_jax.sampling.sampler import EngineConfig, SamplingConfig
from ares_jax.sampling.state import Drawing, abstract_state, empty_state
from ares_jax.system import mesh
from ares_jax.training.batch import pack

PLAIN = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, min_tokens=0, max_tokens=8)
ENGINE = EngineConfig(slots=0, read=4, chunk=16, cache_gib=1.0)


@pytest.mark.parametrize("bad", [
  dict(temperature=-1.0), dict(top_p=0.0), dict(top_k=-1), dict(max_tokens=0),
  dict(min_tokens=9)])
def test_refuses_impossible_settings(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    dataclasses.replace(PLAIN, **bad)


@pytest.mark.parametrize("bad", [
  dict(slots=-1), dict(read=-1), dict(chunk=-1), dict(cache_gib=0.0)])
def test_refuses_impossible_engines(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    dataclasses.replace(ENGINE, **bad)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*make_golden.VARIANTS, *make_golden.FAMILIES])
def test_greedy_decoding_of_64_tokens_equals_transformers(variant):
  names = ("text", "image", "images")
  # 78 tokens are those of four images: the prompt is as long as the array allows.
  model = golden_batch.config(variant)
  prompts = golden_batch.prompts(model, names, length=78)
  params = golden_batch.read_hf(make_golden.folder(variant), model)
  with jax.set_mesh(mesh.make_mesh(1, 1, jax.devices()[:1])):
    drawing = Drawing(jax.random.key(0), np.arange(model.vocab) != model.image_token, None, 2,
                      SamplingConfig(0.0, 1.0, 0, 0, make_golden.GREEDY), (-1,))
    got = sampler.sample(model, params, prompts, drawing, EngineConfig(1.0, 3, 1, 20))
  assert got.mask.all()
  with golden_batch.references(variant) as reference:
    for b, name in enumerate(names):
      for g in range(2):
        np.testing.assert_array_equal(got.tokens[b * 2 + g], reference[f"{name}/greedy"])


@pytest.fixture(scope="module")
def run():
  with jax.set_mesh(mesh.make_mesh(-1, 1)), setup.open_run(tiny.read()) as parts:
    params = parts.init_params()
    # Tied weights repeat the last token: weaker ones let others, and the end, have their turn.
    params["embed"] = 0.5 * params["embed"]
    rows = [parts.source("eval")[index] for index in range(4)]
    yield parts, params, parts.generator.encoder.batch(rows, np.arange(4))


def sample(run, prompts, *, group=2, allowed=None, engine=ENGINE, **sampling):
  parts, params, _ = run
  allowed = parts.generator.allowed if allowed is None else allowed
  generator = dataclasses.replace(parts.generator, allowed=allowed, engine=engine)
  return generator.sample(params, prompts, jax.random.key(7), group=group,
                          sampling=dataclasses.replace(PLAIN, **sampling))


def only(run, *tokens):
  """Tokens that may be drawn: these and the end."""
  return np.isin(np.arange(run[0].model.vocab), [*tokens, *run[0].generator.end])


def test_recorded_statistics_equal_a_full_forward_pass(run):
  parts, params, prompts = run
  samples = sample(run, prompts)
  rows, _ = pack(prompts, samples, samples.mask.sum(1), group=2, minibatch=8, microbatch=4,
                 row_tokens=(80,), longest=38)
  rows = jax.tree.map(lambda x: x[0].reshape(-1, *x.shape[3:]), rows.replace(used=None))

  @jax.jit
  def forward(params, rows):
    vision = VisionInput(**prompts.vision())
    features = qwen25_vl.vision_features(parts.model, params, vision)
    embeds = qwen25_vl.embed(parts.model, params, rows.tokens, rows.unit,
                             features.reshape(-1, features.shape[-1]))
    hidden = qwen25_vl.hidden(parts.model, params, embeds, jnp.moveaxis(rows.positions, 1, 0),
                              rows.segment)
    return jax.nn.log_softmax(hidden @ qwen25_vl.unembedding(parts.model, params).T)

  logp = np.asarray(forward(params, rows))
  logprob = np.take_along_axis(logp[:, :-1], rows.tokens[:, 1:, None], 2)[..., 0]
  entropy = -np.sum(np.exp(logp) * logp, -1)[:, :-1]
  mask = rows.response_mask[:, 1:]
  assert mask.sum() == samples.mask.sum() > 20
  sampled = samples.entropy[rows.sequence, rows.response_index][:, 1:]
  np.testing.assert_allclose(rows.sampler_logprob[:, 1:][mask], logprob[mask], atol=1e-4)
  np.testing.assert_allclose(sampled[mask], entropy[mask], atol=1e-4)
  assert np.ptp(entropy[mask]) > 0.1


def test_int8_pages_sample_from_nearly_the_same_policy(run):
  exact, int8, other = (sample(run, run[2], engine=engine) for engine in (
    ENGINE, dataclasses.replace(ENGINE, int8_pages=True),
    EngineConfig(slots=3, read=1, chunk=7, cache_gib=1.0, int8_pages=True)))
  # The first token is of the prompt's own hidden state, which has read no pages.
  np.testing.assert_array_equal(int8.logprob[:, 0], exact.logprob[:, 0])
  same = int8.mask & exact.mask & (np.cumsum(int8.tokens != exact.tokens, 1) == 0)
  gap = np.abs(int8.logprob - exact.logprob)[same]
  assert same.sum() > 30 and 1e-5 < gap.mean() < 0.02
  # A prompt's scales are its own: they depend on nothing else in the batch. A number between two
  # int8 values may become the other one, which moves a log-probability by some 1e-5.
  np.testing.assert_array_equal(other.tokens, int8.tokens)
  np.testing.assert_allclose(other.logprob, int8.logprob, atol=5e-4)


def test_a_sample_depends_on_key_prompt_and_number_alone(run):
  prompts = run[2]
  whole = sample(run, prompts)
  part = sample(run, prompts.take([2, 1, 3]), group=3)
  for place, prompt in enumerate([2, 1, 3]):
    for number in (0, 1):
      np.testing.assert_array_equal(part.tokens[3 * place + number],
                                    whole.tokens[2 * prompt + number])
  assert (whole.tokens[0] != whole.tokens[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("slices, data, model, engine", [
  (1, 1, 1, EngineConfig(slots=3, read=1, chunk=5, cache_gib=1.0)),
  (1, 2, 2, EngineConfig(slots=4, read=2, chunk=16, cache_gib=1.0)),
  (2, 1, 2, EngineConfig(slots=4, read=2, chunk=16, cache_gib=1.0))])
def test_slots_chunks_and_devices_change_no_answer(run, slices, data, model, engine, monkeypatch):
  want = sample(run, run[2], group=3)
  # Attention then reads a longer part of the pages from chunk to chunk.
  monkeypatch.setattr(sampler, "MIN_LIVE_TOKENS", 2)
  parts, params, prompts = run
  read = mock.Mock(wraps=slots.read_prompts)
  monkeypatch.setattr(slots, "read_prompts", read)
  devices = jax.devices()[:slices * data * model]
  with jax.set_mesh(mesh.make_mesh(data, model, devices, slices=slices)):
    params = jax.tree.map(np.asarray, params)
    got = sample((parts, params, None), prompts, group=3, engine=engine)
  assert read.call_count == 4 // engine.read
  equal(got, want)


def equal(got, want):
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_array_equal(got.mask, want.mask)
  for name in ("logprob", "entropy"):
    np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-5)


def test_rows_that_are_put_back_are_drawn_again_with_the_same_numbers(run, monkeypatch):
  want = sample(run, run[2], group=3, max_tokens=24)
  # Pages for one prompt and one answer more: all rows start at once, and few of them can go on.
  monkeypatch.setattr(scheduler, "rows_that_fit", lambda *_: np.array([100]))
  parts, params, prompts = run
  plans = []

  def plan(*arguments, **options):
    sizes = scheduler.plan_cache(*arguments, **options)
    plans.append(dataclasses.replace(
      sizes, pages=4 * sizes.prompt_pages + scheduler.pages_lib.count(sizes.page_tokens, 24) + 3))
    return plans[-1]

  monkeypatch.setattr(sampler, "plan_cache", plan)
  generator = dataclasses.replace(parts.generator, history=scheduler.History(),
                                  engine=EngineConfig(slots=9, read=4, chunk=5, cache_gib=1.0))
  with jax.set_mesh(mesh.make_mesh(1, 1, jax.devices()[:1])):
    got = generator.sample(jax.tree.map(np.asarray, params), prompts, jax.random.key(7), group=3,
                           sampling=dataclasses.replace(PLAIN, max_tokens=24))
  assert 0.1 < generator.history.redrawn < 0.9
  equal(got, want)


class Odd(GradingPool):
  """Grades complete responses, about half of them right; records their order."""

  def __init__(self):
    super().__init__(1)
    self.name, self.seen = "odd", []

  def _grade_here(self, pair):
    self.seen.append(pair)
    return zlib.crc32(pair[0].encode()) % 2


class Decoding:
  """An array that is always ready, or never, when the host asks."""

  def __init__(self, array, ready):
    self._array, self._ready = array, ready

  def is_ready(self):
    return self._ready

  def __array__(self, *arguments, **options):
    return np.asarray(self._array)


def decoding(monkeypatch, ready):
  """Makes every chunk ready at once, or only when the host has nothing else to do."""
  decode = slots.decode

  def wrapped(*arguments, **options):
    state, status = decode(*arguments, **options)
    return state, status.replace(ended=Decoding(status.ended, ready))

  monkeypatch.setattr(slots, "decode", wrapped)


@pytest.mark.parametrize("ready", [True, False])
def test_answers_graded_meanwhile_are_those_graded_afterwards(run, monkeypatch, ready):
  parts, params, prompts = run
  want = sample(run, prompts, group=3)
  texts = [parts.generator.encoder.chat.text(tokens[mask])
           for tokens, mask in zip(want.tokens, want.mask, strict=True)]
  decoding(monkeypatch, ready)
  monkeypatch.setattr(sampler, "FETCH_SIZE", 2)
  with Odd() as grader:
    generator = dataclasses.replace(parts.generator, grader=grader,
                                    engine=EngineConfig(slots=4, read=4, chunk=2, cache_gib=1.0))
    got, grades = generator.answer(params, prompts, jax.random.key(7), group=3, sampling=PLAIN)
    # Only where the devices take their time, and then in the order in which slots become free.
    in_order = [text for text, _ in grader.seen] == list(dict.fromkeys(texts))
  assert in_order == ready
  np.testing.assert_array_equal(got.tokens, want.tokens)
  assert grades.texts == texts
  np.testing.assert_array_equal(grades.correct, [zlib.crc32(text.encode()) % 2 for text in texts])
  assert 0 < grades.correct.sum() < len(texts) and grades.timed_out == 0


def test_a_grader_that_fails_stops_decoding(run, monkeypatch):
  decoding(monkeypatch, False)
  chunks = mock.Mock(wraps=slots.decode)
  monkeypatch.setattr(slots, "decode", chunks)
  parts, params, prompts = run
  with Odd() as grader:
    generator = dataclasses.replace(parts.generator, grader=grader,
                                    engine=EngineConfig(slots=4, read=4, chunk=2, cache_gib=1.0))
    monkeypatch.setattr(Odd, "_grade_here", mock.Mock(side_effect=GraderError("odd is broken")))
    with pytest.raises(GraderError, match="odd is broken"):
      generator.answer(params, prompts, jax.random.key(7), group=8, sampling=PLAIN)
  stopped = chunks.call_count
  sample(run, prompts, group=8, engine=generator.engine)
  assert 2 * stopped < chunks.call_count - stopped


def test_the_end_may_come_at_the_first_token_or_never(run):
  end = run[0].generator.end[0]
  samples = sample(run, run[2], allowed=only(run), engine=EngineConfig(1.0, 4, 4, 16))
  np.testing.assert_array_equal(samples.tokens[:, 0], end)
  np.testing.assert_array_equal(samples.mask.sum(1), 1)
  no_end = run[0].generator.allowed.copy()
  no_end[end] = False
  assert sample(run, run[2], allowed=no_end, engine=EngineConfig(1.0, 4, 4, 16)).mask.all()


def test_the_end_never_comes_before_min_tokens(run):
  samples = sample(run, run[2], group=8, allowed=only(run, 20), min_tokens=3)
  lengths = samples.mask.sum(1)
  assert lengths.min() == 3 and lengths.max() > 3


def test_a_slot_takes_the_next_row_within_a_chunk(run):
  parts, params, prompts = run
  model = parts.model
  with jax.set_mesh(mesh.make_mesh(1, 1, jax.devices()[:1])):
    params = sampler.rollout_weights(model, params)
    arrays = dict(tokens=prompts.tokens, length=prompts.length, positions=prompts.positions,
                  unit=prompts.unit, prompt_id=prompts.prompt_id,
                  vision=qwen25_vl.VisionInput(**prompts.vision()))
    sizes = scheduler.plan_cache(model, EngineConfig(1.0, 3, 4, 2), prompts=4, group=2, tokens=8,
                                 prompt_tokens=prompts.tokens.shape[1])
    state = empty_state(model, sizes, 0)
    # The last prompt is not read: its answers have to wait.
    state = slots.read_prompts(model, params, state, arrays, np.int32([0, 1, 2, 4]))
    drawing = Drawing(jax.random.key(0), only(run), None, 2, PLAIN, parts.generator.end)
    state, status = slots.decode(model, params, state, drawing, np.int32([3]), steps=2, live=8,
                                 tokens=prompts.tokens.shape[1])
    state, status = jax.device_get((state.slots, status))
  # 6 answers of one token in 3 slots.
  np.testing.assert_array_equal(status.ended, [True] * 6 + [False] * 2)
  np.testing.assert_array_equal(status.done, [-1, -1, -1])
  np.testing.assert_array_equal(state.length, [1, 1, 1, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(state.tokens[:6, 0], parts.generator.end[0])


@pytest.mark.parametrize("branching", [None, Branching(np.float32(1), branches=1, window=4)])
def test_a_chunk_is_one_program_that_never_copies_the_pages_nor_asks_the_host(branching):
  model = golden_batch.config("tied")
  sizes = scheduler.CachePlan(prompts=2, group=2, prompt_tokens=40, tokens=29, page_tokens=8,
                              pages=23, slots=3, read=2, chunk=16)
  with jax.set_mesh(mesh.make_mesh(1, 1, jax.devices()[:1])):
    params = weights.abstract(weights.weight_table(model), jax.sharding.get_mesh(), jnp.float32)
    state = abstract_state(model, sizes, 1 if branching else 0)
    drawing = Drawing(jax.random.key(0), np.ones(model.vocab, bool), branching, 2,
                            dataclasses.replace(PLAIN, max_tokens=29, top_p=0.9), (1,))
    text = slots.decode.lower(model, params, state, drawing, np.int32([3]), tokens=40, steps=16,
                              live=20).compile().as_text()
  shape = f"{model.kv_heads},{model.layers * 23},8,{model.head_dim}"
  assert re.search(rf"f32\[{shape}\]", text)
  split = f"{model.kv_heads},{model.layers},23,8,{model.head_dim}"
  assert not re.findall(rf"= f32\[(?:{shape}|{split})\]\S* copy\(.*", text)
  assert not re.findall(r"infeed|outfeed|send\(|recv\(|callback", text)


def test_the_chunks_of_a_batch_share_one_program_of_each_kind(run, capfd):
  # 5 chunks, 2 calls that read; no other test decodes 3 slots.
  sample(run, run[2], group=3, engine=EngineConfig(1.0, 3, 2, 3), max_tokens=7)
  told = capfd.readouterr().err
  assert told.count("compiling decode") == 1 and told.count("compiling read_prompts") <= 1


def test_greedy_repeats_itself_and_image_tokens_are_never_drawn(run):
  parts, _, prompts = run
  samples = sample(run, prompts, temperature=0.0)
  np.testing.assert_array_equal(samples.tokens[::2], samples.tokens[1::2])
  drawn = sample(run, prompts, group=8)
  assert parts.model.image_token not in drawn.tokens[drawn.mask]
  assert parts.generator.allowed.sum() == len(parts.tokenizer) - 14  # the end token is allowed


def test_ends_at_the_end_token(run):
  samples = sample(run, run[2], group=8)
  end = run[0].generator.end[0]
  for tokens, mask in zip(samples.tokens, samples.mask, strict=True):
    length = mask.sum()
    assert mask[:length].all()
    assert end not in tokens[: length - 1]
    assert length == 8 or tokens[length - 1] == end
    assert (tokens[length:] == 0).all()
  lengths = samples.mask.sum(1)
  assert lengths.min() < 8 and lengths.max() == 8  # both kinds occurred
