"""Commands on the folder of a run that lies in a bucket, on a real server of the interface."""

import json
import pathlib
import subprocess
import sys
import types

import pytest
import small_run
import tiny

from ares_jax import evaluate
from ares_jax.diagnose import __main__ as diagnose_command
from ares_jax.evaluation import results
from ares_jax.report import __main__ as report_command
from ares_jax.run import files
from ares_jax.system.gcs import file_system


@pytest.fixture
def run(gcs, tmp_path):
  """The address of small_run's folder."""
  folder = pathlib.Path(small_run.write(tmp_path / "local"))
  for path in folder.rglob("*.*"):
    file_system().pipe_file(f"{gcs}/{path.relative_to(folder)}", path.read_bytes())
  return gcs


def flags(monkeypatch, command, **values):
  for name, value in values.items():
    monkeypatch.setattr(command, name, types.SimpleNamespace(value=value))


def test_a_report_is_written_into_the_bucket(run, monkeypatch, capsys):
  flags(monkeypatch, report_command, _WORKDIR=run, _COMPARE=[run], _OUT=None, _PNG=True)
  report_command.main()
  said = capsys.readouterr().out.splitlines()
  assert said[0].startswith(f"wrote {run}/report.html: ")
  assert b"data:image/jpeg" in file_system().cat_file(f"{run}/report.html")
  assert all(line.startswith(f"wrote {run}/report/") for line in said[1:]) and len(said) > 3
  for line in said[1:]:
    assert file_system().exists(line.removeprefix("wrote "))


def test_a_check_reads_the_bucket_and_writes_its_pictures_there(run, monkeypatch, capsys):
  flags(monkeypatch, diagnose_command, _WORKDIR=run, _COMPARE=[], _JSON=True, _PNG=True)
  diagnose_command.main("passk")
  captured = capsys.readouterr()
  assert json.loads(captured.out)["workdir"] == run
  path = captured.err.split()[-1]
  assert path.startswith(f"{run}/diagnose/") and file_system().exists(path)


def test_files_are_read_by_their_address_in_a_bucket(run):
  assert files.read_json(run, "results.json").keys() == {"adacs", "aepo"}
  assert files.read_json(run, "none.json") == {}
  with pytest.raises(ValueError, match=f"^{run}/none.json does not exist"):
    files.require_json(run, "none.json")
  assert evaluate._matching(f"{run.rpartition('/')[0]}/*") == [run]
  with pytest.raises(ValueError, match=f"{run}/config.json is no results.json of an evaluation"):
    results.earlier_result(f"{run}/config.json", None)


@pytest.mark.slow
def test_a_run_is_trained_evaluated_exported_and_reported_in_a_bucket(gcs, tmp_path):
  def command(name, *words):
    done = subprocess.run([sys.executable, "-m", f"ares_jax.{name}", f"--workdir={gcs}", *words],
                          cwd=tiny.ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done

  config = "--config=tests/tiny.py"
  command("train", config, "--curate=0/2", "--config.warmup.steps=0")
  command("train", config, "--curate=1/2", "--config.warmup.steps=0")
  command("train", config, "--config.warmup.steps=0")
  assert not file_system().exists(f"{gcs}/curation.jsonl")  # the shards' lines were used
  again = command("train", config, "--config.warmup.steps=0")
  assert "adacs seconds in its steps" in again.stdout and "s/step" not in again.stderr
  result = json.loads(command("evaluate", config, "--json").stdout)
  assert result["model"] == f"{gcs} aepo step 3"
  assert json.loads(file_system().cat_file(f"{gcs}/evaluate/test/results.json")) == result
  exported = json.loads(command("export", f"--out={tmp_path}/model", "--json").stdout)
  assert exported["step"] == 3 and (tmp_path / "model" / "model.safetensors").exists()
  command("report")
  assert file_system().exists(f"{gcs}/report.html")
