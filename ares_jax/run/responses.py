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


def write_rollouts(workdir, step, responses, chat, *, count):
  """Appends the first `count` responses of an iteration to WORKDIR/rollouts.jsonl.

  They are all responses to the first prompts, so that the responses of a group can be compared.

  Args:
    workdir: folder of the run.
    step: number of the iteration, from 1.
    responses: GradedResponses.
    chat: data.chat.Chat, whose tokenizer gives the text of a token.
    count: number of responses to write, at most; fewer are written if there are fewer.
  """
  lines = response_lines(workdir, "aepo", step, responses, chat,
                         indices=range(min(count, len(responses.texts))))
  with open(os.path.join(workdir, "rollouts.jsonl"), "a", encoding="utf-8") as file:
    file.writelines(lines)


def write_held_out(workdir, stage, step, responses, chat, *, problems, kept):
  """Writes WORKDIR/held_out/STAGE.jsonl: some responses to the first held-out problems.

  Every stage answers the same problems, so that its answers can be compared with another stage's.

  Args:
    workdir: folder of the run.
    stage: name of the finished stage.
    step: its last step.
    responses: GradedResponses.
    chat: data.chat.Chat.
    problems: number of problems to write, at most.
    kept: number of responses to each of them.
  """
  group, count = responses.group, min(problems, len(responses.rows))
  lines = response_lines(workdir, stage, step, responses, chat, indices=[
    index for index in range(count * group) if index % group < kept])
  os.makedirs(os.path.join(workdir, "held_out"), exist_ok=True)
  write_text(os.path.join(workdir, "held_out", f"{stage}.jsonl"), "".join(lines))


def response_lines(workdir, stage, step, responses, chat, *, indices):
  """Lines of JSON of the responses at `indices`; writes the images of their prompts."""
  rate = np.asarray(responses.correct).reshape(-1, responses.group).mean(1)
  images, lines = {}, []
  for index in indices:
    prompt = index // responses.group
    if prompt not in images:
      images[prompt] = [save_image(workdir, image) for image in responses.rows[prompt]["images"]]
    line = {"stage": stage, "step": int(step), "images": images[prompt],
            "pass_rate": float(rate[prompt])}  # of the whole group, written or not
    line |= _response(responses, index, chat.tokenizer)
    lines.append(json.dumps(line, allow_nan=False) + "\n")
  return lines


def _response(responses, index, tokenizer):
  """The fields of a line that one response has to itself."""
  row, samples = responses.rows[index // responses.group], responses.samples
  mask = samples.mask[index]
  return {
    "id": row["id"], "sample": index % responses.group, "question": row["question"],
    "answer": row["answer"], "response": responses.texts[index],
    "correct": float(responses.correct[index]), "format_ok": float(responses.format_ok[index]),
    "parent": int(samples.parent[index]), "fork": int(samples.fork[index]),
    "tokens": tokenizer.batch_decode([[token] for token in samples.tokens[index][mask]]),
    # 1e-4 nats is a tenth of what a reader of the report can tell apart; null is not finite.
    "entropy": [round(float(nats), 4) if np.isfinite(nats) else None
                for nats in samples.entropy[index][mask]]}


def save_image(workdir, image):
  """Writes an image once, under the digest of its pixels; returns its path inside `workdir`."""
  pixels = load_image(image, min_pixels=28 * 28, max_pixels=MAX_PIXELS)
  name = f"images/{hashlib.sha256(pixels.tobytes()).hexdigest()[:20]}.jpg"
  path = os.path.join(workdir, name)
  if not os.path.exists(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # At 56 x 56 pixels, colour subsampling smears the colour of a cell into the next one.
    with atomic_write(path) as temporary:
      Image.fromarray(pixels).save(temporary, format="JPEG", quality=90, subsampling=0)
  return name
