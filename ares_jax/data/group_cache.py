"""Row groups of data files, kept for the next row: small files stay whole, large do not grow."""

import collections
import threading


class Groups:
  """Row groups last read, of all files of the process together."""

  def __init__(self, room):
    self._room, self._lock = room, threading.Lock()
    self._tables = collections.OrderedDict()

  def get(self, key):
    with self._lock:
      if key in self._tables:
        self._tables.move_to_end(key)
      return self._tables.get(key)

  def make_room(self, size):
    """Drops the oldest until `size` bytes fit: old and new must not be there together."""
    with self._lock:
      held = sum(table.nbytes for table in self._tables.values())
      while self._tables and held + size > self._room:
        held -= self._tables.popitem(last=False)[1].nbytes

  def put(self, key, table):
    with self._lock:
      self._tables[key] = table


GROUPS = Groups(2**28)  # bytes
