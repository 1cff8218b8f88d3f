"""Failures of Orbax that nobody awaits any more stay off the screen."""

import asyncio
import gc
import logging

import pytest

from ares_jax.run.checkpoint import quiet


@pytest.mark.parametrize("make", ["create_task", "run_in_executor"])
def test_failures_that_nobody_awaits_any_more_are_not_logged(make, caplog):
  async def fail():
    raise OSError(28, "No space left on device")

  def fail_in_thread():
    raise OSError(28, "No space left on device")

  async def leave():
    loop = asyncio.get_running_loop()
    task = (loop.create_task(fail()) if make == "create_task"
            else loop.run_in_executor(None, fail_in_thread))
    await asyncio.sleep(0.05)
    assert task.done()

  logger = logging.getLogger("asyncio")
  kept = logger.filters[:]
  try:
    logger.filters.clear()
    for silent in (False, True):
      if silent:
        quiet.silence_orbax()
      caplog.clear()
      asyncio.run(leave())
      gc.collect()
      assert any("never retrieved" in one.getMessage() for one in caplog.records) != silent
  finally:
    logger.filters[:] = kept
