"""Writes graded responses as lines of JSON, token by token, and the images of their prompts.

A line holds the response and its grades, nothing that follows from them: report/annotate.py
computes windows, buckets and rewards, with the ops and the settings of the line's step.
"""

import dataclasses
import hashlib
import json
import os

import numpy as np
from PIL import Image

from ares_jax.data.images import load_image
from ares_jax.run.files import atomic_write, write_text

MAX_PIXELS = 512 * 512  # of an image that is kept for people to look at


@dataclasses.dataclass(frozen=True)
class GradedResponses:
  """Responses to prompts and their grades; response b answers prompt b // group."""

  rows: list  # of the source, one a prompt
  samples: object  # sampler.Samples of numpy arrays
  texts: list  # of the responses
  correct: np.ndarray  # 0 or 1
  format_ok: np.ndarray  # 0 or 1
  group: int  # G, responses a prompt
  scores: object = None  # scoring.Scores; None where right is 1 and wrong 0


def write_rollouts(workdir, step, responses, encoder, *, count):
  """Appends the first `count` GradedResponses of iteration `step` to WORKDIR/rollouts.jsonl.

  The iterations count from 1. `encoder` is the prompts.Encoder of the rows.
  """
  indices = range(min(count, len(responses.texts)))
  with open(os.path.join(workdir, "rollouts.jsonl"), "a", encoding="utf-8") as file:
    file.writelines(_lines(workdir, "aepo", step, responses, encoder, indices))


def write_held_out(workdir, stage, step, responses, encoder, *, problems, kept):
  """Writes WORKDIR/held_out/STAGE.jsonl: `kept` responses to each of the first `problems` problems.

  `step` is the stage's last. Every stage answers the same problems, so that its answers can be
  compared with another stage's.
  """
  count = min(problems, len(responses.rows)) * responses.group
  indices = [index for index in range(count) if index % responses.group < kept]
  os.makedirs(os.path.join(workdir, "held_out"), exist_ok=True)
  write_text(os.path.join(workdir, "held_out", f"{stage}.jsonl"),
             "".join(_lines(workdir, stage, step, responses, encoder, indices)))


def _lines(workdir, stage, step, responses, encoder, indices):
  """Lines of JSON of the responses at `indices`; writes the images of their prompts."""
  samples, images, lines = responses.samples, {}, []
  decode = encoder.chat.tokenizer.batch_decode
  scores = responses.scores
  accuracy = np.asarray(responses.correct if scores is None else scores.accuracy)
  rate = accuracy.reshape(-1, responses.group).mean(1)
  for index in indices:
    prompt, mask = index // responses.group, samples.mask[index]
    row = responses.rows[prompt]
    if prompt not in images:
      images[prompt] = [save_image(workdir, image, turn=encoder.config.turn_images)
                        for image in row["images"]]
    own = {} if scores is None else {
      "accuracy": float(scores.accuracy[index]), "reward": float(scores.reward[index]),
      "components": {name: float(values[index]) for name, values in scores.components.items()
                     if np.isfinite(values[index])}}
    lines.append(json.dumps({
      "stage": stage, "step": int(step), "id": row["id"], "sample": index % responses.group,
      "question": _shown(row), "answer": row["answer"], "images": images[prompt],
      "response": responses.texts[index], "correct": float(responses.correct[index]),
      "format_ok": float(responses.format_ok[index]), **own, "parent": int(samples.parent[index]),
      "fork": int(samples.fork[index]),
      "pass_rate": float(rate[prompt]),  # of the whole group, written or not
      "tokens": decode([[token] for token in samples.tokens[index][mask]]),
      # 1e-4 nats is a tenth of what a reader of the report can tell apart; null is not finite.
      "entropy": [round(float(nats), 4) if np.isfinite(nats) else None
                  for nats in samples.entropy[index][mask]]}, allow_nan=False) + "\n")
  return lines


def _shown(row):
  """The question of a row, after the turns before it."""
  return "\n\n".join([*(f"{turn['role']}: {turn['content']}" for turn in row.get("history", ())),
                      row["question"]])


def save_image(workdir, image, turn=True):
  """Writes an image once, under the digest of its pixels; returns its path inside `workdir`.

  `turn` is whether its EXIF orientation is followed, as it is where the model is shown it.
  """
  pixels = load_image(image, min_pixels=28 * 28, max_pixels=MAX_PIXELS, turn=turn)
  name = f"images/{hashlib.sha256(pixels.tobytes()).hexdigest()[:20]}.jpg"
  path = os.path.join(workdir, name)
  if not os.path.exists(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # At 56 x 56 pixels, colour subsampling smears the colour of a cell into the next one.
    with atomic_write(path) as temporary:
      Image.fromarray(pixels).save(temporary, format="JPEG", quality=90, subsampling=0)
  return name
