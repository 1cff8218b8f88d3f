import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image
from small_run import HOSTILE, line, write

from ares_jax.diagnose import hwe, kl, passk, terms
from ares_jax.run.records import read_run
from ares_jax.system import figures


@pytest.fixture(scope="module")
def records(tmp_path_factory):
  return read_run(write(tmp_path_factory.mktemp("run")))


def test_precision_and_recall_of_a_sentence_checked_by_hand():
  # Windows of 2 start at 0..4 with means 0 2 3 1 0; quantile 0.6 is 1 + 0.4 * (2 - 1) = 1.4.
  entropy_BT, mask_BT = np.float32([[0, 0, 4, 2, 0, 0]]), np.ones((1, 6), bool)
  trigger_BT = np.bool_([[1, 0, 0, 1, 0, 0]])
  score = hwe.score_windows(entropy_BT, mask_BT, trigger_BT, window=2, quantile=0.6)
  # Flagged: 1..2 without a trigger, 2..3 with one; the trigger at 0 is not found.
  assert score["threshold"] == pytest.approx(1.4) and score["flagged"] == 2
  assert (score["precision"], score["recall"], score["f1"]) == (0.5, 0.5, 0.5)
  # All five windows: those at 0, 2 and 3 hold a trigger.
  assert score["every"] == pytest.approx(2 * 0.6 / 1.6)


def test_a_response_shorter_than_a_window_has_nothing_to_find():
  score = hwe.score_windows(np.float32([[1, 2]]), np.ones((1, 2), bool), np.bool_([[1, 0]]),
                            window=4, quantile=0.5)
  assert score["f1"] is None and score["every"] is None and score["flagged"] == 0


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
  path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
  path.write_text(json.dumps({"step": 1, "id": "p1", "sample": 0, "triggers": [2]}) + "\n")
  return path


def test_the_papers_claim_is_judged_on_the_given_responses(records, labelled):
  # Two copies of a sentence of 12 tokens whose only peak is its trigger; windows of 6.
  tokens, nats = ["x"] * 12, [0.0] * 12
  tokens[11], nats[11] = " wait", 6.0
  lines = [line(1, sample, 1.0, 1.0) | {"tokens": tokens, "entropy": nats} for sample in (0, 1)]
  good = hwe.measure_hwe(dataclasses.replace(records, rollouts=lines), windows=(6,),
                         quantiles=(0.99,))
  assert good["claim"]["holds"] and good["claim"]["best"]["f1"] == 1
  assert "F1 > 0.5 at w = 6 holds here: F1 = 1." in hwe.hwe_text(good)
  bad = hwe.measure_hwe(dataclasses.replace(records, rollouts=[
    one | {"tokens": [" wait"] + ["x"] * 11} for one in lines]), windows=(6,), quantiles=(0.99,))
  assert not bad["claim"]["holds"] and "does not hold here" in hwe.hwe_text(bad)
  assert "entropy tells nothing" in hwe.hwe_text(bad)
  # The small run's five tokens have no window of 6.
  none = hwe.measure_hwe(records, hwe.read_labels(labelled), windows=(6,), quantiles=(0.99,))
  assert (none["responses"], none["triggers"]) == (1, 1)
  assert "cannot be decided" in hwe.hwe_text(none)


def test_the_listed_tokens_are_those_that_the_run_flagged(records, tmp_path):
  def found(records):
    result = hwe.measure_hwe(records, windows=(2,), quantiles=(0.5,))
    return {row["token"]: row["count"] for row in result["found"]}

  # Means of the windows of 2 are 1, 1.5, 2 and 1.5, of 12 responses; the run's threshold is 1.5.
  assert found(records) == {" wait": 12, HOSTILE: 12, " so": 12}
  semantic = read_run(write(tmp_path / "run", aepo__entropy__detector="semantic"))
  assert found(semantic) == {" wait": 12}
  # A detector of triggers flags the word in <think> too, as in training.
  tag = dataclasses.replace(semantic, rollouts=[
    one | {"tokens": ["<", "think", ">", "x", "x"]} for one in semantic.rollouts])
  assert found(tag) == {"think": 12}


def test_a_response_with_an_entropy_that_was_not_finite_is_left_out(records):
  broken = line(1, 0, 1.0, 1.0) | {"entropy": [None, 2.0, 1.0, 3.0, 0.0]}
  found = hwe.measure_hwe(dataclasses.replace(records, rollouts=[*records.rollouts, broken]),
                          windows=(2,), quantiles=(0.5,))
  assert found["responses"] == 12


def test_labels_that_do_not_fit_are_refused(records, labelled, tmp_path):
  labelled = {(1, "p1", 0): [5]}
  with pytest.raises(ValueError, match=r"triggers \[5\].*outside its 5 tokens"):
    hwe.measure_hwe(records, labelled, windows=(2,), quantiles=(0.5,))
  (tmp_path / "bad.jsonl").write_text('{"step": 1}\n')
  with pytest.raises(ValueError, match="line 1 has no step, id, sample and triggers"):
    hwe.read_labels(tmp_path / "bad.jsonl")


def test_the_simulated_controller_is_stable_or_oscillates_or_stays_at_a_bound():
  calm = kl.simulate(0.1, 0.0, low=0.1, high=10.0)
  assert calm["state"] == "stable" and calm["ratio"] == pytest.approx(1, abs=0.01)
  assert kl.simulate(0.9, 1.0, low=0.1, high=10.0)["state"] == "oscillating"
  # Kappa would have to be 1.
  assert kl.simulate(0.1, 0.0, low=0.1, high=0.5)["state"] == "diverging"


def test_the_advice_says_whether_a_bucket_is_held_or_its_kappa_is_at_a_bound(records):
  config = records.aepo_config().kl

  def said(values, kappa):
    lines = [{"kl/outside/easy": value, "kl/kappa/easy": kappa} for value in values]
    row = kl.bucket_summary("easy", lines, config, 0.05)
    return row, kl.kl_advice({"dynamic": True, "buckets": [row], "here": None, "low": config.low,
                              "high": config.high})[0]

  row, words = said([1e-14, 0.02, 0.04, 0.08, 0.06, 0.05, 0.05, 0.05, 0.05], 1.0)
  assert row["ratio"] == pytest.approx(1) and "is held" in words and row["noise"] < 1
  assert "does not bind" in said([0.01] * 6, 0.1)[1]
  assert "upper bound" in said([0.2] * 6, 10.0)[1]
  assert "no tokens" in said([None] * 6, 1.0)[1]


def test_the_fitted_distribution_is_the_one_that_the_pass_rates_came_from():
  random = np.random.default_rng(0)
  rates = random.binomial(8, random.beta(2.0, 1.0, 40_000)) / 8
  np.testing.assert_allclose(passk.fit_beta(rates, 8), (2, 1), rtol=0.05)


def test_more_samples_find_the_true_bucket_more_often(records):
  result = passk.measure_passk(records)
  right = [row["right"] for row in result["groups"]]
  assert right == sorted(right) and right[-1] > 0.8 and result["problems"] == 3
  for row in result["groups"]:
    assert np.sum(row["confusion"]) == pytest.approx(1, abs=1e-3)
    assert np.trace(row["confusion"]) == pytest.approx(row["right"], abs=1e-3)
  change = [row["reward"] for row in result["groups"]]
  assert change[0] > change[-1] > 0 and "true bucket: 64 samples" in passk.passk_text(result)


def test_terms_are_averaged_over_each_third_of_the_run(records):
  shares = [0.1, 0.3, None, 0.5, 0.02, 0.04]
  lines = {step: {"step": step, "reward/shaped_size": share, "reward/shaped_size/hard": 2.0,
                  "gradient/accuracy": 4.0 if step > 4 else None,
                  "gradient/kl": 1.0 if step > 4 else None}
           for step, share in enumerate(shares, start=1)}
  run = dataclasses.replace(records, metrics=records.metrics | {"aepo": lines})
  result = terms.measure_terms(run)
  means = {(row["name"], row["bucket"]): row["thirds"] for row in result["rows"]}
  assert means["entropy term / accuracy, in advantages", None] == pytest.approx([0.2, 0.5, 0.03])
  assert means["entropy term / accuracy, in advantages", "hard"] == [2, 2, 2]
  assert means["gradient of the KL term", None] == [None, None, 1]
  text = terms.terms_text(result)
  assert "by 3% of their size, so the run is nearly one of accuracy alone" in text
  assert "The KL term's gradient is 25% of that of accuracy." in text
  assert list(terms.terms_pictures(result)) == ["terms_shaped"]


def test_terms_that_were_not_measured_are_said_to_be_missing(records):
  lines = {1: {"step": 1, "hwe/threshold": 0.2}}
  text = terms.terms_text(terms.measure_terms(
    dataclasses.replace(records, metrics=records.metrics | {"aepo": lines})))
  assert "was not logged" in text and "config.aepo.terms_every > 0" in text


def test_checks_are_drawn(records, tmp_path, monkeypatch):
  monkeypatch.setattr(kl, "RATES", (0.1, 0.9))  # the simulation takes seconds
  monkeypatch.setattr(kl, "NOISES", (0.0, 1.5))
  found = hwe.measure_hwe(records, windows=(2, 4), quantiles=(0.5, 0.9))
  result = kl.measure_kl(records)
  paths = figures.save_pngs(
    hwe.hwe_pictures(found) | kl.kl_pictures(result)
    | passk.passk_pictures(passk.measure_passk(records)), str(tmp_path / "d"))
  assert [os.path.basename(path) for path in paths] == [
    "hwe_f1.png", "hwe_tokens.png", "kl_outside.png", "kl_kappa.png", "kl_states.png", "passk.png"]
  picture = np.asarray(Image.open(paths[-2]).convert("RGB"))
  colours = set(map(tuple, picture.reshape(-1, 3).tolist()))
  states = {one["state"] for one in result["simulation"]}
  assert len(states) > 1 and {state for state, tint in kl.TINTS.items()
                              if tuple(bytes.fromhex(tint[1:])) in colours} == states
