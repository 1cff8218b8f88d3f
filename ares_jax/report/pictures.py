"""The page's pictures as PNG files and as TensorBoard images."""

import os
import re

import numpy as np
import tensorboardX

from ares_jax.report import statistics
from ares_jax.report.annotate import annotate
from ares_jax.report.drawing import bars, lines, scatter
from ares_jax.report.page import LIMIT, panels, short_names, thin_lines

UNITS = {"entropy": "nats", "count": "tokens a response"}


def write_pictures(records, others, folder):
  """Writes FOLDER/STAGE_TITLE.png for every picture, and TensorBoard images of them.

  Args:
    records: records.Records of the run.
    others: Records of runs in the same curves.
    folder: is made.

  Returns:
    The paths written.
  """
  os.makedirs(folder, exist_ok=True)
  runs = [records, *others]
  curves = dict(zip(short_names(runs), map(statistics.curves, runs), strict=True))
  drawn = {}
  for stage in curves[next(iter(curves))]:
    for panel in panels()["aepo" if stage == "aepo" else "sft"]:
      series = [(label if len(runs) == 1 else f"{name} {label}", of[stage]["step"],
                 of[stage]["values"][metric])
                for metric, label in panel["metrics"] for name, of in curves.items()
                if stage in of and metric in of[stage]["values"]]
      series = [one for one in series if any(value is not None for value in one[2])]
      if series:
        title = panel["title"] + (f", {panel['unit']}" if panel["unit"] else "")
        drawn[f"{stage} {panel['title']}"] = lines(f"{stage}: {title}", series)
  annotated = []
  if records.rollouts:
    annotated = annotate(thin_lines(records.rollouts, LIMIT), records.aepo_metrics(),
                         records.aepo_config())
  fit = statistics.length_against_count(annotated)
  if fit:
    drawn["aepo Length against N_HE"] = scatter(fit)
  parts = statistics.entropy_by_bucket(annotated)
  for key, title in (("entropy", "Entropy by difficulty"), ("count", "N_HE by difficulty")):
    if parts:
      drawn[f"aepo {title}"] = bars(f"aepo: {title}, {UNITS[key]}", [
        (part["bucket"], [(part[key], f"{part[key]:.3g}, n = {part['n']}")]) for part in parts])
  for run, of_run in zip(short_names(runs), runs, strict=True):
    drawn |= _lengths(run if len(runs) > 1 else "", statistics.lengths(of_run.results))
  return save_picture(drawn, folder, os.path.join(records.workdir, "tensorboard", "report"),
              max((max(by_step) for by_step in records.metrics.values() if by_step), default=0))


def _lengths(run, found):
  """Bars of answers' lengths by difficulty and by level, a bar a finished stage."""
  drawn = {}
  for kind, title in (("bucket", "Length by difficulty"), ("level", "Length by level")):
    groups = [(name, [(part["length"], f"{part['length']:.3g} {stage}, {part['accuracy']:.0%} "
                       f"right, n = {part['n']}") for stage, part in stages.items()])
              for name, stages in found[kind].items()]
    if groups:
      name = f"{title} {run}".strip()
      drawn[f"held out {name}"] = bars(f"held out: {name}, tokens", groups)
  return drawn


def save_picture(drawn, folder, events, step):
  """Writes {title: image} as PNG files and as TensorBoard images; returns the paths."""
  paths = []
  with tensorboardX.SummaryWriter(events) as writer:
    for title, image in drawn.items():
      name = "_".join(re.findall(r"\w+", title.lower()))
      paths.append(os.path.join(folder, f"{name}.png"))
      image.save(paths[-1], optimize=True)
      writer.add_image(f"report/{name}", np.asarray(image), step, dataformats="HWC")
  return paths
