import json

import pytest
from small_run import write

from ares_jax.report.statistics import curves
from ares_jax.run.files import read_json
from ares_jax.run.records import read_run


@pytest.mark.parametrize("text", ["{\n", "", "[1]", '{"a": "\udc80'])
@pytest.mark.parametrize("name", ["results.json", "config.json", "fingerprint.json"])
def test_a_cut_file_is_named_with_the_remedy(tmp_path, name, text):
  (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
  with pytest.raises(ValueError, match=f"{name} is damaged .*; restore it, or remove it: the"):
    read_json(str(tmp_path), name)


@pytest.mark.parametrize("name, text, message", [
  ("results.json", "{", "results.json is damaged"),
  ("results.json", '{"aepo": 3}', "results.json has no evaluation at 'aepo'; restore it, or rem"),
  ("results.json", '{"foo": 1}', "results.json has no evaluation at 'foo'"),
  ("config.json", "", "config.json is damaged"),
  ("metrics.jsonl", '{"foo": 1}\n', "metrics.jsonl line 1 is no object with stage and step"),
  ("metrics.jsonl", "3\n", "metrics.jsonl line 1 is no object"),
  ("metrics.jsonl", "{\n", "metrics.jsonl line 1 is not JSON"),
  ("metrics.jsonl", "[" * 100_000 + "\n", "metrics.jsonl line 1 is not JSON"),
  ("metrics.jsonl", '{"stage": "aepo", "step": "1"}\n', "line 1 is no object with step;"),
  ("rollouts.jsonl", '{"stage": "aepo", "step": null}\n', "line 1 is no object with step and"),
  ("rollouts.jsonl", '{"stage": "aepo", "step": 1}\n', "line 1 is no object with id and"),
  ("held_out/aepo.jsonl", "{}\n", "held_out/aepo.jsonl line 1 is no object with stage and step"),
  ("held_out/aepo.jsonl", '{"stage": "aepo", "step": 1, "id": "p"}\n', "no object with sample")])
def test_what_is_damaged_is_an_error_or_a_note(tmp_path, name, text, message):
  workdir = write(tmp_path / "run")
  (tmp_path / "run" / name).write_text(text)
  with pytest.raises(ValueError, match=message):
    read_run(workdir)
  notes = []
  read_run(workdir, notes)
  assert len(notes) == 1 and message in notes[0]


def test_a_validation_whose_step_was_lost_is_no_step(tmp_path):
  workdir = write(tmp_path / "run")
  with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
    file.write('{"stage": "aepo", "step": 9, "validate/accuracy": 0.5}\n')
  assert [*read_run(workdir).metrics["aepo"]] == [1, 2, 3]


def test_a_validation_belongs_to_its_step_and_may_come_before_the_first(tmp_path):
  workdir = write(tmp_path / "run")
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  validations = [json.dumps({"stage": "aepo", "step": step, "validate/accuracy": step / 4})
                 for step in (0, 2)]
  (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(
    [validations[0], *lines[:2], validations[1], *lines[2:]]) + "\n")
  records = read_run(workdir)
  assert [*records.metrics["aepo"]] == [1, 2, 3]  # what reads iterations never sees step 0
  assert records.metrics["aepo"][2].items() >= {"validate/accuracy": 0.5,
                                                "response/tokens": 5.0}.items()
  curve = curves(records)["aepo"]
  assert curve["step"] == [0, 1, 2, 3]
  assert curve["values"]["validate/accuracy"] == [0, None, 0.5, None]
  assert curve["values"]["response/tokens"] == [None, 5.0, 5.0, 5.0]
