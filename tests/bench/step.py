"""The update of reinforcement learning: our AEPO step, as GRPO, against google-tunix's, in one run.

    python -m tests.bench.step
    python -m tests.bench.step --cases=skewed --prompts=16 --repeats=5

tests/bench/logprob_entropy.py says how to install google-tunix 0.1.7, in a virtual environment of
its own. Both have the Qwen2.5 text model of rollout_tunix.py in float32, fresh weights, the same
sampled batch (8 responses a prompt; lengths all the greatest, or skewed as in rollout.py) and a KL
term, and make of it one optimizer update with Adam: log-probabilities of the reference, gradient of
the policy with its entropy as a metric. Timed from the batch in the host's memory to the new
weights: ours packs rows, in which answers share prompts or, "repeated", do not; "google-tunix" pads
all responses to the longest, as its GRPO learner does, and "google-tunix, packed" has what its
`max_seq_token_per_tpu` does of them. Its train step and log-probabilities are called as its trainer
and learner call them, without its loop and logs, --microbatch sequences at a time. Prints a
Markdown table: medians of --repeats rounds, in each of which all run once, of wall time and of the
process's CPU time; a real token is one of a prompt or a response; ours, sharing, computes fewer.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen2 import model as tunix_qwen2
from tunix.rl import algo_core, common, trainer
from tunix.rl import utils as tunix_utils
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.sft.peft_trainer import TrainingConfig

from ares_jax.data.images import VisionShape
from ares_jax.data.prompts import PromptBatch
from ares_jax.models import weights
from ares_jax.run import config as run_config
from ares_jax.sampling.groups import Rollout
from ares_jax.sampling.sampler import Samples
from ares_jax.system import config as config_lib
from ares_jax.system import mesh
from ares_jax.training import aepo_step
from ares_jax.training.batch import pack
from ares_jax.training.minibatches import balance_minibatches
from tests.bench.rollout_tunix import (
  EMBED,
  GROUP,
  HEAD_DIM,
  HEADS,
  KV_HEADS,
  LAYERS,
  MLP,
  MODEL,
  VOCAB,
)

RATE, BETA = 1e-5, 0.04


def sampled(prompts, prompt_tokens, tokens, skewed):
  """(PromptBatch, Samples, correct) of prompts without images."""
  rng = np.random.default_rng(0)
  count = prompts * GROUP
  lengths = np.full(count, tokens)
  if skewed:
    # Median 0.15 of the most, 99th percentile the most.
    lengths = np.clip(tokens * 0.15 * np.exp(0.815 * rng.normal(size=count)), 1, tokens).astype(int)
  mask = np.arange(tokens) < lengths[:, None]
  positions = np.broadcast_to(np.arange(prompt_tokens, dtype=np.int32), (3, prompts, prompt_tokens))
  batch = PromptBatch(
    rng.integers(2, VOCAB, (prompts, prompt_tokens), np.int32),
    np.full(prompts, prompt_tokens, np.int32), positions,
    np.full((prompts, prompt_tokens), -1, np.int32),
    [[]] * prompts, VisionShape(1, MODEL.vision.window, MODEL.vision.patch, MODEL.vision.merge),
    np.arange(prompts, dtype=np.int32), [{}] * prompts, np.arange(prompts),
    np.tile([prompt_tokens, 0, 0, 0], (prompts, 1)))
  value = np.where(mask, 1.0, 0).astype(np.float32)
  samples = Samples(
    np.where(mask, rng.integers(2, VOCAB, mask.shape), 0).astype(np.int32), mask, -9 * value,
    value, np.full(count, -1, np.int32), np.zeros(count, np.int32))
  return batch, samples, (np.arange(count) % 2).astype(np.float32)


def ours(prompts, samples, correct, options, share_prompts):
  """A function that makes one update."""
  values = config_lib.load("configs/ares_tiny.py:grpo")
  count, longest = len(samples.mask), options.prompt_tokens + options.tokens
  values.aepo.update(dict(
    prompts=count // GROUP, group=GROUP, minibatch=count, microbatch=options.rows,
    row_tokens=tuple(longest * share // 4 for share in (8, 9, 10)), share_prompts=share_prompts))
  values.aepo.sampling.max_tokens = options.tokens
  values.aepo.kl.beta = (BETA,) * 3
  values.aepo.optimizer.update(dict(learning_rate=RATE, weight_decay=0.0, clip=float("inf")))
  config = run_config.read_config(values).aepo
  params = jax.jit(lambda: weights.init(weights.weight_table(MODEL), jax.random.key(0)))()
  words = mesh.put(np.zeros(VOCAB, bool))
  state = [aepo_step.init_state(config, jax.tree.map(jnp.copy, params))]
  sizes = dict(minibatch=config.minibatch, microbatch=config.microbatch,
               row_tokens=config.row_tokens, share_prompts=share_prompts)

  def run():
    lengths = samples.mask.sum(1)
    balance_minibatches(prompts.length, lengths.reshape(-1, GROUP), **sizes)
    rows, packing = pack(prompts, samples, lengths, group=GROUP, longest=longest, **sizes)
    rollout = Rollout(prompts, samples, lengths, correct, correct, [], 1, {})
    batch = rollout.batch(rows).to_device(config.prompts, config.microbatch)
    state[0], metrics = aepo_step.aepo_step(MODEL, config, state[0], params, batch, words)
    return packing["pack/real"], float(metrics["update/grad_norm"])

  return run


class Tunix:
  """google-tunix's actor and reference."""

  def __init__(self, prompts, samples, correct, options):
    sizes = tunix_qwen2.ModelConfig(
      num_layers=LAYERS, vocab_size=VOCAB, embed_dim=EMBED, hidden_dim=MLP, num_heads=HEADS,
      head_dim=HEAD_DIM, num_kv_heads=KV_HEADS, rope_theta=1_000_000, norm_eps=1e-6,
      use_tied_embedding=True)
    self.reference = nnx.split(tunix_qwen2.Qwen2(sizes, rngs=nnx.Rngs(0)))
    self.sizes, self.samples, self.options = sizes, samples, options
    self.correct, self.tokens = correct, np.repeat(prompts.tokens, GROUP, 0)

  def trainer(self, parts):
    """Its jitted train step; every `parts` calls are an update."""
    config = GRPOConfig(num_generations=GROUP, beta=BETA)
    config.temperature = 1.0
    actor = trainer.Trainer(
      tunix_qwen2.Qwen2(self.sizes, rngs=nnx.Rngs(0)), optax.adam(RATE),
      TrainingConfig(eval_every_n_steps=1, gradient_accumulation_steps=parts), lambda: {})
    actor.with_loss_fn(
      lambda model, train_example, algo_config: algo_core.grpo_loss_fn(
        model, train_example, algo_config=algo_config, pad_id=0, eos_id=1), has_aux=True)
    actor.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": config})
    return actor.jit_train_and_eval_step()[0]

  def examples(self):
    """Its examples, padded, with the log-probabilities of the reference."""
    advantages = algo_core.compute_advantages(rewards=self.correct, num_generations=GROUP)
    for first in range(0, len(self.tokens), self.options.microbatch):
      part = slice(first, first + self.options.microbatch)
      prompt_ids, completion_ids = map(jnp.asarray, (self.tokens[part], self.samples.tokens[part]))
      reference = common.compute_per_token_logps(
        *self.reference, prompt_tokens=prompt_ids, completion_tokens=completion_ids, pad_id=0,
        eos_id=1)
      yield common.TrainExample(
        prompt_ids=prompt_ids, prompt_mask=prompt_ids != 0, completion_ids=completion_ids,
        completion_mask=jnp.asarray(self.samples.mask[part]),
        advantages=jnp.asarray(advantages[part]), ref_per_token_logps=reference,
        old_per_token_logps=None)

  def padded(self):
    step = self.trainer(len(self.tokens) // self.options.microbatch)
    return lambda: self.update(step, self.examples())

  def packed(self):
    row_tokens = 2 * (self.options.prompt_tokens + self.options.tokens)

    def rows():
      examples = ([example] for example in self.examples())
      return (row for part in tunix_utils.pack_sequences(examples, row_tokens) for row in part)

    step = self.trainer(len(list(rows())))
    return lambda: self.update(step, rows())

  def update(self, step, examples):
    norms, padded = [], 0
    for example in examples:
      norms.append(step(example)[2])
      padded += example.prompt_ids.size + example.completion_ids.size
    return self.real() / padded, max(map(float, norms))

  def real(self):
    return self.tokens.size + int(self.samples.mask.sum())


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--cases", default="skewed,equal")
  parser.add_argument("--prompts", type=int, default=8, help="default %(default)s, 8 samples each")
  parser.add_argument("--prompt-tokens", type=int, default=64, help="default %(default)s")
  parser.add_argument("--tokens", type=int, default=256, help="of a response, default %(default)s")
  parser.add_argument("--rows", type=int, default=2, help="ours, a gradient; default %(default)s")
  parser.add_argument("--microbatch", type=int, default=8,
                      help="google-tunix's sequences a gradient, default %(default)s")
  parser.add_argument("--repeats", type=int, default=3, help="rounds, default %(default)s")
  options = parser.parse_args()
  print(f"4 layers, D=256, V={VOCAB}, {options.prompts} prompts of {options.prompt_tokens} tokens, "
        f"{GROUP} responses of at most {options.tokens}, on {jax.devices()[0].device_kind}, jax "
        f"{jax.__version__}, median of {options.repeats} rounds\n")
  print("| lengths | | real tokens of all | wall s | CPU s | real tokens/s | times google-tunix's "
        "speed, wall | CPU |\n" + "| --- " * 8 + "|", flush=True)
  for case in options.cases.split(","):
    prompts, samples, correct = sampled(options.prompts, options.prompt_tokens, options.tokens,
                                        {"skewed": True, "equal": False}[case])
    tunix = Tunix(prompts, samples, correct, options)
    runs = {"google-tunix": tunix.padded(), "google-tunix, packed": tunix.packed(),
            "ours, prompts repeated": ours(prompts, samples, correct, options, False),
            "ours": ours(prompts, samples, correct, options, True)}
    times, shares = {name: [] for name in runs}, {}
    for round_ in range(options.repeats + 1):
      for name, run in runs.items():
        start = time.perf_counter(), time.process_time()
        shares[name], norm = run()
        spent = time.perf_counter() - start[0], time.process_time() - start[1]
        if not 0 < norm < np.inf:
          raise ValueError(f"{name}: the gradient's norm is {norm}")
        if round_:  # The first round compiles.
          times[name].append(spent)
    median = {name: np.median(spent, 0) for name, spent in times.items()}
    for name, spent in median.items():
      ratio = median["google-tunix"] / spent
      print(f"| {case} | {name} | {shares[name]:.1%} | {spent[0]:.2f} | {spent[1]:.2f} | "
            f"{tunix.real() / spent[0]:.0f} | {ratio[0]:.2f} | {ratio[1]:.2f} |", flush=True)


if __name__ == "__main__":
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    main()
