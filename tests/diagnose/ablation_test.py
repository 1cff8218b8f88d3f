import json

import pytest
import tiny

from ares_jax.diagnose import ablation
from ares_jax.system import figures

UNIFORM = {"aepo__reward__easy": 1.0, "aepo__reward__medium": 0.0}


def part(accuracy, length):
  return {"n": 4, "accuracy": accuracy, "pass_at_k": 1.0, "format_ok": 1.0, "length": length}


def finish(folder, seed, easy, hard, levels=("1", "2", "10"), start=0.5, **changes):
  """A finished run's folder: accuracies of its lowest and its highest level, and of its start."""
  folder.mkdir()
  (folder / "config.json").write_text(tiny.values(seed=seed, **changes).to_json_best_effort())
  by_level = dict(zip(levels, (part(easy, 5.0), part(0.5, 9.0), part(hard, 20.0)), strict=False))
  whole = part((easy + hard) / 2, 12.0)
  result = {"n": 12, "samples": 2, "greedy": whole, "sampled": whole, "level": by_level,
            "bucket": {name: part(0.5, 9.0) for name in ("easy", "medium", "hard")}}
  before = result | {"sampled": part(start, 9.0)}
  (folder / "results.json").write_text(json.dumps({"adacs": before, "aepo": result}))
  return str(folder)


def test_arms_are_compared_on_easy_and_hard_problems_over_their_common_seeds(tmp_path):
  folders = [finish(tmp_path / "d0", 0, 0.9, 0.6), finish(tmp_path / "d1", 1, 0.8, 0.7),
             finish(tmp_path / "d2", 2, 0.1, 0.1),
             finish(tmp_path / "u0", 0, 0.9, 0.4, **UNIFORM),
             finish(tmp_path / "u1", 1, 0.8, 0.5, **UNIFORM)]
  result = ablation.measure_ablation(folders)
  # By number: as text "10" would stand before "2".
  assert result["levels"] == {"easy": "1", "hard": "10"} and result["shared"] == [0, 1]
  uniform, ours = result["arms"]
  assert (uniform["arm"], ours["arm"]) == (ablation.UNIFORM, ablation.BY_DIFFICULTY)
  assert ours["seeds"] == [0, 1, 2]
  assert uniform["hard"]["accuracy"][0] == pytest.approx(0.45)
  assert uniform["easy"]["length"][0] == 5
  assert result["difference"]["easy"] == pytest.approx((0, 0), abs=1e-9)
  assert result["difference"]["hard"] == pytest.approx((0.2, 0), abs=1e-9)
  said = ablation.ablation_text(result)
  assert "On easy problems the runs show no difference" in said
  assert "on hard problems difficulty shaping is better" in said
  assert figures.png_bytes(ablation.ablation_pictures(result)["ablation"])


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
  ours, uniform = finish(tmp_path / "d", 0, 1, 1), finish(tmp_path / "u", 0, 1, 1, **UNIFORM)
  plain = finish(tmp_path / "p", 0, 1, 1, aepo__reward__kind="accuracy")
  other = finish(tmp_path / "o", 0, 1, 1, adacs__steps=77)
  flat = finish(tmp_path / "f", 0, 1, 1, levels=())
  none = finish(tmp_path / "n", 0, 1, 1, levels=(), **UNIFORM)
  for folders, message in (
      ([ours], "no run with uniform shaping"), ([plain], "p shapes no rewards"),
      ([ours, uniform, other], "differs from .*/d in adacs.steps"),
      ([ours, uniform, str(tmp_path)], "config.json does not exist"),
      ([flat, none], "fewer than two levels"), ([ours, ours + "/", uniform], "seed 0 is there")):
    with pytest.raises(ValueError, match=message):
      ablation.measure_ablation(folders)


def test_runs_of_a_seed_share_their_cold_start_and_their_kind_of_machine(tmp_path):
  ours, uniform = finish(tmp_path / "d", 0, 1, 1), finish(tmp_path / "u", 0, 1, 1, **UNIFORM)
  apart = finish(tmp_path / "a", 0, 1, 1, start=0.6, **UNIFORM)
  with pytest.raises(ValueError, match="seed 0, but not one cold start: after adacs they were"):
    ablation.measure_ablation([ours, apart])
  for folder, cpu in (("d", "new"), ("u", "old")):
    line = json.dumps({"time": "now", "command": [], "jax": "0.10.2", "device": "cpu", "devices": 1,
                       "cpu": cpu}) + "\n"
    (tmp_path / folder / "starts.jsonl").write_text(2 * line)
  with pytest.raises(ValueError, match="ran on different machines.*: old, cpu and new, cpu; run"):
    ablation.measure_ablation([ours, uniform])
  (tmp_path / "u" / "starts.jsonl").write_text((tmp_path / "d" / "starts.jsonl").read_text())
  assert ablation.measure_ablation([ours, uniform])["shared"] == [0]


def test_arms_without_a_common_seed_have_no_difference(tmp_path):
  result = ablation.measure_ablation([finish(tmp_path / "d", 0, 1, 1),
                                      finish(tmp_path / "u", 1, 1, 0.5, **UNIFORM)])
  assert result["difference"]["hard"] == (None, None)
  assert "share no seed" in ablation.ablation_text(result)
