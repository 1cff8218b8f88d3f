"""Stage 1, AdaCS: fine-tuning on data whose reasoning grows with difficulty (section 3.1).

`curate` measures pass rates with a probe model and selects responses, `fine_tune` learns them. The
warm-up of a model without pretrained weights is `fine_tune` on other rows.

R packed rows, T tokens a row.
"""

import dataclasses
import functools
import json
import os
import sys
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ares_jax import hosts, mesh, model_flops, optimizer, shares
from ares_jax.data import curate as curation
from ares_jax.data import curation_page, pass_rates
from ares_jax.data.sources import epochs
from ares_jax.data.traces import encode_example, trace_batch
from ares_jax.loop import LoopConfig, run_stage
from ares_jax.metrics import Progress
from ares_jax.models import lora, qwen25_vl
from ares_jax.models.vision import VisionInput
from ares_jax.optimizer import OptimizerConfig
from ares_jax.run_folder import dump_batch, flat, write_json, write_text
from ares_jax.sampler import SamplingConfig, stage_key


@dataclasses.dataclass(frozen=True)
class SftConfig:
  """Supervised fine-tuning."""

  steps: int  # 0 leaves the stage out
  batch: int  # examples a step
  shuffle: bool  # False takes the rows in their order, a curriculum
  row_tokens: tuple[int, ...]  # T, tokens of a packed row: of these, what pads a batch least
  row_windows: int  # vision windows a packed row has room for
  microbatch: int  # packed rows a gradient; a step accumulates over its rows
  frozen: tuple[str, ...]  # parts of the weights that are not trained, e.g. ("vision",); LoRA: all
  optimizer: OptimizerConfig
  loop: LoopConfig

  def __post_init__(self):
    if self.steps < 0 or self.batch < 1 or self.microbatch < 1:
      raise ValueError(f"steps = {self.steps} must be >= 0, batch = {self.batch} and "
                       f"microbatch = {self.microbatch} >= 1")
    if min(self.row_windows, *self.row_tokens, len(self.row_tokens)) < 1:
      raise ValueError(f"row_windows = {self.row_windows} must be >= 1, row_tokens = "
                       f"{self.row_tokens} one size or more, >= 1")


@dataclasses.dataclass(frozen=True)
class CurateConfig:
  """AdaCS selection (paper table 1)."""

  selection: Literal["adacs", "vanilla"]  # vanilla: the same number, drawn uniformly (table 4)
  pass_rates: Literal["probe", "column"]  # measured by the run, or the rows' own "pass_rate"
  problems: int  # problems looked at
  samples: int  # answers of the probe a problem; brackets go from 0 to as many
  count: int  # responses selected
  batch: int  # problems a sampling call

  def __post_init__(self):
    if min(self.problems, self.samples, self.count, self.batch) < 1:
      raise ValueError("problems, samples, count and batch must be >= 1")
    if self.count > self.problems:
      raise ValueError(f"count = {self.count} responses from problems = {self.problems}; one "
                       "response a problem is kept, lower count")


@flax.struct.dataclass
class SftState:
  """All that supervised training changes."""

  step: jax.Array  # int32 [], finished steps
  params: dict  # what is trained: weights, or adapters (models/lora.py)
  opt_state: optax.OptState


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames="state")
def sft_step(model, config, state, batch, base=None):
  """One update on a packed batch: mean negative log-likelihood of the response tokens.

  Args:
    model: ModelConfig.
    config: SftConfig.
    state: SftState.
    batch: dict of tokens, segment, loss_mask, unit [R, T], positions [3, R, T] and vision; R a
      multiple of config.microbatch.
    base: lora.Base under the adapters that the state holds; None where it holds weights.

  Returns:
    state, metrics.
  """
  frozen = lora.trained_frozen(base, config.frozen)
  parts = len(batch["tokens"]) // config.microbatch
  split = {name: jnp.moveaxis(batch[name], -2, 0) if name == "positions" else batch[name]
           for name in batch}
  split = jax.tree.map(lambda x: x.reshape(parts, config.microbatch, *x.shape[1:]), split)
  tokens = jnp.maximum(batch["loss_mask"].sum(), 1).astype(jnp.float32)

  def loss_fn(params, part):
    part = jax.tree.map(lambda x: mesh.shard(x, "data"), part)
    params = params | {name: jax.lax.stop_gradient(params[name]) for name in frozen}
    params = lora.join(base, params)
    features = qwen25_vl.vision_features(model, params, part["vision"])
    mask = part["loss_mask"]
    logprob, entropy = qwen25_vl.score(
      model, params, features, wanted=mask,
      **{name: part[name] for name in ("tokens", "unit", "positions", "segment")})
    return -jnp.where(mask, logprob, 0).sum() / tokens, jnp.where(mask, entropy, 0).sum() / tokens

  def accumulate(carry, part):
    (loss, entropy), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, part)
    return jax.tree.map(jnp.add, carry, (grads, loss, entropy)), None

  zeros = (jax.tree.map(jnp.zeros_like, state.params), jnp.float32(0), jnp.float32(0))
  (grads, loss, entropy), _ = jax.lax.scan(accumulate, zeros, split)
  rate = optimizer.learning_rate(config.optimizer, state.step, config.steps)
  tx = optimizer.of(config.optimizer, state.params, frozen=frozen)
  # Entropy is a function of all logits: where one is not finite, it is not.
  faults = {"fault/logits": ~jnp.isfinite(entropy), "fault/logprob": ~jnp.isfinite(loss)}
  params, opt_state, metrics = optimizer.apply(
    tx, grads, state.opt_state, state.params, rate, ~jnp.any(jnp.stack([*faults.values()])))
  params, opt_state = optimizer.keep_layout(tx, params, opt_state, lora.specs(model, base, params))
  metrics |= faults | {"loss": loss, "entropy": entropy, "tokens": tokens, "learning_rate": rate,
                       "rows": jnp.float32(len(batch["tokens"])),
                       "pack/real": (batch["segment"] > 0).mean()}
  return SftState(state.step + 1, params, opt_state), metrics


def fine_tune(params, source, config, *, stage, generator, workdir, seed, threads, base=None):
  """Supervised fine-tuning as a resumable stage.

  Args:
    params: what is trained, as the stage starts: weights, or adapters of `base`; donated.
    source: rows with a "response".
    config: SftConfig.
    stage: name of the stage.
    generator: rollout.Generator.
    workdir, seed, threads: folder, shuffle seed, reading threads.
    base: lora.Base, or None.

  Returns:
    `params`, trained.
  """
  opt_state = optimizer.start(optimizer.of(
    config.optimizer, params, frozen=lora.trained_frozen(base, config.frozen)), params)

  encode = functools.partial(encode_example, generator.encoder)

  def collate(rows, examples, _):
    return trace_batch(generator.encoder, rows, row_tokens=config.row_tokens,
                       row_windows=config.row_windows, row_multiple=config.microbatch,
                       examples=examples)

  def begin(state):
    batches = shares.stream(source, batch=config.batch, seed=seed, encode=encode, collate=collate,
                            start=int(state.step), threads=threads, shuffle=config.shuffle)

    def step(state):
      with generator.phases("data"):
        traces = next(batches)
        batch = to_device(traces)
      with generator.phases("update"), generator.phases("device"):
        state, metrics = sft_step(generator.model, config, state, batch, base)
        metrics = jax.device_get(metrics) | epochs(source, int(state.step) * config.batch)
      metrics |= _work(traces, config, generator.model, base is not None)
      if metrics["skipped"]:
        dump_batch(workdir, stage, int(state.step), {"batch": batch})
      return state, metrics, f"loss {metrics['loss']:.3f}"

    return step

  state = SftState(mesh.put(jnp.int32(0)), params, opt_state)
  return run_stage(stage, state, begin, steps=config.steps, workdir=workdir,
                   config=config.loop, phases=generator.phases).params


def _work(batch, config, model, adapters):
  """Tokens of a TraceBatch, prompts too, and FLOPs that learning them needs."""
  image = model_flops.vision(model.vision, batch.vision["image"])
  return {"work/tokens": (batch.segment > 0).sum(),
          "work/flops": model_flops.fine_tuning(config, model, batch.segment, batch.loss_mask.sum(),
                                               image, adapters=adapters)}


def to_device(batch):
  """The arrays of a data.traces.TraceBatch on the current mesh, rows over "data"."""
  arrays = mesh.put({"tokens": batch.tokens, "segment": batch.segment, "unit": batch.unit,
                     "loss_mask": batch.loss_mask, "vision": VisionInput(**batch.vision)}, "data")
  arrays["positions"] = mesh.put(batch.positions, None, "data")
  return arrays


class Selected:
  """The rows that curation chose, each with its one response: a source for `fine_tune`."""

  def __init__(self, source, chosen):
    """`chosen`: list of (row number, which of its responses)."""
    self._source, self._chosen = source, chosen

  def __len__(self):
    return len(self._chosen)

  def __getitem__(self, index):
    number, which = self._chosen[index]
    row = self._source[number]
    return row | {"response": pass_rates.candidates(row)[which]}


def curate(params, source, config, *, generator, workdir, max_tokens, seed):
  """Pass rates, selection, and WORKDIR/curation.json and .html, what was chosen and why.

  Shards that were made apart (`ares_jax.train --curate=3/8`) are taken as they are.

  Args:
    params: the probe's weights; None where config.pass_rates is "column".
    source: rows with "responses", candidate answers of a teacher; wrong ones are dropped.
    config: CurateConfig.
    generator: rollout.Generator.
    workdir: a finished curation there is read back, not repeated.
    max_tokens: longest answer of the probe.
    seed: of the probe's samples and of ties.

  Returns:
    Selected.
  """
  path = os.path.join(workdir, "curation.json")
  chosen = hosts.leader(lambda: _chosen(path))
  if chosen is None:
    files = hosts.leader(lambda: pass_rates.finished_shards(
      workdir, config.problems, functools.partial(_check_same, workdir)))
    if not files:
      files = [os.path.join(workdir, pass_rates.FILE)]
      measure(params, source, config, generator=generator, path=files[0], max_tokens=max_tokens,
              seed=seed)
    hosts.leader(lambda: _report(files, workdir, config, seed))
    chosen = hosts.leader(lambda: _chosen(path))
  return Selected(source, [tuple(pair) for pair in chosen])


def _chosen(path):
  """What curation.json says was chosen; None where there is none yet."""
  if not os.path.exists(path):
    return None
  with open(path, encoding="utf-8") as file:
    return json.load(file)["chosen"]


def _report(files, workdir, config, seed):
  """Writes WORKDIR/curation.html and curation.json of files of lines."""
  report = curation.report(pass_rates.lines(files), selection=config.selection,
                           count=config.count, samples=config.samples,
                           rng=np.random.default_rng(seed))
  write_text(os.path.join(workdir, "curation.html"), curation_page.html(report))
  write_json(os.path.join(workdir, "curation.json"), report)
  print(curation_page.text(report), file=sys.stderr, flush=True)


def measure(params, source, config, *, generator, path, max_tokens, seed, shard=(0, 1)):
  """Appends a line a problem to the file `path`: its passes and the lengths of its responses.

  Problems pass by batch by batch: what is held of a response is its length. A stopped one goes on
  after its last line. What a line holds does not depend on the number of shards.

  Args:
    params, source, config, generator, max_tokens, seed: as for `curate`.
    path: as in data/pass_rates.py.
    shard: (number, shards), which of the problems.
  """
  if len(source) < config.problems:
    raise ValueError(f"{config.problems} problems to curate, the source has {len(source)}; "
                     "lower curate.problems")
  if config.problems < len(source) and len(getattr(source, "parts", ())) > 1:
    raise ValueError(f"{config.problems} problems of {len(source)} in {len(source.parts)} sources: "
                     "they are taken one source behind the other, whatever the weights; set "
                     f"curate.problems={len(source)}, or leave sources out of data.files.curated")
  part, done = pass_rates.part(config.problems, shard), hosts.leader(
    lambda: pass_rates.go_on(path))
  progress = Progress(len(part), "curation", start=done)
  while done < len(part):
    looked_at = _look_at(params, source, config, generator, max_tokens, seed, part, done)
    if jax.process_index() == 0:
      with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in looked_at)
    done += len(looked_at)
    progress.update(done, "problems")
  progress.close()


# What a line of a curation follows from, of config.json and fingerprint.json.
_DECIDE = ("seed", "model.", "data.digits", "data.bad_rows", "data.files.curated", "data.curated",
           "prompt.", "grade.grader", "warmup.steps", "curate.pass_rates", "curate.problems",
           "curate.samples", "aepo.sampling.max_tokens", "tokenizer", "template", "weights")


def _check_same(workdir, folder):
  """Raises ValueError where a shard in `folder` was made with another config or other files."""
  def read(where):
    found = {}
    for name in ("config.json", "fingerprint.json"):
      with open(os.path.join(where, name), encoding="utf-8") as file:
        found |= flat(json.load(file))
    return {key: value for key, value in found.items() if key.startswith(_DECIDE)}

  own, other = read(workdir), read(folder)
  different = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
  if different:
    raise ValueError(f"{folder} was made with other values of {', '.join(different)}; make it "
                     "again, or give the run the same")


def _look_at(params, source, config, generator, max_tokens, seed, part, start):
  """Lines of the next batch of problems of `part`, those from its place `start` on."""
  size, probe = min(config.batch, len(part) - start), config.pass_rates == "probe"
  # The probe's batches have one shape: the last one is filled up.
  numbers = [part[place % len(part)] for place in range(
    start, start + (config.batch if probe else size))]

  def look(row):
    # Responses first: a row without any is told apart from one that cannot be asked.
    return pass_rates.candidates(row), generator.encoder.encode(row) if probe else None

  rows, found = shares.read(source, numbers, look)
  responses, encoded = zip(*found, strict=True)
  responses = responses[:size]
  if probe:
    prompts = generator.encoder.batch(rows, np.array(numbers), encoded)
    passes = _pass_counts(params, prompts, config, generator, max_tokens, seed)
  else:
    passes = [pass_rates.column_passes(row, config.samples) for row in rows]
  pairs = [(row["answer"], text) for row, texts in zip(rows, responses, strict=False)
           for text in texts]
  _, correct, _, _ = generator.judge([text for _, text in pairs], [truth for truth, _ in pairs])
  right, chat = iter(correct), generator.encoder.chat
  return [{"problem": number, "id": row["id"], "source": row["source"], "passes": int(count),
           "tokens": [len(chat.response(text)) if next(right) else None for text in texts]}
          for number, row, texts, count in zip(numbers, rows, responses, passes, strict=False)]


def _pass_counts(params, prompts, config, generator, max_tokens, seed):
  """int [problems of the batch]: right answers of the probe at temperature 1."""
  sampling = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, min_tokens=0,
                            max_tokens=max_tokens)
  _, _, correct, _, _ = generator.answer(params, prompts, stage_key(seed, "probe"),
                                         group=config.samples, sampling=sampling)
  return correct.reshape(-1, config.samples).sum(1).astype(int)
