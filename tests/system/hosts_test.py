"""Detection of the processes of a run, and their communication."""

import json
import re
import socket
import unittest.mock

import pytest
import tiny

from ares_jax.run import identity, lock
from ares_jax.system import cluster, hosts
from ares_jax.system import heartbeat as heartbeat_lib

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1",
         "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize("environ, found", [
  ({}, None),
  ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
  ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
   {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1,
    "coordinator_bind_address": "a:1", "cluster_detection_method": "deactivate"}),
  (SLURM | {"SLURM_NTASKS": "1"}, None),
  ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}, None),  # the batch script, not a step of srun
  (SLURM, {"cluster_detection_method": "slurm", "local_device_ids": None}),
  (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "3"},
   {"cluster_detection_method": "slurm", "local_device_ids": [0, 1, 2]}),
  (SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"},  # a task a GPU
   {"cluster_detection_method": "slurm", "local_device_ids": None}),
  ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
  ({"TPU_WORKER_HOSTNAMES": "a,b"}, {"cluster_detection_method": "gketpu"}),
  ({"ARES_CLUSTER": "gcetpu"}, {"cluster_detection_method": "gcetpu"}),
])
def test_processes_are_detected_in_the_environment(environ, found):
  assert cluster.detect(environ) == found


@pytest.mark.parametrize("environ, message", [
  ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES without JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
  ({"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "HOST:PORT"),
  ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
   "JAX_PROCESS_ID=2 is outside 0..1"),
])
def test_an_incomplete_environment_is_refused(environ, message):
  with pytest.raises(ValueError, match=message):
    cluster.detect(environ)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_the_port_of_an_ipv6_address_is_checked():
  with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
    port = server.getsockname()[1]
    with pytest.raises(ValueError, match=r"cannot listen at \[::1\]:\d+: .*in use"):
      cluster._check_free(f"[::1]:{port}")
  cluster._check_free(f"[::1]:{port}")


def test_a_port_that_is_taken_is_refused(monkeypatch):
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    for name, value in zip(cluster.EXPLICIT, (address, "2", "0"), strict=True):
      monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"cannot listen at {address}.*another port"), \
        cluster.join_cluster(cluster.HostsConfig(5.0, 5.0)):
      pass


@pytest.mark.parametrize("any_process, ended", [(bool, "fail"), (lambda flag: True, "leave")])
def test_a_stop_that_the_others_do_not_know_of_ends_them(monkeypatch, any_process, ended):
  peers = unittest.mock.Mock()
  monkeypatch.setattr(cluster, "detect", lambda environ: {"cluster_detection_method": "none"})
  monkeypatch.setattr(cluster, "_connect", lambda found, config: None)
  monkeypatch.setattr(cluster, "_Peers", lambda heartbeat: peers)
  monkeypatch.setattr(cluster.hosts, "any_process", any_process)
  with pytest.raises(KeyboardInterrupt), cluster.join_cluster(cluster.HostsConfig(5.0, 5.0)):
    with heartbeat_lib.stop_signals():
      heartbeat_lib.stop_requested()
      raise KeyboardInterrupt
  assert [name for name, *_ in peers.method_calls] == [ended] and not heartbeat_lib.stop_agreed()


def test_waiting_times_are_checked():
  with pytest.raises(ValueError, match="heartbeat = 1.0 s >= 2"):
    cluster.HostsConfig(5.0, 1.0)


def test_shards_split_a_sequence(monkeypatch):
  monkeypatch.setattr(hosts.jax, "process_count", lambda: 3)
  parts = []
  for number in range(3):
    monkeypatch.setattr(hosts.jax, "process_index", lambda number=number: number)
    parts.append(hosts.local_shard(list(range(7))))
  assert parts == [[0, 3, 6], [1, 4], [2, 5]]


def test_processes_that_differ_are_named(monkeypatch):
  monkeypatch.setattr(hosts, "allgather_bytes", lambda data: [data, data.replace(b"0", b"1")])
  hosts.check_same({"steps": 2}, "was started with another config")
  with pytest.raises(ValueError, match="process 1 was started with another config: seed is 1, "
                     "process 0 has 0; start the same command"):
    hosts.check_same({"seed": 0, "steps": 2}, "was started with another config")


@pytest.mark.parametrize("name, value", [
  ("seed", 7), ("aepo.group", 3), ("--workdir", "/other"), ("--check", True), ("--replay", "x.npz"),
  ("--allow_change", ["seed"]), ("version of jax", "0.1"), ("code of ares_jax", "0")])
def test_every_setting_that_decides_what_a_run_does_is_compared(monkeypatch, name, value):
  words = {"check": False, "replay": "", "allow_change": []}

  def gather(data):
    record = json.loads(data)
    assert name in record
    return [data, json.dumps(record | {name: value}).encode()]

  monkeypatch.setattr(hosts, "allgather_bytes", gather)
  with pytest.raises(ValueError, match="process 1 was started with another config: "
                     f"{name} is {re.escape(repr(value))}, process 0 has"):
    identity.check_equal(tiny.values(), "/run", words)


def test_processes_with_different_disks_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(hosts, "allgather", lambda call: [call(), b""])
  with pytest.raises(ValueError, match=f"process 1 finds another {tmp_path} than process 0"), \
      lock.one_run(str(tmp_path)):
    pass
