"""Writes any source as a versioned TFDS data set, of which Grain reads each row by itself.

    python -m ares_jax.data.write_tfds --path=ViRL39K --schema=virl39k --out=DIR --version=1.0.0

Images go into the rows as they are encoded. Training reads it as
    dict(path="DIR/ares/1.0.0", schema="plain", split="", weight=1.0)
Reading one row of Parquet means reading its whole row group, and loose images are one file each;
here both come with the row. Needs no TensorFlow.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from etils import epath
from PIL import Image

from ares_jax.data.files.schema import read_schemas
from ares_jax.data.sources import FileSource, SourceConfig
from ares_jax.system.command import UsageError, run

_TEXTS = ("id", "source", "question", "level", "response")
_LISTS = ("answer", "responses")
_RATE = "pass_rate"


class Ares(tfds.core.GeneratorBasedBuilder):
  """Rows of a FileSource, in their order."""

  VERSION = tfds.core.Version("1.0.0")  # an instance has its own

  def __init__(self, source, folder, version):
    """
    Args:
      source: FileSource.
      folder: where data sets are.
      version: "1.0.0".
    """
    self._source, self.VERSION = source, tfds.core.Version(version)
    self._fields = _present(source[0])  # rows of one source have the same
    super().__init__(data_dir=folder, file_format="array_record")

  def _info(self):
    columns = {field: tfds.features.Text() if field in _TEXTS else
               tfds.features.Sequence(tfds.features.Text()) for field in self._fields}
    if _RATE in columns:
      columns[_RATE] = tfds.features.Scalar(np.float64)
    columns["images"] = tfds.features.Sequence(
      tfds.features.Tensor(shape=(), dtype=np.object_))
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(columns), disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for number in range(len(self._source)):
      row = self._source[number]
      # A field more or less stops here, at its row: not left out, nor an empty text in training.
      more = sorted(set(_present(row)) - set(self._fields))
      if more:
        raise ValueError(f"row {row['id']} has {', '.join(more)}, which the first row lacks; "
                         "give the first row these fields too, or take them out")
      row = {_RATE: -1.0} | row  # -1: not measured
      yield number, {field: row[field] for field in self._fields} | {
        "images": [_encoded(image) for image in row["images"]]}


def _present(row):
  return [field for field in (*_TEXTS, *_LISTS, _RATE) if row.get(field) is not None]


def _encoded(image):
  if isinstance(image, bytes):
    return image
  if isinstance(image, np.ndarray):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
  return epath.Path(image).read_bytes()


def build(source, folder, version):
  """Writes FOLDER/ares/VERSION and returns that path; what is there already stays."""
  builder = Ares(source, folder, version)
  builder.download_and_prepare()
  return str(builder.data_path)


def main():
  words = flags.FLAGS
  if not words.path or not words.out:
    raise UsageError("pass --path=FILE or folder, and --out=FOLDER")
  print(build(FileSource(SourceConfig(words.path, words.schema, words.split, 1.0)), words.out,
              words.version))


def define_flags():
  """Not at import: other commands have flags of these names."""
  flags.DEFINE_string("path", "", "File or folder of the source.")
  flags.DEFINE_enum("schema", "plain", sorted(read_schemas()), "What its columns mean.")
  flags.DEFINE_string("split", "", "Of a folder; default all of it.")
  flags.DEFINE_string("out", "", "Folder for ares/VERSION.")
  flags.DEFINE_string("version", "1.0.0", "Of the data set; another one for other data.")


if __name__ == "__main__":
  define_flags()
  run(main)
