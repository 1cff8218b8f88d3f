"""Stage 1, AdaCS: a cold start on responses whose length grows with difficulty (section 3.1).

`fine_tune` is supervised fine-tuning, which the warm-up uses too. `curate` selects the responses: a
probe model answers every problem several times, and a selected problem keeps one right response.
"""

import dataclasses
import functools
import json
import os
import sys

import jax
import numpy as np

from ares_jax.data import sharded
from ares_jax.data.curation import page, pass_rates
from ares_jax.data.curation import select as curation
from ares_jax.data.sources import epochs
from ares_jax.data.traces import encode_example
from ares_jax.models import flops
from ares_jax.models.weights import Params
from ares_jax.run import bucket
from ares_jax.run.files import dump_batch, read_json, write_json, write_text
from ares_jax.run.identity import check_curation
from ares_jax.run.loop import run_stage
from ares_jax.run.progress import Progress
from ares_jax.run.setup import StageContext
from ares_jax.sampling.sampler import SamplingConfig, stage_key
from ares_jax.system import hosts
from ares_jax.system.command import UsageError
from ares_jax.training.sft_step import init_state, sft_step, to_device


def fine_tune(params, source, config, context, *, stage):
  """Supervised fine-tuning by an SftConfig as a resumable stage; returns the trained parameters.

  `params` are weights, or adapters of `context.base`, and are donated. The rows of the source have
  a "response".
  """
  generator, base = context.generator, context.base

  limits = dict(row_tokens=config.row_tokens, row_windows=config.row_windows)

  def begin(state):
    parts = sharded.sharded_stream(
      source, batch=config.batch, seed=context.seed, start=int(state.step),
      encode=functools.partial(encode_example, generator.encoder, **limits),
      threads=context.threads, shuffle=config.shuffle)

    def step(state):
      with generator.phases("data"):
        examples = next(parts).traces(generator.encoder, row_multiple=config.microbatch, **limits)
        batch = to_device(examples)
      with generator.phases("update"), generator.phases("device"):
        state, metrics = sft_step(generator.model, config, state, batch, base)
        metrics = jax.device_get(metrics) | epochs(source, int(state.step) * config.batch)
      image = flops.vision_flops(generator.model.images, examples.sizes[:, 2:])
      metrics["work/tokens"] = examples.sizes[:, 0].sum()  # prompts included
      metrics["work/flops"] = flops.sft_flops(config, generator.model, examples.sizes[:, 0],
                                              examples.learnt, image, adapters=base is not None)
      if metrics["skipped"]:
        dump_batch(context.workdir, stage, int(state.step), {"batch": batch})
      return state, metrics, f"loss {metrics['loss']:.3f}"

    return step

  return run_stage(stage, init_state(config, params, base), begin, steps=config.steps,
                   workdir=context.workdir, config=config.loop, phases=generator.phases).params


@dataclasses.dataclass(frozen=True)
class Probe:
  """The model that answers the problems of stage 1, so that their pass rates are known."""

  params: Params | None  # weights; None where config.pass_rates is "column"
  max_tokens: int  # longest answer

  def passes(self, prompts, config, context):
    """int [problems]: right answers to each prompt, of config.samples at temperature 1."""
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, min_tokens=0,
                              max_tokens=self.max_tokens)
    _, grades = context.generator.answer(self.params, prompts, stage_key(context.seed, "probe"),
                                         group=config.samples, sampling=sampling)
    return grades.correct.reshape(-1, config.samples).sum(1).astype(int)


@dataclasses.dataclass(frozen=True)
class Selected:
  """The selected rows, each with its one response: a source for `fine_tune`."""

  source: object  # rows by number
  chosen: list  # of (row number, index of its response)

  def __len__(self):
    return len(self.chosen)

  def __getitem__(self, index):
    number, response = self.chosen[index]
    row = self.source[number]
    return row | {"response": pass_rates.candidate_responses(row)[response]}


def curate(probe, source, config, context):
  """Measures pass rates, selects responses by a CurateConfig, reports both, and returns Selected.

  The rows of the source have "responses", a teacher's candidate answers; wrong ones are dropped.
  WORKDIR/curation.json and curation.html hold the selection and its reasons; a finished curation is
  read, not repeated. Pass rates of finished shards (`ares_jax.train --curate=3/8`) are used.
  """
  workdir = context.workdir
  chosen = hosts.on_process_0(lambda: read_json(workdir, "curation.json").get("chosen"))
  if chosen is None:
    hosts.on_process_0(lambda: bucket.fetch(workdir, "curation"))  # shards finished meanwhile
    files = hosts.on_process_0(lambda: pass_rates.finished_shards(
      workdir, config.problems, functools.partial(check_curation, workdir)))
    if not files:
      files = [os.path.join(workdir, pass_rates.FILE)]
      measure_pass_rates(probe, source, config, context, path=files[0])
    chosen = hosts.on_process_0(lambda: _select(files, config, context))
  return Selected(source, chosen)


def _select(files, config, context):
  """Selects responses by the lines of `files`; writes WORKDIR/curation.html and curation.json."""
  report = curation.curation_report(pass_rates.read_problems(files), selection=config.selection,
                                    count=config.count, samples=config.samples,
                                    rng=np.random.default_rng(context.seed))
  write_text(os.path.join(context.workdir, "curation.html"), page.curation_html(report))
  write_json(os.path.join(context.workdir, "curation.json"), report)
  print(page.curation_text(report), file=sys.stderr, flush=True)
  return report["chosen"]


def parse_shard(text, config):
  """(number, shards) of --curate=3/8; None for --curate=all and without the flag."""
  if not text:
    return None
  if not config.adacs.steps:
    raise ValueError(f"adacs.steps = 0: without stage 1 nothing is curated; set it above 0, or "
                     f"leave --curate={text} out")
  if text == "all":
    return None
  number, _, shards = text.partition("/")
  if not (number.isdecimal() and shards.isdecimal()):
    raise UsageError(f"--curate={text} is neither all nor NUMBER/SHARDS, 0/8 to 7/8")
  if config.warmup.steps:
    raise ValueError(f"warmup.steps = {config.warmup.steps}: the probe of a shard is the model of "
                     "model.path; set it to 0, or curate with all")
  return int(number), int(shards)


def curate_shard(parts, folder, shard):
  """Measures the pass rates of one shard (number, shards) of stage 1's problems, into `folder`."""
  config = parts.config
  probe = Probe(parts.init_params() if config.curate.pass_rates == "probe" else None,
                config.aepo.sampling.max_tokens)
  context = StageContext(parts.generator, folder, config.seed, config.threads)
  measure_pass_rates(probe, parts.source("sft"), config.curate, context,
                     path=os.path.join(folder, pass_rates.FILE), shard=shard)


def measure_pass_rates(probe, source, config, context, *, path, shard=(0, 1)):
  """Appends a line for each problem to a file: its right answers, and its responses' lengths.

  data/curation/pass_rates.py describes the file at `path`. Memory holds one batch of problems. A
  stopped measurement continues after its last complete line. `shard` is (number, shards), the part
  of the problems that is measured; a line does not depend on the number of shards.

  Raises:
    ValueError: the source has too few problems, or is a mixture of which some would be left.
  """
  if len(source) < config.problems:
    raise ValueError(f"{config.problems} problems to curate, the source has {len(source)}; "
                     "lower curate.problems")
  if config.problems < len(source) and len(getattr(source, "parts", ())) > 1:
    raise ValueError(f"{config.problems} problems of {len(source)} in {len(source.parts)} sources: "
                     "problems are taken one source after the other, whatever the weights; set "
                     f"curate.problems={len(source)}, or leave sources out of data.files.sft")
  numbers = pass_rates.shard_numbers(config.problems, shard)
  done = hosts.on_process_0(lambda: pass_rates.drop_torn_line(path))
  progress = Progress(len(numbers), "curation", unit="problem", start=done)
  while done < len(numbers):
    lines = _measure_batch(probe, source, config, context, numbers, done)
    if jax.process_index() == 0:
      with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    done += len(lines)
    progress.update(done)
  progress.close()


def _measure_batch(probe, source, config, context, numbers, start):
  """Lines of the next batch of problems: those of `numbers` from index `start` on."""
  generator, use_probe = context.generator, config.pass_rates == "probe"
  size = min(config.batch, len(numbers) - start)
  # The probe's batches have one shape: the last one is filled up with the first problems.
  end = start + (config.batch if use_probe else size)
  numbers = [numbers[index % len(numbers)] for index in range(start, end)]

  def read(row):
    # Responses first: a row without any is refused as that, not as a row that cannot be encoded.
    responses = pass_rates.candidate_responses(row)
    return responses, (generator.encoder.encode(row) if use_probe else
                       pass_rates.column_passes(row, config.samples))

  part = sharded.read_sharded(source, numbers, read)
  share, passes = part.share, [second for _, second in part.encoded]
  if use_probe:
    prompts = dataclasses.replace(part, encoded=passes).prompts(generator.encoder, numbers)
    passes = probe.passes(prompts, config, context)[share.held]
  # Each process grades the responses of the problems that it owns.
  own = [(index, row, int(count), texts) for index, row, count, (texts, _) in zip(
    share.held.tolist(), part.rows, passes, part.encoded, strict=True)
    if index < size and share.owner[index] == jax.process_index()]

  def measure():
    lengths = _right_lengths([(row, texts) for _, row, _, texts in own], generator)
    return [(index, {"problem": numbers[index], "id": row["id"], "source": row["source"],
                     "passes": count, "tokens": tokens})
            for (index, row, count, _), tokens in zip(own, lengths, strict=True)]

  parts = hosts.allgather(lambda: json.dumps(measure()).encode())
  return [line for _, line in sorted((line for part in parts for line in json.loads(part)),
                                     key=lambda line: line[0])]


def _right_lengths(answered, generator):
  """Tokens of the responses to each row, of (row, responses); None for a wrong response."""
  texts = [text for _, of_row in answered for text in of_row]
  correct = iter(generator.judge(texts, [row for row, of_row in answered for _ in of_row]))
  return [[len(generator.encoder.chat.response(text)) if next(correct) else None
           for text in of_row] for _, of_row in answered]
