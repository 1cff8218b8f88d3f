"""Writes graded responses as lines of JSON, token by token, and the images of their prompts.

A line holds the response and its grades, nothing that follows from them: report/annotate.py
computes windows, buckets and rewards, with the ops and the settings of the line's step.
"""

import dataclasses
import hashlib
import io
import json
import os

import jax
import numpy as np
from PIL import Image

from ares_jax.data.images import load_image
from ares_jax.data.sharded import from_bytes, to_bytes
from ares_jax.run.files import atomic_write, write_text
from ares_jax.system import hosts, shares

MAX_PIXELS = 512 * 512  # of an image that is kept for people to look at


@dataclasses.dataclass(frozen=True)
class GradedResponses:
  """Responses to P prompts and their grades; response b answers prompt b // group.

  Rows, samples and texts are those of the H prompts that this process holds.
  """

  rows: list  # of the source, H
  held: np.ndarray  # int [H], their numbers among the P prompts
  samples: object  # sampler.Samples of numpy arrays, H * G rows
  texts: list  # of the H * G responses
  correct: np.ndarray  # [B], 0 or 1
  format_ok: np.ndarray  # [B], 0 or 1
  group: int  # G, responses a prompt
  scores: object = None  # scoring.Scores; None where right is 1 and wrong 0


def write_rollouts(workdir, step, responses, encoder, *, count):
  """Appends the first `count` GradedResponses of iteration `step` to WORKDIR/rollouts.jsonl.

  The iterations count from 1. `encoder` is the prompts.Encoder of the rows.
  Collective; process 0 writes.
  """
  found = _gathered("aepo", step, responses, encoder, range(min(count, len(responses.correct))))

  def append():
    _write_images(workdir, found)
    with open(os.path.join(workdir, "rollouts.jsonl"), "a", encoding="utf-8") as file:
      file.writelines(line for line, _ in found)

  hosts.on_process_0(append)


def write_held_out(workdir, stage, step, responses, encoder, *, problems, kept):
  """Writes WORKDIR/held_out/STAGE.jsonl: `kept` responses to each of the first `problems` problems.

  `step` is the stage's last. Every stage answers the same problems, so that its answers can be
  compared with another stage's. Collective; process 0 writes.
  """
  count = min(problems * responses.group, len(responses.correct))
  found = _gathered(stage, step, responses, encoder,
                    [index for index in range(count) if index % responses.group < kept])

  def write():
    _write_images(workdir, found)
    os.makedirs(os.path.join(workdir, "held_out"), exist_ok=True)
    write_text(os.path.join(workdir, "held_out", f"{stage}.jsonl"),
               "".join(line for line, _ in found))

  hosts.on_process_0(write)


def _gathered(stage, step, responses, encoder, indices):
  """(line, {file: JPEG}) of the responses at `indices`, from the processes that hold them.

  An image comes with the first response about it.
  """
  share = shares.share(len(responses.correct) // responses.group)

  def local():
    here, shown = dict(zip(responses.held.tolist(), range(len(responses.held)), strict=True)), {}
    for index in indices:
      prompt = index // responses.group
      if share.owner[prompt] == jax.process_index():
        images = []
        if prompt not in shown:
          images = [_jpeg(image, encoder.config.turn_images)
                    for image in responses.rows[here[prompt]]["images"]]
          shown[prompt] = [name for name, _ in images]
        line = _line(stage, step, responses, encoder.chat, index, here[prompt], shown[prompt])
        yield index, line, dict(images)

  parts = hosts.allgather(lambda: to_bytes(list(local())))
  return [(line, images) for _, line, images in sorted(
    (each for part in parts for each in from_bytes(part)), key=lambda each: each[0])]


def _line(stage, step, responses, chat, index, place, images):
  """The line of JSON of response `index`, to the prompt at `place` of those held."""
  samples, row, group = responses.samples, responses.rows[place], responses.group
  here, first = place * group + index % group, index - index % group
  mask, scores = samples.mask[here], responses.scores
  accuracy = np.asarray(responses.correct if scores is None else scores.accuracy)
  own = {} if scores is None else {
    "accuracy": float(scores.accuracy[index]), "reward": float(scores.reward[index]),
    "components": {name: float(values[index]) for name, values in scores.components.items()
                   if np.isfinite(values[index])}}
  return json.dumps({
    "stage": stage, "step": int(step), "id": row["id"], "sample": index % group,
    "question": _shown(row), "answer": row["answer"], "images": images,
    "response": responses.texts[here], "correct": float(responses.correct[index]),
    "format_ok": float(responses.format_ok[index]), **own, "parent": int(samples.parent[here]),
    "fork": int(samples.fork[here]),
    # Of the whole group, written or not.
    "pass_rate": float(accuracy[first:first + group].mean()),
    "tokens": chat.tokenizer.batch_decode([[token] for token in samples.tokens[here][mask]]),
    # 1e-4 nats is a tenth of what a reader of the report can tell apart; null is not finite.
    "entropy": [round(float(nats), 4) if np.isfinite(nats) else None
                for nats in samples.entropy[here][mask]]}, allow_nan=False) + "\n"


def _shown(row):
  """The question of a row, after the turns before it."""
  return "\n\n".join([*(f"{turn['role']}: {turn['content']}" for turn in row.get("history", ())),
                      row["question"]])


def _jpeg(image, turn):
  """(path inside the workdir, bytes of the JPEG) of an image.

  The path is the digest of its pixels. `turn`: whether its EXIF orientation is followed, as it is
  where the model is shown it.
  """
  pixels = load_image(image, min_pixels=28 * 28, max_pixels=MAX_PIXELS, turn=turn)
  data = io.BytesIO()
  # At 56 x 56 pixels, colour subsampling smears the colour of a cell into the next one.
  Image.fromarray(pixels).save(data, format="JPEG", quality=90, subsampling=0)
  return f"images/{hashlib.sha256(pixels.tobytes()).hexdigest()[:20]}.jpg", data.getvalue()


def _write_images(workdir, found):
  for _, images in found:
    for name, data in images.items():
      path = os.path.join(workdir, name)
      if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
          file.write(data)
