"""Stage 1, AdaCS: data whose reasoning grows with difficulty (section 3.1).

`curate` measures pass rates with a probe model and selects responses; fine_tuning.py learns them.
"""

import functools
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.data import sharded
from ares_jax.data.curation import page, pass_rates
from ares_jax.data.curation import select as curation
from ares_jax.data.sources import epochs
from ares_jax.data.traces import encode_example, trace_batch
from ares_jax.models import flops, lora
from ares_jax.run.files import read_json, write_json, write_text
from ares_jax.run.identity import CURATION, flatten
from ares_jax.run.loop import run_stage
from ares_jax.run.nonfinite import dump_batch
from ares_jax.run.progress import Progress
from ares_jax.sampling.sampler import SamplingConfig, stage_key
from ares_jax.system import hosts, mesh
from ares_jax.training import optimizer
from ares_jax.training.sft_step import SftState, sft_step, to_device


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
    return row | {"response": pass_rates.candidate_responses(row)[which]}


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
  chosen = hosts.on_process_0(lambda: _chosen(workdir))
  if chosen is None:
    files = hosts.on_process_0(lambda: pass_rates.finished_shards(
      workdir, config.problems, functools.partial(_check_same, workdir)))
    if not files:
      files = [os.path.join(workdir, pass_rates.FILE)]
      measure_pass_rates(params, source, config, generator=generator, path=files[0],
                         max_tokens=max_tokens, seed=seed)
    hosts.on_process_0(lambda: _report(files, workdir, config, seed))
    chosen = hosts.on_process_0(lambda: _chosen(workdir))
  return Selected(source, [tuple(pair) for pair in chosen])


def _chosen(workdir):
  """What curation.json says was chosen; None where there is none yet."""
  return read_json(workdir, "curation.json").get("chosen")


def _report(files, workdir, config, seed):
  """Writes WORKDIR/curation.html and curation.json of files of lines."""
  report = curation.curation_report(pass_rates.read_problems(files), selection=config.selection,
                                    count=config.count, samples=config.samples,
                                    rng=np.random.default_rng(seed))
  write_text(os.path.join(workdir, "curation.html"), page.curation_html(report))
  write_json(os.path.join(workdir, "curation.json"), report)
  print(page.curation_text(report), file=sys.stderr, flush=True)


def measure_pass_rates(params, source, config, *, generator, path, max_tokens, seed, shard=(0, 1)):
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
  part, done = pass_rates.shard_numbers(config.problems, shard), hosts.on_process_0(
    lambda: pass_rates.drop_torn_line(path))
  progress = Progress(len(part), "curation", start=done)
  while done < len(part):
    looked_at = _look_at(params, source, config, generator, max_tokens, seed, part, done)
    if jax.process_index() == 0:
      with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in looked_at)
    done += len(looked_at)
    progress.update(done, "problems")
  progress.close()


def curate_shard(parts, folder, shard):
  """Measures the pass rates of one shard (number, shards) of stage 1's problems, into `folder`."""
  config = parts.config
  params = parts.init_params() if config.curate.pass_rates == "probe" else None
  measure_pass_rates(params, parts.source("curated"), config.curate,
                     generator=parts.generator, path=os.path.join(folder, pass_rates.FILE),
                     seed=config.seed, shard=shard, max_tokens=config.aepo.sampling.max_tokens)


# What a line of a curation follows from, of config.json and fingerprint.json.
_DECIDE = ("seed", "model.", "data.digits", "data.bad_rows", "prompt.", "grade.grader",
           "warmup.steps", "tokenizer", "template", "weights", *CURATION)


def _check_same(workdir, folder):
  """Raises ValueError where a shard in `folder` was made with another config or other files."""
  def read(where):
    found = {}
    for name in ("config.json", "fingerprint.json"):
      found |= flatten(read_json(where, name))
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
    return pass_rates.candidate_responses(row), generator.encoder.encode(row) if probe else None

  rows, found = sharded.read_sharded(source, numbers, look)
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
  opt_state = optimizer.init_opt_state(optimizer.make_with_frozen(
    config.optimizer, params, frozen=lora.trained_frozen(base, config.frozen)), params)

  encode = functools.partial(encode_example, generator.encoder)

  def collate(rows, examples, _):
    return trace_batch(generator.encoder, rows, row_tokens=config.row_tokens,
                       row_windows=config.row_windows, row_multiple=config.microbatch,
                       examples=examples)

  def begin(state):
    batches = sharded.sharded_stream(source, batch=config.batch, seed=seed, encode=encode,
                                     collate=collate, start=int(state.step), threads=threads,
                                     shuffle=config.shuffle)

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
  image = flops.vision_flops(model.vision, batch.vision["image"])
  return {"work/tokens": (batch.segment > 0).sum(),
          "work/flops": flops.sft_flops(config, model, batch.segment, batch.loss_mask.sum(),
                                               image, adapters=adapters)}
