"""The report's pictures as PNG files and as TensorBoard images."""

import os
import re

import numpy as np
from PIL import Image

from ares_jax.ops.difficulty import BUCKETS
from ares_jax.report import statistics
from ares_jax.report.page import annotated_responses, panels, short_names
from ares_jax.system import figures
from ares_jax.system.figures import Curve


def write_pictures(records, others, folder):
  """Writes FOLDER/STAGE_TITLE.png for every picture of a run's Records, and TensorBoard images.

  Curves of `others`, Records of more runs, are drawn with its own. Returns the paths.
  """
  runs = dict(zip(short_names([records, *others]), [records, *others], strict=True))
  pictures = _curve_figures(runs) | _rollout_figures(records) | _length_figures(runs)
  last_step = max((max(by_step) for by_step in records.metrics.values() if by_step), default=0)
  paths = figures.save_pngs(
    {"_".join(re.findall(r"\w+", title.lower())): figure for title, figure in pictures.items()},
    folder)
  import tensorboardX  # loads PyTorch where it is installed: 2.5 s

  with tensorboardX.SummaryWriter(os.path.join(records.workdir, "tensorboard", "report")) as writer:
    for path in paths:
      name, _ = os.path.splitext(os.path.basename(path))
      writer.add_image(f"report/{name}", np.asarray(Image.open(path).convert("RGB")), last_step,
                       dataformats="HWC")
  return paths


def _curve_figures(runs):
  """{"STAGE TITLE": figure} of the panels of panels.json; runs: {name: Records}."""
  curves = {name: statistics.curves(run) for name, run in runs.items()}
  found = {}
  for stage in next(iter(curves.values())):
    for panel in panels()["aepo" if stage == "aepo" else "sft"]:
      lines = [Curve(label if len(runs) == 1 else f"{name} {label}", of_run[stage]["step"],
                     of_run[stage]["values"][metric])
               for metric, label in panel["metrics"] for name, of_run in curves.items()
               if stage in of_run and metric in of_run[stage]["values"]]
      lines = [line for line in lines if any(value is not None for value in line.y)]
      if lines:
        found[f"{stage} {panel['title']}"] = figures.curve_figure(
          f"{stage}: {panel['title']}", lines, y_label=panel["unit"])
  return found


def _rollout_figures(records):
  """Length against N_HE, and entropy and N_HE by difficulty, of the logged rollouts."""
  annotated = annotated_responses(records, [], held_out=False)
  if not annotated:
    return {}
  found = {}
  fit = statistics.length_against_count(annotated)
  if fit:
    figure, [axes] = figures.new_figure(
      f"aepo: length = {fit['intercept']:.3g} + {fit['slope']:.3g} N_HE, r = {fit['r']:.2f}, "
      f"{fit['n']} rollouts", x_label="N_HE, tokens that start a flagged window",
      y_labels=["tokens of a response"])
    groups = [Curve(name, *([dot[part] for dot in fit["dots"] if dot[2] == bucket]
                            for part in (0, 1))) for bucket, name in enumerate(BUCKETS)]
    figures.draw_points(axes, groups, (fit["intercept"], fit["slope"]))
    figures.draw_legend(axes)
    found["aepo Length against N_HE"] = figure
  parts = statistics.entropy_by_bucket(annotated)
  for key, title, unit in (("entropy", "Entropy by difficulty", "nats, mean over tokens"),
                           ("count", "N_HE by difficulty", "flagged tokens of a response")):
    found[f"aepo {title}"] = figures.bar_figure(f"aepo: {title}", [
      (part["bucket"], [(part[key], f"{part[key]:.3g}, n = {part['n']}")])
      for part in parts if part[key] is not None], x_label=unit)
  return found


def _length_figures(runs):
  """Held-out answers' lengths by difficulty and by level, one bar for each finished stage."""
  found = {}
  for name, run in runs.items():
    lengths = statistics.lengths(run.results)
    for kind, title in (("bucket", "Length by difficulty"), ("level", "Length by level")):
      groups = [(group, [(part["length"], f"{part['length']:.3g} {stage}, {part['accuracy']:.0%} "
                          f"correct, n = {part['n']}") for stage, part in stages.items()])
                for group, stages in lengths[kind].items()]
      if groups:
        title = f"held out {title} {name if len(runs) > 1 else ''}".strip()
        found[title] = figures.bar_figure(title.replace("out", "out:", 1), groups,
                                          x_label="tokens of an answer")
  return found
