"""Rollouts of equal or skewed lengths: ours against google-tunix's vanilla sampler, in one run.

    python -m tests.bench.rollout_tunix
    python -m tests.bench.rollout_tunix --cases=32x128,8x512 --new=64
    python -m tests.bench.rollout_tunix --cases=16x128 --new=256 --skewed --slots=64 --chunk=16

tests/bench/logprob_entropy.py says how to install google-tunix 0.1.7, in a virtual environment of
its own. A case 32x128 has 32 prompts of 128 tokens, 8 samples each. Both have a Qwen2.5 text model
of the same sizes with fresh weights, the same prompts, temperature 1 and the whole vocabulary, and
draw --new tokens a sample, since the end may not be drawn. With --skewed a sample has the length of
tests/bench/rollout.py's lognormal: ours ends there; google-tunix, which goes on until the last of
its batch has ended, draws --new for all, and what lies beyond a sample's length is not counted.
google-tunix returns the log-probability of each token; ours that, another and the entropy. Every
call has a key of its own. Prints a Markdown table: medians of `--repeats` rounds, in each of which
both run once, of wall time and of the process's CPU time, which a busy machine changes less.
"""

import argparse
import time
from unittest import mock

import jax
import numpy as np
from flax import nnx
from tunix.generate import sampler as tunix_sampler
from tunix.models.qwen2 import model as tunix_qwen2

from ares_jax.data.images import VisionShape
from ares_jax.data.prompts import PromptBatch
from ares_jax.models import weights
from ares_jax.models.config import ModelConfig, VisionConfig
from ares_jax.sampling import sampler, scheduler, slots
from ares_jax.sampling.state import Drawing
from ares_jax.system import mesh
from tests.bench import rollout

GROUP, END, VOCAB = 8, 1, 8192
LAYERS, EMBED, MLP, HEADS, KV_HEADS, HEAD_DIM = 4, 256, 768, 8, 2, 32
# Text alone: the vision tower is as small as can be.
MODEL = ModelConfig(
  embed=EMBED, layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, mlp=MLP,
  qkv_bias=True, qk_norm=False, rope_theta=1e6, mrope_sections=(4, 6, 6),
  mrope_interleaved=False, norm_eps=1e-6, tied=True,
  vocab=VOCAB, image_token=0, compute_dtype="float32", remat="none", unroll=LAYERS,
  vision=VisionConfig(depth=1, hidden=8, heads=1, mlp=8, patch=14, temporal_patch=2, merge=2,
                      window=28, full_attention=(), out=EMBED))


class Numbers:
  """A tokenizer whose text is token ids."""

  def encode(self, text):
    return [int(word) for word in text.split()]

  def decode(self, ids):
    return " ".join(map(str, ids))

  def bos_id(self):
    return 0  # None is put in front of a prompt.

  def eos_id(self):
    return END

  def pad_id(self):
    return 0


def ours(tokens_PT, new, held, chunk):
  """A function of a seed that draws the samples and returns their lengths."""
  prompts, length = tokens_PT.shape
  batch = PromptBatch(
    tokens_PT, np.full(prompts, length, np.int32),
    np.broadcast_to(np.arange(length, dtype=np.int32), (3, prompts, length)),
    np.full((prompts, length), -1, np.int32), [[]] * prompts,
    VisionShape(1, MODEL.vision.window, MODEL.vision.patch, MODEL.vision.merge),
    np.arange(prompts, dtype=np.int32), [{}] * prompts, np.arange(prompts),
    np.tile([length, 0, 0, 0], (prompts, 1)))
  params = jax.jit(lambda: weights.init(weights.weight_table(MODEL), jax.random.key(0)))()
  sampling = sampler.SamplingConfig(1.0, 1.0, 0, 0, new)
  history = scheduler.History()
  engine = sampler.EngineConfig(slots=held, read=held // GROUP, chunk=chunk, cache_gib=8.0)

  def run(seed):
    drawing = Drawing(jax.random.key(seed), np.arange(VOCAB) != END, None, GROUP, sampling,
                            (END,))
    samples = sampler.sample(MODEL, params, batch, drawing, engine, history=history)
    return jax.device_get(samples).mask.sum(1)

  return run


def tunix(tokens_PT, new):
  """The same of google-tunix."""
  length = tokens_PT.shape[1]
  config = tunix_qwen2.ModelConfig(
    num_layers=LAYERS, vocab_size=VOCAB, embed_dim=EMBED, hidden_dim=MLP, num_heads=HEADS,
    head_dim=HEAD_DIM, num_kv_heads=KV_HEADS, rope_theta=1_000_000, norm_eps=1e-6,
    use_tied_embedding=True)
  engine = tunix_sampler.Sampler(
    tunix_qwen2.Qwen2(config, rngs=nnx.Rngs(0)), Numbers(),
    tunix_sampler.CacheConfig(length + new, LAYERS, KV_HEADS, HEAD_DIM))
  texts = [" ".join(map(str, row)) for row in tokens_PT for _ in range(GROUP)]

  def run(seed):
    out = engine(texts, max_generation_steps=new, max_prompt_length=length, return_logprobs=True,
                 eos_tokens=[END], forbidden_tokens=[END], temperature=1.0, top_p=1.0, seed=seed)
    return np.array([len(tokens) for tokens in out.tokens])

  return run


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--cases", default="32x128,8x512", help="PROMPTSxTOKENS,...")
  parser.add_argument("--new", type=int, default=64, help="tokens a sample, default %(default)s")
  parser.add_argument("--skewed", action="store_true", help="lognormal lengths, --new at most")
  parser.add_argument("--slots", type=int, default=0, help="of ours, default one a sample")
  parser.add_argument("--chunk", type=int, default=64, help="of ours, default %(default)s")
  parser.add_argument("--repeats", type=int, default=3, help="rounds, default %(default)s")
  options = parser.parse_args()
  print(f"4 layers, D=256, V={VOCAB}, {GROUP} samples x {options.new} tokens, on "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, median of {options.repeats} "
        "rounds\n")
  print("| prompts x tokens | | wall s | CPU s | times google-tunix's speed, wall | CPU |\n"
        "| --- | --- | --- | --- | --- | --- |", flush=True)
  for case in options.cases.split(","):
    prompts, length = map(int, case.split("x"))
    tokens_PT = np.random.default_rng(0).integers(2, VOCAB, (prompts, length), np.int32)
    rows = prompts * GROUP
    want_B = (rollout.skewed(rows, options.new) if options.skewed
              else np.full(rows, options.new, np.int32))
    runs = {"google-tunix": tunix(tokens_PT, options.new),
            "ours": ours(tokens_PT, options.new, options.slots or rows, options.chunk)}
    times = {name: [] for name in runs}
    for round_ in range(options.repeats + 1):
      for name, run in runs.items():
        start = time.perf_counter(), time.process_time()
        with mock.patch.object(slots, "_draw", rollout.ending_at(want_B, END)):
          drawn_B = run(round_)
        spent = time.perf_counter() - start[0], time.process_time() - start[1]
        np.testing.assert_array_equal(np.minimum(drawn_B, want_B), want_B)
        if round_:  # The first round compiles.
          times[name].append(spent)
    median = {name: np.median(spent, 0) for name, spent in times.items()}
    for name, spent in median.items():
      ratio = median["google-tunix"] / spent
      print(f"| {case} | {name} | {spent[0]:.2f} | {spent[1]:.2f} | {ratio[0]:.2f} | "
            f"{ratio[1]:.2f} |", flush=True)


if __name__ == "__main__":
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    main()
