"""Graded responses as lines of JSON, token by token, and the images they are about.

A line holds what happened and nothing that follows from it: windows, buckets' targets and rewards
are computed by whoever reads it (report/annotate.py), with the ops and the numbers of that step.
"""

import hashlib
import itertools
import json
import os

import numpy as np
from PIL import Image

from ares_jax.data.images import load_image
from ares_jax.run.files import atomic_write, write_text

# Images are kept for people: at most so many pixels.
MAX_PIXELS = 512 * 512


def write_rollouts(workdir, step, rollout, *, group, count, chat):
  """Appends the first `count` responses of an iteration to WORKDIR/rollouts.jsonl.

  Args:
    workdir: folder of the run.
    step: number of the iteration, from 1.
    rollout: rollout.Rollout.
    group: G; all samples of the first prompts are written, so that groups can be compared.
    count: responses; more than there are is all.
    chat: data.chat.Chat, whose tokenizer gives the text of a token.
  """
  samples, mask = rollout.samples, rollout.samples.mask[:count]
  found = response_lines(workdir, "aepo", step, rollout.prompts.rows, rollout.texts[:count],
                tokens=[row[keep] for row, keep in zip(samples.tokens, mask, strict=False)],
                entropy=[row[keep] for row, keep in zip(samples.entropy, mask, strict=False)],
                correct=rollout.correct, format_ok=rollout.format_ok, group=group, chat=chat,
                forks=zip(samples.parent.tolist(), samples.fork.tolist(), strict=True))
  with open(os.path.join(workdir, "rollouts.jsonl"), "a", encoding="utf-8") as file:
    file.writelines(found)


def write_held_out(workdir, stage, step, rows, samples, grades, *, group, problems, kept, chat):
  """Writes WORKDIR/held_out/STAGE.jsonl: `kept` samples of the first `problems` held-out problems.

  Every stage answers the same ones, so that the same problem can be seen early and late.

  Args:
    workdir, stage, step: folder of the run, finished stage, its last iteration.
    rows: of the source, one a problem.
    samples: sampler.Samples of the problems, numpy; what follows the rows is left out.
    grades: rollout.Grades of the samples.
    group: samples a prompt.
    problems, kept: how much is written.
    chat: data.chat.Chat.
  """
  count = min(problems, len(rows)) * group
  mask = samples.mask[:count]
  found = response_lines(workdir, stage, step, rows, grades.texts[:count],
                tokens=[row[keep] for row, keep in zip(samples.tokens, mask, strict=False)],
                entropy=[row[keep] for row, keep in zip(samples.entropy, mask, strict=False)],
                correct=grades.correct, format_ok=grades.format_ok, group=group, chat=chat)
  folder = os.path.join(workdir, "held_out")
  os.makedirs(folder, exist_ok=True)
  write_text(os.path.join(folder, f"{stage}.jsonl"), "".join(
    line for index, line in enumerate(found) if index % group < kept))


def response_lines(workdir, stage, step, rows, texts, *, tokens, entropy, correct, format_ok, group,
                   chat, forks=None):
  """A JSON line for every text; images are written to WORKDIR/images.

  Args:
    workdir, stage, step: where and when.
    rows: of the source, one a prompt.
    texts: of the first responses; response b answers prompt b // group.
    tokens, entropy: of each text, int32 [n] and float32 [n] nats; null where not finite.
    correct, format_ok: of all responses, 0 or 1.
    group: G.
    chat: data.chat.Chat.
    forks: (parent, fork) of each response, as in RolloutBatch; None where nothing forks.
  """
  rate = np.asarray(correct).reshape(-1, group).mean(1)
  forks = itertools.repeat((-1, 0)) if forks is None else forks
  images = {}
  found = []
  for index, (text, (parent, fork)) in enumerate(zip(texts, forks, strict=False)):
    prompt, row = index // group, rows[index // group]
    if prompt not in images:
      images[prompt] = [save_image(workdir, image) for image in row["images"]]
    found.append(json.dumps({
      "stage": stage, "step": int(step), "id": row["id"], "sample": index % group,
      "question": row["question"], "answer": row["answer"], "images": images[prompt],
      "response": text, "correct": float(correct[index]), "format_ok": float(format_ok[index]),
      "parent": parent, "fork": fork,
      "pass_rate": float(rate[prompt]),  # of the whole group, written or not
      "tokens": chat.tokenizer.batch_decode([[token] for token in tokens[index]]),
      # 1e-4 nats: a tenth of what a reader of the page can tell apart. null: not finite, a fault.
      "entropy": [round(float(nats), 4) if np.isfinite(nats) else None
                  for nats in entropy[index]]}, allow_nan=False) + "\n")
  return found


def save_image(workdir, image):
  """Writes an image once, under a name made of its pixels; returns the path inside `workdir`."""
  pixels = load_image(image, min_pixels=28 * 28, max_pixels=MAX_PIXELS)
  name = f"images/{hashlib.sha256(pixels.tobytes()).hexdigest()[:20]}.jpg"
  path = os.path.join(workdir, name)
  if not os.path.exists(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # Without colour subsampling: at 56 x 56 pixels it smears one cell's colour into the next.
    with atomic_write(path) as temporary:
      Image.fromarray(pixels).save(temporary, format="JPEG", quality=90, subsampling=0)
  return name
