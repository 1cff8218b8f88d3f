"""The frame of a stage: go on from its checkpoint, step, log, save, stop when asked.

A stage is a state and a function of it. All that changes during a run is in the state, `step`
(finished steps) among it, so saving the state saves the run.
"""

import os
import time

import jax
from absl import logging

from ares_jax.run import speed
from ares_jax.run.checkpoint.manager import Checkpoints, abstract_like
from ares_jax.run.identity import check_marks, run_marks
from ares_jax.run.metrics import MetricWriter
from ares_jax.run.progress import Progress
from ares_jax.system import heartbeat, hosts, profiler
from ares_jax.system.profiler import PhaseTimer

_SKIPPED = ("skipped", "update/skipped")  # metrics > 0 where an update was left out
NONFINITE = "nonfinite/"  # metrics > 0 that say why; logged in such steps alone
_TOGETHER = 60  # seconds between two processes that meet the same error
_PAUSES = (2, 10)  # seconds before a disk that refused a save is asked again


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
    KeyboardInterrupt: Ctrl-C or SIGTERM came, also in the middle of a rollout or of grading; the
      state is saved up to the last finished step.
    ValueError: a step cannot be done (a bad row, a grader that fails, a cache that is too small):
      saved likewise; gradients stay non-finite; or the checkpoint is of another model, of a longer
      run, or damaged.
    OSError: a save failed, which is noticed at the first step after it, or a line of the log, and
      two more tries did.
  """
  phases = phases or PhaseTimer()
  with Checkpoints(os.path.join(workdir, name), config.keep) as checkpoints:
    restored = checkpoints.restore(abstract_like(state), strict=config.strict)
    if restored is not None:
      # A fresh stage donates its first state; a resumed one must not hold it beside the real one.
      jax.tree.map(lambda x: x.delete(), state)
      step, state, made_with = restored
      where = f"checkpoint {step} of {name}"
      hosts.on_process_0(lambda: check_marks(workdir, name, made_with, where))
    made_with = hosts.on_process_0(lambda: run_marks(workdir))
    done = int(state.step)
    if done > steps:
      raise ValueError(f"{checkpoints.directory} is at step {done}, beyond the {steps} steps of "
                       f"{name}; raise its steps or use another workdir")
    if done == steps:
      return state
    skipped = 0  # in a row; a run that goes on counts anew, which costs max_skipped steps at most
    with MetricWriter(workdir, name, step=done) as writer, heartbeat.stop_signals():
      progress = Progress(steps, name, start=done)
      phases.take()  # what ran between the stages belongs to none of their steps
      step = begin(state)
      while done < steps:
        profiler.profile_step(name, done)
        try:
          with phases("step"):
            heartbeat.heartbeat(common=True)
            state, metrics, note = step(state)
            metrics = jax.device_get(metrics)
        except heartbeat.StopRequested:
          break  # between two steps, or in one that has not reached its update: `state` is whole
        except (ValueError, OSError) as error:
          if isinstance(error, OSError) and jax.process_count() > 1 or not hosts.barrier(
              f"{name}/{done}", _TOGETHER):
            raise  # this process alone has met it, and a save takes all
          # A step refuses its data, or its folder refuses responses, before the update, which is
          # what uses the state up.
          _save_now(checkpoints, done, state, made_with)
          kind = OSError if isinstance(error, OSError) else ValueError
          raise kind(f"{error}; {name} is saved at step {done} of {steps}") from error
        done += 1
        faults = {key: count for key, count in metrics.items() if key.startswith(NONFINITE)}
        metrics = {key: x for key, x in metrics.items() if key not in faults or faults[key]}
        if any(metrics[key] for key in _SKIPPED if key in metrics):
          skipped += 1
          named = [key[len(NONFINITE):] for key in faults if faults[key]] or ["gradient"]
          logging.warning("%s step %d: no update: not finite, or beyond its limit: %s", name, done,
                          ", ".join(named))
        else:
          skipped = 0
        seconds = phases.take()
        fast = speed.speed_metrics(metrics, seconds["seconds/step"])
        metrics |= seconds | fast
        try:
          _patiently(lambda done=done, metrics=metrics: writer.write_scalars(done, metrics))
        except OSError as error:
          # Without its line the step does not count: saved, it would be missing in the log.
          raise OSError(f"step {done} of {name} cannot be logged: {error}; the run goes on from "
                        "its newest checkpoint when the folder can be written") from error
        progress.update(done, ", ".join(filter(None, (note, speed.speed_note(fast)))))
        try:
          checkpoints.check()
          if done % config.save_every == 0:
            with phases("save"):
              checkpoints.save(done, state, made_with)
        except OSError as error:
          logging.warning("%s; saving step %d instead", error, done)
          _save_now(checkpoints, done, state, made_with)
        if skipped > config.max_skipped:
          _save_now(checkpoints, done, state, made_with)
          raise ValueError(
            f"{name}: {skipped} steps in a row were skipped, for {', '.join(named)} that was not "
            f"finite or beyond its limit; step {done} is saved and as finite as the one before "
            f"them; look into a batch with --replay={os.path.join(workdir, 'nonfinite')}/"
            f"{name}-{done}.npz; lower the learning rate")
      progress.close()
      with phases("save"):
        _save_now(checkpoints, done, state, made_with)
      profiler.end_profile()  # what comes after the stage is none of its steps
      stopped = heartbeat.stop_requested()
    if stopped:
      raise KeyboardInterrupt(f"{name} is saved at step {done} of {steps}; "
                              "run the same command again to continue")
  return state


def _save_now(checkpoints, step, state, made_with):
  """Returns when the finished `step`, if any, is on disk; tries again when the disk refuses."""
  log = os.path.join(os.path.dirname(checkpoints.directory), "metrics.jsonl")

  def save():
    os.stat(log)  # Orbax would make a folder that is gone anew, for this checkpoint alone
    if step and checkpoints.latest() != step:
      checkpoints.save(step, state, made_with)
    checkpoints.wait()

  _patiently(save)


def _patiently(act):
  """Calls `act`; again, after a while, when the disk refuses."""
  for pause in (*_PAUSES, None):
    try:
      return act()
    except OSError as error:
      if pause is None:
        raise
      logging.warning("%s; once more in %d s", error, pause)
      time.sleep(pause)
