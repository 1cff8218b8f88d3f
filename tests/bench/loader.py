"""How fast data come: images against Hugging Face's processor, rows through the loader, opening.

    python -m tests.bench.loader [--images=32] [--rows=256] [--million=1000000] [--rounds=3]

Images: JPEG of 640 x 480 from bytes to patches. Ours stop at uint8 patches, which the device
normalises; transformers' `Qwen2VLImageProcessorPil` gives float32 ones. Loader: rows of such an
image and a short question, shuffled, to prompts of fixed shape, in batches of 32. Opening: a file
of a million short rows, until a row at its end is there; memory is what the process grows by.
Rounds are interleaved; on a busy machine only the ratios mean something.
"""

import argparse
import functools
import io
import json
import pathlib
import tempfile
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
from array_record.python import array_record_module
from PIL import Image

from ares_jax.data import digits
from ares_jax.data.chat import Chat
from ares_jax.data.images import load_image, patchify
from ares_jax.data.prompts import Encoder, PromptConfig
from ares_jax.data.sources import FileSource, SourceConfig, stream

AREA = dict(min_pixels=256 * 28 * 28, max_pixels=1024 * 28 * 28)
BATCH = 32


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, size in (("images", 32), ("rows", 256), ("million", 1_000_000), ("rounds", 3)):
    parser.add_argument(f"--{name}", type=int, default=size)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    images(options.images, options.rounds)
    loader(pathlib.Path(folder), options.rows, options.rounds)
    opening(pathlib.Path(folder), options.million)


def images(count, rounds):
  from transformers import Qwen2VLImageProcessorPil

  processor = Qwen2VLImageProcessorPil(
    size={"shortest_edge": AREA["min_pixels"], "longest_edge": AREA["max_pixels"]})
  pictures = [jpeg(number) for number in range(count)]

  def ours(data):
    return patchify(load_image(data, **AREA))[0]

  def theirs(data):
    return processor(images=[Image.open(io.BytesIO(data))], return_tensors="np")["pixel_values"]

  assert ours(pictures[0]).shape == theirs(pictures[0]).shape
  seconds = fastest({"ours": lambda: [ours(data) for data in pictures],
                     "transformers": lambda: [theirs(data) for data in pictures]}, rounds)
  for name, taken in seconds.items():
    print(f"images, {name}: {count / taken:.1f} images/s")
  print(f"images, ours over transformers: {seconds['transformers'] / seconds['ours']:.2f}")


def loader(folder, count, rounds):
  """Rows a second through `stream` from several formats and numbers of threads."""
  tokenizer = digits.tokenizer()
  encoder = Encoder(Chat(tokenizer, "", tokenizer.convert_tokens_to_ids("<|image_pad|>")),
                    PromptConfig("", (600,), (64,), **AREA), window=112, patch=14, merge=2)
  records = [{"problem": "<image>Compute red + blue, modulo 10", "answer": "3",
              "images": [{"bytes": jpeg(number % 32), "path": None}]} for number in range(count)]
  table = pa.Table.from_pylist(records)
  for size in (10, 100):
    pyarrow.parquet.write_table(table, folder / f"groups_of_{size}.parquet", row_group_size=size)
  (folder / "images").mkdir()
  writer = array_record_module.ArrayRecordWriter(str(folder / "rows.array_record"), "group_size:1")
  for number, record in enumerate(records):
    (folder / "images" / f"{number}.jpg").write_bytes(record["images"][0]["bytes"])
    writer.write(json.dumps(record | {"images": [f"images/{number}.jpg"]}).encode())
  writer.close()

  def read(name, threads):
    source = FileSource(SourceConfig(str(folder / name), "easyr1", "", 1.0))
    batches = stream(source, batch=BATCH, seed=0, start=0, threads=threads,
                     encode=encoder.encode)
    for _ in range(count // BATCH):
      next(batches)

  seconds = fastest({
    f"{name}, {threads} threads": functools.partial(read, name, threads)
    for name in ("rows.array_record", "groups_of_10.parquet", "groups_of_100.parquet")
    for threads in (1, 2)}, rounds)
  for name, taken in seconds.items():
    print(f"loader, {name}: {count / taken:.1f} rows/s, {512 * taken / count:.1f} s for the 512 "
          "prompts of an iteration of configs/aepo_7b.py")


def opening(folder, count):
  """Seconds and memory until a row of a long file can be read."""
  with open(folder / "long.jsonl", "w", encoding="utf-8") as file:
    for number in range(count):
      file.write(f'{{"problem": "What is {number} + {number}, in decimal digits?", '
                 f'"answer": "{2 * number}", "source": "sums"}}\n')
  with pyarrow.parquet.ParquetWriter(folder / "long.parquet", pa.schema(
      [(name, pa.string()) for name in ("problem", "answer", "source")])) as writer:
    for start in range(0, count, 1000):
      writer.write_table(pa.table({
        "problem": [f"What is {n} + {n}, in decimal digits?" for n in range(start, start + 1000)],
        "answer": [str(2 * n) for n in range(start, start + 1000)], "source": ["sums"] * 1000}))
  for name in ("long.jsonl", "long.parquet"):
    before, began = psutil.Process().memory_info().rss, (time.perf_counter(), time.process_time())
    source = FileSource(SourceConfig(str(folder / name), "easyr1", "", 1.0))
    assert source[count - 1]["answer"] == [str(2 * (count - 1))]
    opened, busy = time.perf_counter() - began[0], time.process_time() - began[1]
    for number in np.random.default_rng(0).integers(0, count, 1000):
      source[int(number)]
    grown = (psutil.Process().memory_info().rss - before) / 2**20
    size = (folder / name).stat().st_size / 2**20
    print(f"opening {name}, {count} rows, {size:.0f} MiB: {opened:.2f} s, {busy:.2f} s of CPU; "
          f"{grown:.0f} MiB more after 1000 random rows", flush=True)


def jpeg(seed):
  """A JPEG of 640 x 480 with smooth shapes and some noise, about 60 kB."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
  noisy = np.clip(np.asarray(coarse) + rng.normal(0, 6, (480, 640, 3)), 0, 255).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(noisy).save(file, "JPEG", quality=90)
  return file.getvalue()


def fastest(functions, rounds):
  """{name: seconds of its fastest round}."""
  best = dict.fromkeys(functions, float("inf"))
  for _ in range(rounds):
    for name, function in functions.items():
      began = time.perf_counter()
      function()
      best[name] = min(best[name], time.perf_counter() - began)
  return best


if __name__ == "__main__":
  main()
