"""Which errors of reading a checkpoint mean that it is damaged."""

import errno
import json

import aiohttp
import gcsfs.retry
import google.auth.exceptions
import pytest

from ares_jax.run.checkpoint.manifest import DamagedError, damage_of_step


@pytest.mark.parametrize("error", [
  gcsfs.retry.HttpError({"code": 503, "message": "try again"}),
  gcsfs.retry.HttpError({"code": 401, "message": "Invalid Credentials"}),
  OSError("Forbidden: b/o\nno access"),  # gcsfs's error for 403
  ValueError("Bad Request: b/o\ninvalid grant"),  # and for 400
  aiohttp.ClientConnectionError("connection reset"), aiohttp.ServerTimeoutError(),
  google.auth.exceptions.RefreshError("expired"), ConnectionResetError(errno.ECONNRESET, "reset"),
  TimeoutError("slow"), ValueError("UNAVAILABLE: Error reading gs://b/o"),
  ValueError("PERMISSION_DENIED: Error reading gs://b/o"), OSError(errno.EIO, "mount"),
], ids=lambda error: f"{type(error).__name__} {str(error)[:9]}")
def test_a_store_that_does_not_answer_says_nothing_of_the_checkpoint(error):
  with pytest.raises((OSError, ValueError)) as raised, damage_of_step(3):
    raise error
  assert not isinstance(raised.value, DamagedError)


@pytest.mark.parametrize("error", [
  FileNotFoundError("b/o"), ValueError("NOT_FOUND: gs://b/o"), ValueError("DATA_LOSS: gs://b/o"),
  json.JSONDecodeError("Expecting value", "", 0), KeyError("record"), EOFError(),
], ids=lambda error: f"{type(error).__name__} {str(error)[:9]}")
def test_a_file_that_is_missing_or_broken_is_damage(error):
  with pytest.raises(DamagedError, match="^checkpoint 3 is damaged: "), damage_of_step(3):
    raise error
