"""Row groups of data files, kept for the next row: small files stay whole, large do not grow."""

import collections
import threading


class Groups:
  """Row groups last read, of all files and threads of the process together."""

  def __init__(self, room):
    """`room`: bytes, of those that are kept and those that are being read."""
    self._room, self._changed = room, threading.Condition()
    self._reading = 0  # bytes
    self._tables = collections.OrderedDict()

  def read(self, key, size, load):
    """The group `key`, from `load()` where it is not kept.

    Drops the oldest until `size` bytes fit: old and new must not be there together. Waits while
    other threads read so much that they do not fit; a group larger than the room is read alone.
    """
    with self._changed:
      if key in self._tables:
        self._tables.move_to_end(key)
        return self._tables[key]
      self._changed.wait_for(lambda: not self._reading or self._reading + size <= self._room)
      self._reading += size
      held = sum(table.nbytes for table in self._tables.values())
      while self._tables and held + self._reading > self._room:
        held -= self._tables.popitem(last=False)[1].nbytes
    table = None
    try:
      table = load()
      return table
    finally:
      with self._changed:
        self._reading -= size
        if table is not None:
          self._tables[key] = table
        self._changed.notify_all()


GROUPS = Groups(2**28)  # bytes
