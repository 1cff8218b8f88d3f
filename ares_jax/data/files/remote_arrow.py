"""Arrow files that cannot be mapped into memory: gs:// and what else etils opens.

Streams and files are the same row of messages, each a length, a header and a body. Headers say how
many rows a batch has and how long it is, so that opening reads no batch, and a row its own alone.
"""

import bisect
import itertools
import struct
import threading

import pyarrow as pa

from ares_jax.data.files import group_cache

_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # kinds of headers (Arrow's Message.fbs)
_MAGIC, _MARK = b"ARROW1\0\0", 0xFFFFFFFF


class RemoteArrow:
  """Records by number."""

  def __init__(self, path):
    """`path` is an epath.Path."""
    self._path, self._lock = path, threading.Lock()
    self._places, rows = [], []
    with path.open("rb") as file:
      for place, size, header, kind, message in _messages(file, path):
        if kind == _SCHEMA:
          file.seek(place)
          self._schema = pa.ipc.read_schema(pa.py_buffer(file.read(size)))
        elif kind == _BATCH:
          self._places.append((place, size))
          rows.append(_number(message, header, 0, "<q"))
        elif kind == _DICTIONARY:
          raise ValueError(f"{path} has dictionary columns; save it as parquet")
    self._ends = list(itertools.accumulate(rows))

  def __len__(self):
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, number):
    batch = bisect.bisect_right(self._ends, number)
    start = self._ends[batch - 1] if batch else 0
    return self._read(batch).slice(number - start, 1).to_pylist()[0]

  def __getstate__(self):
    return {key: value for key, value in self.__dict__.items() if key != "_lock"}

  def __setstate__(self, state):
    self.__dict__.update(state, _lock=threading.Lock())

  def _read(self, batch):
    place, size = self._places[batch]

    def load():
      with self._path.open("rb") as file:
        file.seek(place)
        message = pa.ipc.read_message(pa.py_buffer(file.read(size)))
      return pa.ipc.read_record_batch(message, self._schema)

    with self._lock:  # a second thread waits for the batch that the first one reads
      return group_cache.GROUPS.read((self._path, batch), size, load)


def _messages(file, path):
  """(place, size, place of the header's table, its kind, header) of each message."""
  end = file.seek(0, 2)
  file.seek(0)
  place = len(_MAGIC) if file.read(len(_MAGIC)) == _MAGIC else 0
  while place + 8 <= end:
    file.seek(place)
    mark, length = struct.unpack("<Ii", file.read(8))
    if mark != _MARK:
      raise ValueError(f"{path} is no Arrow stream or file of version 0.15 or later")
    if not length:
      return
    message = file.read(length)
    table = struct.unpack_from("<I", message)[0]
    # Fields of a Message: 1 kind of the header, 2 the header, 3 bytes of the body.
    header = _field(message, table, 2)
    header += struct.unpack_from("<I", message, header)[0]
    size = 8 + length + _number(message, table, 3, "<q")
    yield place, size, header, _number(message, table, 1, "<B"), message
    place += size


def _number(data, table, field, form):
  """A number in a table of a flatbuffer; 0, its default, where it is left out."""
  place = _field(data, table, field)
  return struct.unpack_from(form, data, place)[0] if place else 0


def _field(data, table, field):
  """Where a field of a flatbuffer's table stands; 0 where it is left out."""
  layout = table - struct.unpack_from("<i", data, table)[0]
  if 4 + 2 * field >= struct.unpack_from("<H", data, layout)[0]:
    return 0
  offset = struct.unpack_from("<H", data, layout + 4 + 2 * field)[0]
  return table + offset if offset else 0
