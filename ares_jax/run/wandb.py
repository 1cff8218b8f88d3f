"""Sends the metrics of a run to Weights & Biases, if the config names a project.

The user installs the package (`pip install wandb`) and gives the key by `wandb login` or
WANDB_API_KEY, or sets WANDB_MODE=offline. No key is in a config.
"""

import contextlib
import dataclasses
import os
import pathlib

import jax
from absl import logging

from ares_jax.run import metrics
from ares_jax.run.files import write_text
from ares_jax.system.config import ConfigError, one_line


@dataclasses.dataclass(frozen=True)
class WandbConfig:
  """A project at Weights & Biases."""

  project: str  # "" = metrics are not sent
  name: str  # of the run there; "" = name of the workdir


@contextlib.contextmanager
def wandb(config, workdir, settings):
  """Sends every line of metrics.jsonl that is written inside, from process 0.

  A resumed run continues the same run there, by the id in WORKDIR/wandb_id. Metrics are named
  STAGE/METRIC, over STAGE/step. `settings`, the complete config as a dict, are shown beside them.
  Raises ConfigError if a project is named, but the package is missing or cannot start a run.
  """
  if not config.project or jax.process_index() != 0:
    yield
    return
  os.makedirs(workdir, exist_ok=True)
  path = pathlib.Path(workdir, "wandb_id")
  if not path.exists():
    write_text(str(path), os.urandom(8).hex())
  try:
    import wandb as client
    run = client.init(project=config.project, name=config.name or os.path.basename(str(workdir)),
                      id=path.read_text(), resume="allow", dir=os.fspath(workdir), config=settings)
  except Exception as error:  # the package's errors have no common class
    raise ConfigError(
      f"config.wandb.project = {config.project!r}: {one_line(error)}; pip install wandb and wandb "
      "login, set WANDB_MODE=offline, or leave config.wandb.project empty") from error
  stages = set()

  def send(line):
    stage = line["stage"]
    if stage not in stages:
      stages.add(stage)
      run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    try:
      run.log({f"{stage}/{name}": value for name, value in line.items()
               if name != "stage" and value is not None})
    except Exception as error:  # must not stop the run: the line is in metrics.jsonl
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
