"""The metrics of a run at Weights & Biases too, where a config asks for it; the files stay.

The package and its key are the user's: `pip install wandb`, then `wandb login` or WANDB_API_KEY in
the environment, or WANDB_MODE=offline. Nothing of them stands in a config.
"""

import contextlib
import dataclasses
import os

import jax
from absl import logging

from ares_jax.run import metrics
from ares_jax.run.files import write_text
from ares_jax.system.config import ConfigError, one_line


@dataclasses.dataclass(frozen=True)
class WandbConfig:
  """Where metrics go besides the run's folder."""

  project: str  # at Weights & Biases; "" = nowhere
  name: str  # of the run there; "" = the workdir's


@contextlib.contextmanager
def wandb(config, workdir, settings):
  """Every line of metrics.jsonl that is written inside is sent too, by process 0.

  A run that goes on is the same run there: its id stands in WORKDIR/wandb_id. Steps are counted by
  stage, as in metrics.jsonl: names are STAGE/METRIC over STAGE/step.

  Args:
    config: WandbConfig.
    workdir: folder of the run.
    settings: dict of the whole config, shown beside the metrics.

  Raises:
    ConfigError: asked for, and the package is not there or cannot begin a run.
  """
  if not config.project or jax.process_index() != 0:
    yield
    return
  try:
    import wandb as client
  except ImportError as error:
    raise ConfigError(
      f"config.wandb.project = {config.project!r} needs the package wandb ({error}); pip install "
      "wandb, or leave config.wandb.project empty") from error
  os.makedirs(workdir, exist_ok=True)
  path = os.path.join(workdir, "wandb_id")
  if not os.path.exists(path):
    write_text(path, os.urandom(8).hex())
  with open(path, encoding="utf-8") as file:
    identity = file.read()
  try:
    run = client.init(project=config.project, name=config.name or os.path.basename(workdir),
                      id=identity, resume="allow", dir=workdir, config=settings)
  except Exception as error:  # its errors have no class in common
    raise ConfigError(
      f"config.wandb.project = {config.project!r}: {one_line(error)}; wandb login, set "
      "WANDB_MODE=offline, or leave config.wandb.project empty") from error
  stages = set()

  def send(line):
    stage = line["stage"]
    if stage not in stages:
      stages.add(stage)
      run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    try:
      run.log({f"{stage}/{name}": value for name, value in line.items()
               if name != "stage" and value is not None})
    except Exception as error:  # the line is in the file: a copy that fails stops no run
      logging.warning("step %d of %s was not sent to Weights & Biases: %s", line["step"], stage,
                      error)

  try:
    with metrics.mirror_lines(send):
      yield
  finally:
    try:
      run.finish()
    except Exception as error:
      logging.warning("the run at Weights & Biases did not end well: %s", error)
