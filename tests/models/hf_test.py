import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import golden_batch, make_golden, random_folder
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ares_jax.models import families, hf, hf_config, hf_files, weights
from ares_jax.system import mesh as mesh_lib

VL = families.FAMILIES["qwen2_5_vl"]
WITH_IMAGES = tuple(name for name, family in families.FAMILIES.items() if family.tower)
TIED, UNTIED = make_golden.folder("tied"), make_golden.folder("untied")


def read(folder):
  out = {}
  for file in sorted(folder.glob("*.safetensors")):
    out |= load_file(file)
  return out


@pytest.mark.parametrize("variant", [*make_golden.VARIANTS, *make_golden.FAMILIES])
def test_a_round_trip_gives_the_same_bytes_in_the_same_files(tmp_path, variant):
  base, config = make_golden.folder(variant), golden_batch.config(variant)
  hf.to_hf(golden_batch.read_hf(base, config), config, tmp_path / "out", base)
  before, after = read(base), read(tmp_path / "out")
  assert before.keys() == after.keys()
  for name in before:
    assert before[name].dtype == after[name].dtype
    assert before[name].tobytes() == after[name].tobytes(), name
  for path in base.glob("*.json"):
    assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
  assert {path.name for path in (tmp_path / "out").iterdir()} \
    == {path.name for path in base.iterdir()} - {"references.npz"}
  with safe_open(next((tmp_path / "out").glob("*.safetensors")), "np") as file:
    assert file.metadata() == {"format": "pt"}  # transformers refuses files without it


def test_trained_weights_come_back_in_the_bases_dtype(tmp_path):
  config = golden_batch.config("untied")
  params = jax.tree.map(lambda leaf: 2 * leaf, golden_batch.read_hf(UNTIED, config))
  hf.to_hf(params, config, tmp_path / "out", UNTIED)
  name = "model.layers.1.self_attn.o_proj.weight"
  after = read(tmp_path / "out")[name]
  assert after.dtype == jnp.bfloat16
  np.testing.assert_array_equal(after.astype(np.float32), 2 * read(UNTIED)[name].astype(np.float32))


@pytest.mark.parametrize("value, message", [
  (70000.0, "o_proj.weight has values up to 70000, too large for float16; export with --weights"),
  (np.nan, "o_proj.weight has values that are no finite numbers")])
def test_a_weight_that_its_dtype_cannot_hold_is_an_error(tmp_path, value, message):
  (tmp_path / "base").mkdir()
  save_file({name: x.astype(np.float16) for name, x in read(TIED).items()},
            tmp_path / "base" / "model.safetensors")
  config = golden_batch.config("tied")
  params = golden_batch.read_hf(tmp_path / "base", config)
  params["blocks"]["o"] = np.array(params["blocks"]["o"])
  params["blocks"]["o"][1, 0, 0, 0] = value
  with pytest.raises(ValueError, match=message):
    hf.to_hf(params, config, tmp_path / "out", tmp_path / "base")
  assert [path.name for path in tmp_path.iterdir()] == ["base"]
  if value == 70000:
    shutil.copy(TIED / "config.json", tmp_path / "base")
    hf.to_hf(params, config, tmp_path / "out", tmp_path / "base", dtype="bfloat16")
    written = read(tmp_path / "out")["model.layers.1.self_attn.o_proj.weight"]
    assert np.float32(written).max() == 70144  # the nearest bfloat16


def test_additional_chat_templates_are_kept(tmp_path):
  base, config = tmp_path / "base", golden_batch.config("tied")
  shutil.copytree(TIED, base)
  (base / "additional_chat_templates").mkdir()
  (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
  hf.to_hf(golden_batch.read_hf(base, config), config, tmp_path / "out", base)
  copy = tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja"
  assert copy.read_text() == "{{ tools }}" and copy.parent.stat().st_mode & 0o100


def test_a_linear_layer_of_hugging_face_is_the_transpose_of_ours():
  params = golden_batch.read_hf(TIED, golden_batch.config("tied"))
  theirs = read(TIED)
  # Row 2 * 8 + 5 of q_proj makes feature 5 of head 2.
  np.testing.assert_array_equal(params["blocks"]["q"][1, :, 2, 5],
                                theirs["model.layers.1.self_attn.q_proj.weight"][21])
  np.testing.assert_array_equal(params["blocks"]["o"][1, 2, 5],
                                theirs["model.layers.1.self_attn.o_proj.weight"][:, 21])
  # Values (query, key, value), heads of 16: row 2 * 32 + 16 + 3 is value 3 of head 1.
  np.testing.assert_array_equal(params["vision"]["blocks"]["qkv"][2, :, 2, 1, 3],
                                theirs["visual.blocks.2.attn.qkv.weight"][83])


def test_weights_read_on_four_devices_equal_those_read_on_one():
  config = golden_batch.config("untied")
  want = golden_batch.read_hf(UNTIED, config)
  mesh = mesh_lib.make_mesh(2, 2)
  got = hf.from_hf(UNTIED, config, mesh)
  shardings = weights.shardings(weights.weight_table(config), mesh)
  assert jax.tree.map(lambda leaf: leaf.sharding, got) == shardings
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_weights_are_cast_to_the_dtype_asked_for():
  theirs = read(TIED)
  params = golden_batch.read_hf(TIED, golden_batch.config("tied"), jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
  np.testing.assert_array_equal(params["embed"],
                                theirs["model.embed_tokens.weight"].astype(jnp.bfloat16))
  np.testing.assert_array_equal(
    params["blocks"]["up"][2].T, theirs["model.layers.2.mlp.up_proj.weight"].astype(jnp.bfloat16))


def test_every_missing_unknown_and_misshaped_tensor_is_named(tmp_path):
  tensors = read(TIED)
  del tensors["model.norm.weight"], tensors["visual.blocks.3.norm2.weight"]
  tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
  tensors["visual.merger.ln_q.weight"] = np.ones(31, np.float32)
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError) as caught:
    golden_batch.read_hf(tmp_path, golden_batch.config("tied"))
  assert str(caught.value) == (
    f"{tmp_path} does not hold this model: missing model.norm.weight; "
    "missing visual.blocks.3.norm2.weight; unknown model.layers.0.self_attn.q_norm.weight; "
    "visual.merger.ln_q.weight is (31,) instead of (32,)")


def test_names_nested_one_level_deeper_are_read_and_written_back(tmp_path):
  deeper = {}
  for name, tensor in read(TIED).items():
    if name.startswith("model."):
      deeper["model.language_model." + name.removeprefix("model.")] = tensor
    else:
      deeper["model." + name] = tensor
  (tmp_path / "base").mkdir()
  save_file(deeper, tmp_path / "base" / "model.safetensors")
  config = golden_batch.config("tied")
  params = golden_batch.read_hf(tmp_path / "base", config)
  jax.tree.map(np.testing.assert_array_equal, params, golden_batch.read_hf(TIED, config))
  hf.to_hf(params, config, tmp_path / "out", tmp_path / "base")
  assert read(tmp_path / "out").keys() == deeper.keys()


def test_a_tied_head_stored_twice_must_equal_the_embedding(tmp_path):
  tensors, config = read(TIED), golden_batch.config("tied")
  (tmp_path / "base").mkdir()
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  save_file(tensors, tmp_path / "base" / "model.safetensors")
  params = golden_batch.read_hf(tmp_path / "base", config)
  params["embed"] = params["embed"] + 1
  hf.to_hf(params, config, tmp_path / "out", tmp_path / "base")
  after = read(tmp_path / "out")
  np.testing.assert_array_equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
  tensors["lm_head.weight"][3, 4] += 1
  save_file(tensors, tmp_path / "base" / "model.safetensors")
  with pytest.raises(ValueError, match="ties lm_head.weight to the embedding, but they differ"):
    golden_batch.read_hf(tmp_path / "base", config)


def test_an_export_never_overwrites_and_leaves_nothing_half_done(tmp_path):
  config = golden_batch.config("tied")
  params = golden_batch.read_hf(TIED, config)
  (tmp_path / "out").mkdir()
  with pytest.raises(ValueError, match="out exists; export to a new folder"):
    hf.to_hf(params, config, tmp_path / "out", TIED)
  del params["final_norm"]
  with pytest.raises(KeyError):
    hf.to_hf(params, config, tmp_path / "other", TIED)
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_was_not_downloaded_is_named(tmp_path):
  for path in UNTIED.iterdir():
    shutil.copy(path, tmp_path)
  (tmp_path / "model-00002-of-00003.safetensors").unlink()
  with pytest.raises(ValueError, match="no model-00002-of-00003.safetensors"):
    golden_batch.read_hf(tmp_path, golden_batch.config("untied"))


def test_a_tensor_in_two_files_is_named(tmp_path):
  for path in UNTIED.iterdir():
    shutil.copy(path, tmp_path)
  first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
  tensors = load_file(second) | dict(list(load_file(first).items())[:1])
  save_file(tensors, second)
  with pytest.raises(ValueError, match=f"is in {first.name} and in {second.name}; remove"):
    golden_batch.read_hf(tmp_path, golden_batch.config("untied"))


@pytest.mark.parametrize("left", [(), ("model-*.safetensors",)])
def test_one_file_beside_an_index_of_others_is_ambiguous(tmp_path, left):
  for path in (*UNTIED.iterdir(), TIED / "model.safetensors"):
    shutil.copy(path, tmp_path)
  for path in [path for pattern in left for path in tmp_path.glob(pattern)]:
    path.unlink()  # as transformers does where it saves one file over several
  with pytest.raises(ValueError, match="holds model.safetensors, which transformers reads, and mo"):
    golden_batch.read_hf(tmp_path, golden_batch.config("untied"))
  (tmp_path / hf_files.INDEX).write_text('{"weight_map": {"a": "model.safetensors"}}')
  config = golden_batch.config("tied")
  jax.tree.map(np.testing.assert_array_equal, golden_batch.read_hf(tmp_path, config),
               golden_batch.read_hf(TIED, config))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("files", [[TIED / "config.json"], []])
def test_an_adapter_is_not_left_out_in_silence(tmp_path, files, name):
  for path in files:
    shutil.copy(path, tmp_path)
  (tmp_path / name).write_bytes(b"")
  with pytest.raises(ValueError, match=f"holds an adapter, {name}, which is not read; merge it"):
    hf.model_config(tmp_path, compute_dtype="float32", remat="none", unroll=1)


@pytest.mark.parametrize("name, damage, message", [
  ("model.safetensors", lambda raw: raw[:-5], "is damaged or cut short, download it again"),
  ("model.safetensors", lambda raw: raw[:6], "is damaged or cut short"),
  ("model.safetensors", lambda raw: b"", "is damaged or cut short"),
  ("model.safetensors", lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "damaged"),
  ("config.json", lambda raw: b"[1, 2]", "config.json holds a list, not a JSON object"),
  ("config.json", lambda raw: raw[:20], "config.json is damaged, download it again: "),
  ("config.json", lambda raw: b"\xff\xfe", "config.json is damaged"),
  ("config.json", lambda raw: b"null", "config.json holds null"),
  (hf_files.INDEX, lambda raw: b"{}", "weight_map does not name the file of each tensor"),
  (hf_files.INDEX, lambda raw: b'{"weight_map": {"a": 1}}', "weight_map does not name"),
  (hf_files.INDEX, lambda raw: b'{"weight_map": {"a": "b/c.safetensors"}}', "each tensor, in this"),
  (hf_files.INDEX, lambda raw: b'{"weight_map": {"a": "../c.safetensors"}}', "tensor, in this"),
  (hf_files.INDEX, lambda raw: b'{"weight_map"', "index.json is damaged"),
])
def test_a_damaged_file_is_one_error_that_names_it(tmp_path, name, damage, message):
  for path in TIED.iterdir():
    shutil.copy(path, tmp_path)
  path = tmp_path / name
  path.write_bytes(damage(path.read_bytes() if path.exists() else b""))
  with pytest.raises(ValueError, match=message):
    config = hf.model_config(tmp_path, compute_dtype="float32", remat="none", unroll=1)
    golden_batch.read_hf(tmp_path, config)


def config_of(tmp_path, base, change):
  fields = json.loads((base / "config.json").read_text())
  change(fields)
  (tmp_path / "config.json").write_text(json.dumps(fields))
  return hf.model_config(tmp_path, compute_dtype="bfloat16", remat="block", unroll=1)


def test_both_forms_of_config_give_the_same_sizes(tmp_path):
  flat, nested = (config_of(tmp_path, base, lambda fields: fields.update(tie_word_embeddings=True))
                  for base in (TIED, UNTIED))
  assert flat == nested
  assert (flat.vocab, flat.embed, flat.head_dim, flat.kv_heads) == (128, 32, 8, 2)
  assert (flat.mrope_sections, flat.rope_theta, flat.image_token) == ((1, 1, 2), 1e6, 6)
  assert flat.vision.full_attention == (1, 3) and flat.vision.window == 56
  # Older nested folders keep it inside text_config.
  def move(fields):
    fields["text_config"]["tie_word_embeddings"] = True
  assert config_of(tmp_path, UNTIED, move) == flat


@pytest.mark.parametrize("change, message", [
  (dict(hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu' is implemented"),
  (dict(use_sliding_window=True), "use_sliding_window is True"),
  (dict(attention_dropout=0.1), "attention_dropout is 0.1"),
  (dict(model_type="qwen3_vl_moe"), "is 'qwen3_vl_moe', a mixture of experts; implemented are qwe"),
  (dict(model_type="qwen3_5"), "is 'qwen3_5', layers of linear attention; implemented are qwen2_5"),
  (dict(logit_scale=2.0), "logit_scale = 2.0 is unknown"),
  (dict(rope_scaling={"type": "yarn", "factor": 4.0, "mrope_section": [1, 1, 2]}), "rotary .*yarn"),
  (dict(rope_scaling={"type": "mrope", "factor": 4.0, "mrope_section": [1, 1, 2]}), "rotary .*4"),
  (dict(layer_types=["sliding_attention"] * 3), "layer_types"),
  (dict(layer_types=["full_attention"] * 2), "full_attention in all 3 layers"),
  (dict(num_attention_heads=5), "hidden_size 32 is not a multiple of num_attention_heads 5"),
  (dict(use_sliding_window=1.5), "use_sliding_window is 1.5"),
  (dict(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]},
        rope_scaling={"type": "linear", "factor": 2.0}), "rotary .*linear"),
  (dict(head_dim=16), "head_dim is 16; only hidden_size / num_attention_heads = 8"),
  (dict(quantization_config={"bits": 4}), "quantization_config is .*; only None is impl"),
  (dict(num_hidden_layers="3"), "num_hidden_layers is '3'; it must be one integer"),
  (dict(rope_theta=[1e6]), "rope_theta is .*; it must be one number"),
  (dict(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 1, 1]}),
   r"rope_scaling.mrope_section is \[1, 1, 1, 1\]; it must be three integers"),
  (dict(rope_scaling={"type": "mrope", "mrope_section": 4}), "mrope_section is 4; it must be a li"),
  (dict(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 1]}), "must sum to head_dim / 2"),
  (dict(rope_scaling="mrope"), "rope_scaling is 'mrope'; it must be an object"),
  (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false'; it must be true or false"),
  (dict(layer_types=3), "layer_types 3: only full_attention"),
  (dict(vision_config=[]), r"vision_config is \[\]; it must be an object"),
  (dict(text_config=7), "text_config is 7; it must be an object"),
  (dict(model_type=["qwen2_5_vl"]), "model_type is .*implemented are qwen2_5_vl, qwen2"),
])
def test_what_is_not_implemented_is_refused_by_name(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    config_of(tmp_path, TIED, lambda fields: fields.update(change))


@pytest.mark.parametrize("change, message", [
  (dict(hidden_act="gelu"), "vision_config.hidden_act is 'gelu'"),
  (dict(in_chans=1), "vision_config.in_chans is 1"),
  (dict(deepstack=[1]), r"vision_config.deepstack = \[1\] is unknown"),
  (dict(rope_parameters={"rope_type": "axial", "rope_theta": 5.0}), "vision_config.rope_para"),
  (dict(rope_parameters={"rope_type": "axial", "rope_theta": 1e4, "factor": 2}), "factor"),
  (dict(fullatt_block_indexes=7), "vision_config.fullatt_block_indexes is 7; it must be a list of"),
  (dict(patch_size=[14, 14]), r"vision_config.patch_size is \[14, 14\]; it must be one integer"),
  (dict(out_hidden_size=48), "vision.out 48 differs from embed 32"),
])
def test_vision_fields_are_refused_by_name(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    config_of(tmp_path, TIED, lambda fields: fields["vision_config"].update(change))


@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "vision_config"])
def test_a_missing_size_is_named(tmp_path, name):
  with pytest.raises(ValueError, match=f"config.json: field '{name}' is missing"):
    config_of(tmp_path, TIED, lambda fields: fields.pop(name))


@pytest.mark.parametrize("change", [
  dict(head_dim=8), dict(head_dim=None), dict(unsloth_fixed=True, unsloth_version="2025.1"),
  dict(auto_map={"AutoModel": "x.Y"}), dict(_attn_implementation_internal="sdpa"),
  dict(use_sliding_window=None), dict(use_mrope=False), dict(something_new=None),
  dict(text_config=None),
  dict(output_attentions=False, id2label={"0": "LABEL_0"}, temperature=1.0),
  dict(layer_types=["full_attention"] * 3)])
def test_what_changes_nothing_is_accepted(tmp_path, change):
  plain = config_of(tmp_path, TIED, lambda fields: None)
  assert config_of(tmp_path, TIED, lambda fields: fields.update(change)) == plain


def test_full_attention_of_blocks_that_are_not_there_is_left_out(tmp_path):
  def longer(fields):
    fields["vision_config"]["fullatt_block_indexes"] = [1, 3, 7, 15]
  assert config_of(tmp_path, TIED, longer).vision.full_attention == (1, 3)


@pytest.mark.parametrize("kind", WITH_IMAGES)
def test_absent_fields_have_transformers_values(kind):
  import transformers

  family, whole = families.FAMILIES[kind], transformers.AutoConfig.for_model(kind)
  for table, config in ((family.text, whole.text_config), (family.text, whole),
                        (family.tower.fields, whole.vision_config)):
    for name, value in table.read.items():
      if hasattr(config, name) and value not in (families.REQUIRED, None):
        have = getattr(config, name)
        assert (tuple(have) if isinstance(have, list) else have) == value, name
    for name, values in table.fixed.items():
      assert getattr(config, name, values[0]) in values, name
  assert whole.text_config.rope_parameters["rope_theta"] == family.text.read["rope_theta"]


@pytest.mark.parametrize("kind", WITH_IMAGES)
def test_every_field_of_transformers_config_classes_is_read_fixed_or_known_to_be_irrelevant(kind):
  import transformers

  family, whole = families.FAMILIES[kind], transformers.AutoConfig.for_model(kind)

  def known(name, table):
    return name in table.read.keys() | table.fixed.keys() | hf_config._IRRELEVANT

  for config in (whole, whole.text_config):
    for name in type(config).__annotations__:
      assert known(name, family.text), name
  for name in type(whole.vision_config).__annotations__:
    assert known(name, family.tower.fields), name


def qwen3_vl(tmp_path, text=(), vision=(), **outer):
  """ModelConfig of the golden folder with changed fields of text_config and vision_config."""
  def change(fields):
    fields.update(outer)
    fields["text_config"].update(text)
    fields["vision_config"].update(vision)
  return config_of(tmp_path, make_golden.folder("qwen3_vl"), change)


def test_qwen3_vl_is_read_as_it_is_published(tmp_path):
  now = qwen3_vl(tmp_path)
  # transformers 4: two fields for the rotary embedding, the tower's old model_type.
  assert now == qwen3_vl(
    tmp_path, dict(rope_parameters=None, rope_theta=1e6, rope_scaling={
      "mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"}),
    dict(model_type="qwen3_vl", rope_parameters=None))
  assert (now.head_dim, now.qkv_bias, now.qk_norm, now.tied) == (16, False, True, True)
  assert (now.mrope_sections, now.mrope_interleaved) == ((4, 2, 2), True)
  assert (now.vision.patch, now.vision.window, now.vision.positions) == (16, 0, 5)
  assert now.vision.deepstack == (0, 2)


@pytest.mark.parametrize("text, vision, message", [
  (dict(rope_parameters={"rope_theta": 1e6, "mrope_interleaved": False}), {},
   "rope_parameters.mrope_interleaved is False; only True is implemented"),
  (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), {}, "rotary embedding .*yarn"),
  (dict(attention_bias=True), {}, "attention_bias is True"),
  (dict(num_experts=8), {}, "num_experts = 8 is unknown"),
  ({}, dict(hidden_act="gelu"), "vision_config.hidden_act is 'gelu'; only 'gelu_pytorch_tanh'"),
  ({}, dict(num_position_embeddings=26), "num_position_embeddings is 26; it must be a square"),
  ({}, dict(num_position_embeddings=-4), "num_position_embeddings is -4; it must be a square"),
  ({}, dict(deepstack_visual_indexes=[1, 4]), r"deepstack \(1, 4\) must name blocks of 0..3"),
  ({}, dict(deepstack_visual_indexes=None), "deepstack_visual_indexes is None; it must be a list"),
  ({}, dict(window_size=112), "vision_config.window_size = 112 is unknown"),
  ({}, dict(patch_size=0), "patch is 0; it must be at least 1"),
])
def test_fields_of_qwen3_vl_are_refused_by_name(tmp_path, text, vision, message):
  with pytest.raises(ValueError, match=message):
    qwen3_vl(tmp_path, text, vision)


CHANGES = {
  "text": dict(
    vocab_size=256, hidden_size=64, intermediate_size=65, num_hidden_layers=4,
    num_attention_heads=2, num_key_value_heads=4, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4,
    rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]},
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    layer_types=["sliding_attention"] * 3, image_token_id=7, tie_word_embeddings=False),
  "vision": dict(
    depth=5, hidden_size=64, intermediate_size=49, num_heads=4, patch_size=7,
    spatial_merge_size=1, temporal_patch_size=1, window_size=112, out_hidden_size=64,
    fullatt_block_indexes=[0], rope_parameters={"rope_type": "axial", "rope_theta": 5.0}),
}


def test_every_field_that_is_read_changes_the_model_or_is_refused(tmp_path):
  assert CHANGES["text"].keys() == VL.text.read.keys()
  assert CHANGES["vision"].keys() == VL.tower.fields.read.keys()
  before = config_of(tmp_path, TIED, lambda fields: None)
  for part, changes in CHANGES.items():
    for name, value in changes.items():
      def change(fields, part=part, name=name, value=value):
        if name == "rope_parameters" and part == "text":
          del fields["rope_scaling"]
        (fields["vision_config"] if part == "vision" else fields)[name] = value
      try:
        assert config_of(tmp_path, TIED, change) != before, (part, name)
      except ValueError as error:
        assert str(error).startswith(str(tmp_path)), (part, name, error)


def test_a_nested_text_config_alone_counts_as_in_transformers(tmp_path):
  before = config_of(tmp_path, UNTIED, lambda fields: None)
  both = config_of(tmp_path, UNTIED, lambda fields: fields.update(hidden_size=64, rope_theta=1.5))
  assert both == before
  with pytest.raises(ValueError, match="field 'hidden_size' is missing"):
    def outside(fields):
      fields["hidden_size"] = fields["text_config"].pop("hidden_size")
    config_of(tmp_path, UNTIED, outside)


def test_no_number_of_key_heads_means_one_a_query_head(tmp_path):
  assert config_of(tmp_path, TIED,
                   lambda fields: fields.update(num_key_value_heads=None)).kv_heads == 4


def test_a_folder_without_config_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="config.json does not exist"):
    hf.model_config(tmp_path, compute_dtype="float32", remat="none", unroll=1)


@pytest.mark.parametrize("devices", [(1, 1), (2, 2)])
def test_loading_holds_one_tensor_of_the_folder_at_a_time(tmp_path, devices):
  config = random_folder.SMALL
  shapes = random_folder.write(tmp_path, config)
  largest = 2 * max(map(np.prod, shapes.values()))  # bytes: 4 MiB of 32; a stack of ours has 16
  mesh = mesh_lib.make_mesh(*devices, jax.devices()[:np.prod(devices)])
  hf.from_hf(tmp_path, config, mesh)  # compiled now: only arrays are counted below
  tracemalloc.start()
  params = hf.from_hf(tmp_path, config, mesh)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # What a slice copies, and its turned copy for the device; parameters are not numpy's memory.
  assert largest < peak < 2 * largest + 2**20
  theirs = read(tmp_path)
  np.testing.assert_array_equal(
    params["blocks"]["down"][7].T, theirs["model.layers.7.mlp.down_proj.weight"].astype(np.float32))


def test_a_host_reads_a_part_once_and_only_its_own(tmp_path, monkeypatch):
  config = random_folder.SMALL
  random_folder.write(tmp_path, config)
  reads, read_part = [], hf._read

  def count(slices, tensor, *rest):
    part = read_part(slices, tensor, *rest)
    reads.append((tensor.stored, part.size))
    return part

  monkeypatch.setattr(hf, "_read", count)
  hf.from_hf(tmp_path, config, mesh_lib.make_mesh(2, 2))
  # Split over both axes: a quarter a device; k is the same on both "model" devices: two halves.
  assert [size for name, size in reads if name == "model.layers.3.mlp.gate_proj.weight"] \
    == [256 * 2048 // 4] * 4
  assert [size for name, size in reads if name == "model.layers.3.self_attn.k_proj.weight"] \
    == [256 * 128 // 2] * 2
