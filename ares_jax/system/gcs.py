"""Google Cloud Storage, gs://BUCKET/OBJECT, through fsspec's gcsfs, which etils.epath uses too."""

import contextlib
import logging
import sys

import fsspec

from ares_jax.system.config import one_line

# Other hosts write to the bucket too, so every listing asks it; also those of etils.epath.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it raises what it logs


def in_bucket(folder):
  """Whether the address of a folder is one of a bucket."""
  return "://" in str(folder)


def file_system():
  """The fsspec file system; it tries requests again for half a minute."""
  return fsspec.filesystem("gs")


@contextlib.contextmanager
def bucket_errors(address):
  """Turns the many kinds of errors of a bucket into OSError, one line that names `address`."""
  try:
    yield
  except FileNotFoundError as error:
    if error.filename:
      raise  # of the local disk
    raise OSError(f"{address}: no such bucket or object") from error
  except Exception as error:
    if not is_refusal(error):
      raise
    raise OSError(f"{address}: {type(error).__name__}: {one_line(error)[:300]}") from error


def is_refusal(error):
  """Whether an exception says that a bucket does not answer or refuses, and nothing of its objects.

  tensorstore's errors, which have no class of their own, are not recognised here.
  """
  if isinstance(error, FileNotFoundError):
    return False
  if isinstance(error, OSError):
    return error.errno is None or isinstance(error, ConnectionError | TimeoutError)
  if isinstance(error, ValueError):
    return str(error).startswith("Bad Request")  # gcsfs's word for an answer of 400
  if "gcsfs" not in sys.modules:
    return False
  import aiohttp
  import gcsfs.retry
  import google.auth.exceptions
  import requests
  return isinstance(error, gcsfs.retry.HttpError | gcsfs.retry.ChecksumError | aiohttp.ClientError
                    | requests.RequestException | google.auth.exceptions.GoogleAuthError)
