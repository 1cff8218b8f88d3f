"""Answers to a benchmark, one line a problem in a file that a second run goes on with."""

import dataclasses
import functools
import hashlib
import json
import os
import time

import jax
import numpy as np
from etils import epath

from ares_jax.data import sharded
from ares_jax.evaluation.judge import verdicts
from ares_jax.grading import quantity
from ares_jax.grading.notation import normalise
from ares_jax.grading.response import extract_boxed, well_formed
from ares_jax.run.checkpoint import digest
from ares_jax.run.files import write_text
from ares_jax.sampling.rollout import Grades
from ares_jax.sampling.sampler import stage_key
from ares_jax.system import heartbeat, hosts

_SEED = 0  # of the samples: runs of all seeds are asked alike


def predict(generator, params, benchmark, *, path, sampling, batch, model, judge):
  """Answers every problem, or those an earlier run left; returns all problems with their samples.

  A problem's answers depend on its place in the benchmark alone, so a run in pieces
  says the same as one in one piece.

  Args:
    generator: rollout.Generator.
    params: weights.
    benchmark: data.benchmarks.Benchmark.
    path: predictions.jsonl; its first line says what answered what.
    sampling: SamplingConfig.
    batch: problems a sampling call.
    model: name of the weights for people; their digest decides.
    judge: "package.module:function" asked instead of the grader (data/judge.py), "" for the grader.

  Raises:
    ValueError: the file holds answers of another model, other prompts or another sampling; or the
      processes of this one were not asked the same; or the judge fails.
    pulse.Stopped: the run was asked to stop; whole problems are in the file.
  """
  rows = benchmark.rows
  asked = hashlib.sha256()
  for row in rows:
    heartbeat.heartbeat()
    asked.update(json.dumps([row["id"], row["question"] + generator.encoder.chat.suffix,
                             row["answer"], row.get("tolerance"), _digest_images(row)]).encode())
  weights = hashlib.sha256(json.dumps(digest.digest_tree(params)).encode()).hexdigest()[:16]
  head = {"benchmark": benchmark.name, "problems": len(rows), "n": benchmark.n, "seed": _SEED,
          "model": model, "weights": weights, "dtype": generator.model.compute_dtype,
          "prompts": asked.hexdigest()[:16], "grader": judge or generator.grader.name,
          "min_pixels": generator.encoder.config.min_pixels,
          "max_pixels": generator.encoder.config.max_pixels, **dataclasses.asdict(sampling)}
  hosts.check_same(head, "asks something else")
  done = {problem["place"]: problem for problem in hosts.on_process_0(lambda: _resume(path, head))}
  for start in range(0, len(rows), batch):
    fresh = range(start, min(start + batch, len(rows)))
    if all(place in done for place in fresh):
      continue
    # The last batch is filled with rows from the front, which are then dropped: one shape.
    places = np.arange(start, start + batch) % len(rows)
    shared, encoded = sharded.read_sharded(rows, places, generator.encoder.encode)
    prompts = generator.encoder.batch(shared, places, encoded)
    began = time.perf_counter()
    ask = functools.partial(_written, generator) if judge else generator.answer
    samples, grades = ask(params, prompts, stage_key(_SEED, "evaluate"), group=benchmark.n,
                          sampling=sampling)
    seconds = (time.perf_counter() - began) / len(fresh)
    texts, correct = grades.texts, grades.correct
    if judge:
      items = [_item(rows[place], texts[index * benchmark.n + number])
               for index, place in enumerate(fresh) for number in range(benchmark.n)]
      correct = hosts.on_process_0(lambda items=items: verdicts(judge, items))
    lengths = samples.mask.sum(1)
    last = samples.tokens[np.arange(len(texts)), np.maximum(lengths, 1) - 1]
    with open(path if jax.process_index() == 0 else os.devnull, "a", encoding="utf-8") as file:
      for index, place in enumerate(fresh):
        row = rows[place]
        problem = {field: row.get(field) for field in ("id", "source", "level", "group", "step")}
        problem["level"] = None if problem["level"] is None else str(problem["level"])
        problem |= {"place": place, "answer": row["answer"], "seconds": seconds,
                    "timed_out": grades.timed_out if index == 0 else 0, "samples": []}
        for number in range(index * benchmark.n, (index + 1) * benchmark.n):
          right = float(correct[number])
          if right < 1 and row.get("tolerance") and not judge:
            right = float(within_tolerance(extract_boxed(texts[number]), row["answer"],
                                           row["tolerance"]))
          problem["samples"].append({
            "correct": right, "format_ok": float(grades.format_ok[number]),
            "truncated": float(last[number] not in generator.end),
            "tokens": int(lengths[number]), "response": texts[number]})
        file.write(json.dumps(problem, ensure_ascii=True) + "\n")
        done[place] = problem
  return head, [done[place] for place in range(len(rows))]


def _written(generator, params, prompts, key, *, group, sampling):
  """What Generator.answer returns, with nothing graded: a judge has the only word."""
  samples = generator.sample(params, prompts, key, group=group, sampling=sampling)
  texts = [generator.encoder.chat.text(tokens[mask])
           for tokens, mask in zip(samples.tokens, samples.mask, strict=True)]
  return samples, Grades(texts, None, [well_formed(text) for text in texts], 0)


def _item(row, text):
  truths = row["answer"]
  return {"id": row["id"], "question": row["question"],
          "truths": [truths] if isinstance(truths, str) else list(truths), "response": text,
          "answer": extract_boxed(text)}


def within_tolerance(said, truths, tolerance):
  """Whether a number is at most `tolerance` off one of the truths, in the same unit."""
  said = None if said is None else quantity.parse_quantity(normalise(said)) if len(
    said) < 100 else None
  for truth in [truths] if isinstance(truths, str) else truths:
    right = quantity.parse_quantity(normalise(truth))
    if said and right and abs(said.number - right.number) <= tolerance and (
        said.unit == right.unit and said.size == right.size or None in (said.unit, right.unit)):
      return True
  return False


def _digest_images(row):
  parts = []
  for image in row["images"]:
    if isinstance(image, str):
      data = epath.Path(image).read_bytes()
    else:
      data = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
    parts.append(hashlib.sha256(data).hexdigest()[:16])
  return parts


def _resume(path, head):
  """The problems of whole lines, each place once; writes the head of a new file."""
  done = {}
  if os.path.exists(path):
    with open(path, encoding="utf-8", newline="\n") as file:
      lines = file.read().split("\n")
    before = json.loads(lines[0])
    different = [f"{key} was {before.get(key)!r}, is {head[key]!r}" for key in head
                 if before.get(key) != head[key] and key != "model"]
    if different:
      raise ValueError(f"{path} holds other answers: {'; '.join(different)}; remove it or give "
                       "another --out")
    # What follows the last line end was cut off in writing.
    done = {problem["place"]: problem for problem in map(json.loads, lines[1:-1])}
  write_text(path, "".join(json.dumps(line) + "\n" for line in [head, *done.values()]))
  return list(done.values())
