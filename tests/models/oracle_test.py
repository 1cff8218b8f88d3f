"""With torch and transformers: the committed references are theirs, and they read our exports."""

import functools

import jax
import numpy as np
import pytest
from models import golden_batch, make_golden
from models.qwen25_vl_test import VARIANTS, forward, gradient, load

from ares_jax.models import hf, hf_files, weights

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("variant", VARIANTS)
def test_references_and_all_gradients_are_those_of_transformers(variant):
  want = make_golden.references(variant, golden_batch.NAMES)
  with golden_batch.references(variant) as committed:
    fresh = make_golden.summary(want)
    assert fresh.keys() == set(committed.keys())
    for key, value in fresh.items():
      np.testing.assert_allclose(committed[key], value, rtol=1e-4, atol=1e-4, err_msg=key)
  config = golden_batch.config(variant)
  batch = golden_batch.batch_for(config).replace(units=())
  for b, name in enumerate(golden_batch.NAMES):
    grads = gradient(config, load(variant), np.eye(len(golden_batch.NAMES), dtype=np.float32)[b],
                     batch)
    flat = {weights.name_of(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    for key, (path, layer) in hf_files.sources_of(config).items():
      if config.tied and key == "lm_head.weight":
        continue
      theirs = want[f"{name}/gradient/" + key.replace("model.", "model.language_model.")
                    .replace("visual.", "model.visual.")]
      ours = hf_files.to_theirs(flat[path] if layer is None else flat[path][layer], path)
      error = np.linalg.norm(ours.ravel() - theirs.ravel())
      assert error <= 1e-3 * np.linalg.norm(theirs) + 1e-6, (name, key, error)


@pytest.mark.parametrize("variant", ["tied", *make_golden.FAMILIES])
def test_transformers_loads_an_export_of_trained_weights_and_agrees(variant, tmp_path):
  from transformers import AutoModelForImageTextToText

  config = golden_batch.config(variant)
  batch = golden_batch.batch_for(config)
  key = jax.random.key(0)
  params = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(key, leaf.shape),
                        load(variant))
  hf.to_hf(params, config, tmp_path / "out", make_golden.folder(variant), dtype="float32")
  model, report = AutoModelForImageTextToText.from_pretrained(
    tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
  assert not any(report.values()), report
  row = golden_batch.NAMES.index("text")
  _, logits = jax.jit(functools.partial(forward, config))(
    params, batch.tokens, batch.unit, batch.positions, batch.segment, batch.vision)
  tokens, _ = make_golden.case("text")
  with torch.no_grad():
    want = model(input_ids=torch.tensor(tokens, dtype=torch.long)[None]).logits[0].numpy()
  np.testing.assert_allclose(logits[row, :len(tokens)], want, atol=1e-4)
