import subprocess

import jax

from ares_jax.run import starts


def test_every_start_is_a_line(tmp_path):
  assert starts.read_starts(tmp_path) == []
  for _ in range(2):
    starts.note_start(tmp_path)
    with open(tmp_path / "starts.jsonl", "a") as file:
      file.write('{"time": "20')  # what a kill or a full disk leaves of a line
  first, second = starts.read_starts(tmp_path)
  assert first == second | {"time": first["time"]}
  assert first["jax"] == jax.__version__ and first["cpu"] == starts.cpu_type()


def test_the_commit_is_that_of_git_or_of_a_file(tmp_path, monkeypatch):
  assert starts.commit(tmp_path) == ""
  (tmp_path / "COMMIT").write_text("abc123\n")
  assert starts.commit(tmp_path) == "abc123"
  git = ["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@t"]
  for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
    subprocess.run([*git, *words], check=True)
  clean = starts.commit(tmp_path)
  assert len(clean) == 12
  (tmp_path / "COMMIT").write_text("changed")
  assert starts.commit(tmp_path) == f"{clean}-dirty"
  monkeypatch.setenv("PATH", "")  # a machine without git
  assert starts.commit(tmp_path) == "changed"


def test_the_type_of_a_cpu_has_its_name_and_avx512(tmp_path):
  for flags, words in (("fpu avx512f", "with"), ("fpu avx2", "without")):
    (tmp_path / "cpu").write_text(f"model name\t: Fast One\nflags\t\t: {flags}\n\nmodel name: x")
    assert starts.cpu_type(tmp_path / "cpu") == f"Fast One {words} AVX-512"
