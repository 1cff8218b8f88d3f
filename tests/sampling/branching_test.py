import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ares_jax.models import paged, qwen25_vl
from ares_jax.models.vision import VisionInput
from ares_jax.run import setup
from ares_jax.sampling import pages, sampler, scheduler
from ares_jax.sampling.branching import Branching, hand_over_forks, join_forks, parents
from ares_jax.sampling.sampler import EngineConfig, SamplingConfig
from ares_jax.sampling.state import Prompts, Slots, State
from ares_jax.system import mesh
from ares_jax.training.batch import pack

GROUP, BRANCHES, WINDOW, TOKENS = 5, 3, 2, 16
SAMPLING = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, min_tokens=0, max_tokens=TOKENS)
ENGINE = EngineConfig(slots=0, read=4, chunk=5, cache_gib=1.0)


@pytest.fixture(scope="module")
def run():
  with jax.set_mesh(mesh.make_mesh(-1, 1)), setup.open_run(tiny.read()) as parts:
    params = parts.init_params()
    # Tied weights repeat the last token: weaker ones let others, and the end, have their turn.
    params["embed"] = 0.5 * params["embed"]
    rows = [parts.source("eval")[index] for index in range(4)]
    yield parts, params, parts.generator.encoder.batch(rows, np.arange(4))


def sample(run, threshold, engine=ENGINE):
  parts, params, prompts = run
  branching = Branching(jnp.float32(threshold), BRANCHES, WINDOW) if threshold else None
  generator = dataclasses.replace(parts.generator, engine=engine)
  return generator.sample(params, prompts, jax.random.key(7), group=GROUP, sampling=SAMPLING,
                          branching=branching)


@pytest.fixture(scope="module")
def plain(run):
  return sample(run, None)


def rises(samples, row, threshold):
  """Where the windows of a row rise to the threshold: eq. 4, one window after the other."""
  entropy = samples.entropy[row][samples.mask[row]]
  means = [entropy[start:start + WINDOW].mean() for start in range(len(entropy) - WINDOW + 1)]
  return [start for start in range(1, len(means))
          if means[start - 1] < threshold <= means[start]]


@pytest.fixture(scope="module")
def threshold(plain):
  return float(np.median(plain.entropy[plain.mask]))


@pytest.fixture(scope="module")
def forked(run, threshold):
  return sample(run, threshold)


def test_forks_are_given_to_finished_with_their_parents_tokens(run, forked, threshold):
  parts, params, prompts = run
  handed = {}
  with mock.patch.object(sampler, "FETCH_SIZE", 4):
    dataclasses.replace(parts.generator, engine=EngineConfig(1.0, 4, 4, 2)).sample(
      params, prompts, jax.random.key(7), group=GROUP, sampling=SAMPLING,
      branching=Branching(jnp.float32(threshold), BRANCHES, WINDOW),
      finished=lambda row, tokens: handed.setdefault(row, tokens))
  assert any(forked.fork[row] for row in handed)
  for row, tokens in handed.items():
    np.testing.assert_array_equal(tokens, forked.tokens[row][forked.mask[row]])


def test_whom_a_sample_may_fork_from():
  # Two start at the prompt: 0 and 1; 2 and 4 may fork from 0, 3 from 1.
  np.testing.assert_array_equal(parents(5, 3), [0, 1, 0, 1, 0])
  np.testing.assert_array_equal(parents(4, 0), [0, 1, 2, 3])
  x, fork = np.arange(9).reshape(3, 3), np.int32([0, 1, 2])
  np.testing.assert_array_equal(join_forks(x, fork, 3, 2), [[0, 1, 2], [0, 4, 5], [0, 1, 8]])


def test_an_idle_slot_takes_over_the_first_fork_that_waits_and_shares_its_pages():
  # Group of 4: samples 0 and 1 run in slots 0 and 2, slot 1 is idle; 2 and 3 wait to fork from them
  # at tokens 2 and 3. The prompt has 3 tokens, a page 2: the fork shares tokens 0 .. 3.
  def state(limit):
    return State(
      pool=pages.Pool(paged.Pages(np.zeros((1, 8, 2, 1)), None),
                      np.int32([2, 1, 1, 2, 1, 1, 0, 0])),
      prompts=Prompts(None, None, np.int32([3]), None, None, None),
      slots=Slots(
        row=np.int32([0, 4, 1]), hidden=None, done=np.int32([4, 0, 3]), waiting=None, ended=None,
        table=np.int32([[0, 1, 2, 4], [8, 8, 8, 8], [0, 3, 5, 8]]),
        tokens=np.zeros((4, 5), np.int32), length=None, logprob=None, entropy=None,
        fork=np.int32([0, 0, 2, 3]), forks=np.int32([1, 7, 1]), given=np.int32([0, 0, 0, 0]),
        limit=np.int32([limit]), redrawn=None))

  branching = Branching(1.0, branches=2, window=2)
  got = jax.jit(lambda state: hand_over_forks(state, 4, branching))(state(3))
  np.testing.assert_array_equal(got.slots.row, [0, 2, 1])
  # Token 1 is read once more: it leads to the fork.
  np.testing.assert_array_equal(got.slots.done, [4, 1, 3])
  np.testing.assert_array_equal(got.slots.forks, [1, 0, 1])
  np.testing.assert_array_equal(got.slots.given, [1, 0, 0, 0])
  np.testing.assert_array_equal(got.slots.table[1], [0, 1, 8, 8])
  np.testing.assert_array_equal(got.pool.holders, [3, 2, 1, 2, 1, 1, 0, 0])
  kept = jax.jit(lambda state: hand_over_forks(state, 4, branching))(state(2))
  np.testing.assert_array_equal(kept.slots.row, [0, 4, 1])


def test_sequences_fork_where_their_windows_rise_to_the_threshold(forked, threshold):
  first = GROUP - BRANCHES
  counts = []
  for row in (prompt * GROUP + number for prompt in range(4) for number in range(first)):
    children = range(row + first, row // GROUP * GROUP + GROUP, first)
    want = rises(forked, row, threshold)[:len(children)]
    want += [0] * (len(children) - len(want))
    np.testing.assert_array_equal(forked.fork[list(children)], want)
    counts += [start > 0 for start in want]
    assert forked.fork[row] == 0
  # Both kinds occurred, and a sequence with two forks.
  assert 0 < sum(counts) < len(counts) and (forked.fork.reshape(4, 5)[:, [2, 4]] > 0).all(1).any()
  want = np.where(forked.fork > 0, np.tile(parents(GROUP, BRANCHES), 4), -1)
  np.testing.assert_array_equal(forked.parent, want)


def test_a_fork_has_its_parents_tokens_and_goes_on_by_itself(forked, plain):
  differ = []
  for row in range(4 * GROUP):
    start = forked.fork[row]
    assert forked.mask[row].sum() > start
    if start:
      parent = row // GROUP * GROUP + forked.parent[row]
      np.testing.assert_array_equal(forked.tokens[row, :start], forked.tokens[parent, :start])
      differ.append((forked.tokens[row] != forked.tokens[parent]).any())
    else:  # As without branching, the groups' first sequences too.
      np.testing.assert_array_equal(forked.tokens[row], plain.tokens[row])
  assert np.mean(differ) > 0.5


def test_statistics_of_forks_equal_a_full_forward_pass(run, forked):
  parts, params, prompts = run
  packed, _ = pack(prompts, forked, forked.mask.sum(1), group=GROUP, minibatch=4 * GROUP,
                   microbatch=4 * GROUP, row_tokens=(2 * (26 + TOKENS),), longest=26 + TOKENS)
  rows = jax.tree.map(lambda x: x[0, 0] if x.ndim > 1 else x, packed)

  @jax.jit
  def forward(params, rows):
    features = qwen25_vl.vision_features(parts.model, params, VisionInput(**prompts.vision()))
    embeds = qwen25_vl.embed(parts.model, params, rows.tokens, rows.unit,
                             features.reshape(-1, features.shape[-1]))
    hidden = qwen25_vl.hidden(parts.model, params, embeds, jnp.moveaxis(rows.positions, 1, 0),
                              rows.segment)
    return jax.nn.log_softmax(hidden @ qwen25_vl.unembedding(parts.model, params).T)

  logp = np.asarray(forward(params, rows))[:, :-1]
  logprob = np.take_along_axis(logp, rows.tokens[:, 1:, None], 2)[..., 0]
  mask = rows.response_mask[:, 1:]
  at = rows.sequence[:, 1:][mask], rows.response_index[:, 1:][mask]
  assert len(at[0]) == forked.mask.sum()
  np.testing.assert_allclose(forked.logprob[at], logprob[mask], atol=1e-4)
  np.testing.assert_allclose(forked.entropy[at], -np.sum(np.exp(logp) * logp, -1)[mask], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("few_pages", [False, True])
def test_slots_pages_and_devices_change_no_fork(run, forked, threshold, few_pages, monkeypatch):
  # Above, an idle slot takes over every fork; here slots mostly return to their own, or too many
  # rows start at once and are put back.
  engine = EngineConfig(slots=2, read=1, chunk=7, cache_gib=1.0)
  parts, params, prompts = run
  if few_pages:
    engine = EngineConfig(slots=8, read=4, chunk=5, cache_gib=1.0)
    monkeypatch.setattr(scheduler, "rows_that_fit", lambda *_: np.array([100]))
    plan = scheduler.plan_cache
    monkeypatch.setattr(sampler, "plan_cache", lambda *arguments, **options: dataclasses.replace(
      plan(*arguments, **options), pages=4 * 4 + TOKENS // 8 + 3))
  history = scheduler.History()
  parts = dataclasses.replace(parts, generator=dataclasses.replace(
    parts.generator, history=history))
  with jax.set_mesh(mesh.make_mesh(1, 1, jax.devices()[:1])):
    got = sample((parts, jax.tree.map(np.asarray, params), prompts), threshold, engine)
  assert (history.redrawn > 0.1) == few_pages
  for name in ("tokens", "mask", "parent", "fork"):
    np.testing.assert_array_equal(getattr(got, name), getattr(forked, name), err_msg=name)
  for name in ("logprob", "entropy"):
    np.testing.assert_allclose(getattr(got, name), getattr(forked, name), atol=1e-5)


def test_before_the_first_threshold_nothing_forks(run, plain):
  samples = sample(run, np.nan)
  jax.tree.map(np.testing.assert_array_equal, samples, plain)
  assert (samples.parent == -1).all() and (samples.fork == 0).all()
