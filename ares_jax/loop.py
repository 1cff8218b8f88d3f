"""The frame of a stage: go on from its checkpoint, step, log, save, stop when asked.

A stage is a state and a function of it. All that changes during a run is in the state, `step`
(finished steps) among it, so saving the state saves the run.
"""

import contextlib
import dataclasses
import os
import signal

import jax

from ares_jax.checkpoint import Checkpoints, abstract_like
from ares_jax.metrics import MetricWriter, PhaseTimer, Progress


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """How often a stage saves."""

  save_every: int  # steps between checkpoints; the last step is always saved
  keep: int  # newest checkpoints kept; 1 leaves none to go on from when it is damaged
  strict: bool  # whether a damaged checkpoint is refused; else the newest whole one is taken

  def __post_init__(self):
    if self.save_every < 1 or self.keep < 1:
      raise ValueError(f"save_every = {self.save_every} and keep = {self.keep} must be >= 1")


def run_stage(name, state, begin, *, steps, workdir, config, phases=None):
  """Runs a stage to its end, from its newest checkpoint where there is one.

  Args:
    name: of the stage: its checkpoints lie in WORKDIR/NAME, its metrics carry it.
    state: a record with `step` int32 [], as at step 0. Its arrays are used up.
    begin: function of the state at which the stage goes on; returns `step`, a function state ->
      (state, metrics dict, note for the progress bar). `step` adds 1 to `state.step`.
    steps: steps in all.
    workdir: folder of the run.
    config: LoopConfig.
    phases: metrics.PhaseTimer of the phases inside `step`, or None.

  Returns:
    The state after `steps` steps.

  Raises:
    KeyboardInterrupt: Ctrl-C or SIGTERM came; the state is saved up to the last finished step.
    ValueError: a step cannot be done (a bad row, a grader that fails, a cache that is too small):
      saved likewise; or the checkpoint is of another model, of a longer run, or damaged.
    OSError: a save failed; noticed at the first step after it.
  """
  phases = phases or PhaseTimer()
  with Checkpoints(os.path.join(workdir, name), config.keep) as checkpoints:
    restored = checkpoints.restore(abstract_like(state), strict=config.strict)
    if restored is not None:
      # A fresh stage donates its first state; a resumed one must not hold it beside the real one.
      jax.tree.map(lambda x: x.delete(), state)
      _, state, _ = restored
    done = int(state.step)
    if done > steps:
      raise ValueError(f"{checkpoints.directory} is at step {done}, beyond the {steps} steps of "
                       f"{name}; raise its steps or use another workdir")
    if done == steps:
      return state
    with MetricWriter(workdir, name, step=done) as writer, stop_requests() as stopped:
      progress = Progress(steps, name, start=done)
      phases.take()  # what ran between the stages belongs to none of their steps
      step = begin(state)
      while done < steps and not stopped:
        try:
          with phases("step"):
            state, metrics, note = step(state)
            metrics = jax.device_get(metrics)
        except ValueError as error:
          # A step refuses its data before the update, which is what uses the state up.
          if done and checkpoints.latest() != done:
            checkpoints.save(done, state, {})
          checkpoints.wait()
          raise ValueError(f"{error}; {name} is saved at step {done} of {steps}") from error
        done += 1
        checkpoints.check()
        writer.write_scalars(done, metrics | phases.take())
        progress.update(done, note)
        if done % config.save_every == 0 or done == steps:
          checkpoints.save(done, state, {})
      progress.close()
      if done and checkpoints.latest() != done:
        checkpoints.save(done, state, {})
      checkpoints.wait()
    if stopped:
      raise KeyboardInterrupt(f"{name} is saved at step {done} of {steps}; "
                              "run the same command again to continue")
  return state


@contextlib.contextmanager
def stop_requests():
  """A list, empty until SIGINT or SIGTERM comes; a second signal ends the process at once."""
  received = []

  def note(number, _):
    received.append(number)
    signal.signal(number, signal.SIG_DFL)

  before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
