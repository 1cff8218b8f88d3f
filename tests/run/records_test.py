import pytest
from small_run import write

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
  ("held_out/aepo.jsonl", "{}\n", "held_out/aepo.jsonl line 1 is no object with stage and step")])
def test_what_is_damaged_is_an_error_or_a_note(tmp_path, name, text, message):
  workdir = write(tmp_path / "run")
  (tmp_path / "run" / name).write_text(text)
  with pytest.raises(ValueError, match=message):
    read_run(workdir)
  notes = []
  read_run(workdir, notes)
  assert len(notes) == 1 and message in notes[0]
