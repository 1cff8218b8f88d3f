"""A cache of row groups of data files, of limited size."""

import collections
import threading


class Groups:
  """The row groups read last, shared by all files and threads of the process."""

  def __init__(self, capacity):
    """`capacity`: bytes, of the groups kept and of those being read."""
    self._capacity, self._changed = capacity, threading.Condition()
    self._reading = 0  # bytes
    self._tables = collections.OrderedDict()

  def read(self, key, size, load):
    """The group `key`; calls `load()` where it is not in the cache.

    Drops the oldest groups before loading, so that `size` bytes fit. Waits while other threads read
    so much that they do not fit; a group larger than the capacity is read while no other is.
    """
    with self._changed:
      if key in self._tables:
        self._tables.move_to_end(key)
        return self._tables[key]
      self._changed.wait_for(lambda: not self._reading or self._reading + size <= self._capacity)
      self._reading += size
      held = sum(table.nbytes for table in self._tables.values())
      while self._tables and held + self._reading > self._capacity:
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
