import json

import pytest
from models import golden_batch

from ares_jax.models import hf_processor

VISION = golden_batch.config("tied").vision


def write(folder, name="preprocessor_config.json", **changes):
  fields = hf_processor.processor_fields(VISION, min_pixels=784, max_pixels=7840)
  fields = {key: value for key, value in (fields | changes).items() if value != "left out"}
  (folder / name).write_text(json.dumps(
    fields if name == hf_processor.FILE else {"image_processor": fields}))
  return hf_processor.pixel_limits(folder, VISION)


def test_limits_come_in_the_forms_of_both_transformers(tmp_path):
  assert write(tmp_path) == (784, 7840)
  # The published folders: two fields of their own, and none of those with one usual value.
  assert write(tmp_path, size="left out", min_pixels=3136, max_pixels=12845056,
               do_resize="left out", rescale_factor="left out") == (3136, 12845056)
  assert write(tmp_path, max_pixels=1568) == (784, 1568)
  assert write(tmp_path, do_convert_rgb=None, resample=None, min_pixels=None) == (784, 7840)
  assert write(tmp_path, max_pixels=1568) == (784, 1568)
  # transformers reads the file of all parts first, if it has one for images.
  assert write(tmp_path, "processor_config.json") == (784, 7840)
  (tmp_path / "processor_config.json").write_text('{"processor_class": "Qwen2_5_VLProcessor"}')
  assert hf_processor.pixel_limits(tmp_path, VISION) == (784, 1568)


@pytest.mark.parametrize("changes, message", [
  (dict(image_mean=[0.5, 0.5, 0.5]), r"preprocessor_config.json: image_mean is \[0.5, 0.5, 0.5\]"),
  (dict(image_std=[0.5]), "image_std is"),
  (dict(do_normalize=False), "do_normalize is False; only True is implemented"),
  (dict(resample=2), "resample is 2"),
  (dict(patch_size=16), "patch_size is 16; only 14"),
  (dict(merge_size=1), "merge_size is 1"),
  (dict(size={"shortest_edge": 784}), "neither max_pixels nor size.longest_edge is given"),
  (dict(size=784), "size is 784; shortest_edge and longest_edge are needed"),
  (dict(size="784"), "size is '784'; shortest_edge and"), (dict(size=[784, 7840]), "size is .784"),
  (dict(size={"shortest_edge": "784", "longest_edge": 7840}), "size.shortest_edge is '784'; it mu"),
  (dict(size={"height": 28, "width": 28}), "neither min_pixels nor size.shortest_edge is given"),
  (dict(min_pixels=0), "min_pixels is 0; it must be an integer >= 1"),
  (dict(max_pixels=1e6), "max_pixels is 1000000.0; it must be an integer"),
  (dict(min_pixels=7841), "at least 7841 pixels and at most 7840"),
  (dict(image_mean=0.5), "image_mean is 0.5; only"),
  (dict(rescale_factor="1"), "rescale_factor is '1'; only"),
])
def test_other_pixels_than_ours_are_refused_by_name(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    write(tmp_path, **changes)


@pytest.mark.parametrize("changes", [
  dict(size="left out"), dict(size=None), dict(size="left out", max_pixels=10**6),
  dict(size={"shortest_edge": 1000, "longest_edge": 2000}, min_pixels=900)])
def test_limits_are_those_of_transformers(tmp_path, changes):
  from transformers import Qwen2VLImageProcessorPil

  limits = write(tmp_path, **changes)
  size = Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size
  assert limits == (size["shortest_edge"], size["longest_edge"])


@pytest.mark.parametrize("name, content, message", [
  ("preprocessor_config.json", "[]", "preprocessor_config.json holds a list"),
  ("preprocessor_config.json", "{", "preprocessor_config.json is damaged"),
  ("processor_config.json", '{"image_processor": []}', r"image_processor is \[\]; it must be an"),
])
def test_a_damaged_file_is_one_error(tmp_path, name, content, message):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    hf_processor.pixel_limits(tmp_path, VISION)


def test_what_is_written_is_transformers_processor(tmp_path):
  from transformers import Qwen2VLImageProcessorPil

  write(tmp_path)
  processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
  default = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 7840})
  assert processor.to_dict() == default.to_dict()


def test_the_statistics_of_the_family_are_asked_for(tmp_path):
  # As published; where transformers would take those of CLIP, the folder is of another model.
  vision = golden_batch.config("qwen3_vl").vision
  fields = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16,
            "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5], "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast"}
  path = tmp_path / hf_processor.FILE
  path.write_text(json.dumps(fields))
  assert hf_processor.pixel_limits(tmp_path, vision) == (65536, 16777216)
  for name, message in (("image_mean", r"image_mean is \[0.48.*only \[0.5"),
                        ("image_std", "image_std is"), ("patch_size", "patch_size is 14; only 16")):
    path.write_text(json.dumps({key: value for key, value in fields.items() if key != name}))
    with pytest.raises(ValueError, match=message):
      hf_processor.check_processor(tmp_path, vision)
  with pytest.raises(ValueError, match="image_mean is .*only .0.48"):
    path.write_text(json.dumps(fields | {"patch_size": 14}))
    hf_processor.check_processor(tmp_path, VISION)
  path.unlink()
  hf_processor.write_limits(tmp_path, vision, min_pixels=1024, max_pixels=2048)
  assert hf_processor.pixel_limits(tmp_path, vision) == (1024, 2048)


def test_a_folder_without_it_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="preprocessor_config.json does not exist"):
    hf_processor.pixel_limits(tmp_path, VISION)
  hf_processor.check_processor(tmp_path, VISION)  # a run has limits of its own
