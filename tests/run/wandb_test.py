import json
import sys
import types

import pytest

from ares_jax.run import wandb
from ares_jax.run.metrics import MetricWriter
from ares_jax.system.config import ConfigError


class Run:
  def __init__(self):
    self.lines, self.axes, self.finished = [], [], False

  def log(self, line):
    self.lines.append(line)

  def define_metric(self, name, step_metric):
    self.axes.append((name, step_metric))

  def finish(self):
    self.finished = True


@pytest.fixture
def client(monkeypatch):
  """A stand-in for the package, which keeps what it is told."""
  made = []

  def init(**words):
    made.append((words, Run()))
    return made[-1][1]

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  return made


def write(workdir, config, steps):
  with wandb.wandb(config, str(workdir), {"seed": 0}):
    for stage in ("adacs", "aepo"):
      with MetricWriter(str(workdir), stage, step=steps[0] - 1) as writer:
        for step in steps:
          writer.write_scalars(step, {"loss": 1.0 / step, "odd": float("nan")})


def test_every_line_is_sent_and_is_in_the_file(client, tmp_path):
  write(tmp_path, wandb.WandbConfig("ares", ""), [1, 2])
  [(words, run)] = client
  assert words["project"] == "ares" and words["name"] == tmp_path.name
  assert words["config"] == {"seed": 0} and run.finished
  assert run.axes == [("adacs/*", "adacs/step"), ("aepo/*", "aepo/step")]
  assert run.lines == [{f"{stage}/step": step, f"{stage}/loss": 1 / step}
                       for stage in ("adacs", "aepo") for step in (1, 2)]
  kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["loss"] for line in kept] == [1, 0.5, 1, 0.5]


def test_a_resumed_run_continues_the_same_run_there(client, tmp_path):
  for steps in ([1], [2]):
    write(tmp_path, wandb.WandbConfig("ares", "mine"), steps)
  (first, _), (second, run) = client
  assert first["id"] == second["id"] and second["resume"] == "allow" and first["name"] == "mine"
  assert run.lines[0]["adacs/step"] == 2


def test_without_a_project_nothing_is_sent(client, tmp_path):
  write(tmp_path, wandb.WandbConfig("", ""), [1])
  assert client == [] and not (tmp_path / "wandb_id").exists()


def test_a_missing_package_is_one_line_with_advice(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ConfigError, match="config.wandb.project = 'ares': .*pip install wandb"):
    write(tmp_path, wandb.WandbConfig("ares", ""), [1])


def test_failures_there_do_not_stop_a_run_and_hide_no_error(client, tmp_path, monkeypatch):
  def fail(*_):
    raise ConnectionResetError("gone")

  monkeypatch.setattr(Run, "log", fail)
  monkeypatch.setattr(Run, "finish", fail)
  write(tmp_path, wandb.WandbConfig("ares", ""), [1])
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
  with (pytest.raises(ValueError, match="power cut"),
        wandb.wandb(wandb.WandbConfig("ares", ""), str(tmp_path), {})):
    raise ValueError("power cut")


def test_a_run_that_cannot_start_there_is_one_line(monkeypatch, tmp_path):
  def init(**_):
    raise RuntimeError("no API key\nconfigured")

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  with pytest.raises(ConfigError, match="'ares': no API key.*WANDB_MODE=offline") as error:
    write(tmp_path, wandb.WandbConfig("ares", ""), [1])
  assert "\n" not in str(error.value)
