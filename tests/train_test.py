"""Both stages end to end, at the smallest size."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from ares_jax import adacs, aepo, train
from ares_jax.data.digits import KINDS
from ares_jax.run import setup
from ares_jax.system import mesh


def run(workdir):
  workdir.mkdir(exist_ok=True)
  # With filtering: the place in the data is not the step, and has to be restored too.
  config = tiny.read(aepo__filter__batches=2)
  with jax.set_mesh(mesh.make_mesh(-1, 1)), setup.open_run(config) as parts:
    return train.train(parts, str(workdir))


def lines(workdir, name):
  return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finished")
  return workdir, run(workdir)


@pytest.mark.slow
def test_all_stages_leave_their_records(finished):
  workdir, params = finished
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  table = (workdir / "parameters.txt").read_text()
  assert "| embed " in table and f"Total: {count:,} " in table
  metrics = lines(workdir, "metrics.jsonl")
  assert [(line["stage"], line["step"]) for line in metrics] == [
    ("warmup", 1), ("warmup", 2), ("adacs", 1), ("adacs", 2), ("aepo", 1), ("aepo", 2), ("aepo", 3)]
  for name in ("hwe/share/easy", "hwe/multiplier/hard", "kl/kappa/medium", "seconds/rollout"):
    assert name in metrics[-1]
  for line in metrics:
    assert line["speed/tokens"] == pytest.approx(line["work/tokens"] / line["seconds/step"])
    # 2 a weight and token at least, of the 2 layers of tests/tiny.py.
    assert line["work/flops"] > 2 * 2 * (32 * 16 * 6 + 3 * 32 * 64) * line["work/tokens"]
  responses = lines(workdir, "rollouts.jsonl")
  assert [line["step"] for line in responses] == [1, 1, 2, 2, 3, 3]
  aepo_lines = metrics[-3:]
  assert [line["rollout/batches"] for line in aepo_lines] == [2, 2, 2]
  for line in metrics[2:]:
    assert sum(line.get(f"seconds/{name}", 0) for name in ("data", "rollout", "grading", "update")
               ) <= line["seconds/step"] + 0.1
  results = json.loads((workdir / "results.json").read_text())
  assert list(results) == ["warmup", "adacs", "aepo"]
  assert results["aepo"]["n"] == 6 and set(results["aepo"]["level"]) == {"1", "2"}
  assert all(sum(part["modes"].values()) == pytest.approx(1) and set(part["modes"]) <= set(KINDS)
             for part in results["aepo"]["level"].values())
  held_out = [[(line["id"], line["sample"]) for line in lines(workdir, f"held_out/{stage}.jsonl")]
              for stage in results]
  assert held_out[0] == held_out[1] == held_out[2] and len(held_out[0]) == 8
  curation = json.loads((workdir / "curation.json").read_text())
  assert len(curation["chosen"]) == 8 and sum(curation["bracket_problems"]) == 8


@pytest.mark.slow
def test_a_run_cut_off_in_an_update_ends_like_one_that_was_not(finished, tmp_path, monkeypatch):
  straight, params = finished
  step, calls = aepo.aepo_step, []

  def cut(*args):
    calls.append(1)
    if len(calls) == 2:
      raise RuntimeError("power cut")
    return step(*args)

  monkeypatch.setattr(aepo, "aepo_step", cut)
  with pytest.raises(RuntimeError, match="power cut"):
    run(tmp_path)
  resumed = run(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, resumed, params)
  for name in ("metrics.jsonl", "rollouts.jsonl"):
    kept = [[{key: value for key, value in line.items()
              if not key.startswith(("seconds", "device", "speed", "memory"))}
             for line in lines(workdir, name)] for workdir in (straight, tmp_path)]
    assert kept[0] == kept[1]


def test_a_replay_writes_no_records(tmp_path):
  process = subprocess.run(
    [sys.executable, "-m", "ares_jax.train", "--config=configs/ares_tiny.py",
     f"--workdir={tmp_path}", "--replay=x.npz"], capture_output=True, text=True, timeout=120)
  assert process.returncode == 1 and "the name of a dumped batch is STAGE-STEP.npz" in (
    process.stderr)
  assert not [path.name for path in tmp_path.iterdir() if path.suffix == ".json"]


def test_what_nothing_would_be_curated_for_is_refused():
  for text, changes, words in (("all", {"adacs__steps": 0}, "adacs.steps = 0: without stage 1"),
                               ("0/8", {"adacs__steps": 0}, "adacs.steps = 0: without stage 1"),
                               ("0/8", {}, "warmup.steps = 2: the probe of a shard"),
                               ("1-2", {}, "--curate=1-2 is neither all nor NUMBER/SHARDS")):
    with pytest.raises(ValueError, match=words):
      adacs.parse_shard(text, tiny.read(**changes))
  assert adacs.parse_shard("all", tiny.read()) is None
  assert adacs.parse_shard("", tiny.read(adacs__steps=0)) is None
  assert adacs.parse_shard("3/8", tiny.read(warmup__steps=0)) == (3, 8)
