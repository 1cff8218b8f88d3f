"""Writes any source as a versioned TFDS data set, from which Grain reads single rows.

    python -m ares_jax.data.write_tfds --path=ViRL39K --schema=virl39k --out=DIR --version=1.0.0

Rows contain their images, encoded as they are in the source. Training reads the data set as
    dict(path="DIR/ares/1.0.0", schema="plain", split="", weight=1.0)
Reading a row of Parquet reads its whole row group, and image files are opened one by one; here one
read gives a row and its images. TensorFlow is not needed.
"""

if __name__ == "__main__":
  from ares_jax.system import command

  command.begin("data.write_tfds")

import io

import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from etils import epath
from PIL import Image

from ares_jax.data.files.schema import read_schemas
from ares_jax.data.sources import FileSource, SourceConfig
from ares_jax.system.command import UsageError, run

_TEXTS = ("id", "source", "question", "level", "group", "response")
_LISTS = ("answer", "responses", "shown_options")
_RATE = "pass_rate"


class Ares(tfds.core.GeneratorBasedBuilder):
  """The rows of a FileSource, in their order."""

  VERSION = tfds.core.Version("1.0.0")  # each instance sets its own

  def __init__(self, source, folder, version):
    self._source, self.VERSION = source, tfds.core.Version(version)  # of str, "1.0.0"
    self._fields = _present(_shown(source[0]))  # all rows of a source must have the same fields
    super().__init__(data_dir=folder, file_format="array_record")

  def _info(self):
    columns = {field: tfds.features.Text() if field in _TEXTS else
               tfds.features.Sequence(tfds.features.Text()) for field in self._fields}
    if _RATE in columns:
      columns[_RATE] = tfds.features.Scalar(np.float64)
    columns["images"] = tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_))
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(columns), disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for number in range(len(self._source)):
      row = _shown(self._source[number])
      # Another field is an error: it is neither left out nor an empty text in training.
      extra = sorted(set(_present(row)) - set(self._fields))
      if extra:
        raise ValueError(f"row {row['id']} has {', '.join(extra)}, which the first row lacks; "
                         "add these fields to the first row, or remove them")
      if row.get("history"):
        raise ValueError(f"row {row['id']} has turns before its question, which TFDS cannot hold "
                         "here; read its file directly")
      row = {_RATE: -1.0} | row  # -1: not measured
      yield number, {field: row[field] for field in self._fields} | {
        "images": [_encoded(image) for image in row["images"]]}


def _shown(row):
  """The row with its options under the name of those that its question shows."""
  return row | {"shown_options": row["options"]}


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
  """Writes FOLDER/ares/VERSION and returns that path; keeps an existing data set."""
  builder = Ares(source, folder, version)
  builder.download_and_prepare()
  return str(builder.data_path)


def main():
  options = flags.FLAGS
  if not options.path or not options.out:
    raise UsageError("pass --path=FILE or folder, and --out=FOLDER")
  source = FileSource(SourceConfig(options.path, options.schema, options.split, 1.0))
  print(build(source, options.out, options.version))


def define_flags():
  """Defines the flags; not at import, because other commands have flags of these names."""
  flags.DEFINE_string("path", "", "File or folder of the source.")
  flags.DEFINE_enum("schema", "plain", sorted(read_schemas()), "Key of schemas.json.")
  flags.DEFINE_string("split", "", "Split of a folder; default all files.")
  flags.DEFINE_string("out", "", "Folder for ares/VERSION.")
  flags.DEFINE_string("version", "1.0.0", "Version; change it when the data change.")


if __name__ == "__main__":
  define_flags()
  run(main)
