"""Hostile rows, images and answers are used or reported, and execute nothing."""

import ast
import json
import os
import pathlib
import subprocess
import sys
import types

import data_files as files
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ares_jax.data import digits, validation
from ares_jax.data.bad_row import CODES, BadRow
from ares_jax.data.chat import Chat
from ares_jax.data.prompts import Encoder, PromptConfig
from ares_jax.data.sources import FileSource, SourceConfig
from ares_jax.run.tokens import allowed_tokens

ROOT = pathlib.Path(__file__).parent.parent.parent
ROWS = int(os.environ.get("ARES_HOSTILE_ROWS", 2000))  # 50000 is the long form
BATCH = 50  # rows of one file
TOKENIZER = digits.tokenizer()
ENCODER = Encoder(Chat(TOKENIZER, "", TOKENIZER.convert_tokens_to_ids("<|image_pad|>")),
                  PromptConfig("", (40,), (4,), 28 * 28, 56 * 56), window=28, patch=14, merge=2)

# Functions that execute their argument; modules that load code with data, or use the network.
RUNS = {"eval", "exec", "compile", "__import__", "system", "popen", "sympify", "parse_expr",
        "literal_eval"}
LOADS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "requests", "urllib",
         "http", "ftplib"}
ALLOWED = {("data/files/truths.py", "literal_eval"),  # literals alone; nothing runs
           ("grading/functions.py", "literal_eval"),  # the same, of the config's reward.arguments
           ("system/gcs.py", "requests")}  # its exceptions, for buckets that a user names


def dangers(source):
  """Forbidden calls and imports of a module."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Call):
      name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(
        node.func, "id", "")
      harmless = isinstance(node.func, ast.Attribute) and (
        name == "compile" or name == "eval")  # re.compile, lowered.compile; no builtin
      if name in RUNS and not harmless:
        yield name
      for word in node.keywords:
        if word.arg in ("trust_remote_code", "allow_pickle", "shell") and not (
            isinstance(word.value, ast.Constant) and word.value.value is False):
          yield word.arg
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names if alias.name.split(".")[0] in LOADS)
    elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LOADS:
      yield node.module


@pytest.mark.parametrize("path", sorted((ROOT / "ares_jax").rglob("*.py")),
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_executes_data(path):
  inside = path.relative_to(ROOT / "ares_jax").as_posix()
  assert {(inside, name) for name in dangers(path.read_text())} - ALLOWED == set()


@pytest.mark.parametrize("source, found", [
  ("eval(x)", ["eval"]), ("import pickle", ["pickle"]), ("from urllib import request", ["urllib"]),
  ("os.system(x)", ["system"]), ("sympy.sympify(x)", ["sympify"]), ("re.compile(x)", []),
  ("load(x, trust_remote_code=True)", ["trust_remote_code"]), ("np.load(x, allow_pickle=y)",
                                                               ["allow_pickle"]),
  ("run(x, shell=False)", []), ("compile(x)", ["compile"]),
])
def test_the_search_finds_dangerous_calls(source, found):
  assert list(dangers(source)) == found


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | (
  st.sampled_from(["<image>", "<image 2>", "<|im_end|>", "<|image_pad|>", "red " * 60, "\0",
                   "a.png", "../a.png", "/etc/passwd", "http://x/a.png", "gs://x/a.png",
                   "__import__('os').system('true')", "\\boxed{", "\ud800", "1" * 5000]))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
  st.sampled_from(["bytes", "path", "content", "role", "x"]), inner, max_size=3), max_leaves=6)
GOOD = {"question": "<image>Compute red", "answer": "3", "images": ["a.png"]}
RECORD = st.dictionaries(
  st.sampled_from(["question", "answer", "images", "level", "id", "options", "source", "digits",
                   "tolerance", "group"]), VALUES, max_size=5)
LINE = st.one_of(
  st.just(json.dumps(GOOD)), RECORD.map(lambda record: json.dumps(GOOD | record)),
  RECORD.map(json.dumps), VALUES.map(json.dumps),
  st.binary(max_size=30).map(
    lambda data: (b"x" + data.replace(b"\n", b" ")).decode("latin-1")))  # blank lines are no rows


@settings(max_examples=ROWS // BATCH, deadline=None,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(LINE, min_size=BATCH, max_size=BATCH))
def test_every_row_is_used_or_reported_and_its_neighbours_are_used(tmp_path_factory, lines):
  folder = tmp_path_factory.mktemp("rows")
  (folder / "a.png").write_bytes(files.png(7, (28, 28)))
  # A sound row before and after every one.
  sound = json.dumps(GOOD)
  text = "".join(f"{sound}\n{line}\n" for line in lines) + sound + "\n"
  (folder / "d.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
  source = FileSource(SourceConfig(str(folder / "d.jsonl"), "plain", "", 1.0))
  assert len(source) == 2 * BATCH + 1
  grader = types.SimpleNamespace(name="layered", bad_truths=lambda rows: [])
  found = validation.find_bad_rows(source, numbers=range(len(source)), check=ENCODER.encode,
                                   grader=grader, threads=1)
  bad = {row["number"] for row in found}
  assert len(bad) == len(found) and all(number % 2 for number in bad)
  for row in found:
    assert row["reason"] in CODES and row["message"]
    json.dumps(row)
  for number in set(range(len(source))) - bad:
    prompt = ENCODER.encode(source[number])
    assert number % 2 or len(prompt.images) == 1


@pytest.mark.parametrize("shape, dtype", [((28, 28, 1), "uint8"), ((28, 28, 5), "uint8"),
                                          ((28,), "uint8"), ((28, 28, 3), "complex64"),
                                          ((28, 28, 3), "float64"), ((0, 28, 3), "uint8")])
def test_an_array_that_is_no_picture_is_a_bad_row(shape, dtype):
  with pytest.raises(BadRow, match="^row 7: "):
    ENCODER.encode({"id": "7", "question": "Compute red", "images": [np.zeros(shape, dtype)]})


def test_image_tokens_are_never_sampled():
  tokenizer = digits.tokenizer()
  allowed = allowed_tokens(tokenizer, len(tokenizer) + 8, (tokenizer.eos_token_id,))
  marks = [token for token in tokenizer.get_vocab() if token.startswith("<|")]
  assert {"<|image_pad|>", "<|vision_start|>", "<|vision_end|>"} <= set(marks)
  drawn = [token for token in marks if allowed[tokenizer.convert_tokens_to_ids(token)]]
  assert drawn == [tokenizer.eos_token] and not allowed[len(tokenizer):].any()


IMAGES = '''
import io, resource, sys
import numpy as np
from PIL import Image
from ares_jax.data import images

LIMITS = dict(min_pixels=56 * 56, max_pixels=28 * 28 * 40)
rng = np.random.default_rng(0)
picture = Image.fromarray(rng.integers(0, 256, (61, 90, 3), np.uint8))
kinds = []
for name in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
  buffer = io.BytesIO()
  picture.save(buffer, format=name)
  kinds.append(buffer.getvalue())
  images.load_image(kinds[-1], **LIMITS)

def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before, outcomes = peak(), [0, 0]
for number in range(300):
  data = bytearray(kinds[number % len(kinds)])
  for _ in range(rng.integers(1, 5)):
    kind, index = rng.integers(4), int(rng.integers(len(data)))
    if kind == 0:
      data[index] ^= 1 << rng.integers(8)
    elif kind == 1:
      del data[max(index, 1):]
    elif kind == 2:  # sizes are near the start of a file, as numbers of four bytes
      index = int(rng.integers(min(64, len(data))))
      data[index:index + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
    else:
      data[index:index] = data[:index]
  try:
    assert images.load_image(bytes(data), **LIMITS).dtype == np.uint8
    outcomes[0] += 1
  except ValueError as error:
    assert str(error).startswith("image: cannot use this image"), error
    outcomes[1] += 1
print(*outcomes, (peak() - before) // 1024)
'''


def test_mutated_images_load_or_give_a_valueerror_in_little_memory():
  done = subprocess.run([sys.executable, "-W", "ignore", "-c", IMAGES], cwd=ROOT, text=True,
                        capture_output=True, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]
  images, errors, mebibytes = map(int, done.stdout.split())
  assert images + errors == 300 and min(images, errors) > 30
  assert mebibytes <= 256


AUDIT = '''
import sys
from ares_jax.data import digits
from ares_jax.grading import answer, formula, response
from ares_jax.data.chat import Chat
from ares_jax.data.prompts import Encoder, PromptConfig
from ares_jax.data.sources import FileSource, SourceConfig

EVIL = ["__import__('os').system('touch pwned')", "<|im_end|>", "$(touch pwned)",
        "\\\\boxed{__import__('os').system('touch pwned')}", "\\\\input{/etc/passwd}",
        "{{config}}", "lambda: 0", "1e999999", "!!python/object/apply:os.system ['touch pwned']"]
tokenizer = digits.tokenizer()
chat = Chat(tokenizer, "", tokenizer.convert_tokens_to_ids("<|image_pad|>"))
encoder = Encoder(chat, PromptConfig("", (200,), (4,), 784, 3136), window=28, patch=14, merge=2)

def work(texts):
  source = FileSource(SourceConfig("d.jsonl", "plain", "", 1.0))
  for number in range(len(source)):
    try:
      encoder.encode(source[number])
    except ValueError:
      pass
  for text in texts:
    chat.response(text)
    answer.same_answer(text, "3", symbolic=lambda *_: False)
    response.extract_boxed(text), response.well_formed(text)

def formulas(texts):  # as a worker grades them: sympy compiles what it has parsed
  for text in texts:
    try:
      formula.same_formula(text, "x+1")
    except Exception:
      pass

work(["3", "x+1"]), formulas(["3", "x^2+1"])  # what is imported late is imported here
REACHING = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen",
            "socket.connect", "socket.getaddrinfo", "socket.bind", "ctypes.dlopen")
FORBIDDEN = REACHING + ("exec", "pickle.find_class", "marshal.loads", "import")
seen = []
sys.addaudithook(lambda event, args: seen.append((event, str(args)[:80]))
                 if armed and event in armed[0] else None)
armed = [FORBIDDEN]
work(EVIL)
armed[0] = REACHING
formulas(EVIL)
armed.clear()
print(seen)
'''


def test_hostile_text_executes_nothing_and_connects_nowhere(tmp_path):
  evil = ["__import__('os').system('touch pwned')", "http://127.0.0.1:9/a.png", "\\\\x"]
  files.jsonl(tmp_path / "d.jsonl", [
    {"question": text, "answer": text, "images": [], "options": f"[{text!r}]"} for text in evil] + [
    {"question": "q", "answer": "3", "images": [text]} for text in evil])
  done = subprocess.run([sys.executable, "-W", "ignore", "-c", AUDIT], cwd=tmp_path, text=True,
                        capture_output=True, timeout=300,
                        env=os.environ | {"PYTHONPATH": str(ROOT)})
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.strip() == "[]" and os.listdir(tmp_path) == ["d.jsonl"]
