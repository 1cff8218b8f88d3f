"""The training loop of a stage: resume, step, log, save, and stop when asked.

The state of a stage holds everything that changes during a run, also the number of finished steps
(`step`), so saving the state saves the run.
"""

import dataclasses
import os
import time
from collections.abc import Callable

import jax
from absl import logging

from ares_jax.run.best import Best, lines_of
from ares_jax.run.bucket import upload
from ares_jax.run.checkpoint.manager import Checkpoints, abstract_like
from ares_jax.run.identity import check_marks, run_marks, stage_folder
from ares_jax.run.metrics import MetricWriter
from ares_jax.run.progress import Progress, speed_metrics, speed_note
from ares_jax.system import heartbeat, hosts, profiler
from ares_jax.system.gcs import in_bucket
from ares_jax.system.profiler import PhaseTimer

NONFINITE = "nonfinite/"  # metrics > 0 that say why an update was skipped
_SKIPPED = ("skipped", "update/skipped")  # metrics > 0 in a step whose update was skipped
_BARRIER_SECONDS = 60  # that processes wait for each other after the same error
_RETRY_PAUSES = (2, 10)  # seconds before a write that failed is tried again


@dataclasses.dataclass(frozen=True)
class Validation:
  """When a stage's weights are measured; the metrics are a line of their own at their step.

  That is before the first step, every `every` steps and after the last.
  """

  every: int
  measure: Callable  # function of the state; returns metrics and a note for the progress bar

  def is_due(self, done, steps, best):
    """Whether to measure the weights after `done` steps; not again where `best` has seen it."""
    return best.validated != done and (done % self.every == 0 or done == steps)


def run_stage(name, state, begin, *, steps, workdir, config, phases=None, validation=None):
  """Runs a stage to its last step, from its newest checkpoint if there is one.

  Args:
    name: name of the stage. Its checkpoints are in WORKDIR/NAME, its metrics carry the name.
    state: a record with `step` int32 [], as at step 0. Its arrays are donated.
    begin: function of the state at which the stage starts or resumes; returns `step`, a function
      state -> (state, metrics dict, note for the progress bar). `step` adds 1 to `state.step`.
    steps: total number of steps; the state after them is returned.
    workdir, config: folder and LoopConfig of the run.
    phases: PhaseTimer of the phases inside `step`, or None.
    validation: Validation, or None. A stage ends early where `config.patience` says so.

  Raises:
    KeyboardInterrupt: Ctrl-C or SIGTERM came. The state is saved up to the last finished step.
    ValueError: a step failed and the state is saved likewise; or too many updates in a row were
      skipped; or the checkpoint belongs to another model or a longer run, or is damaged.
    OSError: a checkpoint or a line of the log could not be written, nor at two more tries.
  """
  with Checkpoints(stage_folder(workdir, name), config.keep) as checkpoints:
    state = _restore(name, state, checkpoints, workdir, strict=config.strict)
    done = int(state.step)
    if done > steps:
      raise ValueError(f"{checkpoints.directory} is at step {done}, beyond the {steps} steps of "
                       f"{name}; raise its steps or use another workdir")
    lines = [] if not (validation or config.keep_best) else (
      hosts.on_process_0(lambda: lines_of(config, workdir, name, done)))
    best = Best(config, lines)
    saved = checkpoints.steps()  # without the best one if its save failed
    checkpoints.kept_step = Best(config, [line for line in lines if line["step"] in saved]).step
    due = validation and validation.is_due(done, steps, best)
    if best.ends_stage or done == steps and not due:
      return state
    marks = hosts.on_process_0(lambda: run_marks(workdir))
    with MetricWriter(workdir, name, step=done) as writer, heartbeat.stop_signals():
      stage = _Stage(
        name=name, steps=steps, workdir=workdir, config=config, phases=phases or PhaseTimer(),
        validation=validation, best=best, checkpoints=checkpoints, marks=marks, writer=writer,
        progress=Progress(steps, name, start=done), state=state, done=done)
      stage.run(begin)
      stopped = heartbeat.stop_requested()
    if stopped:
      raise KeyboardInterrupt(f"{name} is saved at step {stage.done} of {steps}; run the same "
                              "command again to continue")
  return stage.state


@dataclasses.dataclass
class _Stage:
  """A stage that runs: its newest state, which it measures, logs, shows and saves."""

  name: str
  steps: int
  workdir: str | os.PathLike
  config: object  # LoopConfig
  phases: PhaseTimer
  validation: Validation | None
  best: Best
  checkpoints: Checkpoints
  marks: dict  # of the run; every checkpoint has them
  writer: MetricWriter
  progress: Progress
  state: object
  done: int  # finished steps
  skipped: int = 0  # updates in a row; a resumed run starts again from 0

  def run(self, begin):
    """Takes the steps that are left, until one ends the stage or a stop is asked for."""
    self.phases.take()  # the time between two stages belongs to none of their steps
    step = begin(self.state)
    if self._validate():  # of a checkpoint that was saved when a stop came before its validation
      self.checkpoints.kept_step = self.done
    while self.done < self.steps and not self.best.ends_stage:
      profiler.profile_step(self.name, self.done)
      try:
        metrics, note = self._take(step)
      except heartbeat.StopRequested:
        break  # the step had not reached its update: `state` is that of the last finished step
      except (ValueError, OSError) as error:
        self._save_and_raise(error)
      self._finish(metrics, note)
    self.progress.close()
    with self.phases("save"):
      self._save_now()
    profiler.end_profile()  # work after the stage belongs to none of its steps

  def _take(self, step):
    with self.phases("step"):
      heartbeat.heartbeat(collective=True)
      self.state, metrics, note = step(self.state)
      return jax.device_get(metrics), note

  def _finish(self, metrics, note):
    """Logs, shows, validates and saves a step that was taken."""
    self.done += 1
    reasons, seconds = ", ".join(_skip_reasons(metrics)), self.phases.take()
    if reasons:
      logging.warning("%s step %d: no update: not finite, or beyond its limit: %s", self.name,
                      self.done, reasons)
    speed = speed_metrics(metrics, seconds["seconds/step"])
    self._write({key: x for key, x in metrics.items() if x or not key.startswith(NONFINITE)}
                | seconds | speed)
    self.progress.update(self.done, ", ".join(filter(None, (note, speed_note(speed)))))
    self.skipped = self.skipped + 1 if reasons else 0
    is_best = self.best.see(self.done, metrics)
    is_best |= self._validate()
    self._save_if_due(is_best)
    if self.skipped > self.config.max_skipped:
      self._save_now()
      raise ValueError(
        f"{self.name}: {self.skipped} steps in a row were skipped, for {reasons} that was not "
        f"finite or beyond its limit; step {self.done} is saved with the weights from before them; "
        f"look into a batch with --replay={self.workdir}/nonfinite/{self.name}-{self.done}.npz; "
        "lower the learning rate")

  def _validate(self):
    """Whether the weights were validated and are the best; a stopped run validates later."""
    if not (self.validation and self.validation.is_due(self.done, self.steps, self.best)):
      return False
    try:
      metrics, note = self.validation.measure(self.state)
      is_best = self.best.see(self.done, metrics)
    except heartbeat.StopRequested:
      return False
    except (ValueError, OSError) as error:
      self._save_and_raise(error)
    self._write(metrics | self.phases.take())
    self.progress.say(f"{self.name} {self.done}/{self.steps}  "
                      f"{', '.join(filter(None, (note, self.best.note())))}")
    return is_best

  def _write(self, metrics):
    """Writes a line of metrics.jsonl."""
    try:
      _with_retries(lambda: self.writer.write_scalars(self.done, metrics))
    except OSError as error:
      # Not saved: a checkpoint of this step would leave its line missing from the log for good.
      raise OSError(f"step {self.done} of {self.name} cannot be logged: {error}; the run goes on "
                    "from its newest checkpoint when the folder can be written") from error

  def _save_if_due(self, is_best):
    """Starts a save every `save_every` steps and of the best; replaces one that failed before."""
    try:
      self.checkpoints.check()
      if self.done % self.config.save_every == 0 or is_best:
        with self.phases("save"):
          upload(self.workdir)  # the log of these steps first: they are never done again
          self.checkpoints.save(self.done, self.state, self.marks, is_best=is_best)
    except OSError as error:
      logging.warning("%s; saving step %d instead", error, self.done)
      self._save_now(is_best)

  def _save_now(self, is_best=False):
    """Returns when the finished steps are on disk; nothing is saved at step 0."""
    def save():
      if not in_bucket(self.workdir):
        # Orbax would recreate a deleted run folder for this checkpoint alone.
        os.stat(os.path.join(self.workdir, "metrics.jsonl"))
      upload(self.workdir)
      if self.done and self.checkpoints.latest() != self.done:
        self.checkpoints.save(self.done, self.state, self.marks, is_best=is_best)
      self.checkpoints.wait()

    _with_retries(save)

  def _save_and_raise(self, error):
    if not _all_failed(error, f"{self.name}/{self.done}"):
      raise error
    self._save_now()
    kind = OSError if isinstance(error, OSError) else ValueError
    raise kind(f"{error}; {self.name} is saved at step {self.done} of {self.steps}") from error


def _restore(name, state, checkpoints, workdir, *, strict):
  """The state of the stage's newest checkpoint; `state` if there is none."""
  restored = checkpoints.restore(abstract_like(state), strict=strict)
  if restored is None:
    return state
  jax.tree.map(lambda x: x.delete(), state)  # frees its memory, also where the caller holds it
  step, state, marks = restored
  hosts.on_process_0(lambda: check_marks(workdir, name, marks, f"checkpoint {step} of {name}"))
  return state


def _all_failed(error, name):
  """Whether all processes met the error of a step, so that all take part in a save."""
  on_one_process = jax.process_count() > 1 and isinstance(error, OSError)
  return not on_one_process and hosts.barrier(name, _BARRIER_SECONDS)


def _skip_reasons(metrics):
  """Names of the values for which a step skipped its update; [] if it did not skip it."""
  if not any(metrics.get(key) for key in _SKIPPED):
    return []
  return [key.removeprefix(NONFINITE) for key, count in metrics.items()
          if key.startswith(NONFINITE) and count] or ["gradient"]


def _with_retries(write):
  """Calls `write`; after an OSError again, after each of `_RETRY_PAUSES`."""
  for number, pause in enumerate(_RETRY_PAUSES):
    try:
      return write()
    except OSError as error:
      if number == 0:
        logging.warning("%s; trying again for %d s", error, sum(_RETRY_PAUSES))
      time.sleep(pause)
  return write()
