import functools
import json
import os
import warnings

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from models import golden_batch

from ares_jax import export
from ares_jax.data import digits
from ares_jax.data.chat import Chat
from ares_jax.data.prompts import Encoder
from ares_jax.models import hf, hf_processor, lora, qwen25_vl, weights
from ares_jax.run import identity
from ares_jax.run import model as model_lib
from ares_jax.run.checkpoint import manager
from ares_jax.system import mesh


@flax.struct.dataclass
class State:
  """What a stage saves: weights among other things."""

  step: jax.Array
  params: dict
  opt_state: dict


def parts():
  config = tiny.read()
  opened = model_lib.open_model(config.model)
  return config, opened.config, opened.tokens.tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(workdir, weights): a run whose warm-up is saved at step 2, its adacs at 4, aepo not yet."""
  workdir = tmp_path_factory.mktemp("run")
  config = json.loads(tiny.values().to_json_best_effort())
  del config["mesh"]["slice"]  # as of a run from before there were any
  (workdir / "config.json").write_text(json.dumps(config))
  _, model, _ = parts()
  with jax.set_mesh(mesh.make_mesh(2, 2)):
    for stage, step in (("warmup", 2), ("adacs", 4)):
      rng = np.random.default_rng(step)
      # Every parameter is random: norms of 1 and biases of 0 would hide mistakes.
      params = jax.tree.map(
        lambda x, rng=rng: jax.device_put(np.float32(0.2 * rng.standard_normal(x.shape)),
                                          x.sharding),
        weights.abstract(weights.weight_table(model), jax.sharding.get_mesh(), jnp.float32))
      moment = jax.tree.map(jnp.ones_like, params)
      state = State(mesh.put(jnp.int32(step)), params, {"moment": moment})
      with manager.Checkpoints(str(workdir / stage), keep=1) as checkpoints:
        checkpoints.save(step, state, {})
  (workdir / "aepo").mkdir()
  return workdir, params


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
  out = tmp_path_factory.mktemp("out") / "hf"
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    result = export.export(str(run[0]), str(out))
  return out, result


def test_the_last_saved_stage_is_written_without_its_optimizer(run, exported):
  out, result = exported
  _, model, _ = parts()
  assert result == {"folder": str(out), "stage": "adacs", "step": 4,
                    "parameters": weights.count(model)}
  again = hf.model_config(out, compute_dtype="float32", remat="none", unroll=1)
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, golden_batch.read_hf(out, again), run[1])
  config, _, _ = parts()
  assert hf_processor.pixel_limits(out, model.vision) == (config.prompt.min_pixels,
                                                          config.prompt.max_pixels)


@pytest.mark.slow
def test_transformers_loads_the_export_and_gives_our_logits(run, exported):
  torch = pytest.importorskip("torch")
  import transformers

  out, _ = exported
  config, model, tokenizer = parts()
  chat = Chat(tokenizer, "", model.image_token)
  encoder = Encoder(chat, config.prompt, model.vision.window, model.vision.patch,
                    model.vision.merge)
  source = digits.DigitsSource(config.data.digits.problem, "test", 0, 4)
  rows = [source[index] for index in range(2)]
  batch = encoder.batch(rows, np.arange(2))
  vision = qwen25_vl.VisionInput(**batch.vision)
  features = qwen25_vl.vision_features(model, run[1], vision)
  embeds = qwen25_vl.embed(model, run[1], batch.tokens, batch.unit, features)
  segment = (np.arange(batch.tokens.shape[1]) < batch.length[:, None]).astype(np.int32)
  states = qwen25_vl.hidden(model, run[1], embeds, batch.positions, segment)
  ours = np.asarray(states @ qwen25_vl.unembedding(model, run[1]).T)

  theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
    out, dtype=torch.float32, attn_implementation="eager").eval()
  saved = transformers.AutoTokenizer.from_pretrained(out)
  processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(out)
  for number, row in enumerate(rows):
    length = int(batch.length[number])
    image = processor(images=row["images"], return_tensors="pt")
    count = int(image["image_grid_thw"].prod()) // 4
    text = saved.apply_chat_template(
      [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}],
      tokenize=False, add_generation_prompt=True)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
    ids = saved(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == batch.tokens[number, :length].tolist()
    theirs.model.rope_deltas = None
    logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=(ids == model.image_token).int(), **image).logits
    np.testing.assert_allclose(ours[number, :length], logits[0].detach().numpy(), atol=1e-4)


@pytest.fixture(scope="module")
def adapters(exported, tmp_path_factory):
  """(workdir, adapters): a run of random adapters over the exported model, at step 3."""
  workdir = tmp_path_factory.mktemp("adapters")
  changes = {"model__path": str(exported[0]), "model__lora__rank": 2, "model__lora__alpha": 5.0,
             "model__lora__targets": tuple(lora.TARGETS)}
  (workdir / "config.json").write_text(tiny.values(**changes).to_json_best_effort())
  config = tiny.read(**changes)
  model = model_lib.model_config(config.model)
  with jax.set_mesh(mesh.make_mesh(2, 2)):
    rng = np.random.default_rng(0)
    pairs = jax.tree.map(
      lambda x: jax.device_put(np.float32(0.3 * rng.standard_normal(x.shape)), x.sharding),
      lora.abstract(model, config.model.lora, jax.sharding.get_mesh()))
    base = lora.Base(model_lib.first_weights(config, model), 2.5)
    identity.keep_base(str(workdir), base)
    with manager.Checkpoints(str(workdir / "aepo"), keep=1) as checkpoints:
      checkpoints.save(3, State(mesh.put(jnp.int32(3)), pairs, {}), {})
  return workdir, pairs


@pytest.mark.slow
def test_peft_loads_the_adapters_and_gives_the_logits_of_the_merged_model(exported, adapters,
                                                                           tmp_path):
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  import transformers

  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    result = export.export(str(adapters[0]), str(tmp_path / "adapter"), adapter=True)
    export.export(str(adapters[0]), str(tmp_path / "merged"))
  assert result["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(adapters[1]))
  read = functools.partial(transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained,
                           dtype=torch.float32, attn_implementation="eager")
  ids = torch.arange(10, 40)[None]
  merged, plain = (read(folder).eval()(input_ids=ids).logits.detach().numpy()
                   for folder in (tmp_path / "merged", exported[0]))
  with warnings.catch_warnings():
    warnings.filterwarnings("error", message="Found missing adapter keys")
    adapted = peft.PeftModel.from_pretrained(read(exported[0]), str(tmp_path / "adapter")).eval()
  names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
  assert len(names) == 2 * 2 * len(lora.TARGETS) and not [x for x in names if "visual" in x]
  logits = adapted(input_ids=ids).logits.detach().numpy()
  np.testing.assert_allclose(logits, merged, atol=1e-4)
  assert np.abs(merged - plain).max() > 0.1


def test_without_adapters_of_a_folder_there_are_none_to_write(run, tmp_path):
  with jax.set_mesh(mesh.make_mesh(-1, 1)), pytest.raises(
      ValueError, match="rank = 0, model.path = '': --adapter needs adapters"):
    export.export(str(run[0]), str(tmp_path / "adapter"), adapter=True)


def test_a_stage_can_be_chosen(run, tmp_path):
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    assert export.export(str(run[0]), str(tmp_path / "hf"), "warmup")["step"] == 2


def test_what_cannot_be_exported_is_one_error(run, exported, tmp_path):
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    with pytest.raises(ValueError, match="config.json does not exist"):
      export.export(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="exists; export to a new folder"):
      export.export(str(run[0]), str(exported[0]))
    with pytest.raises(ValueError, match="no checkpoint in .*/aepo"):
      export.export(str(run[0]), str(tmp_path / "out"), "aepo")
    config = json.loads((run[0] / "config.json").read_text())
    config["model"]["sizes"]["mlp"] = 65
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no checkpoint of warmup, adacs, aepo yet"):
      export.export(str(tmp_path), str(tmp_path / "out"))
    os.symlink(run[0] / "warmup", tmp_path / "warmup")
    with pytest.raises(ValueError, match="checkpoint 2 in .* does not fit this run: .*blocks/down"):
      export.export(str(tmp_path), str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()
