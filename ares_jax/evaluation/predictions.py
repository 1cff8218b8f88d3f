"""Graded answers to a benchmark in predictions.jsonl, which a stopped evaluation continues.

The first line of the file says which weights answered which prompts, and how; every further line is
a GradedProblem.
"""

import dataclasses
import hashlib
import json
import os

import jax
import numpy as np
from etils import epath

from ares_jax.evaluation import graded
from ares_jax.grading.response import shows_work
from ares_jax.run.checkpoint import digest
from ares_jax.run.files import write_text
from ares_jax.run.records import Lines
from ares_jax.system import heartbeat, hosts


def predict(generator, params, benchmark, settings, *, batch, path, model):
  """Answers the problems of a Benchmark that the file at `path` has no answers to, `batch` a call.

  `settings` are graded.EvaluationSettings. `model` names the weights for people; their digest tells
  them apart.

  Returns:
    (the first line as a dict, list of GradedProblem of all rows).

  Raises:
    ValueError: the file holds answers of other weights, to other prompts, or sampled or graded
      otherwise; or the processes of this run differ in one of these; or see graded.py.
    heartbeat.StopRequested: the process was asked to stop; the file keeps the complete batches.
  """
  head = _head(generator, params, benchmark, settings, model)
  hosts.check_same(head, "asks something else")
  done = {}
  for problem in hosts.on_process_0(lambda: _resume(path, head)):
    # Lines of before version 0.2 do not say whether a response shows work.
    samples = [graded.GradedSample(**{"shows_work": float(shows_work(sample["response"]))} | sample)
               for sample in problem["samples"]]
    done[problem["index"]] = graded.GradedProblem(**problem | {"samples": samples})
  count = len(benchmark.rows)
  for indices, prompts in graded.prompt_batches(generator, benchmark.rows, count, batch, done=done):
    problems, _ = graded.answer_batch(generator, params, indices, prompts, settings)
    with open(path if jax.process_index() == 0 else os.devnull, "a", encoding="utf-8") as file:
      for problem in problems:
        file.write(json.dumps(dataclasses.asdict(problem)) + "\n")
        done[problem.index] = problem
  return head, [done[index] for index in range(count)]


def _head(generator, params, benchmark, settings, model):
  """The first line of the file: everything that the answers and their grades depend on."""
  encoder, prompts = generator.encoder, hashlib.sha256()
  for row in benchmark.rows:
    heartbeat.heartbeat()
    prompts.update(json.dumps([row["id"], row["question"] + encoder.chat.suffix, row["answer"],
                               row.get("tolerance"), _image_digests(row),
                               *row.get("history", ())]).encode())
  weights = hashlib.sha256(json.dumps(digest.digest_tree(params)).encode())
  return {"benchmark": benchmark.name, "problems": len(benchmark.rows), "n": settings.samples,
          "seed": graded.SEED, "model": model, "weights": weights.hexdigest()[:16],
          "dtype": generator.model.compute_dtype, "prompts": prompts.hexdigest()[:16],
          "grader": settings.judge or generator.grader.name,
          "min_pixels": encoder.config.min_pixels, "max_pixels": encoder.config.max_pixels,
          **dataclasses.asdict(settings.sampling)}


def _image_digests(row):
  """Digests of the bytes of a row's images: of files, encoded images or arrays of pixels."""
  images = [epath.Path(image).read_bytes() if isinstance(image, str) else image
            for image in row["images"]]
  return [hashlib.sha256(image if isinstance(image, bytes) else np.ascontiguousarray(image))
          .hexdigest()[:16] for image in images]


def _resume(path, head):
  """The problems in complete lines, once each; the file then holds `head` and those lines."""
  before, *problems = list(Lines(path)) or [head]
  different = [f"{key} was {before.get(key)!r}, is {head[key]!r}" for key in head
               if before.get(key) != head[key] and key != "model"]
  if different:
    raise ValueError(f"{path} holds other answers: {'; '.join(different)}; remove it or give "
                     "another --out")
  done = {problem["index"]: problem for problem in problems}
  write_text(path, "".join(json.dumps(line) + "\n" for line in [head, *done.values()]))
  return list(done.values())
