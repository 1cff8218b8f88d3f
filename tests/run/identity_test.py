import json
import logging
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

from ares_jax.run import config as run_config
from ares_jax.run import files, identity, lock
from ares_jax.system import config as config_lib

HOLD = '''
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(sys.argv[2])
file.flush()
print("held", flush=True)
time.sleep(600)
'''


def record(**changes):
  return json.dumps({"host": socket.gethostname(), "pid": 7, "time": "2025-01-01 00:00:00 +0000"}
                    | changes)


def test_one_run_a_folder(tmp_path):
  with lock.lock(str(tmp_path)):
    held = json.loads((tmp_path / "lock").read_text())
    assert held["pid"] == os.getpid() and held["host"] == socket.gethostname()
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on .* since 20"):
      with lock.lock(str(tmp_path)):
        pass
  with lock.lock(str(tmp_path)):  # and again, when it is over
    pass
  assert (tmp_path / "lock").read_text() == ""


def test_a_damaged_lock_is_that_of_no_known_process(tmp_path):
  (tmp_path / "lock").write_bytes(b"\0\xff")
  with lock.lock(str(tmp_path)):
    with pytest.raises(ValueError, match="in use by process"):
      with lock.lock(str(tmp_path)):
        pass


@pytest.mark.parametrize("inside", ["", "x"])
def test_a_file_is_no_workdir(tmp_path, inside):
  (tmp_path / "notes").write_text("mine")
  with pytest.raises(ValueError, match="notes.* is a file, or in a file; name a folder"):
    with lock.lock(str(tmp_path / "notes" / inside)):
      pass
  assert (tmp_path / "notes").read_text() == "mine"


def test_other_hosts_can_read_a_lock_at_once(tmp_path, monkeypatch):
  written = []
  monkeypatch.setattr(os, "fsync", lambda number: written.append(os.fstat(number).st_size))
  with lock.lock(str(tmp_path)):
    assert written == [os.stat(tmp_path / "lock").st_size]


def test_the_lock_of_a_killed_run_is_stale(tmp_path, caplog):
  path = tmp_path / "lock"
  process = subprocess.Popen([sys.executable, "-c", HOLD, path, record()], stdout=subprocess.PIPE)
  assert process.stdout.readline() == b"held\n"
  with pytest.raises(ValueError, match="in use by process 7 on .*; stop that run or use another"):
    with lock.lock(str(tmp_path)):
      pass
  process.kill()
  process.wait()
  with caplog.at_level(logging.WARNING), lock.lock(str(tmp_path)):
    assert json.loads(path.read_text())["pid"] == os.getpid()
  assert "the lock of process 7" in caplog.text and "stale" in caplog.text


def test_another_host_is_believed_while_it_renews_its_lock(tmp_path):
  path = tmp_path / "lock"
  path.write_text(record(host="elsewhere"))
  with pytest.raises(ValueError, match="in use by process 7 on elsewhere .*, seen 0 s ago"):
    with lock.lock(str(tmp_path)):
      pass
  long_ago = time.time() - lock._GONE - 1
  os.utime(path, (long_ago, long_ago))
  with lock.lock(str(tmp_path)):
    assert json.loads(path.read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize("ahead", [5, 97570200])
def test_a_lock_dated_in_the_future_is_held_only_if_it_is_updated(tmp_path, monkeypatch, ahead):
  path, future = tmp_path / "lock", time.time() + ahead
  path.write_text(record(host="elsewhere"))
  os.utime(path, (future, future))
  waits = []
  monkeypatch.setattr(lock.time, "sleep", lambda seconds: (waits.append(seconds), os.utime(path)))
  with pytest.raises(ValueError, match=f"in use by process 7 on elsewhere .*remove {path}"):
    with lock.lock(str(tmp_path)):
      pass
  os.utime(path, (future, future))
  monkeypatch.setattr(lock.time, "sleep", waits.append)
  with lock.lock(str(tmp_path)):
    assert json.loads(path.read_text())["host"] == socket.gethostname()
  assert min(waits) > lock._RENEW  # a living run updates it within that time


def test_a_lock_is_renewed(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "_RENEW", 0.05)
  with lock.lock(str(tmp_path)):
    os.utime(tmp_path / "lock", (0, 0))
    limit = time.monotonic() + 30
    while not os.stat(tmp_path / "lock").st_mtime and time.monotonic() < limit:
      time.sleep(0.01)
    assert os.stat(tmp_path / "lock").st_mtime > 0


def test_a_dumped_batch_reads_back_and_three_are_kept(tmp_path):
  batch = {"tokens": np.arange(6).reshape(2, 3), "vision": {"patches": np.float32([np.nan])}}
  for step in range(5):
    files.dump_batch(str(tmp_path), "aepo", step, batch)
    os.utime(tmp_path / "nonfinite" / f"aepo-{step}.npz", (step, step))
  assert sorted(os.listdir(tmp_path / "nonfinite")) == ["aepo-2.npz", "aepo-3.npz", "aepo-4.npz"]
  with np.load(tmp_path / "nonfinite" / "aepo-4.npz") as file:
    np.testing.assert_array_equal(file["tokens"], batch["tokens"])
    np.testing.assert_array_equal(file["vision/patches"], batch["vision"]["patches"])


def keep(folder, marks=None, allow=(), **changes):
  """Keeps the tiny config with `changes`, and digests."""
  identity.keep_records(str(folder), {
    "config.json": json.loads(tiny.values(**changes).to_json_best_effort()),
    "fingerprint.json": marks or {"tokenizer": "a", "data.rl": "b"}}, allow)


def test_a_workdir_belongs_to_one_config_but_for_how_it_runs(tmp_path):
  keep(tmp_path)
  keep(tmp_path, threads=3, aepo__loop__save_every=7, engine__slots=3)
  with pytest.raises(ValueError, match="made with another config .*: aepo.kl.dynamic, seed differ"):
    keep(tmp_path, seed=1, aepo__kl__dynamic=False)
  kept = json.loads((tmp_path / "config.json").read_text())
  assert kept["threads"] == 3
  del kept["mesh"]["slice"]  # as of a run from before there were any
  (tmp_path / "config.json").write_text(json.dumps(kept))
  keep(tmp_path, mesh__slice=2)
  with pytest.raises(ValueError, match="files: aepo.kl.dynamic differ; .*=aepo.kl.dynamic$"):
    keep(tmp_path, seed=1, aepo__kl__dynamic=False, allow=("seed",))
  keep(tmp_path, seed=1, allow=("seed",))
  keep(tmp_path, seed=1)  # the new value is now the workdir's


def test_a_setting_that_an_older_run_does_not_have_counts_as_its_default(tmp_path):
  new = {"aepo": {"filter": {"low": 0.01, "key": "accuracy"}}}
  old = {"aepo": {"filter": {"low": 0.01}}}
  identity.keep_records(str(tmp_path), {"config.json": old})
  assert identity.check_records(str(tmp_path), {"config.json": new}) == {}
  new["aepo"]["filter"]["key"] = "reward"
  with pytest.raises(ValueError, match="aepo.filter.key differ"):
    identity.check_records(str(tmp_path), {"config.json": new})


def test_a_setting_that_only_begins_like_a_free_one_is_kept(tmp_path):
  def keep(**grade):
    identity.keep_records(str(tmp_path), {"config.json": {"grade": {"timeout": 1.0} | grade}})

  keep()
  keep(timeout=2.0, timeout_share=0.5)
  with pytest.raises(ValueError, match="files: grade.timeouts differ"):
    keep(timeouts=3)


def test_what_is_refused_changes_nothing(tmp_path):
  keep(tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  with pytest.raises(ValueError, match="other files: data.rl differ"):
    keep(tmp_path, {"tokenizer": "a", "data.rl": "c"}, seed=1, allow=("seed",))
  assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_checkpoint_made_with_something_else_is_refused_unless_it_was_allowed(tmp_path):
  keep(tmp_path)
  first = identity.run_marks(str(tmp_path))
  assert first["data.rl"] == '"b"' and first["seed"] == "0" and "threads" not in first
  for found in (first, {}):  # {}: of a version that kept none
    identity.check_marks(str(tmp_path), "aepo", found, "checkpoint 3")
  with pytest.raises(ValueError, match="^checkpoint 3 was made .*: data.rl, seed differ; "):
    identity.check_marks(
      str(tmp_path), "aepo", first | {"data.rl": '"x"', "seed": "5"}, "checkpoint 3")
  keep(tmp_path, {"tokenizer": "a", "data.rl": "c"}, ("seed", "data.rl"), seed=1)
  identity.check_marks(str(tmp_path), "aepo", first, "checkpoint 3")  # from before the change
  with pytest.raises(ValueError, match="seed differ"):
    identity.check_marks(str(tmp_path), "aepo", first | {"seed": "7"}, "checkpoint 3")


def test_runs_that_differ_later_go_on_from_copies_of_one_cold_start(tmp_path):
  keep(tmp_path, {"data.rl": "a"})
  other = identity.run_marks(str(tmp_path)) | {"data.rl": '"b"', "aepo.reward.kind": '"x"'}
  other |= {"data.files.rl": '"x"', "data.digits.rl": "9"}
  identity.check_marks(str(tmp_path), "adacs", other, "checkpoint 3")
  identity.check_marks(
    str(tmp_path), "warmup", other | {"curate.selection": '"x"'}, "checkpoint 3")
  # The probe of stage 1 answers at the length of stage 2.
  for stage, key in (("aepo", "aepo.reward.kind"), ("adacs", "curate.selection"),
                     ("adacs", "aepo.sampling.max_tokens"), ("warmup", "warmup.steps")):
    with pytest.raises(ValueError, match=f"{key}.* differ"):
      identity.check_marks(str(tmp_path), stage, other | {key: '"x"'}, "checkpoint 3")


def test_data_of_older_runs_are_read_under_the_names_of_today():
  config = {"aepo": {"prompts": 4}, "data": {
    "files": {"lessons": [], "curated": [], "prompts": [{"path": "test"}], "test": []},
    "digits": {"curated": 1, "prompts": 2, "test": 3,
               "teacher": {"first_lesson": 4, "last_lesson": 5, "first_level": 6}}}}
  assert files.current_names(config) == {"aepo": {"prompts": 4}, "data": {
    "files": {"warmup": [], "sft": [], "rl": [{"path": "test"}], "eval": []},
    "digits": {"sft": 1, "rl": 2, "eval": 3,
               "teacher": {"first_warmup": 4, "last_warmup": 5, "first_level": 6}}}}
  digests = {"data.lessons": "a", "data.files.prompts": "b", "prompts": "c", "aepo.prompts": "d"}
  assert files.current_names(digests) == {
    "data.warmup": "a", "data.files.rl": "b", "prompts": "c", "aepo.prompts": "d"}


def test_the_marks_in_an_older_checkpoint_are_compared_under_the_names_of_today(tmp_path):
  keep(tmp_path)
  new = {f"data.{new}": f"data.{old}" for old, new in files.RENAMED_DATA.items()}
  old = {new.get(key, key): value for key, value in identity.run_marks(str(tmp_path)).items()}
  assert "data.prompts" in old and "data.rl" not in old
  identity.check_marks(str(tmp_path), "aepo", old, "checkpoint 3")
  with pytest.raises(ValueError, match="^checkpoint 3 was made .*: data.rl differ; "):
    identity.check_marks(str(tmp_path), "aepo", old | {"data.prompts": '"x"'}, "checkpoint 3")


def test_a_file_that_is_not_finished_leaves_nothing(tmp_path):
  with pytest.raises(KeyboardInterrupt), files.atomic_write(str(tmp_path / "a")) as temporary:
    pathlib.Path(temporary).write_text("half")
    raise KeyboardInterrupt
  assert os.listdir(tmp_path) == []


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
  written = []
  monkeypatch.setattr(os, "fsync", lambda number: written.append(
    (os.fstat(number).st_size, os.listdir(tmp_path))))
  files.write_text(str(tmp_path / "a"), "four")
  assert written == [(4, ["a.tmp"])] and os.listdir(tmp_path) == ["a"]


def test_a_disk_that_refuses_a_file_keeps_the_old_one_and_nothing_besides(tmp_path):
  path = tmp_path / "results.json"
  files.write_text(str(path), "old")
  (tmp_path / "results.json.tmp").symlink_to("/dev/full")
  with pytest.raises(OSError, match="No space left"):
    files.write_text(str(path), "new" * 10_000)
  assert os.listdir(tmp_path) == ["results.json"] and path.read_text() == "old"


# Every setting of a config, by hand: the records must say the same (run/config.py, run/data.py).
FREE = ("threads", "hosts.", "mesh.", "engine.cache_gib", "engine.slots", "engine.read",
        "engine.chunk", "grade.workers", "grade.timeout", "grade.timeout_share", "stall_minutes",
        "wandb.", "warmup.loop.", "adacs.loop.", "aepo.loop.", "aepo.terms_every", "aepo.validate",
        "aepo.validate_on", "reward.failure", "reward.timeout", "reward.judge.")
PER_HOST = ("threads", "grade.workers", "grade.timeout", "stall_minutes")
FIRST_IN_STAGE_1 = ("adacs.", "curate.", "aepo.sampling.max_tokens", "data.sft",
                    "data.files.sft", "data.digits.sft", "engine.int8_pages")
FIRST_IN_STAGE_2 = ("aepo.", "data.rl", "data.files.rl", "data.digits.rl", "reward.weights",
                    "reward.overlong")
DECIDE_CURATION = (
  "seed", "model.", "data.digits", "data.digits.", "data.bad_rows", "prompt.", "grade.grader",
  "warmup.steps", "tokenizer", "template", "weights", "curate.pass_rates", "curate.problems",
  "curate.samples", "aepo.sampling.max_tokens", "data.sft", "data.files.sft",
  "data.digits.sft", "reward.function", "reward.arguments", "reward.accuracy",
  "reward.threshold", "engine.int8_pages")
DIGESTS = ("tokenizer", "template", "weights", "data.warmup", "data.sft", "data.rl",
           "data.eval", "base.final_norm", "base.blocks/q")


@pytest.mark.parametrize("name", ["ares_tiny", "aepo_7b"])
def test_the_use_of_every_setting_is_the_expected_one(name):
  def is_among(key, names):
    return key in names or key.startswith(tuple(name for name in names if name.endswith(".")))

  values = config_lib.load(str(tiny.ROOT / "configs" / f"{name}.py"))
  for key in (*identity.flatten(json.loads(values.to_json_best_effort())), *DIGESTS):
    found = identity.use_of(key)
    stage = ("adacs" if is_among(key, FIRST_IN_STAGE_1) else
             "aepo" if is_among(key, FIRST_IN_STAGE_2) else "warmup")
    assert found.free == is_among(key, FREE), key
    assert found.per_host == is_among(key, PER_HOST), key
    assert found.curation == is_among(key, DECIDE_CURATION), key
    assert found.free or found.first_read_by == stage, key


def test_every_setting_is_classified_where_it_is_declared():
  marks = config_lib.setting_marks(run_config.TrainConfig)
  assert len(marks) > 150
  assert [key for key, found in marks.items() if not found.keys() & {"free", "first_read_by"}] == []


def test_a_removed_setting_of_an_older_run_counts_like_its_section():
  assert identity.use_of("engine.removed").free
  assert identity.use_of("aepo.loss.removed") == identity.Use("aepo")
  assert identity.use_of("removed") == identity.Use("warmup")


def test_a_shard_of_a_curation_that_decides_otherwise_is_refused(tmp_path):
  run, shard = tmp_path / "run", tmp_path / "shard"
  keep(run)
  keep(shard, threads=7, curate__count=3, aepo__group=8, aepo__minibatch=32)
  identity.check_curation(str(run), str(shard))
  other = tmp_path / "other"
  keep(other, {"tokenizer": "c"}, curate__samples=3)
  with pytest.raises(ValueError, match="made with other values of curate.samples, tokenizer; make"):
    identity.check_curation(str(run), str(other))


def test_names_in_the_data_are_no_old_keys():
  results = {"aepo": {"source": {"place": {"formatted": 1.0}}, "level": {"thought": {"n": 2}},
                      "formatted": 0.5}}
  assert files.current_names(results) == {
    "aepo": {"source": {"place": {"format_ok": 1.0}}, "level": {"thought": {"n": 2}},
             "format_ok": 0.5}}
