"""Examples of the documentation run; its commands, links, keys and names exist."""

import ast
import doctest
import importlib.util
import io
import pathlib
import re
import shlex

import imports_test
import numpy as np
import pytest
from PIL import Image

from ares_jax import ops
from ares_jax.grading import functions
from ares_jax.run import config as run_config
from ares_jax.run.identity import flatten
from ares_jax.system import config, figures

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")),
         *sorted((ROOT / "examples").glob("*/README.md")))
# Pages whose commands are not checked: tables of past measurements, and names that are gone.
LINKED = (*PAGES, ROOT / "benchmarks.md", ROOT / "CHANGELOG.md", ROOT / "ares_jax" / "README.md")


@pytest.fixture(scope="module")
def picture():
  spec = importlib.util.spec_from_file_location("ops_picture", DOCS / "ops_picture.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("page, least", [("ops.md", 40), ("reward.md", 3)])
def test_examples_run(page, least):
  with np.printoptions():  # The page sets its own, for itself.
    results = doctest.testfile(str(DOCS / page), module_relative=False)
  assert results.attempted >= least and results.failed == 0


def test_every_op_is_mentioned():
  text = (DOCS / "ops.md").read_text(encoding="utf-8")
  assert [name for name in ops.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("page, most", [("README.md", 130), ("ares_jax/README.md", 60)])
def test_the_pages_read_first_stay_short(page, most):
  assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= most


def test_file_names_that_label_a_link_end_its_target():
  for page in LINKED:
    for label, link in re.findall(r"\[`?([\w./]+\.\w+|\w+_test)`?\]\(([^)#:\s]+)\)",
                                  page.read_text(encoding="utf-8")):
      assert f"/{link}".removesuffix(".py").endswith(f"/{label}".removesuffix(".py")), (
        f"{page.name}: [{label}]({link})")


def test_the_map_names_rooms_modules_and_functions_that_are_there():
  text = (ROOT / "ares_jax" / "README.md").read_text(encoding="utf-8")
  steps = re.findall(r"`([\w/]+\.py):(\w+)`", text)
  rooms = re.findall(r"^\| (\d) \| (.*?) \| (.*?) \|", text, re.MULTILINE)
  assert len(steps) > 20 and len(rooms) > 10
  for file, name in steps:
    source = (ROOT / "ares_jax" / file).read_text(encoding="utf-8")
    assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), f"{file}:{name}"
  floors = {room: str(floor) for room, floor in imports_test.FLOOR_OF.items()}
  for floor, names, contents in rooms:
    folders = re.findall(r"`([\w./]+)`", names)
    assert all((ROOT / "ares_jax" / folder).exists() for folder in folders), names
    assert {floors[re.sub(r"(/|\.py)$", "", folder)] for folder in folders} == {floor}, names
    for module in re.findall(r"`([\w/]+)`", contents):
      paths = [ROOT / "ares_jax" / folder / module for folder in folders if folder.endswith("/")]
      assert not paths or any(path.is_dir() or path.with_suffix(".py").is_file()
                              for path in paths), f"{names}: {module}"


def test_the_changelog_names_modules_that_are_there():
  text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Renamed modules")[2]
  rows = re.findall(r"^\| (`.*) \| (`.*) \|$", text, re.MULTILINE)
  assert len(rows) > 30
  for before, after in rows:
    names = re.findall(r"`(\w+\.[\w.]+)`", after)
    if after.endswith("with the same name"):
      room = re.findall(r"`([\w.]+\.)`", after)[0]
      names = [room + name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", before)]
    for name in names:
      assert (ROOT / "ares_jax" / name.replace(".", "/")).with_suffix(".py").is_file(), name


def test_links_lead_somewhere():
  for page in LINKED:
    for link, part in re.findall(r"\]\(([^)#:\s]*)(#[^)]*)?\)", page.read_text(encoding="utf-8")):
      target = page.parent / link if link else page
      assert target.exists(), f"{page.name}: {link}"
      if part:
        heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        known = {"#" + re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
        assert part in known, f"{page.name}: {link}{part}"


def commands():
  """(page, words) of every command in a block of shell, and of those in the text."""
  for page in PAGES:
    text = page.read_text(encoding="utf-8")
    lines = [line for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text,
                                                re.DOTALL | re.MULTILINE)
             if not kind for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(line.split()) for line in re.findall(
      r"`((?:python -m|launch/\w)[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))]
    for line in lines:
      for command in line.split("&&"):
        words = shlex.split(command)
        while words and re.match(r"[A-Z_]+=", words[0]):
          words.pop(0)
        if words:
          yield pytest.param(page.name, words, id=f"{page.name}: {' '.join(words)[:70]}")


def flags_of(text):
  return set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text)) | {"help"}


@pytest.mark.parametrize("page, words", list(commands()))
def test_commands_exist_with_their_flags_and_config_keys(page, words):
  given = [word for word in words if word.startswith("-") and word != "-m"]
  if words[0] == "python" and words[1] == "-m" and words[2].startswith("ares_jax"):
    module = ROOT / words[2].replace(".", "/")
    module = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
    check_flags(given, flags_of(module.read_text(encoding="utf-8")))
  elif words[0].startswith("launch/"):
    text = (ROOT / words[0]).read_text(encoding="utf-8")
    if "--" in words:
      check_flags(words[words.index("--") + 1 :],
                  flags_of((ROOT / "ares_jax" / "train.py").read_text(encoding="utf-8")))
      given = [word for word in words[: words.index("--")] if word.startswith("-")]
    for word in given:
      assert re.search(re.escape(word.split("=")[0]) + r"\b", text), word
    assert len(words) == 1 or f"#   {words[1]}" in text or words[1].startswith("-")
  elif words[0] == "python":
    path = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
    assert words[2] in ("pytest", "venv") or (ROOT / path).is_file() or ".." in path
  elif words[0] == "bash":
    assert (ROOT / words[1]).is_file()
  else:
    assert words[0] in ("pip", "hf", "gcloud", "ruff", ".", ".ci/run"), (
      f"{page}: unknown program {words[0]}")


def check_flags(words, known):
  """Flags are defined, files of configs are there, and their keys take these values."""
  values, changes = None, {}
  for word in (word.strip("[]") for word in words if word.startswith(("-", "["))):
    name, _, value = word.lstrip("-").partition("=")
    assert name.split(".")[0] in known, word
    if name == "config" and value.startswith("configs/"):
      values = config.load(str(ROOT / value))
    elif name.startswith("config."):
      changes[name.removeprefix("config.")] = value
  if values is None:
    return
  for key, value in changes.items():
    try:
      value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      pass
    with values.unlocked():
      node = values
      for part in key.split(".")[:-1]:
        node = node[part]
      assert key.split(".")[-1] in node, key
      node[key.split(".")[-1]] = value
  config.build(run_config.TrainConfig, values, "config")


def test_config_keys_in_the_text_are_keys_of_the_configs():
  """`aepo.loss.clip_low`, or `loss.clip_low` where a page speaks of stage 2."""
  keys = set()
  for name in ("ares_tiny.py", "aepo_7b.py"):
    keys |= flatten(config.load(str(ROOT / "configs" / name)).to_dict()).keys()
  keys |= {key[:dot.start()] for key in keys for dot in re.finditer(r"\.", key)}  # the sections
  found = 0
  for page in PAGES:
    text = page.read_text(encoding="utf-8")
    for key in re.findall(r"`(?:--config\.)?([a-z]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", text):
      section = key.split(".")[0]
      if key.endswith((".py", ".json")) or not {section, f"aepo.{section}"} & keys:
        continue
      assert {key, f"aepo.{key}"} & keys, f"{page.name}: {key}"
      found += 1
  assert found > 40


def test_picture_flags_four_windows_and_the_seven_tokens_they_cover(picture):
  words, entropy_T = zip(*picture.SENTENCE, strict=True)
  mean_T, _, flag_T, cover_T, threshold = picture.analyse(entropy_T)
  assert [words[t] for t in np.flatnonzero(flag_T)] == [".", "Wait", ",", "maybe"]
  assert [words[t] for t in np.flatnonzero(cover_T)] == [
    ".", "Wait", ",", "maybe", "the", "blue", "one"]
  np.testing.assert_allclose(mean_T[words.index("Wait")], (2.2 + 0.7 + 1.9 + 0.8) / 4)
  assert mean_T[~flag_T].max() < threshold <= mean_T[flag_T].min()


def test_picture_is_what_the_script_draws(picture):
  drawn = Image.open(io.BytesIO(figures.png_bytes(picture.draw()))).convert("RGB")
  kept = Image.open(DOCS / "ops.png").convert("RGB")
  assert drawn.size == kept.size
  # Another version of the font renderer may smooth letters differently.
  difference = np.abs(np.asarray(drawn, np.int16) - np.asarray(kept, np.int16)).max(-1)
  assert (difference > 32).mean() < 0.01


def test_the_three_functions_of_the_reward_page_run_as_they_are(tmp_path):
  text = (ROOT / "docs" / "reward.md").read_text(encoding="utf-8")
  row = {"id": "a", "question": "3 + 4?", "level": "1", "images": []}
  answers = [{"response": f"<think> 3 + 4 </think> \\boxed{{{said}}}", "truth": ["7"],
              "tokens": [1, 2], "entropies": None, "row": row,
              "columns": {"solution": "7", "answer": "7"}, "step": 0} for said in (7, 8)]
  for block in text.split("```python\n")[1:4]:
    name = block.split(".py")[0].removeprefix("# ")
    (tmp_path / f"{name}.py").write_text(block.split("```")[0])
    attribute = re.search(r"def (\w+)", block)[1]
    function, = functions.read_functions(f"{tmp_path / name}.py:{attribute}")
    assert function.form == {"ours": "answer"}.get(name, name)
    batches = [answers] if function.takes_batch else [answers[:1], answers[1:]]
    right, wrong = (result for batch in batches
                    for result in functions.call_function(function, batch))
    key = "accuracy_reward" if name == "trl" else "accuracy"
    assert (right[key], wrong[key]) == (1, 0), (right, wrong)


def test_the_config_of_the_data_page_is_valid():
  text = (DOCS / "data.md").read_text(encoding="utf-8")
  c = config.load(str(ROOT / "configs" / "aepo_3b.py")).unlock()
  exec(text.split("```python\n")[1].split("```")[0], {"c": c})
  built = config.build(run_config.TrainConfig, c, "config")
  assert built.data.files.rl[0].path == "mine.jsonl" and built.adacs.steps == 0
