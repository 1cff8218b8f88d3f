"""Sampling responses: prefill each prompt once, then decode its G samples in one jitted loop.

P prompts, G group, B = P*G rows (row b = p*G + g), T new tokens, V vocabulary.
"""

import dataclasses
import functools
import zlib

import flax.struct
import jax
import jax.numpy as jnp

from ares_jax.mesh import shard
from ares_jax.models import decoder, qwen25_vl


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the next token is drawn."""

  temperature: float  # > 0; 0 takes the most probable token
  top_p: float  # in (0, 1]; 1 keeps the whole vocabulary
  max_tokens: int  # T, the end-of-turn token included

  def __post_init__(self):
    if self.temperature < 0:
      raise ValueError(f"temperature = {self.temperature} must be >= 0 (0 is greedy)")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p = {self.top_p} is outside (0, 1]")
    if self.max_tokens < 1:
      raise ValueError(f"max_tokens = {self.max_tokens} must be >= 1")


@flax.struct.dataclass
class Samples:
  """B responses of at most T tokens."""

  tokens: jax.Array  # int32 [B, T]
  mask: jax.Array  # bool [B, T]: True on response tokens, the end-of-turn token included
  logprob: jax.Array  # float32 [B, T]: log pi(token), temperature 1, whole vocabulary
  entropy: jax.Array  # float32 [B, T]: nats, whole vocabulary, at the sampling temperature (eq. 3)


def stage_key(seed, stage):
  """Typed PRNG key of a stage's samples: no two stages draw the same numbers."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


@functools.partial(jax.jit, static_argnames=("model", "group", "sampling", "end"))
def sample(model, params, prompts, key, allowed_V, *, group, sampling, end):
  """Draws `group` responses to every prompt.

  The random number of a token depends on (key, prompt id, sample, position) alone: the same answers
  come out whatever else is in the batch.

  Args:
    model: ModelConfig.
    params: weights.
    prompts: dict with tokens int32 [P, Tp], length int32 [P], positions int32 [3, P, Tp],
      unit int32 [P, Tp], prompt_id int32 [P], vision VisionInput.
    key: typed PRNG key.
    allowed_V: bool, tokens that may be drawn. Statistics are of the policy, over all of V.
    group: G.
    sampling: SamplingConfig.
    end: tuple of end-of-turn token ids.

  Returns:
    Samples.
  """
  batch, length = len(prompts["length"]) * group, sampling.max_tokens
  features = qwen25_vl.vision_features(model, params, prompts["vision"])
  embeds = qwen25_vl.embed(model, params, prompts["tokens"], prompts["unit"], features)
  hidden, cache = qwen25_vl.prefill(model, params, embeds, prompts["positions"], prompts["length"])
  cache = decoder.expand_cache(cache, group, embeds.shape[1] + length)
  # In the hidden state's dtype, as the trainer's logprob_and_entropy has it.
  unembedding = qwen25_vl.unembedding(model, params).astype(embeds.dtype)
  # M-RoPE counts on from the largest prompt position on all three axes.
  next_position = jnp.repeat(prompts["positions"].max((0, 2)) + 1, group)
  row_keys = jax.vmap(lambda row: jax.random.fold_in(
    jax.random.fold_in(key, jnp.repeat(prompts["prompt_id"], group)[row]), row % group))(
      jnp.arange(batch))

  def draw(hidden_BD, step):
    logits_BV = jnp.einsum("BD,VD->BV", hidden_BD, unembedding,
                           preferred_element_type=jnp.float32)
    keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
    uniform_B = jax.vmap(jax.random.uniform)(keys)
    return next_token(logits_BV, uniform_B, allowed_V, temperature=sampling.temperature,
                      top_p=sampling.top_p)

  def cond(carry):
    step, running_B, *_ = carry
    return (step < length) & running_B.any()

  def body(carry):
    step, running_B, hidden_BD, cache, samples = carry
    token_B, logprob_B, entropy_B = draw(hidden_BD, step)
    samples = Samples(
      tokens=samples.tokens.at[:, step].set(jnp.where(running_B, token_B, 0)),
      mask=samples.mask.at[:, step].set(running_B),
      logprob=samples.logprob.at[:, step].set(jnp.where(running_B, logprob_B, 0)),
      entropy=samples.entropy.at[:, step].set(jnp.where(running_B, entropy_B, 0)))
    running_B &= ~jnp.isin(token_B, jnp.array(end))
    embeds = qwen25_vl.embed(model, params, token_B[:, None], jnp.full((batch, 1), -1), None)
    positions = jnp.broadcast_to((next_position + step)[:, None], (3, batch, 1))
    hidden_BD, cache = qwen25_vl.decode_step(model, params, embeds, positions, cache)
    return step + 1, running_B, shard(hidden_BD, "data"), cache, samples

  empty = Samples(jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, length), bool),
                  jnp.zeros((batch, length)), jnp.zeros((batch, length)))
  hidden = shard(jnp.repeat(hidden, group, axis=0), "data")
  carry = (jnp.int32(0), jnp.ones(batch, bool), hidden, cache, empty)
  return jax.lax.while_loop(cond, body, carry)[-1]


def next_token(logits_BV, uniform_B, allowed_V, *, temperature, top_p):
  """Draws a token a row by inverse CDF from one uniform number, nucleus by bisection.

  Args:
    logits_BV: float32.
    uniform_B: float32 in [0, 1).
    allowed_V: bool; the rest is never drawn.
    temperature: 0 takes the most probable allowed token.
    top_p: the smallest set of tokens that holds this much probability is kept, ties included.

  Returns:
    token_B int32; logprob_B, log pi at temperature 1 over the whole vocabulary; entropy_B in nats
    at `temperature` (1 where greedy) over the whole vocabulary, before top-p.
  """
  logp_BV = jax.nn.log_softmax(logits_BV)
  if temperature in (0, 1):
    policy_BV = logp_BV
  else:
    policy_BV = jax.nn.log_softmax(logits_BV / temperature)
  prob_BV = jnp.exp(policy_BV)
  entropy_B = -jnp.sum(prob_BV * policy_BV, -1)
  if temperature == 0:
    token_B = jnp.argmax(jnp.where(allowed_V, logits_BV, -jnp.inf), -1)
  else:
    kept_BV = jnp.where(allowed_V, prob_BV, 0)
    if top_p < 1:
      kept_BV = _nucleus(kept_BV, top_p)
    cumulative_BV = jnp.cumsum(kept_BV, -1)
    # `<=`: a uniform of exactly 0 must not land on a leading token of probability 0.
    place_B = uniform_B * cumulative_BV[:, -1]
    token_B = jnp.sum(cumulative_BV <= place_B[:, None], -1)
    # Rounding of the product can reach the total; the last token with any mass takes it.
    last_B = prob_BV.shape[-1] - 1 - jnp.argmax(kept_BV[:, ::-1] > 0, -1)
    token_B = jnp.minimum(token_B, last_B)
  token_B = token_B.astype(jnp.int32)
  return token_B, jnp.take_along_axis(logp_BV, token_B[:, None], 1)[:, 0], entropy_B


def _nucleus(prob_BV, top_p):
  """Zeroes everything below the largest threshold whose survivors still hold top_p."""
  need_B1 = top_p * prob_BV.sum(-1, keepdims=True)

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) / 2
    enough = jnp.sum(jnp.where(prob_BV >= middle, prob_BV, 0), -1, keepdims=True) >= need_B1
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  # 30 halvings of [0, max p] leave 1e-9 of it: tokens that close together count as tied.
  high = prob_BV.max(-1, keepdims=True)
  low, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(high), high))
  return jnp.where(prob_BV >= low, prob_BV, 0)
