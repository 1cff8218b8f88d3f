import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ares_jax import mesh, setup
from ares_jax.models import qwen25_vl
from ares_jax.rollout import rollout_batch
from ares_jax.sampler import SamplingConfig, next_token


def draw(prob, uniform, *, allowed=None, temperature=1.0, top_p=1.0):
  """Tokens, log-probabilities and entropies drawn from one distribution by several uniforms."""
  uniform = np.float32(uniform)
  logits = np.tile(np.log(np.float32(prob)), (len(uniform), 1))
  allowed = np.ones(len(prob), bool) if allowed is None else np.bool_(allowed)
  return (np.asarray(x) for x in next_token(logits, uniform, allowed, temperature=temperature,
                                            top_p=top_p))


def test_inverts_the_cumulative_distribution():
  token, _, _ = draw([0.5, 0.3, 0.2], [0.0, 0.49, 0.51, 0.79, 0.81])
  assert token.tolist() == [0, 0, 1, 1, 2]


def test_statistics_are_of_the_whole_policy_whatever_may_be_drawn():
  entropy = -sum(p * np.log(p) for p in (0.5, 0.3, 0.2))
  for options in ({"top_p": 0.1}, {"allowed": [0, 1, 0]}, {"temperature": 0}):
    token, logprob, got = draw([0.5, 0.3, 0.2], [0.9], **options)
    np.testing.assert_allclose(logprob, np.log([0.5, 0.3, 0.2])[token], rtol=1e-5)
    np.testing.assert_allclose(got, entropy, rtol=1e-5)


def test_entropy_is_at_the_sampling_temperature():
  prob = np.array([0.5, 0.3, 0.2]) ** 2
  prob /= prob.sum()
  _, logprob, entropy = draw([0.5, 0.3, 0.2], [0.0], temperature=0.5)
  np.testing.assert_allclose(entropy, -(prob * np.log(prob)).sum(), rtol=1e-5)
  np.testing.assert_allclose(logprob, np.log(0.5), rtol=1e-5)


@pytest.mark.parametrize("top_p, kept", [
  (0.05, {1}), (0.4, {1}), (0.45, {1, 3}), (0.7, {1, 3}), (0.75, {0, 1, 3}), (0.99, {0, 1, 2, 3})])
def test_nucleus_is_the_smallest_set_that_holds_top_p(top_p, kept):
  prob = [0.2, 0.4, 0.1, 0.3]
  token, _, _ = draw(prob, np.linspace(0, 0.9999, 101), top_p=top_p)
  assert set(token.tolist()) == kept


def test_ties_at_the_edge_of_the_nucleus_are_all_kept():
  token, _, _ = draw([0.25] * 4, np.linspace(0, 0.9999, 41), top_p=0.3)
  assert set(token.tolist()) == {0, 1, 2, 3}


def test_tokens_that_are_not_allowed_are_never_drawn():
  uniform = [0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))]
  assert next(draw([0.9, 0.05, 0.05], uniform, allowed=[0, 1, 0])).tolist() == [1, 1, 1]
  assert next(draw([0.9, 0.04, 0.06], [0.3], allowed=[0, 1, 1], temperature=0)).tolist() == [2]


def test_frequencies_match_the_distribution():
  prob = np.float32([0.5, 0.25, 0.15, 0.08, 0.02])
  uniform = jax.random.uniform(jax.random.key(0), 20_000)
  token, _, _ = next_token(jnp.log(jnp.tile(prob, (20_000, 1))), uniform, np.ones(5, bool),
                           temperature=1.0, top_p=1.0)
  counts = np.bincount(np.asarray(token), minlength=5)
  chi_square = ((counts - 20_000 * prob) ** 2 / (20_000 * prob)).sum()
  assert chi_square < 18.5  # 0.999 quantile with 4 degrees of freedom


@pytest.mark.parametrize("bad", [dict(temperature=-1.0), dict(top_p=0.0), dict(max_tokens=0)])
def test_refuses_impossible_settings(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, "max_tokens": 4, **bad})


@pytest.fixture(scope="module")
def run():
  with jax.set_mesh(mesh.make_mesh(-1, 1)), setup.open_run(tiny.read()) as parts:
    params = parts.init_params()
    # Tied weights repeat the last token: weaker ones let others, and the end, have their turn.
    params["embed"] = 0.5 * params["embed"]
    rows = [parts.source("test")[index] for index in range(4)]
    yield parts, params, parts.generator.encoder.batch(rows, np.arange(4))



def sample(run, prompts, *, group=2, temperature=1.0):
  parts, params, _ = run
  sampling = SamplingConfig(temperature=temperature, top_p=1.0, max_tokens=8)
  return parts.generator.sample(params, prompts, jax.random.key(7), group=group, sampling=sampling)


def test_recorded_statistics_equal_a_full_forward_pass(run):
  parts, params, prompts = run
  samples = sample(run, prompts)
  zeros = np.zeros(8, np.float32)
  batch = rollout_batch(prompts, samples, zeros, zeros, group=2)

  @jax.jit
  def forward(params, batch):
    features = qwen25_vl.vision_features(parts.model, params, batch.vision)
    embeds = qwen25_vl.embed(parts.model, params, batch.tokens, batch.unit,
                             jnp.repeat(features, 2, axis=0))
    hidden = qwen25_vl.hidden(parts.model, params, embeds, batch.positions,
                              batch.mask.astype(jnp.int32))
    return jax.nn.log_softmax(hidden @ qwen25_vl.unembedding(parts.model, params).T)

  logp = np.asarray(forward(params, batch))
  logprob = np.take_along_axis(logp[:, :-1], batch.tokens[:, 1:, None], 2)[..., 0]
  entropy = -np.sum(np.exp(logp) * logp, -1)[:, :-1]
  mask = batch.response_mask[:, 1:]
  assert mask.sum() == samples.mask.sum() > 20
  np.testing.assert_allclose(batch.sampler_logprob[:, 1:][mask], logprob[mask], atol=1e-4)
  np.testing.assert_allclose(batch.entropy[:, 1:][mask], entropy[mask], atol=1e-4)
  assert np.ptp(entropy[mask]) > 0.1


def test_a_sample_depends_on_key_prompt_and_number_alone(run):
  prompts = run[2]
  whole = sample(run, prompts)
  part = sample(run, prompts.take([2, 1, 3]), group=3)
  for place, prompt in enumerate([2, 1, 3]):
    for number in (0, 1):
      np.testing.assert_array_equal(part.tokens[3 * place + number],
                                    whole.tokens[2 * prompt + number])
  assert (whole.tokens[0] != whole.tokens[1]).any()


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
