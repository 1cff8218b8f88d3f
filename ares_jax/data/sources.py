"""Where rows come from, and the Grain stream that batches them.

A row is a dict:
  id        str, stable across runs
  source    str, the data set it belongs to (AdaCS draws its length targets per source)
  question  str; `<image>` marks where the next image goes, `<image 2>` where the second one does;
            without any mark all images come first
  answer    str, the accepted truth, or a list of them: an option's letter and its text
  images    list of uint8 arrays [H, W, 3] or file names
  response  str, only for supervised examples
Anything else is metadata.

A JSONL file holds one such object a line, with `problem` accepted for `question`:
  {"problem": "<image>How many?", "answer": "3", "images": ["a.png"], "source": "geometry"}
"""

import dataclasses
import json
import pathlib

import grain


@dataclasses.dataclass(frozen=True)
class JsonlSource:
  """Random access to a JSONL file; image names are relative to the file's folder."""

  path: str
  offsets: tuple[int, ...]

  @classmethod
  def open(cls, path):
    if not pathlib.Path(path).is_file():
      raise ValueError(f"data file {path} does not exist; set data.path to a JSONL file")
    offsets, place = [], 0
    with open(path, "rb") as file:
      for line in file:  # split at \n alone: U+2028 inside a string is no line end
        if line.strip():
          offsets.append(place)
        place += len(line)
    return cls(str(path), tuple(offsets))

  def __len__(self):
    return len(self.offsets)

  def __getitem__(self, index):
    with open(self.path, "rb") as file:
      file.seek(self.offsets[index])
      record = json.loads(file.readline())
    folder = pathlib.Path(self.path).resolve().parent
    name = f"{pathlib.Path(self.path).name}:{index}"
    record.setdefault("id", name)
    record.setdefault("source", pathlib.Path(self.path).stem)
    record.setdefault("images", [])
    if "problem" in record:
      record["question"] = record.pop("problem")
    answers = record.get("answer")
    texts = {"question": [record.get("question")],
             "answer": answers if isinstance(answers, list) and answers else [answers]}
    for key, values in texts.items():
      if not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"row {name}: '{key}' is missing or empty")
    record["images"] = [str(_inside(folder, image, name)) for image in record["images"]]
    return record


def _inside(folder, image, name):
  path = (folder / image).resolve()
  if not path.is_relative_to(folder):
    raise ValueError(f"row {name}: image {image!r} lies outside the data file's folder {folder}")
  return path


def stream(source, *, batch, seed, collate, start, threads, shuffle=True):
  """Endless batches; batch number n is a function of (source, seed, n) alone.

  Args:
    source: random access to rows (`__len__`, `__getitem__`).
    batch: rows a batch.
    seed: of the shuffle; every epoch has its own order.
    collate: function of (list of rows, batch number) run in the loader's threads.
    start: number of the first batch: 0, or the step a run resumes at.
    threads: reading threads. Worker processes would change the order, threads do not.
    shuffle: False keeps the source's order.

  Returns:
    an iterator of what `collate` returns.
  """
  if len(source) < 1:
    raise ValueError("the data source is empty")
  rows = grain.MapDataset.source(source).seed(seed)
  rows = (rows.shuffle() if shuffle else rows).repeat().batch(batch, batch_fn=list)
  batches = rows.map_with_index(lambda number, batch: collate(batch, number))
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  iterator = iter(batches.to_iter_dataset(options))
  iterator.set_state({"next_index": start})
  return iterator
