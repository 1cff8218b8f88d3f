"""AdaCS curation: responses whose length grows with difficulty (paper section 3.1, table 1).

Pass rates of a probe model give brackets 0/8 .. 8/8; for every data source the target length falls
linearly from the median length at pass rate 0 to the median length at pass rate 1; responses
closest to their target are kept, evenly over the brackets of every source.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One correct response to one problem."""

  problem: int  # index of the problem
  response: str
  tokens: int  # response length
  source: str
  passes: int  # of `samples` answers of the probe, how many were right


def length_targets(candidates, *, samples):
  """Target length of every bracket: L_target(p) = (1-p) L(0) + p L(1), in tokens, by source.

  Args:
    candidates: list of Candidate.
    samples: answers of the probe a problem, 8 in the paper.

  Returns:
    targets: dict source -> float64 [samples + 1].
    notes: list of str, one for each end that had no problems and was taken from the nearest
      populated bracket.
  """
  targets, notes = {}, []
  for source in sorted({candidate.source for candidate in candidates}):
    lengths = {}
    for candidate in candidates:
      if candidate.source == source:
        lengths.setdefault(candidate.passes, []).append(candidate.tokens)
    ends = []
    for end in (0, samples):
      nearest = min(lengths, key=lambda passes: (abs(passes - end), passes))  # noqa: B023
      if nearest != end:
        notes.append(f"{source}: no problems at pass rate {end}/{samples}, "
                     f"length taken from {nearest}/{samples}")
      ends.append(float(np.median(lengths[nearest])))
    rate = np.arange(samples + 1) / samples
    targets[source] = (1 - rate) * ends[0] + rate * ends[1]
  return targets, notes


def select(candidates, *, count, samples, rng):
  """AdaCS selection: evenly over (source, bracket), closest to the target length first.

  A problem appears once. Brackets that run out leave their share to the others. Ties in distance
  are broken at random.

  Returns:
    chosen: list of Candidate, at most `count`; fewer where there are not that many problems.
    targets, notes: as `length_targets`.
  """
  targets, notes = length_targets(candidates, samples=samples)
  best = {}
  for candidate in _shuffled(candidates, rng):
    distance = abs(candidate.tokens - targets[candidate.source][candidate.passes])
    if candidate.problem not in best or distance < best[candidate.problem][0]:
      best[candidate.problem] = (distance, candidate)
  brackets = {}
  for distance, candidate in best.values():
    brackets.setdefault((candidate.source, candidate.passes), []).append((distance, candidate))
  queues = [sorted(brackets[key], key=lambda pair: pair[0]) for key in sorted(brackets)]
  chosen = []
  while len(chosen) < count and any(queues):
    for queue in queues:
      if queue and len(chosen) < count:
        chosen.append(queue.pop(0)[1])
  return chosen, targets, notes


def vanilla(candidates, *, count, rng):
  """The baseline (paper table 4): the same number of problems, a uniformly drawn response each."""
  first = {}
  for candidate in _shuffled(candidates, rng):
    first.setdefault(candidate.problem, candidate)
  return list(first.values())[:count]


def _shuffled(candidates, rng):
  return [candidates[index] for index in rng.permutation(len(candidates))]
