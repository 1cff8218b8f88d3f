import json
import os
import pathlib
import subprocess
import sys

import browser
import numpy as np
import pytest
from PIL import Image
from small_run import HOSTILE, line, write

from ares_jax.report import page as page_lib
from ares_jax.report import pictures
from ares_jax.run.metrics import truncate_lines
from ares_jax.run.records import read_run


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  workdir, other = (write(tmp_path_factory.mktemp(name)) for name in ("run", "other"))
  path = tmp_path_factory.mktemp("page") / "report.html"
  path.write_text(page_lib.report_page(read_run(workdir), [read_run(other)]), encoding="utf-8")
  return path


def test_model_text_cannot_leave_the_data(path):
  value = {"text": HOSTILE + "\u2028 /*SCRIPT*/ \ud800"}
  text = page_lib.script_json(value)
  assert not set("<>&\u2028") & set(text)
  assert json.loads(text)["text"] == HOSTILE + "\u2028 /*SCRIPT*/ ?"
  page = path.read_text(encoding="utf-8")
  assert page.count("</script>") == 2 and "http://" not in page.replace(
    "http://www.w3.org/2000/svg", "")


def test_too_many_responses_are_thinned_by_iteration():
  lines = [line(step, sample, 1.0, 1.0) for step in range(1, 31) for sample in range(2)]
  size = page_lib._size(lines[0])
  kept = page_lib.thin_lines(lines, 20 * size)
  steps = sorted({one["step"] for one in kept})
  assert len(kept) == 2 * len(steps) <= 20 and (steps[0], steps[-1]) == (1, 30)
  assert page_lib.thin_lines(lines, 60 * size) == lines and page_lib.thin_lines([], 1) == []


def test_an_entropy_that_was_not_finite_is_left_out(tmp_path):
  workdir = write(tmp_path / "run")
  for name, old, new in (("rollouts", '"entropy": [0.0, 2.0', '"entropy": [0.0, null'),
                         ("metrics", '"hwe/threshold": 1.5', '"hwe/threshold": null')):
    path = tmp_path / "run" / f"{name}.jsonl"
    path.write_text(path.read_text().replace(old, new, 1))
  data = page_lib.page_data(read_run(workdir), [])
  page_lib.script_json(data)  # refuses what is not JSON
  assert data["responses"][0]["entropy"] == [0, None, 1000, 3000, 0]
  assert data["responses"][0]["tau"] is None and data["responses"][-1]["tau"] == 1.5
  assert sum(part["n"] for part in data["difficulty"]) == 12


def test_the_page_begins_with_results_and_what_the_run_was_made_with(tmp_path):
  workdir = write(tmp_path / "mine", seed=7)
  part = {"accuracy": 0.5, "interval": 0.25, "pass_at_k": 0.75, "length": 5.0}
  result = {"bucket": {}, "level": {}, "n": 4, "samples": 2, "greedy": part, "sampled": part}
  (tmp_path / "mine" / "results.json").write_text(json.dumps({"aepo": result}))
  (tmp_path / "mine" / "starts.jsonl").write_text(json.dumps({
    "time": "2026-01-02 03:04:05 +0000", "command": ["train", "--config=configs/ares_tiny.py"],
    "commit": "abc123", "jax": "0.1", "device": "cpu", "devices": 2, "cpu": "Fast One"}) + "\n")
  data = page_lib.page_data(read_run(workdir), [])
  assert data["overview"]["results"] == [
    ["stage", "greedy", "sampled", "pass@k", "tokens", "problems x k"],
    ["aepo", "50.0% ±25.0", "50.0% ±25.0", "75.0%", "5.0", "4 x 2"]]
  facts = dict(data["overview"]["facts"])
  assert (facts["config"], facts["seed"]) == ("configs/ares_tiny.py", "7")
  assert facts["commit"] == "abc123"
  assert facts["started"] == "2026-01-02 03:04:05 +0000" and facts["steps"].endswith("aepo 3 of 3")
  assert ["aepo.group", "8"] in data["overview"]["settings"]
  assert data["runs"][0]["name"] == "mine"


def test_an_advantage_is_that_of_training_and_needs_the_whole_group(tmp_path):
  lines = [line(1, sample, float(sample < 6), 6 / 8) for sample in range(8)]
  lines += [line(2, sample, 1.0, 3 / 8) for sample in range(3)]
  workdir = write(tmp_path / "run")
  (tmp_path / "run" / "rollouts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
  rows = [one for one in page_lib.page_data(read_run(workdir), [])["responses"]
          if not one["held_out"]]
  rewards = np.float32([one["reward"]["total"] for one in rows[:8]])
  expected = (rewards - rewards.mean()) / rewards.std(ddof=1)
  np.testing.assert_allclose([one["advantage"] for one in rows[:8]], expected, rtol=1e-4)
  assert [one["advantage"] for one in rows[8:]] == [None] * 3


@pytest.mark.parametrize("damage, note", [
  (lambda run: next((run / "images").iterdir()).unlink(), "1 images that cannot be read"),
  (lambda run: (run / "config.json").write_text("{"), "config.json is damaged"),
  (lambda run: (run / "results.json").write_text("{"), "results.json is damaged"),
  (lambda run: (run / "metrics.jsonl").write_text('{"foo": 1}\n'), "metrics.jsonl line 1 is no"),
  (lambda run: (run / "rollouts.jsonl").write_text("3\n"), "rollouts.jsonl line 1 is no object"),
  (lambda run: (run / "starts.jsonl").write_text('{"time"{"time"\n'), "starts.jsonl line 1 is not"),
  (lambda run: (run / "starts.jsonl").write_text('{"time": "now"}\n'), "line 1 is no object")])
def test_a_damaged_run_has_a_page_that_says_what_is_left_out(tmp_path, damage, note):
  workdir = write(tmp_path / "run")
  damage(tmp_path / "run")
  notes = []
  text = page_lib.report_page(read_run(workdir, notes), [], notes)
  data = json.loads(text.split('id="data">')[1].split("</script>")[0])
  assert any(note in one for one in data["notes"])
  if "images" in note:
    assert len(data["responses"]) == 16 and data["problems"]["p1"]["images"] == [None]


def test_runs_are_told_apart_by_their_folders(tmp_path):
  (tmp_path / "a" / "run").mkdir(parents=True)
  (tmp_path / "b" / "run").mkdir(parents=True)
  runs = [read_run(write(tmp_path / name / "run")) for name in "ab"]
  assert page_lib.short_names(runs) == ["a/run", "b/run"]
  assert page_lib.short_names(runs[:1]) == ["run"]


@pytest.fixture(scope="module")
def opened(path, tmp_path_factory):
  if browser.program() is None:
    pytest.skip("no Chromium on PATH")
  with browser.browse(tmp_path_factory.mktemp("profile"), width=390) as page:
    page.open(path.as_uri())
    yield page


def choose(page, name, value, event="input"):
  page.run(f"""(() => {{ const field = document.getElementById({json.dumps(name)});
    field.value = {json.dumps(value)};
    field.dispatchEvent(new Event({json.dumps(event)}, {{bubbles: true}})); }})()""")


def text(page, selector):
  return page.run(f"document.querySelector({json.dumps(selector)}).textContent")


def test_opens_on_a_phone_without_errors_and_without_scrolling_sideways(opened):
  assert opened.errors == []
  assert opened.run("window.broken") is None
  assert opened.run("document.documentElement.scrollWidth") <= 390
  assert text(opened, "#found") == "16 responses"
  assert opened.run("document.querySelectorAll('#panels figure').length") > 5


def test_markup_in_a_response_is_text(opened):
  assert HOSTILE in text(opened, "#cards .tokens")
  assert opened.run("document.querySelectorAll('.card script, .card b, .tokens img').length") == 0
  assert opened.run("document.querySelector('.card img').naturalWidth") == 56


def test_marks_are_on_the_tokens_they_belong_to(opened):
  classes = "[...document.querySelector('#cards .tokens').children].map((one) => one.className)"
  assert opened.run(classes) == ["", "flag cover trigger", "flag cover", "flag cover", "cover"]


def test_filters_choose_responses(opened):
  for name, value, count in (("bucket", "0", 4), ("bucket", "1", 8), ("verdict", "1", 9),
                             ("step", "2", 4), ("from", "held out, adacs", 2), ("words", "p3", 4),
                             ("words", "no such words", 0)):
    choose(opened, name, value)
    assert text(opened, "#found") == f"{count} responses", (name, value)
    choose(opened, name, "")


def test_pages_turn(opened):
  assert opened.run("document.querySelectorAll('#cards .card').length") == 10
  opened.run("document.getElementById('next').click()")
  assert opened.run("document.querySelectorAll('#cards .card').length") == 6
  opened.run("document.getElementById('previous').click()")


def test_keys_read_tokens_and_curves(opened):
  opened.run("document.querySelector('#cards .tokens').focus()")
  for _ in range(2):
    opened.press("ArrowRight")
  readout = text(opened, "#cards .readout")
  assert "token 2 of 5" in readout and "entropy 2 nats" in readout and "HWE token" in readout
  assert "trigger word" in readout
  opened.run("document.querySelector('#panels svg').focus()")
  opened.press("Home")
  assert "step 1: run" in text(opened, "#panels .readout")
  assert "other" in text(opened, "#panels .readout") and "0.25" in text(opened, "#panels .readout")


def test_the_same_problem_stands_early_and_late_from_wrong_to_right(opened):
  cards = "[...document.querySelectorAll('#pair .card')]"
  titles = opened.run(f"{cards}.map((one) => one.querySelector('h3').textContent)")
  assert titles == ["held out, after adacs", "held out, after aepo"]
  verdicts = opened.run(f"{cards}.map((one) => one.querySelector('.verdict').textContent)")
  assert verdicts == ["wrong", "correct"]


def test_the_answers_of_a_group_stand_side_by_side(opened):
  cells = "[...document.querySelectorAll('#cards .card .group')][0].querySelectorAll('tr')"
  rows = opened.run(f"[...{cells}].map((row) => [...row.children].map((one) => one.textContent))")
  assert rows[:2] == [["sample", "0", "1", "2", "3"], ["answer", "✓", "✓", "✓", "✓"]]
  assert [row[0] for row in rows[2:]] == ["reward", "advantage", "tokens"]


def test_pictures_fold_on_a_phone(opened):
  closed = "[...document.querySelectorAll('#panels details')].map((one) => one.open)"
  first, *others = opened.run(closed)
  assert first and others and not any(others)
  assert text(opened, "title") == text(opened, "h1") and text(opened, "h1").startswith("Report of")


def test_rounding_errors_have_no_axis_of_their_own(opened):
  ticks = opened.run("""[...lineChart("x", "", [{name: "a", colour: "#000", dash: "", x: [1, 2],
    y: [1e-9, -1e-9]}]).querySelectorAll("svg text")].map((one) => one.textContent)""")
  assert "0" in ticks and not any("e-" in tick for tick in ticks)
  ticks = opened.run("""[...lineChart("x", "", [{name: "a", colour: "#000", dash: "",
    x: [1, 123456], y: [1, 2]}]).querySelectorAll("svg text")].map((one) => one.textContent)""")
  assert "100000" in ticks


def test_names_and_notes_of_bars_stay_inside_the_picture(opened):
  found = opened.run("""(() => {
    const part = (stage) => ({name: stage, value: 104.25, note: "12.75% correct, n = 10000"});
    const figure = barChart("x", [{name: "Common-Division", bars: [part("adacs")]},
      {name: "\u5206W".repeat(100), bars: ["warmup", "adacs", "aepo"].map(part)}]);
    document.body.append(figure);
    const ends = [...figure.querySelectorAll("svg text")].map((one) => one.getBBox());
    const names = [...figure.querySelectorAll(".bars")].map((one) => one.getBoundingClientRect());
    const colours = [...figure.querySelectorAll("svg rect")].map((one) => one.getAttribute("fill"));
    const right = figure.getBoundingClientRect().right;
    figure.remove();
    return {notes: Math.max(...ends.map((box) => box.x + box.width)),
      names: Math.max(...names.map((box) => box.right)) - right, colours};
  })()""")
  assert found["notes"] <= 400 and found["names"] < 0
  first, *others = found["colours"]
  assert others.index(first) == 1  # a stage has one colour, whatever comes first


def test_the_picture_of_the_readme_is_made_from_a_run(opened, tmp_path):
  root = pathlib.Path(__file__).parents[2]
  subprocess.run([sys.executable, "-m", "docs.viewer_picture", f"--out={tmp_path / 'viewer.png'}",
                  f"--workdir={write(tmp_path / 'run')}"], check=True, cwd=root)
  assert Image.open(tmp_path / "viewer.png").width > 2000
  assert (root / "docs" / "viewer.png").stat().st_size <= 300_000


def test_pictures_are_written_as_files_and_for_tensorboard(tmp_path):
  [workdir, other] = [write(tmp_path / name) for name in ("run", "other")]
  paths = pictures.write_pictures(read_run(workdir), [read_run(other)],
                                  os.path.join(workdir, "report"))
  assert len(paths) == 17 and os.path.join(workdir, "report", "aepo_entropy.png") in paths
  assert {"aepo_entropy_by_difficulty.png", "aepo_n_he_by_difficulty.png",
          "held_out_length_by_level_run.png", "held_out_length_by_difficulty_other.png"} <= {
            os.path.basename(path) for path in paths}
  colours = np.asarray(Image.open(paths[0]).convert("RGB")).reshape(-1, 3)
  assert {(0, 114, 178), (213, 94, 0)} <= set(map(tuple, colours))  # a curve of either run
  [events] = (tmp_path / "run" / "tensorboard" / "report").iterdir()
  assert b"report/aepo_entropy" in events.read_bytes()


def test_pictures_are_drawn_of_what_can_be_read(tmp_path):
  workdir = write(tmp_path)
  for name in ("rollouts.jsonl", "config.json"):
    whole = (tmp_path / name).read_text()
    (tmp_path / name).write_text("[]\n")
    notes = []
    names = pictures.write_pictures(read_run(workdir, notes), [], str(tmp_path / "report"))
    assert notes and "aepo_entropy.png" in map(os.path.basename, names)
    (tmp_path / name).write_text(whole)
  lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
  (tmp_path / "rollouts.jsonl").write_text("".join(
    json.dumps(line | {"entropy": [None] * len(line["entropy"])}) + "\n" for line in lines))
  assert pictures.write_pictures(read_run(workdir), [], str(tmp_path / "report"))


def test_a_page_that_is_cut_short_is_seen_as_incomplete(tmp_path):
  workdir = write(tmp_path)
  with open(tmp_path / "rollouts.jsonl", "a") as file:
    file.write('{"stage": "aepo", "st')  # a run is writing this line
  assert len(read_run(workdir).rollouts) == 12
  with open(tmp_path / "rollouts.jsonl", "a") as file:
    file.write("\n")
  with pytest.raises(ValueError, match="rollouts.jsonl line 13 is not JSON"):
    read_run(workdir)


def test_responses_of_an_iteration_that_goes_on_wait_for_its_metrics(tmp_path):
  workdir = write(tmp_path)
  with open(tmp_path / "rollouts.jsonl", "a") as file:
    file.writelines(json.dumps(line(4, sample, 1.0, 1.0)) + "\n" for sample in range(2))
  assert [one["step"] for one in read_run(workdir).rollouts] == 4 * [1] + 4 * [2] + 4 * [3]


def test_a_run_that_resumes_meanwhile_takes_no_line_away(tmp_path):
  rollouts = read_run(write(tmp_path)).rollouts
  truncate_lines(str(tmp_path / "rollouts.jsonl"), "aepo", 1)
  assert [one["step"] for one in rollouts] == 4 * [1] + 4 * [2] + 4 * [3]


def test_responses_are_read_when_they_are_asked_for(tmp_path):
  workdir = write(tmp_path)
  first, _, *rest = (tmp_path / "rollouts.jsonl").read_text().splitlines(keepends=True)
  (tmp_path / "rollouts.jsonl").write_text("".join([first, "{\n", *rest]))
  rollouts = read_run(workdir).rollouts
  assert (rollouts[0]["sample"], rollouts[-1]["step"]) == (0, 3)
  with pytest.raises(ValueError, match="rollouts.jsonl line 2 is not JSON"):
    list(rollouts)
