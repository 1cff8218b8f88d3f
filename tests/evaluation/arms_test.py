import json
import re

import pytest
import tiny

from ares_jax.evaluation import arms as arms_lib
from ares_jax.evaluation import arms_figure, paper


def result(accuracy, length=10.0):
  part = {"n": 4, "share": 1.0, "accuracy": accuracy, "interval": 0.1, "pass_at_k": 1.0,
          "format_ok": 1.0, "length": length, "shows_work": 1.0}
  none = {"n": 0, "accuracy": None, "length": None}
  return {"n": 4, "samples": 8, "greedy": part, "sampled": part,
          "bucket": {"easy": part, "medium": none, "hard": part}, "level": {"1": part}}


def finish(folder, seed, results, **changes):
  folder.mkdir()
  values = tiny.values(seed=seed, **changes)
  (folder / "config.json").write_text(values.to_json_best_effort())
  (folder / "results.json").write_text(json.dumps(results))
  return str(folder)


def runs(folder):
  grpo = {"aepo__reward__kind": "accuracy", "aepo__kl__dynamic": False}
  return [
    finish(folder / "a0", 0, {"warmup": result(0.2), "adacs": result(0.4), "aepo": result(0.8)}),
    finish(folder / "a1", 1, {"warmup": result(0.3), "adacs": result(0.5), "aepo": result(0.6)}),
    finish(folder / "g0", 0, {"warmup": result(0.2), "adacs": result(0.4), "aepo": result(0.7)},
           **grpo, grade__workers=3),
    finish(folder / "g1", 1, {"aepo": result(0.5)}, **grpo),
    finish(folder / "long", 0, {"adacs": result(0.9)}, adacs__steps=77),
  ]


def page(table):
  """The Markdown without its padding."""
  return re.sub(" +", " ", arms_lib.arms_markdown(table, paper.paper_tables()))


def test_arms_are_named_and_their_seeds_averaged(tmp_path):
  table = {row["arm"]: row for row in arms_lib.arm_rows(arms_lib.collect_arms(runs(tmp_path)))}
  assert list(table) == ["warm-up", "AdaCS cold start (adacs.steps=2)",
                         "AdaCS cold start (adacs.steps=77)", "AdaCS + AEPO (ARES)", "AdaCS + GRPO"]
  assert table["warm-up"]["seeds"] == [0, 1]  # the copied start counts once
  mean, half = table["AdaCS + AEPO (ARES)"]["accuracy"]
  assert mean == pytest.approx(0.7)
  # t quantile at 1 degree of freedom 12.706, standard deviation .1 sqrt 2, over sqrt 2.
  assert half == pytest.approx(12.706 * 0.1, rel=1e-4)
  assert table["AdaCS cold start (adacs.steps=77)"]["accuracy"] == (0.9, None)
  mean, half = table["AdaCS + AEPO (ARES)"]["difference"]
  assert mean == pytest.approx(0.1) and half == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("names, reference, differences", [
  (("vanilla + DAPO", "vanilla + GRPO"), "vanilla + GRPO", [0.1, 0.0]),
  (("vanilla + AEPO", "vanilla + DAPO"), "vanilla + DAPO", [0.1, 0.0]),
  (("warm-up", "vanilla + AEPO"), "", [None, None]),
])
def test_arms_are_measured_against_grpo_where_there_is_one(names, reference, differences):
  arms = {name: {0: result(accuracy)} for name, accuracy in zip(names, (0.9, 0.8), strict=True)}
  table = arms_lib.arm_rows(arms)
  assert {row["reference"] for row in table} == {reference}
  assert [row["difference"][0] for row in table] == pytest.approx(differences)
  head = page(table).partition("\n")[0]
  assert ("less" in head) == bool(reference) and f"less {reference}, same" in head or not reference


def test_tables_hold_every_arm_and_the_paper(tmp_path):
  text = page(arms_lib.arm_rows(arms_lib.collect_arms(runs(tmp_path))))
  assert text.count("AdaCS + GRPO |") == 3 and "60.0 ± 127.1" in text and "cold start 50.7" in text
  assert "| ARES-RL-7B | 56.9 / 12893 |" in text and "ARES 55.7" in text
  assert "4 problems x 8 samples" in text
  assert "| 70.0 ± 127.1 / 10.0 ± 0.0 | - | 70.0" in text


@pytest.mark.parametrize("levels", [True, False])
def test_the_figure_has_a_bar_for_every_arm_and_difficulty(tmp_path, levels):
  table = arms_lib.arm_rows(arms_lib.collect_arms(runs(tmp_path)))
  if not levels:
    table = [row | {"level": {}} for row in table]
  accuracy, tokens = arms_figure.arms_figure(table).axes
  # All and the one level; or all, easy and hard: no problem was medium.
  assert len(accuracy.patches) == len(tokens.patches) == (2 if levels else 3) * len(table)
  assert [label.get_text() for label in accuracy.get_xticklabels()] == (
    ["all", "level 1"] if levels else ["all", "easy", "medium", "hard"])
  looks = {bars.get_label(): [(bar.get_height(), bar.get_facecolor(), bar.get_hatch())
                              for bar in bars] for bars in accuracy.containers
           if bars.get_label().endswith("seed(s)")}
  assert looks["AdaCS + GRPO, 2 seed(s)"][0][0] == pytest.approx(60)
  assert len({bars[0][1:] for bars in looks.values()}) == len(looks) == len(table)
  # 70 ± 127 would leave the panel.
  assert accuracy.get_ylim() == (0, 100) and tokens.get_ylim() == (0, pytest.approx(11.5))


def test_the_figures_page_needs_no_other_file(tmp_path):
  text = arms_figure.arms_page(arms_lib.arm_rows(arms_lib.collect_arms(runs(tmp_path))))
  assert text.startswith("<!doctype html>") and text.count("<svg") == 1
  assert not re.search('(src|href)="(?!#)', text)


def test_levels_are_ordered_by_number_and_shown_as_text(tmp_path):
  names = ["10", "2", "a<b"]
  found = result(0.5)
  found["level"] = dict.fromkeys(names, found["level"]["1"])
  table = arms_lib.arm_rows({"AdaCS + AEPO": {0: found, 1: found | {"n": 5}}})
  assert list(table[0]["level"]) == ["2", "10", "a<b"]
  labels = arms_figure.arms_figure(table).axes[0].get_xticklabels()
  assert [label.get_text() for label in labels] == ["all", "level 2", "level 10", "level a<b"]
  text = page(table)
  assert "| arm | 2 | 10 | a<b |" in text and "4 problems x 8 samples; 5 problems x 8" in text


def test_a_figure_of_many_levels_sorts_by_pass_rate():
  found = result(0.5)
  found["level"] = dict.fromkeys(map(str, range(40)), found["level"]["1"])
  labels = arms_figure.arms_figure(arms_lib.arm_rows({"AdaCS + AEPO": {0: found}})).axes[
    0].get_xticklabels()
  assert [label.get_text() for label in labels] == ["all", "easy", "medium", "hard"]


@pytest.mark.parametrize("selection, kind, dynamic, name", [
  ("vanilla", "accuracy", False, "vanilla + GRPO"),
  ("vanilla", "accuracy", True, "vanilla + GRPO + dynamic KL"),
  ("vanilla", "aepo", False, "vanilla + GRPO + entropy shaping"),
  ("vanilla", "aepo", True, "vanilla + AEPO"), ("adacs", "aepo", True, "AdaCS + AEPO (ARES)"),
  ("adacs", "release", True, "AdaCS + release reward"),
])
def test_labels(selection, kind, dynamic, name):
  values = tiny.values(curate__selection=selection, aepo__reward__kind=kind,
                       aepo__kl__dynamic=dynamic)
  assert arms_lib.arm_label(json.loads(values.to_json_best_effort()), "aepo") == name


@pytest.mark.parametrize("config", ["ares_tiny", "aepo_7b"])
@pytest.mark.parametrize("preset, name", [
  ("aepo", "AdaCS + AEPO (ARES)"), ("grpo", "AdaCS + GRPO"), ("dapo", "AdaCS + DAPO")])
def test_a_preset_has_its_own_name(config, preset, name):
  values = tiny.config_lib.load(str(tiny.ROOT / "configs" / f"{config}.py:{preset}"))
  assert arms_lib.arm_label(json.loads(values.to_json_best_effort()), "aepo") == name


def test_two_results_of_one_seed_are_refused(tmp_path):
  folders = [finish(tmp_path / "a", 0, {"warmup": result(0.2)}),
             finish(tmp_path / "b", 0, {"warmup": result(0.3)})]
  with pytest.raises(ValueError, match="b: seed 0 of 'warm-up' is there twice"):
    arms_lib.collect_arms(folders)
  with pytest.raises(ValueError, match="config.json does not exist; give the folder of a run"):
    arms_lib.collect_arms([str(tmp_path)])
