import json

import numpy as np
import pytest
import tiny
from etils import epath

from ares_jax.data.sources import SourceConfig
from ares_jax.run import data as data_lib
from ares_jax.run import identity, setup
from ares_jax.run import model as model_lib
from ares_jax.run.identity import _model_digest, fingerprint


def marks(config):
  opened = model_lib.open_model(config.model)
  data = data_lib.RunData(config, None, None, None)
  return fingerprint(setup.Run(config, opened.config, opened.tokens.tokenizer, None, None, data))


def test_generated_data_are_told_by_seed_and_size():
  one = marks(tiny.read())
  assert sorted(one) == ["data.eval", "data.rl", "data.sft", "data.warmup", "template", "tokenizer"]
  assert one == marks(tiny.read()) and one["data.rl"].startswith("64 rows, ")
  other = marks(tiny.read(seed=1))
  # The test rows are the same for every seed.
  assert [key for key in one if one[key] != other[key]] == ["data.warmup", "data.sft",
                                                            "data.rl"]
  assert "data.sft" not in marks(tiny.read(adacs__steps=0))


def test_a_file_that_changed_under_its_name_is_refused_by_name_or_allowed(tmp_path):
  stages = ("warmup", "sft", "rl", "eval")
  for name in stages:
    (tmp_path / f"{name}.jsonl").write_text('{"question": "q", "answer": "3"}\n' * 4)
  files = data_lib.FilesData(*(
    (SourceConfig(str(tmp_path / f"{name}.jsonl"), "plain", "", 1.0),) for name in stages))
  # read_config refuses a fresh model of such data; sizes and tokenizer are all that counts here.
  config = tiny.read()
  object.__setattr__(config, "data", data_lib.DataConfig(None, files, "error"))
  workdir = str(tmp_path / "run")
  identity.keep_records(workdir, {"fingerprint.json": marks(config)})
  identity.keep_records(workdir, {"fingerprint.json": marks(config)})
  (tmp_path / "rl.jsonl").write_text('{"question": "q", "answer": "4"}\n' * 4)
  with pytest.raises(ValueError, match="or other files: data.rl differ; .* "
                                       "--allow_change=data.rl$"):
    identity.keep_records(workdir, {"fingerprint.json": marks(config)})
  identity.keep_records(workdir, {"fingerprint.json": marks(config)}, ("data.rl",))
  identity.keep_records(workdir, {"fingerprint.json": marks(config)})
  assert set(json.loads((tmp_path / "run" / "fingerprint.json").read_text())) >= {"template"}


def test_weights_of_the_same_names_and_sizes_are_told_by_what_they_hold(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  weights = np.zeros(2**20, np.float32)  # 4 MiB: digested in pieces
  found = []
  for value in (0.0, 1.0):
    weights[0] = value
    (tmp_path / "model.safetensors").write_bytes(weights.tobytes())
    found.append(_model_digest(epath.Path(tmp_path)))
  assert found[0] != found[1]
