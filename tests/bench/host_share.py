"""What each host holds of a batch of 1080p images, with several processes of one run.

    python -m tests.bench.host_share [--prompts=16] [--devices=4]

In every layout the processes together have as many CPU devices. A process does all of an
iteration's work on the host: it reads and decodes the JPEG files of its prompts, answers them (at
random, instead of a model), and moves, packs and puts the groups on its devices, whose memory is
the process's too. Groups are reordered for the update, so most prompts move to another process.
Prints the bytes of images and samples that a process holds, and by how much its resident memory
grows to the end and at its highest, in MiB: the mean and the largest of the processes; and the
digest of the batch on the devices, which is the same in every layout.
"""

import argparse
import functools
import hashlib
import json
import os
import pathlib
import resource
import socket
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
GROUP, TOKENS, PROMPT_TOKENS, WINDOWS = 4, 512, 4096, 192
LIMITS = dict(min_pixels=262144, max_pixels=4194304)  # of configs/aepo_7b.py


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--prompts", type=int, default=16)
  parser.add_argument("--devices", type=int, default=4)
  parser.add_argument("--child", default="")
  options = parser.parse_args()
  if options.child:
    child(options.prompts, options.child)
    return
  print("| processes | holds, mean | largest | grows by | at its highest, mean | largest | digest |"
        "\n| --- | --- | --- | --- | --- | --- | --- |")
  with tempfile.TemporaryDirectory() as folder:
    write_images(folder, options.prompts)
    for count in (1, 2, 4):
      found = layout(folder, options, count)
      held, grown, highest = np.array([each[:3] for each in found]).T / 2**20
      digests = {each[3] for each in found}
      print(f"| {count} | {held.mean():.0f} | {held.max():.0f} | {grown.mean():.0f} | "
            f"{highest.mean():.0f} | {highest.max():.0f} | {', '.join(digests)} |", flush=True)


def write_images(folder, count):
  from PIL import Image

  for number in range(count):
    pixels = np.random.default_rng(number).integers(0, 256, (68, 120, 3), np.uint8)
    Image.fromarray(pixels).resize((1920, 1080)).save(f"{folder}/{number}.jpg")


def layout(folder, options, count):
  """[bytes held, growth, highest growth, digest] of each of `count` processes."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  shared = os.environ | {
    "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={options.devices // count}"}
  processes = [subprocess.Popen(
    [sys.executable, "-m", "tests.bench.host_share", f"--prompts={options.prompts}", "--child",
     folder], stdout=subprocess.PIPE, text=True, cwd=ROOT,
    env=shared | {"JAX_PROCESS_ID": str(number)}) for number in range(count)]
  found = []
  for process in processes:
    output, _ = process.communicate()
    if process.returncode:
      raise RuntimeError(f"a process ended with {process.returncode}: {output}")
    found.append(json.loads(output.splitlines()[-1]))
  return found


def child(prompts, folder):
  import jax

  from ares_jax.system import cluster, mesh

  with cluster.join_cluster(cluster.HostsConfig(300.0, 120.0)), \
      jax.set_mesh(mesh.make_mesh(-1, 1)):
    print(json.dumps(iteration(prompts, folder)), flush=True)


def iteration(prompts, folder):
  import jax

  from ares_jax.data import digits
  from ares_jax.data.chat import Chat
  from ares_jax.data.prompts import Encoder, PromptConfig
  from ares_jax.data.sharded import sharded_stream
  from ares_jax.run.checkpoint.digest import digest_tree
  from ares_jax.sampling.groups import FilterConfig, collect
  from ares_jax.system import hosts
  from ares_jax.training.batch import pack
  from ares_jax.training.minibatches import balance_minibatches

  tokenizer = digits.tokenizer()
  encoder = Encoder(Chat(tokenizer, "", tokenizer.convert_tokens_to_ids("<|image_pad|>")),
                    PromptConfig("", (PROMPT_TOKENS,), (WINDOWS,), **LIMITS), 112, 14, 2)
  rows = [{"id": str(number), "question": "<image>Compute red", "answer": "3",
           "images": [f"{folder}/{number}.jpg"]} for number in range(prompts)]
  hosts.any_process(False)  # connects the processes
  before, sizes = resident(), dict(minibatch=prompts * GROUP // 2, microbatch=4,
                                   row_tokens=(2 * PROMPT_TOKENS,))
  parts = sharded_stream(rows, batch=prompts, seed=0, start=0, encode=encoder.encode, threads=1)
  rollout = collect(
    Random(encoder), None, map(lambda part: part.prompts(encoder, np.arange(prompts)), parts), None,
    group=GROUP, order=functools.partial(balance_minibatches, **sizes), sampling=None,
    config=FilterConfig(1, 0.01, 0.99))
  packed, _ = pack(rollout.prompts, rollout.samples, rollout.lengths, group=GROUP,
                   longest=PROMPT_TOKENS + TOKENS, **sizes)
  held = sum(patches.nbytes for images in rollout.prompts.images for patches, _ in images)
  held += sum(leaf.nbytes for leaf in jax.tree.leaves((rollout.samples, packed.replace(used=None))))
  batch = rollout.batch(packed).to_device(prompts, sizes["microbatch"])
  jax.block_until_ready(batch)
  grown, highest = resident() - before, highest_resident() - before
  digests = digest_tree({name: leaf for name, leaf in zip(
    map(str, range(99)), jax.tree.leaves(batch), strict=False)})
  return held, grown, highest, hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


class Random:
  """Answers prompts at random, by the number of each prompt alone; half of them are right."""

  end = (1,)

  def __init__(self, encoder):
    from ares_jax.run import model
    from ares_jax.sampling.scheduler import History
    from ares_jax.system.profiler import PhaseTimer

    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    self.model = model.model_config(tiny.read().model)
    self.encoder, self.phases, self.history = encoder, PhaseTimer(), History()

  def answer(self, params, prompts, key, *, group, sampling, branching):
    from ares_jax.sampling.rollout import Grades
    from ares_jax.sampling.sampler import Samples

    drawn = [np.random.default_rng(int(number)) for number in prompts.prompt_id]
    lengths = np.concatenate([each.integers(1, TOKENS, group) for each in drawn])
    mask = np.arange(TOKENS) < lengths[:, None]
    tokens = np.concatenate([each.integers(2, 99, (group, TOKENS)) for each in drawn])
    value = np.where(mask, tokens / 99, 0).astype(np.float32)
    count = len(prompts.sizes) * group
    grades = (np.arange(count) % 2).astype(np.float32)
    return Samples(np.where(mask, tokens, 0).astype(np.int32), mask, -value, value,
                   np.full(len(mask), -1, np.int32), np.zeros(len(mask), np.int32)), Grades(
                     [""] * len(mask), grades, grades, 0)


def resident():
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * resource.getpagesize()


def highest_resident():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
  main()
