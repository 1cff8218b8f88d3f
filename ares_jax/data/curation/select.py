"""AdaCS curation: responses whose length grows with difficulty (paper section 3.1, table 1).

Pass rates of a probe model give brackets 0/8 .. 8/8; for every data source the target length falls
linearly from the median length at pass rate 0 to the median length at pass rate 1; responses
closest to their target are kept, evenly over the brackets of every source.

Responses themselves are not here, only their numbers and lengths: 224,000 problems x 8 are 1.8 M
of C candidates, 25 MB.
"""

import array
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Candidates:
  """Correct responses: C of them, a place in every array for each."""

  problem: np.ndarray  # int32 [C], number of the problem
  response: np.ndarray  # int16 [C], which of the problem's responses
  tokens: np.ndarray  # int32 [C], response length
  source: np.ndarray  # int16 [C], index in `names`
  passes: np.ndarray  # int16 [C]: of `samples` answers of the probe, how many were right
  names: tuple  # of the sources, in the order of the alphabet

  def __len__(self):
    return len(self.problem)


def read_candidates(lines):
  """Candidates of problems, one by one.

  Args:
    lines: an iterable of {"problem", "source", "passes", "tokens"} as in data/pass_rates.py.

  Returns:
    candidates: Candidates.
    passes: int16 [problems], of the probe.
    source: int16 [problems], index in the candidates' names.
    dropped: wrong responses.
  """
  problems, rows, numbers, dropped = array.array("h"), array.array("h"), {}, 0
  columns = {name: array.array(code) for name, code in (
    ("problem", "i"), ("response", "h"), ("tokens", "i"), ("source", "h"), ("passes", "h"))}
  for record in lines:
    source = numbers.setdefault(record["source"], len(numbers))
    problems.append(record["passes"])
    rows.append(source)
    for response, tokens in enumerate(record["tokens"]):
      if tokens is None:
        dropped += 1
        continue
      for name, value in (("problem", record["problem"]), ("response", response),
                          ("tokens", tokens), ("source", source), ("passes", record["passes"])):
        columns[name].append(value)
  names = tuple(sorted(numbers))
  # From the order of the file to the alphabet's.
  place = np.int16([names.index(name) for name in numbers])
  columns = {name: np.array(values) for name, values in columns.items()}
  columns["source"] = place[columns["source"]] if len(columns["source"]) else columns["source"]
  return Candidates(**columns, names=names), np.array(problems), place[np.array(rows)], dropped


def curation_report(lines, *, selection, count, samples, rng):
  """What was chosen of problems, and why: a dict for JSON.

  Args:
    lines: as for `read_candidates`.
    selection: "adacs" or "vanilla".
    count: responses chosen at most.
    samples: answers of the probe a problem.
    rng: numpy Generator.
  """
  candidates, passes, source, dropped = read_candidates(lines)
  if selection == "adacs":
    chosen, targets, notes = select_by_length(candidates, count=count, samples=samples, rng=rng)
  else:
    targets, notes = length_targets(candidates, samples=samples)
    chosen = select_uniformly(candidates, count=count, rng=rng)
  rate, tokens = candidates.passes[chosen], candidates.tokens[chosen]

  def brackets(values):
    return np.bincount(values, minlength=samples + 1).tolist()

  def quartiles(before, after):
    """Quartiles of tokens by bracket, of the right responses and of the chosen ones."""
    return {"before": _quartiles(candidates.passes[before], candidates.tokens[before], samples),
            "after": _quartiles(rate[after], tokens[after], samples)}

  return {
    "selection": selection,
    "problems": len(passes),
    "candidates": len(candidates),
    "wrong_candidates_dropped": dropped,
    "bracket_problems": brackets(passes),
    "bracket_chosen": dict(enumerate(brackets(rate))),
    "bracket_mean_tokens": {str(each): float(tokens[rate == each].mean())
                            for each in range(samples + 1) if (rate == each).any()},
    "bracket_mean_tokens_before": {
      str(each): float(candidates.tokens[candidates.passes == each].mean())
      for each in range(samples + 1) if (candidates.passes == each).any()},
    "bracket_quartiles": quartiles(slice(None), slice(None)),
    "source_brackets": {
      name: {"problems": brackets(passes[source == number]),
             "chosen": brackets(rate[candidates.source[chosen] == number])}
      for number, name in enumerate(candidates.names)},
    "source_quartiles": {
      name: quartiles(candidates.source == number, candidates.source[chosen] == number)
      for number, name in enumerate(candidates.names)},
    "target_tokens": {name: target.tolist() for name, target in targets.items()},
    "notes": notes,
    "chosen": np.stack([candidates.problem[chosen], candidates.response[chosen]], 1).tolist(),
  }


def _quartiles(passes, tokens, samples):
  """For every bracket [25%, median, 75%] of its tokens, None without any."""
  return [np.quantile(tokens[passes == each], [0.25, 0.5, 0.75]).tolist()
          if (passes == each).any() else None for each in range(samples + 1)]


def length_targets(candidates, *, samples):
  """Target length of every bracket: L_target(p) = (1-p) L(0) + p L(1), in tokens, by source.

  Args:
    candidates: Candidates.
    samples: answers of the probe a problem, 8 in the paper.

  Returns:
    targets: dict source -> float64 [samples + 1].
    notes: list of str, one for each end that had no problems and was taken from the nearest
      populated bracket.
  """
  targets, notes = {}, []
  for index, source in enumerate(candidates.names):
    own = candidates.source == index
    passes, tokens = candidates.passes[own], candidates.tokens[own]
    populated = np.unique(passes)
    if not len(populated):
      continue
    ends = []
    for end in (0, samples):
      nearest = populated[np.argmin(np.abs(populated - end))]  # of two as near, the lower
      if nearest != end:
        notes.append(f"{source}: no problems at pass rate {end}/{samples}, "
                     f"length taken from {nearest}/{samples}")
      ends.append(float(np.median(tokens[passes == nearest])))
    rate = np.arange(samples + 1) / samples
    targets[source] = (1 - rate) * ends[0] + rate * ends[1]
  return targets, notes


def select_by_length(candidates, *, count, samples, rng):
  """AdaCS selection: evenly over (source, bracket), closest to the target length first.

  A problem appears once. Brackets that run out leave their share to the others. Ties in distance
  are broken at random.

  Returns:
    chosen: int64, places in `candidates`, at most `count`; fewer where there are not that many
      problems.
    targets, notes: as `length_targets`.
  """
  targets, notes = length_targets(candidates, samples=samples)
  table = np.array([targets.get(name, np.zeros(samples + 1)) for name in candidates.names])
  distance = np.abs(candidates.tokens - table[candidates.source, candidates.passes])
  order, turn = _draw(candidates, rng)
  # Of each problem the closest, the first drawn of those as close.
  order = order[np.lexsort((np.arange(len(order)), distance[order], candidates.problem[order]))]
  best = order[_firsts(candidates.problem[order])]
  bracket = candidates.source[best].astype(np.int64) * (samples + 1) + candidates.passes[best]
  queue = np.lexsort((turn[best], distance[best], bracket))
  best, bracket = best[queue], bracket[queue]
  starts = np.flatnonzero(_firsts(bracket))
  rank = np.arange(len(best)) - np.repeat(starts, np.diff([*starts, len(best)]))
  return best[np.lexsort((bracket, rank))][:count], targets, notes


def select_uniformly(candidates, *, count, rng):
  """The baseline (paper table 4): the same number of problems, a uniformly drawn response each."""
  order, _ = _draw(candidates, rng)
  _, first = np.unique(candidates.problem[order], return_index=True)
  return order[np.sort(first)][:count]


def _draw(candidates, rng):
  """(places in a random order, int64 [C]: when the first candidate of its problem was drawn)."""
  order = rng.permutation(len(candidates))
  _, first, which = np.unique(candidates.problem[order], return_index=True, return_inverse=True)
  turn = np.empty(len(order), np.int64)
  turn[order] = first[which]
  return order, turn


def _firsts(ordered):
  """bool: where a run of equal values begins."""
  return np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)]
