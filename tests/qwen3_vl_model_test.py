"""Qwen3-VL goes through the commands: both stages with images, evaluation, export, an answer."""

import json

import jax
import numpy as np
import pytest
import text_model_test
from data.qwen3_vl_chat_test import INSTRUCT, THINKING
from models import make_golden
from PIL import Image

from ares_jax import export, generate, train
from ares_jax.models import hf_files, hf_processor
from ares_jax.run import setup
from ares_jax.sampling.sampler import SamplingConfig
from ares_jax.system import mesh

SIZES = ((40, 70), (33, 33), (96, 64))  # px; with 1024..4096 px a picture has 1 to 4 tokens


def config_of(folder, template, **changes):
  for number, size in enumerate(SIZES):
    Image.fromarray(make_golden.picture(*size, number)).save(folder / f"{number}.png")
  # None, one or two pictures.
  rows = [{"id": str(number), "question": f"What is {number} + 1?", "answer": str(number + 1),
           "images": [str(folder / f"{(number + 1) % 3}.png"), str(folder / "0.png")][:number % 3],
           "response": f"<think> {number} + 1 </think> \\boxed{{{number + 1}}}"}
          for number in range(16)]
  return text_model_test.config_of(folder, "qwen3_vl", rows, template, **{
    "prompt__min_pixels": 1024, "prompt__max_pixels": 4096, "prompt__windows": (1,),
    "warmup__row_windows": 3, "adacs__row_windows": 3, "aepo__frozen": ()} | changes)


@pytest.mark.slow
@pytest.mark.parametrize("template, devices, changes", [
  (INSTRUCT, (1, 1), {}),
  (THINKING, (2, 2), {"model__lora__rank": 2, "aepo__frozen": ("vision",), "adacs__steps": 0})])
def test_qwen3_vl_is_trained_exported_and_answers(template, devices, changes, tmp_path):
  config = config_of(tmp_path, template, **changes)
  devices = mesh.make_mesh(*devices, jax.devices()[:devices[0] * devices[1]])
  with jax.set_mesh(devices), setup.open_run(config, workdir=str(tmp_path)) as run:
    before = run.init_params()
    train.train(run, str(tmp_path))
  metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert {line["stage"] for line in metrics} == (
    {"warmup", "aepo"} if changes else {"warmup", "adacs", "aepo"})
  assert metrics[-1]["update/skipped"] == 0 and metrics[-1]["work/flops"] > 0
  # The sampler's log-probabilities are those of the update: DeepStack reaches both.
  assert metrics[-1]["loss/sampler_gap"] < 1e-4
  opened = "<think>\n" if template == THINKING else ""
  lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
  assert lines and all(line["response"].startswith(opened) for line in lines)
  assert json.loads((tmp_path / "results.json").read_text())
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    export.export(str(tmp_path), str(tmp_path / "out"))
    generator, after = generate.load(str(tmp_path / "out"), dtype="float32", suffix="")
    sampling = SamplingConfig(temperature=0.0, top_p=1.0, top_k=0, min_tokens=0, max_tokens=8)
    answer = generate.generate(generator, after, "Is <image 2> <image 1>?",
                               [str(tmp_path / "2.png"), str(tmp_path / "1.png")],
                               sampling=sampling, seed=0)
  assert answer["tokens"] >= 1
  moved = {name for name, leaf in hf_files.by_name(before).items()
           if not np.array_equal(leaf, hf_files.by_name(after)[name])}
  if changes:
    assert moved == {f"blocks/{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")}
  else:
    assert moved == hf_files.by_name(before).keys()
  assert hf_processor.pixel_limits(tmp_path / "out", generator.model.vision) == (1024, 4096)
