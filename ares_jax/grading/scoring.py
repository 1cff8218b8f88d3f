"""Scores answers: a user's reward functions, the built-in components, their weighted sum.

`Scorer` stands where a GradingPool does, for runs whose section `reward` asks for more than right
or wrong. A component is a number of an answer, such as "accuracy" or "format"; the reward of an
answer is a weighted sum of its components.
"""

import collections
import concurrent.futures
import dataclasses
from typing import Literal

import numpy as np

from ares_jax.grading import functions, sandbox
from ares_jax.grading.judge import JudgeConfig
from ares_jax.grading.pool import GraderError, heartbeat_or_stop, worker_failure
from ares_jax.grading.response import well_formed
from ares_jax.system.config import optional, suggest

_GRADER = "grader"  # the value of reward.accuracy that names the grader of the section `grade`
_BUILT_IN = ("accuracy", "format", "overlong")


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
  """What an answer is worth, before AEPO shapes its reward by difficulty."""

  # "[FORM:]FILE.py:NAME" or "[FORM:]module:NAME", several with commas; "" = the grader alone. FORM
  # is one of functions.FORMS, or "judge" for a function that runs in the trainer's own process.
  function: str = optional("", curation=True)
  arguments: str = optional("", curation=True)  # of every call: "max_length=2048, scale=0.5"
  # "accuracy=1, format=0.1": factors of the components. "" = the component "overall" where the
  # function gives one, else the sum of all its components; without a function, the accuracy.
  weights: str = optional("", first_read_by="aepo")
  # Component that is the accuracy, in [0, 1]; "grader" = measured by the grader. "" = the component
  # "accuracy" or "acc" where there is one, else the first number of the first function.
  accuracy: str = optional("", curation=True)
  threshold: float = optional(0.5, curation=True)  # accuracy from which an answer counts as right
  # Tokens before the longest answer's end, as a share of it, over which DAPO's component "overlong"
  # falls from 0 to -1.
  overlong: float = optional(0.2, first_read_by="aepo")
  # A function that fails on an answer stops the run, or its group is dropped and counted.
  failure: Literal["stop", "drop"] = optional("stop", free=True)
  timeout: float = optional(60.0, free=True)  # seconds a call with a batch of answers
  judge: JudgeConfig = optional(JudgeConfig(), free=True)

  def __post_init__(self):
    self.read_weights()
    if not 0 <= self.threshold <= 1 or not 0 < self.overlong <= 1:
      raise ValueError(f"threshold = {self.threshold} must be in [0, 1], overlong = "
                       f"{self.overlong} in (0, 1]")
    if not 0 < self.timeout < float("inf"):
      raise ValueError(f"timeout = {self.timeout} s must be > 0 and finite")

  @property
  def is_default(self):
    """Whether an answer's reward is 1 where the grader takes it for right, and 0 elsewhere."""
    return not self.function and not self.weights

  def read_weights(self):
    """{component: factor}; {} where none are set."""
    found = {}
    for part in filter(None, map(str.strip, self.weights.split(","))):
      name, _, factor = map(str.strip, part.partition("="))
      try:
        found[name] = float(factor)
      except ValueError as error:
        raise ValueError(f"weights = {self.weights!r} is not of the form \"accuracy=1, "
                         f"format=0.1\": {part!r}") from error
    if not np.isfinite(list(found.values())).all():
      raise ValueError(f"weights = {self.weights!r} must be finite")
    if not self.function and (unknown := sorted({*found} - {*_BUILT_IN})):
      raise ValueError(f"weights name {unknown[0]!r}{suggest(unknown[0], _BUILT_IN)}; set "
                       "reward.function for components of your own")
    return found


@dataclasses.dataclass(frozen=True)
class Scores:
  """The scores of n answers, numpy float32 [n]; an answer on which a function failed has zeros."""

  accuracy: np.ndarray  # in [0, 1]
  reward: np.ndarray  # weighted sum of the components
  components: dict  # {name: values}, NaN where an answer has none
  failed: np.ndarray  # bool: a function failed on the answer
  failure: str = ""  # how it failed on the first of them

  def take(self, rows):
    """The Scores of some answers, an index of numpy."""
    return dataclasses.replace(
      self, accuracy=self.accuracy[rows], reward=self.reward[rows], failed=self.failed[rows],
      components={name: values[rows] for name, values in self.components.items()})

  @classmethod
  def join(cls, parts):
    """The Scores of several lists of answers."""
    names = dict.fromkeys(name for part in parts for name in part.components)

    def of(part, name):
      return part.components.get(name, np.full(len(part.reward), np.nan, np.float32))

    accuracy, reward, failed = (np.concatenate([getattr(part, field) for part in parts])
                                for field in ("accuracy", "reward", "failed"))
    return cls(accuracy, reward,
               {name: np.concatenate([of(part, name) for part in parts]) for name in names},
               failed, next((part.failure for part in parts if part.failure), ""))


class Scorer(sandbox.Workers):
  """Scores batches of answers by a ScoreConfig; a context manager, used like a GradingPool."""

  def __init__(self, config, grader, *, workers, timeout, max_tokens, judge=None):
    """Loads the functions.

    Args:
      config: ScoreConfig.
      grader: GradingPool, which is asked where no function tells the accuracy.
      workers: processes that call the functions.
      timeout: seconds that a function of one answer may take.
      max_tokens: of the longest answer.
      judge: judge.Judge, which calls the functions that run in this process.

    Raises:
      ValueError: a function does not load.
    """
    self.config, self.grader, self.judge = config, grader, judge
    self.functions = functions.read_functions(config.function, config.arguments)
    self.weights, self.max_tokens = config.read_weights(), max_tokens
    self._workers, self._timeout = workers, timeout
    self.step = 0  # iterations that are finished, for functions that ask

  @property
  def name(self):
    """What measures the accuracy: the functions, or the grader."""
    return self.grader.name if self.asks_grader else self.config.function

  @property
  def asks_grader(self):
    """Whether the grader measures the accuracy."""
    return not self.functions or self.config.accuracy == _GRADER

  def bad_truths(self, rows, batch=1024):
    """Yields the rows whose truth the grader refuses; none where a function decides."""
    if self.asks_grader:
      yield from self.grader.bad_truths(rows, batch)

  def try_out(self, rows, *, entropies=True):
    """Scores a made-up answer to each row, so that a function that fails is found early.

    `entropies`: whether the answers have some, as those of the model do; a teacher's have none.
    """
    scoring = self.begin()
    for index, row in enumerate(rows):
      truth = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
      scoring.add(index, f"<think> </think> \\boxed{{{truth}}}", row, [0, 0])
    scoring.finish({index: [0.0, 0.0] for index in range(len(rows))} if entropies else None)

  def begin(self):
    """A new Scoring, for answers that arrive one by one."""
    return Scoring(self)

  def submit(self, function, answers):
    """A future of functions.call_function."""
    if function.is_judge:
      return self.judge.submit(function, answers)
    if not function.wants_images:
      answers = [answer | {"row": answer["row"] | {"images": []}} for answer in answers]
    if self._pool is None:
      modules = {each.target.rpartition(":")[0] for each in self.functions if not each.is_judge}
      self._pool = sandbox.make_pool(self._workers, "ares_jax.grading.functions", *sorted(modules))
    limit = self.config.timeout if function.takes_batch else self._timeout
    return self._pool.schedule(functions.call_function, args=[function, answers], timeout=limit)

  def wait(self, function, future, count):
    """The results in a future of `submit`, of `count` answers.

    Raises StopRequested where this process was asked to stop.
    """
    error = future.exception()  # not raised: sys.exit() of a worker is not ours
    if error is None:
      return future.result()
    heartbeat_or_stop()
    if isinstance(error, GraderError):
      raise error
    limit = (f"reward.timeout = {self.config.timeout} s" if function.takes_batch
             else f"grade.timeout = {self._timeout} s")
    failure = worker_failure(error, f"reward function {function.target!r}", limit)
    return [f"{failure} on {count} answer(s), the first"] * count


class Scoring:
  """Answers that are scored while others are still written, in any order."""

  def __init__(self, scorer):
    self._scorer = scorer
    self._answers = {}  # index -> answer, see functions.py
    self._grading = scorer.grader.begin() if scorer.asks_grader else None
    self._early = [function for function in scorer.functions
                   if not function.takes_batch and not function.wants_entropies]
    self._calls = collections.defaultdict(list)  # target of the function -> [(indices, future)]

  def add(self, index, text, row, tokens):
    """Takes the response `text` of token ids `tokens` to a row; functions of one answer begin."""
    self._answers[index] = {"response": text, "truth": row["answer"], "entropies": None,
                            "tokens": [int(token) for token in tokens],
                            "row": {name: value for name, value in row.items()
                                    if name not in ("columns", "answer")},
                            "columns": row.get("columns", {}), "step": self._scorer.step}
    if self._grading:
      self._grading.add(index, text, row)
    for function in self._early:
      self._submit(function, [index])

  def finish(self, entropies=None):
    """Waits for all functions; `entropies`, {index: nats of its tokens}, where any wants them.

    Returns (correct, format_ok, timed_out, Scores): the first three as GradingPool.grade does.

    Raises:
      GraderError: a function failed and the config does not say "drop"; or a component is missing.
      StopRequested: this process was asked to stop.
    """
    scorer, indices = self._scorer, sorted(self._answers)
    for index, nats in (entropies or {}).items():
      self._answers[index]["entropies"] = [float(x) for x in nats]
    for function in scorer.functions:
      if function not in self._early and indices:
        for some in [indices] if function.takes_batch else [[index] for index in indices]:
          self._submit(function, some)
    found = self._wait()
    correct, _, timed_out = self._grading.finish() if self._grading else ([None] * len(found), 0, 0)
    scores = [self._score(self._answers[index], found[index], graded)
              for index, graded in zip(indices, correct, strict=True)]
    result = self._join(scores)
    if result.failure and scorer.config.failure == "stop":
      raise GraderError(f"{result.failure}; mend the function, or set reward.failure=drop")
    correct = (result.accuracy >= scorer.config.threshold) & ~result.failed
    format_ok = [well_formed(self._answers[index]["response"]) for index in indices]
    timed_out += int(result.failed.sum())
    return np.float32(correct), np.float32(format_ok), timed_out, result

  def _submit(self, function, indices):
    answers = [self._answers[index] for index in indices]
    self._calls[function.target].append((indices, self._scorer.submit(function, answers)))

  def _wait(self):
    """{index: components of the answer, or how a function failed}."""
    found = {index: {} for index in self._answers}
    for function in self._scorer.functions:
      for indices, future in self._calls[function.target]:
        while not future.done():
          heartbeat_or_stop()
          concurrent.futures.wait([future], timeout=1)
        results = self._scorer.wait(function, future, len(indices))
        for index, result in zip(indices, results, strict=True):
          if isinstance(found[index], dict):
            found[index] = found[index] | result if isinstance(result, dict) else (
              f"{function.target!r} {result}")
    return found

  def _join(self, scores):
    """The Scores of answers, of what `_score` returns for each."""
    names = dict.fromkeys(name for values in scores if isinstance(values, dict)
                          for name in values["components"])
    for name in self._scorer.weights if names else ():
      if name not in names:
        raise GraderError(f"reward.weights names {name!r}, which no function returns"
                          f"{suggest(name, list(names))}")

    def column(read, otherwise=0.0):
      return np.float32([otherwise if isinstance(values, str) else read(values)
                         for values in scores])

    return Scores(
      column(lambda values: values["accuracy"]), column(lambda values: values["reward"]),
      {name: column(lambda values, name=name: values["components"].get(name, np.nan), np.nan)
       for name in names},
      failed=np.bool_([isinstance(values, str) for values in scores]),
      failure=next((values for values in scores if isinstance(values, str)), ""))

  def _score(self, answer, found, graded):
    """{"accuracy", "reward", "components"} of an answer, or how a function failed on it."""
    scorer, config = self._scorer, self._scorer.config
    where = f"on {answer['response'][-80:]!r} for {answer['truth']!r}"
    if isinstance(found, str):
      return f"reward function {found} {where}"
    own = {name: value for name, value in found.items() if value is not None}
    if scorer.functions and not own:
      return f"reward function {config.function!r} returns None {where}"
    if graded is not None:
      own["accuracy"] = float(graded)
    name = config.accuracy if config.accuracy not in ("", _GRADER) else "accuracy"
    value = own.get(name) if config.accuracy else (
      own.get(name, own.get("acc", next(iter(own.values())))))
    if value is None:
      return f"reward function {config.function!r} returns no {name!r} (reward.accuracy) {where}"
    if not 0 <= value <= 1:
      raise GraderError(
        f"the accuracy of {answer['response'][-80:]!r} is {value:g} by {config.function!r}, "
        "outside 0..1; name the component that is one by reward.accuracy, or set "
        "reward.accuracy=grader")
    components = self._built_in(answer) | own
    if scorer.weights:
      reward = sum(factor * components.get(name, 0.0) for name, factor in scorer.weights.items())
    else:
      asked = {name: own[name] for name in own if name in found} or own
      reward = asked.get("overall", sum(asked.values()))
    return {"accuracy": value, "reward": reward, "components": components}

  def _built_in(self, answer):
    """The built-in components that the weights name."""
    scorer, found = self._scorer, {}
    if "format" in scorer.weights:
      found["format"] = float(well_formed(answer["response"]))
    if "overlong" in scorer.weights:
      found["overlong"] = soft_overlong(len(answer["tokens"]), scorer.max_tokens,
                                        scorer.config.overlong)
    return found


def soft_overlong(tokens, max_tokens, share):
  """DAPO's penalty of a long answer (arXiv 2503.14476, eq. 13), in [-1, 0].

  0 up to max_tokens * (1 - share) tokens, then falling in a line to -1 at max_tokens.
  """
  buffer = max_tokens * share
  return -min(max(tokens - (max_tokens - buffer), 0.0) / buffer, 1.0)
