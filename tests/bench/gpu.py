"""One large GPU in ten minutes: are ops and kernels right there, and how fast is training?

    python tests/bench/gpu.py --out=FOLDER
    python tests/bench/gpu.py --out=FOLDER --size=tiny      the same on a CPU, for testing this file

Written for one H200 with jax 0.11.2. It measures the device (products, memory), compares ops,
kernels and a model of two layers with float32 on the CPU, and times a rollout and an update of
Qwen2.5-VL-3B with random weights. Needs jax, flax, optax, ml_collections and pillow; packages that
are missing can lie in a folder that PYTHONPATH names:
    pip install --no-deps --target=FOLDER ml_collections

Every part runs in a process of its own with a time limit, so a part that fails or hangs loses only
itself. FOLDER/gpu.json and gpu.md are written anew after each. MFU is FLOPs of the mathematics
(models/flops.py) over what the matrix products of part "device" reached.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import time
import typing

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
NEEDED = ("jax", "flax", "optax", "ml_collections", "PIL")
GIB = 2**30


class Size(typing.NamedTuple):
  """How large everything is."""

  small: bool  # a small model in the place of 3B
  product: int  # side of the matrices
  stream: float  # GiB read and written
  tokens: int  # of a row of attention, and N of the fused log-probability
  vocab: int
  prompts: int
  group: int
  prompt_tokens: int  # half of them an image's, in the rollout
  answer_tokens: int
  microbatch: int  # rows of an update


SIZES = {"3b": Size(False, 16384, 4.0, 2048, 151936, 32, 8, 512, 512, 8),
         "tiny": Size(True, 256, 0.01, 256, 1024, 2, 2, 64, 16, 2)}


class Part(typing.NamedTuple):
  """What is run in one process."""

  call: typing.Callable  # of a Size; returns {name: number or text}
  seconds: int  # expected on an H200, a guess
  limit: int  # seconds
  about: str


def model_of(size):
  """ModelConfig of 3B, or of the same architecture in small."""
  from ares_jax.models.config import SIZE_3B

  if size.small:
    vision = dataclasses.replace(SIZE_3B.vision, depth=2, hidden=64, heads=2, mlp=64, out=64,
                                 full_attention=(1,))
    small = dict(vocab=size.vocab, embed=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128,
                 mrope_sections=(2, 3, 3), image_token=5, vision=vision)
    return dataclasses.replace(SIZE_3B, **small)
  return SIZE_3B


def best(call, *arguments, repeats=5):
  """Least seconds of a compiled call, after one that warms up."""
  import jax

  jax.block_until_ready(call(*arguments))
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def device(size):
  """The roofline: products in three precisions, a stream through memory."""
  import jax
  import jax.numpy as jnp

  found = {"device": jax.devices()[0].device_kind, "jax": jax.__version__,
           "python": sys.version.split()[0], **memory("limit")}
  n = size.product
  for name, dtype, precision in (("bfloat16", "bfloat16", None), ("float32", "float32", None),
                                 ("float32 exact", "float32", "highest")):
    x = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(functools.partial(jnp.matmul, precision=precision))
    found[f"TFLOP/s, {name} products"] = 2 * n**3 / best(product, x, x) / 1e12
  x = jnp.zeros(int(size.stream * GIB) // 4, jnp.float32)
  found["GB/s, read and written"] = 2 * x.nbytes / best(jax.jit(lambda x: x + 1), x) / 1e9
  return found


def memory(*kinds):
  """GiB of the device: "limit", "peak" since the process began; nothing where it is not told."""
  import jax

  stats = jax.local_devices()[0].memory_stats() or {}
  names = {"limit": "bytes_limit", "peak": "peak_bytes_in_use"}
  return {f"GiB of memory, {kind}": stats[names[kind]] / GIB for kind in kinds
          if names[kind] in stats}


def on_cpu(call, *arguments):
  """A call in float32 with exact products on the CPU, as numpy arrays."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
    arguments = [np.asarray(x, np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else
                 np.asarray(x) for x in map(np.asarray, arguments)]
    return jax.tree.map(np.asarray, jax.jit(call)(*arguments))


def difference(got, want):
  """Largest difference of trees of arrays, over the largest value of each array."""
  import jax
  import numpy as np

  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  return float(np.max([np.abs(np.asarray(x, np.float32) - y).max() / max(np.abs(y).max(), 1e-9)
                       for x, y in pairs]))


def random(*shapes, dtype="float32", seed=0):
  """Normal arrays on the device."""
  import jax

  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def ops(size):
  """Every op of a step that has sums or choices, and the draw of a token, at a batch's size."""
  import jax.numpy as jnp
  import numpy as np

  import ares_jax
  from ares_jax.ops.sampling import next_token

  rows, tokens = 64, size.tokens
  logits, = random((64, size.vocab))
  nats, logprob, reward = random((rows, tokens), (rows, tokens), (rows,), seed=1)
  nats, whole = jnp.abs(nats), jnp.ones((rows, tokens), bool)
  uniform = jnp.linspace(0, 0.999, 64)

  def windows(nats):
    mean, inside = ares_jax.window_entropy(nats, whole, window=4)
    threshold, _ = ares_jax.entropy_threshold(mean, inside, quantile=0.85)
    return mean, threshold, ares_jax.hwe_flags(nats, whole, threshold, window=4)

  def loss(logprob):
    return ares_jax.policy_loss(logprob, logprob - 0.1, reward[:, None] + 0 * logprob, whole,
                                clip_low=0.2, clip_high=0.3, clip_dual=3.0)[0]

  def draw(logits):
    return next_token(logits, uniform, jnp.ones((1, size.vocab), bool), temperature=1.0,
                      top_p=0.95, top_k=0)

  cases = {"token_entropy": (ares_jax.token_entropy, logits), "windows": (windows, nats),
           "group_advantage": (functools.partial(ares_jax.group_advantage, group=8), reward),
           "policy_loss": (loss, logprob), "logprob of a draw": (draw, logits)}
  found = {}
  for name, (call, value) in cases.items():
    got, want = call(value), on_cpu(call, value)
    if name.endswith("draw"):  # rounding may choose a neighbour
      same = np.asarray(got.token) == want.token
      found["share of the same tokens drawn"] = float(same.mean())
      got, want = np.asarray(got.logprob)[same], want.logprob[same]
    found[f"{name}, relative difference"] = difference(got, want)
  return found


def plain_attention(q, k, v, segment, *, causal):
  """softmax(q k^T / sqrt(H)) v inside segments, written out."""
  import jax
  import jax.numpy as jnp

  group = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
  allowed = segment[:, :, None] == segment[:, None]
  if causal:
    allowed &= jnp.tril(jnp.ones(allowed.shape[1:], bool))
  scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
  weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -1e30), axis=-1)
  return jnp.einsum("bnts,bsnh->btnh", weights, v)


def kernels(size):
  """Attention of text and of image windows, and the fused log-probability, with gradients."""
  import jax
  import jax.numpy as jnp

  import ares_jax
  from ares_jax.models.attention import attention

  model, found = model_of(size), {}
  def segments(rows):
    return jnp.broadcast_to(jnp.arange(size.tokens) * 3 // size.tokens + 1, (rows, size.tokens))

  def ours(q, k, v, *, causal):
    segment = segments(len(q))
    return attention(q, k, v, segment_BT=segment, causal=causal)

  def plain(q, k, v, *, causal):
    return plain_attention(q, k, v, segments(len(q)), causal=causal)

  def with_gradients(call):
    def both(*arrays):
      *inputs, weight = arrays
      out, back = jax.vjp(call, *inputs)
      return out, back(weight.astype(out.dtype))
    return both

  vision = model.vision
  for name, heads, kv_heads, width, causal in (
      ("text", model.heads, model.kv_heads, model.head_dim, True),
      ("images", vision.heads, vision.heads, vision.head_dim, False)):
    ours_both, plain_both = (jax.jit(with_gradients(functools.partial(call, causal=causal)))
                             for call in (ours, plain))
    shapes = [(1, size.tokens, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    for dtype in ("float32", "bfloat16"):
      arrays = random(*shapes, dtype=dtype)
      label = f"attention of {name}, {dtype}"
      try:
        found[f"{label}, relative difference"] = difference(ours_both(*arrays),
                                                            on_cpu(plain_both, *arrays))
        arrays = random(*[(8, *shape[1:]) for shape in shapes], dtype=dtype)
        found[f"{label}, ms"] = 1e3 * best(ours_both, *arrays)
      except Exception as error:  # the other kernels may work
        found[f"{label}, failed"] = f"{type(error).__name__}: {str(error)[:300]}"
    found[f"{label}, ms of plain XLA"] = 1e3 * best(plain_both, *arrays)

  embed = model.embed
  hidden, unembed = random((size.tokens, embed), (size.vocab, embed), dtype="bfloat16")
  unembed = unembed / embed**0.5
  token = jnp.arange(size.tokens) % size.vocab

  def gradients(hidden, unembed):
    def loss(hidden, unembed):
      logprob, entropy = ares_jax.logprob_and_entropy(hidden, unembed, token)
      return logprob.mean() - 0.5 * entropy.mean()
    return jax.value_and_grad(loss, (0, 1))(hidden, unembed)

  count = min(256, size.tokens)  # of the comparison, which the CPU computes
  got = jax.jit(ares_jax.logprob_and_entropy)(hidden[:count], unembed, token[:count])
  want = on_cpu(ares_jax.logprob_and_entropy, hidden[:count], unembed, token[:count])
  found["logprob_and_entropy, bfloat16, relative difference"] = difference(got, want)
  seconds = best(jax.jit(gradients), hidden, unembed)
  found["logprob_and_entropy with gradients, ms"] = 1e3 * seconds
  found["its TFLOP/s"] = 8 * size.tokens * size.vocab * embed / seconds / 1e12
  return found


def pages(size):
  """Attention of decoding, to keys and values in pages, at the batch of the rollout."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from ares_jax.models import paged

  shape, tokens, rows = model_of(size), 64, size.prompts * size.group
  width = -(-(size.prompt_tokens + size.answer_tokens) // (8 * tokens)) * 8  # pages of a row
  queries, found = shape.heads // shape.kv_heads, {}
  rng = np.random.default_rng(0)
  table = rng.permutation(rows * width).reshape(rows, width).astype(np.int32)
  length = rng.integers(1, width * tokens - 1, rows).astype(np.int32)
  none = np.zeros(rows, np.int32)
  reads = paged.Reads(
    table=table, length=length, active=none == 0, prompt_length=none, own=None,
    prompts=table[:, :1], prompts_length=none, query=np.arange(rows, dtype=np.int32), group=1,
    prompt_tokens=tokens, live=width * tokens)
  reads = jax.tree.map(jnp.asarray, reads)

  def plain(q, k, v):
    k, v = (x[:, table].reshape(shape.kv_heads, rows, -1, shape.head_dim) for x in (k, v))
    scores = jnp.einsum("bkqh,kbsh->bkqs", q, k)
    seen = np.arange(width * tokens) <= length[:, None, None, None]
    return jnp.einsum("bkqs,kbsh->bkqh", jax.nn.softmax(jnp.where(seen, scores, -1e30), -1), v)

  attend = jax.jit(lambda q, k, v: paged.attend(q, paged.Pages(k, v), reads, 0))
  pool = shape.kv_heads, rows * width, tokens, shape.head_dim
  for dtype in ("float32", "bfloat16"):
    q, k, v = random((rows, shape.kv_heads, queries, shape.head_dim), pool, pool, dtype=dtype)
    q = q * shape.head_dim**-0.5
    found[f"attention to pages, {dtype}, relative difference"] = difference(
      attend(q, k, v), on_cpu(plain, q, k, v))
  seconds = best(attend, q, k, v)
  read = 2 * 2 * shape.kv_heads * shape.head_dim * float(length.sum())
  return found | {"ms of a layer": 1e3 * seconds, "GB/s": read / seconds / 1e9}


def prompts_of(size, model):
  """A PromptBatch of random tokens; the second half of every prompt is an image's."""
  import numpy as np

  from ares_jax.data import images
  from ares_jax.data.prompts import PromptBatch

  rng, tower = np.random.default_rng(0), model.vision
  count, tokens, units = size.prompts, size.prompt_tokens, size.prompt_tokens // 2
  down = max(n for n in range(1, int(units**0.5) + 1) if units % n == 0)
  grid = 1, down * tower.merge, units // down * tower.merge
  pictures = [[(rng.integers(0, 256, (units * tower.unit, tower.patch_dim), np.uint8), grid)]
              for _ in range(count)]
  cut = dict(window=tower.window, patch=tower.patch, merge=tower.merge)
  shape = images.VisionShape(images.count_windows([grid], **cut), **cut)
  unit = np.full((count, tokens), -1, np.int32)
  unit[:, tokens - units:] = shape.pack(pictures[:1])[1][0][0]
  ids = np.where(unit < 0, rng.integers(10, model.vocab, unit.shape), model.image_token)
  numbers = np.arange(count)
  return PromptBatch(
    ids.astype(np.int32), np.full(count, tokens, np.int32),
    np.broadcast_to(np.arange(tokens, dtype=np.int32), (3, count, tokens)).copy(), unit, pictures,
    shape, numbers.astype(np.int32), [{}] * count, numbers,
    np.tile([tokens, shape.windows, *images.count_patches([grid])], (count, 1)))


def on_mesh(part):
  """`part` inside a mesh of the first device."""
  @functools.wraps(part)
  def inside(size):
    import jax

    from ares_jax.system import mesh

    with jax.set_mesh(mesh.make_mesh(1, 1, jax.devices()[:1])):
      return part(size)

  return inside


@on_mesh
def model(size):
  """Log-probability and entropy of a prompt with an image, by two layers of the model."""
  import jax

  from ares_jax.models import qwen25_vl
  from ares_jax.system import mesh

  full = model_of(size)
  two = dataclasses.replace(full.vision, depth=2, full_attention=(1,))
  prompts, found = prompts_of(size._replace(prompts=1), full), {}
  vision = qwen25_vl.VisionInput(**prompts.vision())

  def scored(params, dtype):
    shape = dataclasses.replace(full, layers=2, vision=two, compute_dtype=dtype)
    features = qwen25_vl.vision_features(shape, params, vision)
    return qwen25_vl.score(shape, params, features, tokens=prompts.tokens, unit=prompts.unit,
                           positions=prompts.positions.swapaxes(0, 1),
                           segment=0 * prompts.tokens + 1)

  params = weights_of(dataclasses.replace(full, layers=2, vision=two))
  host = jax.device_get(params)
  with jax.set_mesh(mesh.make_mesh(1, 1, jax.devices("cpu")[:1])), \
      jax.default_matmul_precision("highest"):
    want = jax.device_get(jax.jit(scored, static_argnums=1)(host, "float32"))
  for dtype in ("float32", "bfloat16"):
    logprob, entropy = jax.device_get(jax.jit(scored, static_argnums=1)(params, dtype))
    for name, got, right in (("log-probability", logprob, want[0]), ("entropy", entropy, want[1])):
      error = abs(got - right)[:, 1:]  # the first column is meaningless
      found[f"{dtype}, {name}, mean difference, nats"] = float(error.mean())
      found[f"{dtype}, {name}, largest difference, nats"] = float(error.max())
  return found


def config_of(size):
  """AepoConfig and EngineConfig of configs/aepo_3b.py for this batch."""
  from ares_jax.run.config import build_config
  from ares_jax.system import config as config_lib

  values = config_lib.load(str(ROOT / "configs" / "aepo_3b.py")).unlock()
  rows = size.prompts * size.group
  longest = size.prompt_tokens + size.answer_tokens
  values.prompt.max_tokens = (size.prompt_tokens,)
  values.prompt.windows = values.prompt.windows[-1:]
  values.aepo.update(prompts=size.prompts, group=size.group, minibatch=rows,
                     microbatch=size.microbatch, row_tokens=(longest,))
  values.aepo.sampling.max_tokens = size.answer_tokens
  values.engine.update(slots=0, read=min(8, size.prompts), cache_gib=40.0)
  config = build_config(values)
  return config.aepo, config.engine


def weights_of(model, dtype="float32"):
  """Random weights on the device."""
  import jax

  from ares_jax.models import weights

  return jax.jit(lambda: weights.init(weights.weight_table(model), jax.random.key(0), dtype))()


def drawn(model, params, prompts, aepo, engine):
  """Samples on the host; no answer ends before its longest length."""
  import jax
  import numpy as np

  from ares_jax.sampling.rollout import Generator
  from ares_jax.system.profiler import PhaseTimer

  allowed = np.arange(model.vocab) != 1  # the end of a turn
  generator = Generator(model, None, allowed, (1,), engine, None, PhaseTimer())
  return generator.sample(params, prompts, jax.random.key(0), group=aepo.group,
                          sampling=aepo.sampling)


@on_mesh
def rollout(size):
  """Reading the prompts, with their images, and drawing all answers."""
  from ares_jax.models import flops, weights

  model, (aepo, engine) = model_of(size), config_of(size)
  prompts, params, found = prompts_of(size, model), weights_of(model, "bfloat16"), {}
  short = dataclasses.replace(aepo, sampling=dataclasses.replace(aepo.sampling, max_tokens=1))

  def timed(config):
    seconds = []
    for _ in range(3):  # the first one compiles
      start = time.perf_counter()
      samples = drawn(model, params, prompts, config, engine)
      seconds.append(time.perf_counter() - start)
    return samples, min(seconds[1:])

  _, reading = timed(short)
  samples, seconds = timed(aepo)
  tokens = samples.mask.sum(1)
  image = flops.vision_flops(model.images, prompts.sizes[:, 2:])
  work = flops.rollout_flops(model, prompts=prompts.length, answers=tokens, shared=0 * tokens,
                             image=image)
  decoding = max(seconds - reading, 1e-9)
  found["s of reading prompts"], found["s of a rollout"] = reading, seconds
  found["answers at once"] = len(tokens)
  found["answer tokens/s"] = float(tokens.sum()) / seconds
  found["prompt tokens/s"] = float(prompts.length.sum()) / reading
  found["TFLOP/s of reading"] = work["prefill"] / reading / 1e12
  found["TFLOP/s of decoding"] = work["decode"] / decoding / 1e12
  # What every token of all answers has to read: the decoder's weights, and the keys and values.
  weight_bytes = 2 * weights.count(dataclasses.replace(model, vision=None, image_token=None))
  cache_bytes = 4 * model.layers * model.kv_heads * model.head_dim * (
    size.prompts * size.prompt_tokens + len(tokens) * size.answer_tokens / 2)
  found["GB/s that decoding needs at least"] = (
    size.answer_tokens * (weight_bytes + cache_bytes) / decoding / 1e9)
  return found | memory("peak", "limit")


@on_mesh
def update(size):
  """An AEPO update of all weights, from packed rows on the host to new weights."""
  found = updated(size, synthetic)
  del found["loss/sampler_gap"]  # of random numbers
  return found


@on_mesh
def agreement(size):
  """An update of the answers that were drawn: how far the sampler is from the trainer."""
  part = size._replace(prompts=min(4, size.prompts), answer_tokens=min(64, size.answer_tokens))
  found = updated(part, drawn, repeats=0)
  return {"nats a token between sampler and trainer": found["loss/sampler_gap"]}


def synthetic(model, params, prompts, aepo, engine):
  """Samples of random tokens, all of the longest length."""
  del params, engine
  import numpy as np

  from ares_jax.sampling.sampler import Samples

  shape = len(prompts.length) * aepo.group, aepo.sampling.max_tokens
  tokens = np.random.default_rng(1).integers(10, model.vocab, shape)
  return Samples(tokens.astype(np.int32), np.ones(shape, bool),
                 np.full(shape, -np.log(model.vocab), np.float32),
                 np.full(shape, 2.0, np.float32), np.full(shape[0], -1, np.int32),
                 np.zeros(shape[0], np.int32))


def updated(size, answers, repeats=2):
  """Numbers of an update of `answers`, and its metrics."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from ares_jax.models import flops
  from ares_jax.sampling.groups import Rollout
  from ares_jax.system import mesh
  from ares_jax.training import aepo_step
  from ares_jax.training.batch import pack

  model, (aepo, engine) = model_of(size), config_of(size)
  prompts, params = prompts_of(size, model), weights_of(model)
  samples = answers(model, params, prompts, aepo, engine)
  lengths = samples.mask.sum(1)
  rows, packing = pack(prompts, samples, lengths, group=aepo.group, minibatch=aepo.minibatch,
                       microbatch=aepo.microbatch, row_tokens=aepo.row_tokens,
                       longest=size.prompt_tokens + size.answer_tokens)
  correct = (np.arange(len(lengths)) % 2).astype(np.float32)
  rollout = Rollout(prompts, samples, lengths, correct, correct, [], 1, {})
  batch = rollout.batch(rows).to_device(aepo.prompts, aepo.microbatch)
  state = aepo_step.init_state(aepo, jax.tree.map(jnp.copy, params))
  words = mesh.put(np.zeros(model.vocab, bool))
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    state, metrics = aepo_step.aepo_step(model, aepo, state, params, batch, words)
    metrics = jax.device_get(metrics)
    seconds.append(time.perf_counter() - start)
  if not np.isfinite(metrics["update/grad_norm"]):
    raise ValueError("the gradient is not finite")
  work = flops.update_flops(
    aepo, model, prompts=prompts.length, answers=samples.mask.sum(1), adapters=False,
    image=flops.vision_flops(model.images, prompts.sizes[:, 2:]))
  tokens = float(np.repeat(prompts.length, aepo.group).sum() + samples.mask.sum())
  least = min(seconds[1:] or seconds)
  return {"s of an update": least, "s of the first one, compiled": seconds[0],
          "tokens/s": tokens / least, "TFLOP/s": work / least / 1e12,
          "share of real tokens": float(packing["pack/real"]),
          "loss/sampler_gap": float(metrics["loss/sampler_gap"])} | memory("peak", "limit")


PARTS = {
  "device": Part(device, 30, 90, "products and memory of the device"),
  "ops": Part(ops, 40, 120, "ops against float32 on the CPU"),
  "kernels": Part(kernels, 60, 150, "attention and fused log-probability, right and fast"),
  "pages": Part(pages, 30, 120, "attention of decoding, right and fast"),
  "model": Part(model, 60, 150, "two layers of the model against float32 on the CPU"),
  "rollout": Part(rollout, 90, 200, "tokens/s of a rollout"),
  "update": Part(update, 120, 240, "tokens/s of an update"),
  "agreement": Part(agreement, 80, 200, "sampler against trainer"),
}
RATES = {"TFLOP/s": "TFLOP/s, bfloat16 products", "GB/s": "GB/s, read and written"}
# Relative differences above these are marked: bfloat16 has 8 bits, a GPU's float32 products 11.
LARGE = {"bfloat16": 3e-2, "": 5e-3}


def run_part(name, options, seconds):
  """(numbers, seconds) of a part in a process of its own."""
  environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
  if environment.get("JAX_PLATFORMS", "") in ("cuda", "gpu"):
    environment["JAX_PLATFORMS"] = "cuda,cpu"  # the references are computed on the CPU
  words = [sys.executable, __file__, f"--part={name}", f"--size={options.size}"]
  began = time.monotonic()
  try:
    done = subprocess.run(words, env=environment, text=True, timeout=seconds, cwd=ROOT,
                          capture_output=True)
    lines = done.stdout.splitlines()
    found = json.loads(lines[-1]) if done.returncode == 0 else {
      "failed": f"exit code {done.returncode}: {done.stderr[-1500:]}"}
  except subprocess.TimeoutExpired:
    found = {"failed": f"not finished after {seconds:.0f} s"}
  return found, time.monotonic() - began


def write(results, folder):
  """Writes gpu.json and gpu.md."""
  os.makedirs(folder, exist_ok=True)
  pathlib.Path(folder, "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
  pathlib.Path(folder, "gpu.md").write_text(markdown(results))


def markdown(results):
  """The results as a Markdown table; rates also as shares of what the device reached."""
  most = results.get("device", {})
  lines = ["| part | | value | of the device's rate |", "| --- | --- | --- | --- |"]
  for part, numbers in results.items():
    for name, value in numbers.items():
      shown = f"{value:.4g}" if isinstance(value, float) else str(value).splitlines()[-1][:160]
      limit = next((most.get(key) for unit, key in RATES.items() if unit in name), None)
      note = f"{value / limit:.1%}" if limit and part != "device" else ""
      if "relative difference" in name:
        most_there = next(bound for dtype, bound in LARGE.items() if dtype in name)
        note = "" if value < most_there else f"LARGE, above {most_there:g}"  # also for NaN
      lines.append(f"| {part} | {name} | {shown} | {note} |")
  return "\n".join(lines) + "\n"


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", choices=SIZES, default="3b")
  parser.add_argument("--out", default="gpu", help="folder of the results, default %(default)s")
  parser.add_argument("--parts", default=",".join(PARTS), help="default %(default)s")
  parser.add_argument("--minutes", type=float, default=9.5, help="of all, default %(default)s")
  parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.part:
    print(json.dumps(PARTS[options.part].call(SIZES[options.size])))
    return
  missing = [name for name in NEEDED if not importable(name)]
  if missing:
    sys.exit(f"not installed: {', '.join(missing)}; --help says how to bring them along")
  names = options.parts.split(",")
  if unknown := set(names) - set(PARTS):
    sys.exit(f"no parts {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
  expected = sum(PARTS[name].seconds for name in names)
  for name in names:
    print(f"{name}: {PARTS[name].about}, about {PARTS[name].seconds} s")
  print(f"together about {expected / 60:.0f} minutes on an H200, at most {options.minutes:g}; "
        f"results in {options.out}/gpu.md\n", flush=True)
  until, results, failed = time.monotonic() + 60 * options.minutes, {}, False
  for name in names:
    seconds = min(PARTS[name].limit if options.size == "3b" else 600, until - time.monotonic())
    numbers, spent = (run_part(name, options, seconds) if seconds > 10 else
                      ({"failed": "no time was left"}, 0.0))
    failed |= "failed" in numbers
    results[name] = numbers
    write(results, options.out)
    print(f"{name}: {'FAILED' if 'failed' in numbers else 'done'} in {spent:.0f} s", flush=True)
  print("\n" + markdown(results))
  sys.exit(failed)


def importable(name):
  """Whether a module can be imported, without importing it."""
  import importlib.util

  return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
  main()
