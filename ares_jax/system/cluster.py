"""Joins the processes of a run into one, and ends them together."""

import atexit
import contextlib
import dataclasses
import itertools
import os
import socket
import sys
import threading
import time

import jax
from absl import logging

from ares_jax.system import heartbeat as heartbeat_lib
from ares_jax.system import hosts
from ares_jax.system.command import exit_code
from ares_jax.system.private_jax import coordination_client, coordinator_address

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LEAVE = 5.0  # seconds in which a process ends after an error
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class HostsConfig:
  """How long the processes of a run wait for each other; unused with one process."""

  join: float  # s until all processes must have joined
  heartbeat: float  # s without a sign of life from a process until the others end

  def __post_init__(self):
    if self.join < 1 or self.heartbeat < 2:
      raise ValueError(f"join = {self.join} s must be >= 1 and heartbeat = {self.heartbeat} s >= 2")


def detect(environ):
  """Finds the processes of a run in its environment; None, or arguments of jax's `initialize`.

  In this order: the three variables of EXPLICIT, all or none; a Slurm step of several tasks; a TPU
  slice on GKE with several hosts; ARES_CLUSTER, a detection method of jax.distributed ("gcetpu" on
  Cloud TPU VMs, whose environment says nothing about other hosts). None is one process. Raises
  ValueError if a variable of EXPLICIT is missing or malformed.
  """
  if any(environ.get(name) for name in EXPLICIT):
    return _explicit(environ)
  if all(name in environ for name in _SLURM) and int(environ.get("SLURM_NTASKS", 1)) > 1:
    # With one task per node a task has all GPUs of the node; jax would give it one.
    task_per_node = environ.get("SLURM_NTASKS") == environ.get("SLURM_STEP_NUM_NODES")
    gpus = int(environ.get("SLURM_GPUS_ON_NODE", 0)) if task_per_node else 0
    return {"cluster_detection_method": "slurm", "local_device_ids": list(range(gpus)) or None}
  workers = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
  if len(workers.split(",")) > 1 or int(environ.get("MEGASCALE_NUM_SLICES", 1)) > 1:
    return {"cluster_detection_method": "gketpu"}
  method = environ.get("ARES_CLUSTER")
  return {"cluster_detection_method": method} if method else None


def _explicit(environ):
  missing = [name for name in EXPLICIT if not environ.get(name)]
  if missing:
    given = [name for name in EXPLICIT if name not in missing]
    raise ValueError(f"{', '.join(given)} without {', '.join(missing)}; set all three on every "
                     "process, or none for a run of one")
  address, count, number = (environ[name] for name in EXPLICIT)
  if not (count.isdecimal() and number.isdecimal() and ":" in address):
    raise ValueError(f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT, JAX_NUM_PROCESSES="
                     f"{count} and JAX_PROCESS_ID={number} numbers")
  count, number = int(count), int(number)
  if number >= count:
    raise ValueError(
      f"JAX_PROCESS_ID={number} is outside 0..{count - 1} (JAX_NUM_PROCESSES={count})")
  if count == 1:
    return None
  return {
    "coordinator_address": address, "num_processes": count, "process_id": number,
    # By default jax's coordinator listens on every interface, and it has no password.
    "coordinator_bind_address": environ.get("JAX_COORDINATOR_BIND_ADDRESS", address),
    "cluster_detection_method": "deactivate"}


@contextlib.contextmanager
def join_cluster(config):
  """Joins this process to the other processes of the run, if the environment names any.

  A process that ends by an error tells the others its message, and they end too. If one is killed
  or hangs, they end at most `heartbeat` + 5 s later. Enter this before the first use of a device.
  Raises ValueError if the environment is malformed, or process 0 cannot listen at its address.
  """
  found = detect(os.environ)
  if found is None:
    yield
    return
  _connect(found, config)
  peers = _Peers(config.heartbeat)
  method = found["cluster_detection_method"].replace("deactivate", "the environment")
  logging.warning("process %d of %d on %s, told by %s; coordinator %s; devices %d of %d",
                  jax.process_index(), jax.process_count(), socket.gethostname(), method,
                  coordinator_address(), jax.local_device_count(), jax.device_count())
  if jax.process_index():
    logging.set_verbosity(logging.ERROR)  # the others would repeat the log of process 0
  heartbeat_lib.stop_together(hosts.any_process)
  try:
    yield
  except BaseException as error:
    if isinstance(error, KeyboardInterrupt) and heartbeat_lib.stop_agreed():
      peers.leave()  # all processes have stopped and saved
    else:
      peers.fail(error)
    raise
  else:
    peers.leave()
  finally:
    heartbeat_lib.stop_together(None)


def check_cluster():
  """Raises ValueError if there are several processes that `join_cluster` did not find."""
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise ValueError(f"{jax.process_count()} processes that do not know of each other; set "
                     f"ARES_CLUSTER=gcetpu on Cloud TPU VMs, or {', '.join(EXPLICIT)}")


def _connect(found, config):
  if found.get("process_id") == 0:
    _check_free(found["coordinator_bind_address"])
  address = found.get("coordinator_address", "the coordinator")
  joined = threading.Event()

  def limit_wait():
    # After its own timeout jax would end the process with a stack trace.
    if not joined.wait(config.join):
      _exit_with(f"after {config.join:g} s (hosts.join) not all processes have come to {address}: "
                 f"{_missing(found)}; start the same command on every host", os.EX_TEMPFAIL)

  threading.Thread(target=limit_wait, daemon=True, name="join").start()
  jax.config.update("jax_enable_preemption_service", False)  # heartbeat.py handles SIGTERM
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      **found, initialization_timeout=int(config.join) + 60,
      heartbeat_timeout_seconds=int(2 * config.heartbeat),
      shutdown_timeout_seconds=int(config.join))
  except (RuntimeError, OSError) as error:
    raise ValueError(f"joining the other processes by {found} failed: {error}") from error
  joined.set()


def _check_free(address):
  """Raises ValueError if the port is taken: two coordinators on one port would share its calls."""
  host, port = _host_and_port(address)
  try:
    families = {found[0] for found in socket.getaddrinfo(host or None, port)}
    family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    socket.create_server((host, port), family=family).close()
  except OSError as error:
    raise ValueError(f"process 0 cannot listen at {address}: {error}; choose another port in "
                     "JAX_COORDINATOR_ADDRESS, or end the run that has it") from error


def _host_and_port(address):
  host, _, port = address.rpartition(":")
  return host.strip("[]"), int(port)


def _missing(found):
  """Which processes have not joined, as far as this process can tell."""
  if "process_id" not in found:
    return "some are missing"
  count, number = found["num_processes"], found["process_id"]
  try:
    if number:
      socket.create_connection(_host_and_port(found["coordinator_address"]), timeout=5).close()
  except OSError:
    return f"process {number} of {count} finds nobody there, process 0 is missing"
  others = ", ".join(str(other) for other in range(1 if number else 0, count) if other != number)
  return (f"process {number} of {count} has, of {others} at least one has not" if others
          else "the others were there and left")


class _Peers:
  """Notices processes that end or hang, by signs of life in the store of jax's coordinator.

  Process 0 checks the signs of all others; the others check that the store on process 0 answers.
  jax's own check aborts without a clear message; its timeout is set twice as long.
  """

  def __init__(self, heartbeat):
    self._client, self._address = coordination_client(), coordinator_address()
    self._heartbeat, self._pause = heartbeat, min(2.0, heartbeat / 4)
    self._answered = time.monotonic()  # when the store last answered
    self._name = f"process {jax.process_index()} on {socket.gethostname()}"
    self._threads = [threading.Thread(target=loop, daemon=True, name=f"peers{loop.__name__}")
                     for loop in (self._send_signs, self._wait_for_end)]
    for thread in self._threads:
      thread.start()

  def leave(self):
    """Waits until all processes have finished, then disconnects."""
    self._client.wait_at_barrier("ares/end", 10 * 60 * 1000)
    hosts.left.set()
    for thread in self._threads:
      thread.join()  # inside the store's client when Python exits, it would abort the process
    jax.distributed.shutdown()

  def fail(self, error):
    """Tells the others which error ended this process, and the exit code with which all end."""
    code = exit_code(error)
    if code == os.EX_TEMPFAIL:
      # Probably another process has died; then the threads find out which and end this process.
      time.sleep(self._heartbeat + 5)
    hosts.left.set()
    text = " ".join(str(error).split())[:500] or type(error).__name__
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process may have set it
      self._client.key_value_set("ares/ended", f"{code} {self._name} ended: {text}")
    if jax.process_index() == 0:
      time.sleep(2 * self._pause)  # the store ends with this process; let the others read it
    # On a normal exit jax, or a running save, would wait for processes that do not come.
    atexit.register(_flush_and_exit, code)
    timer = threading.Timer(_LEAVE, _flush_and_exit, (code,))
    timer.daemon = True
    timer.start()

  def _send_signs(self):
    seen = {}  # process: (its latest sign, time at which it was first seen)
    for number in itertools.count():
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self._client.key_value_set(f"ares/alive/{jax.process_index()}",
                                   f"{number} {self._name}", allow_overwrite=True)
        self._answered = now = time.monotonic()
        if jax.process_index() == 0:
          for key, sign in self._client.key_value_dir_get("ares/alive/"):
            if key not in seen or seen[key][0] != sign:
              seen[key] = sign, now
        quiet = [sign for sign, when in seen.values() if now - when > self._heartbeat]
        if quiet and not hosts.left.is_set():
          text = (f"{quiet[0].partition(' ')[2]} has given no sign for {self._heartbeat:g} s "
                  "(hosts.heartbeat): the run ends; the same command on all hosts continues it")
          self._client.key_value_set("ares/ended", f"{os.EX_TEMPFAIL} {text}")
          time.sleep(2 * self._pause)  # let the others read it
          _exit_with(text, os.EX_TEMPFAIL)
      if hosts.left.wait(self._pause):
        return

  def _wait_for_end(self):
    while not hosts.left.is_set():
      code, text = os.EX_TEMPFAIL, ""
      try:
        code, _, text = self._client.blocking_key_value_get(
          "ares/ended", int(1000 * self._pause)).partition(" ")
      except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
          text = f"process 0 at {self._address} is gone: the run ends"
      if time.monotonic() - self._answered > self._heartbeat:
        text = (f"process 0 at {self._address} has not answered for {self._heartbeat:g} s "
                "(hosts.heartbeat): the run ends")
      if text and not hosts.left.is_set():
        if jax.process_index() == 0:
          # The store ends with this process, and jax then aborts those that have not ended.
          time.sleep(_LEAVE + 1)
        _exit_with(text, int(code))


def _exit_with(text, code):
  os.write(2, f"error: {text}\n".encode())
  os._exit(code)


def _flush_and_exit(code):
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
