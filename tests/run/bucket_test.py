"""A run's folder in a bucket, on a real server of the interface."""

import json
import os

import numpy as np
import pytest

from ares_jax.run import best, bucket, files, records
from ares_jax.run.config import LoopConfig
from ares_jax.system.gcs import file_system


def content(address):
  """{name: bytes} of all objects in a folder."""
  root = address.removeprefix("gs://")
  return {name.removeprefix(f"{root}/"): file_system().cat_file(name)
          for name in file_system().find(root)}


def put(address, files):
  for name, text in files.items():
    file_system().pipe_file(f"{address}/{name}", text.encode())


def write(folder, name, text, mode="w"):
  path = os.path.join(folder, name)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path, mode) as file:
    file.write(text)


def test_a_folder_on_a_disk_is_used_as_it_is(tmp_path):
  with bucket.open_folder(str(tmp_path)) as folder:
    assert folder == str(tmp_path)
  bucket.upload(str(tmp_path))
  assert bucket.absolute("runs/a") == os.path.abspath("runs/a")


@pytest.mark.parametrize("address", ["s3://a/b", "gs://", "gs:///", "gs://a", "gs://a/"])
def test_other_stores_are_refused(address):
  with pytest.raises(ValueError, match=f"{address} is neither a folder on a disk nor gs://BUCKET"):
    bucket.absolute(address)


def test_files_are_fetched_but_not_checkpoints(gcs):
  put(gcs, {"config.json": "{}", "held_out/aepo.jsonl": "1\n", "images/a.jpg": "x", "lock": "{}",
            "aepo/3/state": "x", "tensorboard/aepo/events": "x", "curation/00000-of-00002/lock": "",
            "curation/00000-of-00002/curation.jsonl": "2\n", "empty": ""})
  with bucket.open_folder(gcs) as folder:
    assert str(folder) == f"{folder}" == gcs
    found = {os.path.relpath(os.path.join(root, name), folder)
             for root, _, names in os.walk(folder) for name in names}
    assert found == {"config.json", "held_out/aepo.jsonl", "images/a.jpg", "empty",
                     "curation/00000-of-00002/curation.jsonl"}
    put(gcs, {"curation/00001-of-00002/curation.jsonl": "3\n"})
    bucket.fetch(folder, "curation")
    assert open(os.path.join(folder, "curation/00001-of-00002/curation.jsonl")).read() == "3\n"
  assert not os.path.exists(folder)


def test_the_best_step_of_a_run_in_a_bucket_is_known(gcs):
  lines = [{"stage": "aepo", "step": step, "validate/accuracy": value}
           for step, value in ((0, 0.5), (4, 0.4))]
  put(gcs, {"metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines)})
  config = LoopConfig(2, 1, False, 2, keep_best="validate/accuracy")
  with pytest.raises(ValueError, match="has no checkpoint of aepo at step 0, "):
    best.best_step(gcs, "aepo", config)


def test_only_what_changed_is_uploaded(gcs):
  put(gcs, {"metrics.jsonl": "1\n", "config.json": "{}"})
  with bucket.open_folder(gcs) as folder:
    put(gcs, {"config.json": "another run's"})  # as of a run that goes on while a report is made
    write(folder, "metrics.jsonl", "2\n", "a")
    write(folder, "images/a.jpg", "x")
    write(folder, "results.json.tmp", "half")
    bucket.upload(folder)
    assert content(gcs) == {"metrics.jsonl": b"1\n2\n", "config.json": b"another run's",
                            "images/a.jpg": b"x"}
    write(folder, "metrics.jsonl", "3\n")  # cut, as when a run resumes
  assert content(gcs)["metrics.jsonl"] == b"3\n"


def test_files_that_others_refer_to_are_uploaded_first(gcs, monkeypatch):
  order = []
  with bucket.open_folder(gcs) as folder:
    send = bucket.BucketFolder._send
    monkeypatch.setattr(bucket.BucketFolder, "_send",
                        lambda self, name: (order.append(name), send(self, name)))
    for name in ("results.json", "rollouts.jsonl", "images/a.jpg"):
      write(folder, name, "x")
    bucket.upload(folder)
  assert order == ["images/a.jpg", "rollouts.jsonl", "results.json"]


def test_lines_are_uploaded_in_the_background(gcs, monkeypatch):
  monkeypatch.setattr(bucket, "_EVERY", 0.05)
  with bucket.open_folder(gcs) as folder:
    write(folder, "metrics.jsonl", "1\n")
    while not content(gcs):
      pass
  assert content(gcs) == {"metrics.jsonl": b"1\n"}


def test_what_changed_before_an_error_is_uploaded(gcs):
  with pytest.raises(ValueError, match="^mistake$"), bucket.open_folder(gcs) as folder:
    write(folder, "metrics.jsonl", "1\n")
    raise ValueError("mistake")
  assert content(gcs) == {"metrics.jsonl": b"1\n"}


def test_messages_name_the_bucket_and_not_the_copy(gcs):
  put(gcs, {"config.json": "{}", "metrics.jsonl": "{\n{}\n"})
  with pytest.raises(ValueError, match=f"^{gcs}/metrics.jsonl line 1 is not JSON"):
    with bucket.open_folder(gcs) as folder:
      records.read_run(folder)


def test_dumped_batches_beyond_the_newest_are_removed_in_the_bucket(gcs):
  for steps in ((1, 2), (3, 4)):  # the second time by a run that resumed
    with bucket.open_folder(gcs) as folder:
      for step in steps:
        files.dump_batch(folder, "aepo", step, {"x": np.float32([1])})
        bucket.upload(folder)
  assert sorted(content(gcs)) == [f"nonfinite/aepo-{step}.npz" for step in (2, 3, 4)]


def test_nothing_is_uploaded_when_another_run_has_taken_over_and_the_copy_stays(gcs, caplog):
  def confirm():
    raise ValueError("taken over")

  with pytest.raises(OSError, match="^taken over; what was not uploaded is in /.*/ares_jax-"):
    with bucket.open_folder(gcs, confirm) as folder:
      write(folder, "metrics.jsonl", "1\n")
  assert content(gcs) == {}
  assert open(os.path.join(folder, "metrics.jsonl")).read() == "1\n"
  with pytest.raises(ValueError, match="^mistake$"), bucket.open_folder(gcs, confirm):
    raise ValueError("mistake")
  assert "taken over; what was not uploaded is in" in caplog.text


def test_a_bucket_that_does_not_exist_is_named(gcs):
  with pytest.raises(OSError, match="^gs://ares-no-such-bucket/run: no such bucket"):
    with bucket.open_folder("gs://ares-no-such-bucket/run") as folder:
      write(folder, "config.json", json.dumps({}))
