"""The command on a run of ours and on a Hugging Face folder, at the smallest size."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from ares_jax import evaluate
from ares_jax.data import digits
from ares_jax.evaluation import results
from ares_jax.run import config as run_config
from ares_jax.run import setup
from ares_jax.run.checkpoint.manager import Checkpoints
from ares_jax.system import heartbeat, mesh
from ares_jax.training import sft_step

SHORT = {"warmup__steps": 1, "adacs__steps": 0, "aepo__steps": 0, "evaluate__problems": 3,
         "evaluate__batch": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A workdir as one step of the warm-up leaves it, but for the step itself."""
  workdir = tmp_path_factory.mktemp("trained")
  (workdir / "config.json").write_text(tiny.values(**SHORT).to_json_best_effort())
  config = tiny.read(**SHORT)
  with jax.set_mesh(mesh.make_mesh(-1, 1)), setup.open_run(config) as parts:
    params = parts.init_params()
    state = sft_step.init_state(config.warmup, params)
    with Checkpoints(str(workdir / "warmup"), 1) as checkpoints:
      checkpoints.save(1, state.replace(step=mesh.put(jax.numpy.int32(1))), {})
    yield workdir, parts


def test_a_run_is_evaluated_on_its_own_data_and_resumed(trained, monkeypatch):
  workdir, parts = trained
  name, params = evaluate.newest_weights(parts, str(workdir))
  assert name.endswith("warmup step 1")
  jax.tree.map(np.testing.assert_array_equal, params, parts.init_params())
  benchmark, folder = evaluate.choose_benchmark(parts, "", ""), str(workdir / "evaluate" / "test")
  first = results.evaluate_benchmark(parts, params, benchmark, folder=folder, model=name)
  assert first["n"] == 2 and first["problems"] == 3 and len(first["interval"]) == 2
  assert first["max_tokens"] == 12 and set(first["by_level"]) == {"1", "2"}

  def refuse(*_, **__):
    raise AssertionError("a finished evaluation is not repeated")

  monkeypatch.setattr(type(parts.generator), "sample", refuse)
  again = results.evaluate_benchmark(parts, params, benchmark, folder=folder, model=name,
                            compare=f"{folder}/results.json")
  assert again["compare"]["difference"] == 0 and again["compare"]["paired"]
  page = (workdir / "evaluate" / "test" / "results.md").read_text()
  assert re.search(r"\| level 2 +\| 1 ", page) and "+0.0 ±0.0 points, paired by problem" in page
  with pytest.raises(ValueError, match="results.md is no results.json of an evaluation"):
    results.evaluate_benchmark(parts, params, benchmark, folder=str(workdir / "none"), model=name,
                      compare=f"{folder}/results.md")
  with pytest.raises(ValueError, match="the paper has no scores on 'test'"):
    results.evaluate_benchmark(parts, params, benchmark, folder=str(workdir / "none"), model=name,
                      compare="paper:ARES-7B")
  assert not (workdir / "none").exists()  # seen before anything is answered

  monkeypatch.undo()
  named, folder = dataclasses.replace(benchmark, name="gsm8k"), workdir / "evaluate" / "gsm8k"
  beside = results.evaluate_benchmark(parts, params, named, folder=str(folder), model=name,
                             compare="paper:ARES-RL-7B")["compare"]
  assert beside["difference"] == pytest.approx(first["score"] - 0.957) and not beside["paired"]
  assert beside["length_difference"] == pytest.approx(first["length_mean"] - 278.9)
  assert np.diff(beside["interval"]) == pytest.approx(2 * first["score_half_width"])
  assert "treated as exact" in (folder / "results.md").read_text()


def test_a_workdir_without_a_checkpoint_is_named(trained, tmp_path):
  with pytest.raises(ValueError, match="has no checkpoint of warmup, adacs, aepo"):
    evaluate.newest_weights(trained[1], str(tmp_path))


@pytest.mark.slow
def test_a_hugging_face_folder_answers_a_file_of_ones_own(tmp_path):
  folder = tmp_path / "model"
  shutil.copytree(tiny.ROOT / "tests" / "models" / "golden" / "tied", folder)
  tokenizer = digits.tokenizer()
  tokenizer.save_pretrained(folder)
  config = json.loads((folder / "config.json").read_text())
  config["image_token_id"] = tokenizer.convert_tokens_to_ids("<|image_pad|>")
  (folder / "config.json").write_text(json.dumps(config))
  (tmp_path / "mine.jsonl").write_text(
    json.dumps({"question": "Compute red + blue, modulo 10", "answer": "7", "level": 2}) + "\n"
    + json.dumps({"question": "Compute red, modulo 10", "answer": "3", "level": 1}) + "\n")
  values = tiny.values(**SHORT, model__path=str(folder), data__digits=None, data__files=dict(
    warmup=(), sft=(), rl=(), eval=()))
  with jax.set_mesh(mesh.make_mesh(1, 1, devices=jax.devices()[:1])), setup.open_run(
      run_config.read_config(values), check=False) as parts:
    benchmark = evaluate.choose_benchmark(parts, str(tmp_path / "mine.jsonl"), "")
    result = results.evaluate_benchmark(parts, parts.init_params(), benchmark,
                               folder=str(tmp_path / "out"), model=str(folder))
  assert (result["benchmark"], result["n"], result["temperature"]) == ("file_mine", 1, 0.0)
  assert result["by_level"]["2"]["problems"] == 1 and result["by_bucket"] == {}
  lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
  assert len(lines) == 3 and json.loads(lines[1])["answer"] == ["7"]


@pytest.mark.parametrize("name, path, words", [
  ("mathvista", "", "--benchmark=mathvista needs --data=FILE"),
  ("mathvsta", "", "did you mean 'mathvista'"),
])
def test_a_benchmark_that_cannot_be_read_is_named(trained, name, path, words):
  with pytest.raises(ValueError, match=words):
    evaluate.choose_benchmark(trained[1], name, path)


def test_a_benchmark_is_checked_before_weights_are_read(trained, tmp_path, monkeypatch, capsys):
  workdir, parts = trained
  Image.new("RGB", (28, 28)).save(tmp_path / "good.png")
  (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n")
  record = {"question": "Compute red, modulo 10", "answer": "1", "subject": "algebra"}
  (tmp_path / "test.jsonl").write_text("".join(json.dumps(record | {"id": name, "image": name}) +
                                               "\n" for name in ("good.png", "bad.png")))
  flags = types.SimpleNamespace(
    ablation=[], config=tiny.values(**SHORT), workdir=str(workdir), model="", images="", columns="",
    benchmark="mathvision", data=str(tmp_path), compare="", judge="", json=True, out="x")
  monkeypatch.setattr(evaluate, "open_run", lambda *_, **__: contextlib.nullcontext(parts))
  monkeypatch.setattr(evaluate, "newest_weights", lambda *_: pytest.fail("weights are read"))
  monkeypatch.setattr(evaluate.flags, "FLAGS", flags)
  with pytest.raises(pytest.fail.Exception, match="weights are read"):
    evaluate.main()
  assert re.match(r"mathvision: 1 of 2 problems, 1 with images; pass@1\nskipped: row bad.png: .*"
                  "bad.png: cannot use this image", capsys.readouterr().err)
  flags.data, flags.images = str(tmp_path / "test.jsonl"), str(workdir)
  with pytest.raises(ValueError, match="2 of 2 rows of 'mathvision' lack an image"):
    evaluate.main()


def test_held_out_data_with_too_few_rows_are_refused(trained):
  parts = types.SimpleNamespace(config=trained[1].config, source=lambda name: [{}] * 2)
  with pytest.raises(ValueError, match="3 problems to evaluate on, the source has 2"):
    evaluate.choose_benchmark(parts, "", "")


def test_ablation_needs_finished_runs(tmp_path):
  with pytest.raises(ValueError, match="no finished run"):
    evaluate.compare_arms([f"{tmp_path}/*"])


def test_the_command_is_watched_and_stops_when_it_is_asked(tmp_path, monkeypatch):
  def open_run(config, **_):
    assert {"signals", "watchdog"} <= {thread.name for thread in threading.enumerate()}
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(100):
      heartbeat.heartbeat()
      time.sleep(0.01)

  monkeypatch.setattr(evaluate, "open_run", open_run)
  monkeypatch.setattr(evaluate.flags, "FLAGS", types.SimpleNamespace(
    ablation=[], config=tiny.values(**SHORT), workdir=str(tmp_path), model=""))
  with pytest.raises(heartbeat.StopRequested):
    evaluate.main()


@pytest.mark.parametrize("out", ["", "step_1"])
def test_results_lie_in_the_run_or_where_it_was_said(trained, monkeypatch, capsys, out):
  workdir, parts = trained
  monkeypatch.setattr(evaluate, "open_run", lambda *_, **__: contextlib.nullcontext(parts))
  monkeypatch.setattr(evaluate, "newest_weights", lambda *_: ("m", None))
  monkeypatch.setattr(evaluate, "evaluate_benchmark", lambda *_, folder, **__: folder)
  monkeypatch.setattr(evaluate.flags, "FLAGS", types.SimpleNamespace(
    ablation=[], config=tiny.values(**SHORT), workdir=str(workdir), model="", benchmark="", data="",
    images="", columns="", compare="", judge="", json=True, out=out))
  evaluate.main()
  assert json.loads(capsys.readouterr().out) == (out or str(workdir / "evaluate" / "test"))


def test_the_command_finds_the_checkpoint_and_what_is_answered(trained):
  workdir = trained[0]
  config = workdir / "config.py"
  config.write_text(
    "import json\nfrom ml_collections import ConfigDict\n"
    f"def get_config():\n  return ConfigDict(json.load(open({str(workdir / 'config.json')!r})))\n")
  written = (workdir / "evaluate" / "test" / "predictions.jsonl").read_text()
  result = subprocess.run(
    [sys.executable, "-m", "ares_jax.evaluate", f"--config={config}", f"--workdir={workdir}",
     "--json"], cwd=tiny.ROOT, capture_output=True, text=True, timeout=300)
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout)["problems"] == 3
  assert (workdir / "evaluate" / "test" / "predictions.jsonl").read_text() == written
