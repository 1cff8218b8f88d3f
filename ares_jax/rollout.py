"""Rollouts: sample G responses a prompt, grade them, keep the groups that teach something."""

import dataclasses

import flax.struct
import jax
import numpy as np

from ares_jax import mesh
from ares_jax.data.prompts import PromptBatch
from ares_jax.models.vision import VisionInput
from ares_jax.sampler import EngineConfig, sample


@flax.struct.dataclass
class RolloutBatch:
  """B = P*G graded sequences, prompt and response contiguous from column 0.

  Column t is about token t: logprob[:, t] = log p(token_t | < t).
  """

  tokens: jax.Array  # int32 [B, T]
  mask: jax.Array  # bool [B, T]: prompt and response
  response_mask: jax.Array  # bool [B, T]: response, its end-of-turn token included
  positions: jax.Array  # int32 [3, B, T], M-RoPE
  unit: jax.Array  # int32 [B, T]: merged vision unit that feeds the token, -1 for text
  vision: VisionInput  # of the P prompts
  sampler_logprob: jax.Array  # float32 [B, T]: 0 outside the response
  entropy: jax.Array  # float32 [B, T] nats: 0 outside the response
  correct: jax.Array  # float32 [B], 0 or 1
  formatted: jax.Array  # float32 [B], 0 or 1
  parent: jax.Array  # int32 [B]: sample of its group that it forked from; -1 = from none
  fork: jax.Array  # int32 [B]: response tokens it has in common with its parent


@dataclasses.dataclass(frozen=True)
class FilterConfig:
  """Online filtering (DAPO, the release): groups all right or all wrong teach nothing."""

  batches: int  # prompt batches sampled an iteration at most; 1 = keep every group
  low: float  # a group whose mean accuracy is outside [low, high] is dropped
  high: float

  def __post_init__(self):
    if self.batches < 1:
      raise ValueError(f"batches = {self.batches} must be >= 1 (1 = no filtering)")
    if not 0 <= self.low < self.high <= 1:
      raise ValueError(f"low = {self.low}, high = {self.high}: 0 <= low < high <= 1 is needed")


@dataclasses.dataclass(frozen=True)
class Generator:
  """What sampling needs besides weights and prompts; made once a run.

  Attributes:
    model: ModelConfig.
    encoder: data.prompts.Encoder.
    allowed: bool [V] numpy, tokens that may be drawn.
    end: end-of-turn token ids.
    engine: sampler.EngineConfig.
    grader: data.grade.GradingPool.
    phases: metrics.PhaseTimer.
  """

  model: object
  encoder: object
  allowed: np.ndarray
  end: tuple
  engine: EngineConfig
  grader: object
  phases: object

  def sample(self, params, prompts, key, *, group, sampling, branching=None):
    """Samples of a PromptBatch as numpy arrays; pads P so that the devices divide it."""
    prompts_P = len(prompts.length)
    pad = -prompts_P % mesh.size("data")
    rows = np.arange(prompts_P + pad) % prompts_P
    arrays = {
      "tokens": prompts.tokens[rows],
      "length": prompts.length[rows],
      "positions": prompts.positions[:, rows],
      "unit": prompts.unit[rows],
      "prompt_id": prompts.prompt_id[rows],
      "vision": VisionInput(**{name: array[rows] for name, array in prompts.vision.items()}),
    }
    with self.phases("rollout"):
      samples = sample(self.model, params, arrays, key, self.allowed, group=group,
                       sampling=sampling, engine=self.engine, end=self.end, branching=branching)
      samples = jax.device_get(samples)
    return jax.tree.map(lambda array: array[: prompts_P * group], samples)

  def grade(self, prompts, samples, *, group):
    """(texts, correct float32 [B], formatted float32 [B], answers that timed out)."""
    with self.phases("grading"):
      texts = [self.encoder.chat.text(tokens[mask])
               for tokens, mask in zip(samples.tokens, samples.mask, strict=True)]
      truths = [row["answer"] for row in prompts.rows for _ in range(group)]
      return texts, *self.grader.grade(texts, truths)


@dataclasses.dataclass(frozen=True)
class Rollout:
  """One iteration's graded samples, on the host."""

  prompts: object  # data.prompts.PromptBatch of the P prompts kept
  batch: RolloutBatch
  texts: list  # B responses
  batches: int  # prompt batches drawn
  metrics: dict

  def to_device(self):
    """The RolloutBatch on the current mesh, rows over "data"."""
    arrays = {field.name: getattr(self.batch, field.name)
              for field in dataclasses.fields(self.batch) if field.name != "positions"}
    return RolloutBatch(**mesh.put(arrays, "data"),
                        positions=mesh.put(self.batch.positions, None, "data"))


def collect(generator, params, batches, key, *, group, sampling, config, branching=None):
  """Samples and grades until P groups are worth learning from.

  Groups outside the filter's band are replaced by groups of further batches. When
  `config.batches` are drawn and too few are left, dropped groups fill up: shapes stay static.

  Args:
    generator: Generator.
    params: weights to sample from.
    batches: iterator of PromptBatch of P prompts.
    key: typed PRNG key of the run.
    group: G.
    sampling: SamplingConfig.
    config: FilterConfig.
    branching: branching.Branching, or None where every response starts at its prompt.
  """
  kept, dropped, drawn, in_band, timed_out = [], [], 0, 0, 0
  while drawn < config.batches:
    with generator.phases("data"):
      prompts = next(batches)
    samples = generator.sample(params, prompts, key, group=group, sampling=sampling,
                               branching=branching)
    texts, correct, formatted, late = generator.grade(prompts, samples, group=group)
    drawn, timed_out = drawn + 1, timed_out + late
    rate = correct.reshape(-1, group).mean(1)
    inside = (config.low <= rate) & (rate <= config.high)
    useful, in_band = inside | (config.batches == 1), in_band + inside.sum()
    for index in range(len(prompts.rows)):
      rows = slice(index * group, (index + 1) * group)
      part = (prompts.take([index]), jax.tree.map(lambda x, rows=rows: x[rows], samples),
              texts[rows], correct[rows], formatted[rows])
      (kept if useful[index] else dropped).append(part)
    if len(kept) >= len(prompts.rows):
      break
  groups = len(prompts.rows)
  metrics = {"rollout/batches": drawn, "rollout/timed_out": timed_out,
             "rollout/useful": float(in_band / (drawn * groups)),
             "rollout/filled": max(0, groups - len(kept)) / groups}
  chosen = (kept + dropped)[:groups]
  prompts = PromptBatch.join([part[0] for part in chosen])
  samples = jax.tree.map(lambda *parts: np.concatenate(parts), *[part[1] for part in chosen])
  correct, formatted = (np.concatenate([part[index] for part in chosen]) for index in (3, 4))
  texts = [text for part in chosen for text in part[2]]
  batch = rollout_batch(prompts, samples, correct, formatted, group=group)
  metrics["rollout/truncated"] = 1 - np.isin(
    samples.tokens[np.arange(len(texts)), np.maximum(samples.mask.sum(1), 1) - 1],
    generator.end).mean()
  if branching is not None:
    metrics["rollout/forked"] = (samples.fork > 0).mean()
  return Rollout(prompts, batch, texts, drawn, metrics)


def rollout_batch(prompts, samples, correct, formatted, *, group):
  """RolloutBatch of numpy arrays; T = prompt room + response room."""
  B, response = samples.tokens.shape
  room = prompts.tokens.shape[1]
  start = np.repeat(prompts.length, group)[:, None]
  column = np.arange(room + response)[None] - start  # of the response; negative in the prompt
  inside = (column >= 0) & (column < response)
  place = np.clip(column, 0, response - 1)

  def spread(of_prompt, of_response):
    padded = np.pad(of_prompt, ((0, 0), (0, response)))
    return np.where(column < 0, np.repeat(padded, group, 0),
                    np.where(inside, np.take_along_axis(of_response, place, 1), 0))

  nothing = np.zeros_like(prompts.tokens)
  response_mask = spread(nothing, samples.mask).astype(bool)
  mask = response_mask | (column < 0)
  after = prompts.positions.max((0, 2))[:, None] + 1 + np.arange(response)
  positions = np.stack([spread(axis, np.repeat(after, group, 0)) for axis in prompts.positions])
  return RolloutBatch(
    tokens=np.where(mask, spread(prompts.tokens, samples.tokens), 0).astype(np.int32),
    mask=mask,
    response_mask=response_mask,
    positions=np.where(mask, positions, 0).astype(np.int32),
    unit=np.where(column < 0, spread(prompts.unit, samples.tokens), -1).astype(np.int32),
    vision=VisionInput(**prompts.vision),
    sampler_logprob=np.where(response_mask, spread(nothing, samples.logprob), 0).astype(np.float32),
    entropy=np.where(response_mask, spread(nothing, samples.entropy), 0).astype(np.float32),
    correct=correct, formatted=formatted, parent=samples.parent, fork=samples.fork)
