"""AdaCS curation: selects responses whose length grows with difficulty (section 3.1, table 1).

Problems are grouped in brackets by the pass rate of a probe model, 0/8 .. 8/8. For each data source
the target length falls linearly from the median length at pass rate 0 to the one at pass rate 1.
The responses closest to their target are selected, evenly over the brackets of all sources.

Only numbers and lengths of responses are held: 224,000 problems x 8 are 1.8 M candidates, 25 MB.
"""

import array
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Candidates:
  """Right responses; C of them."""

  problem: np.ndarray  # int32 [C], number of the problem
  response: np.ndarray  # int16 [C], index among the problem's responses
  tokens: np.ndarray  # int32 [C], response length
  source: np.ndarray  # int16 [C], index in `names`
  passes: np.ndarray  # int16 [C], right answers of the probe to the problem
  names: tuple  # of the sources, in alphabetical order

  def __len__(self):
    return len(self.problem)


def curation_report(lines, *, selection, count, samples, rng):
  """The selection and its statistics, a dict for JSON.

  `selection` is "adacs" or "vanilla", `count` the largest number of responses to select, `samples`
  the number of the probe's answers to a problem. `lines` are as for `read_candidates`.
  """
  candidates, problem_passes, problem_source, wrong = read_candidates(lines)
  if selection == "adacs":
    chosen, targets, notes = select_by_length(candidates, count=count, samples=samples, rng=rng)
  else:
    targets, notes = length_targets(candidates, samples=samples)
    chosen = select_uniformly(candidates, count=count, rng=rng)
  passes, tokens, source = (values[chosen] for values in
                            (candidates.passes, candidates.tokens, candidates.source))
  brackets = range(samples + 1)

  def by_bracket(values):
    return np.bincount(values, minlength=samples + 1).tolist()

  def means(passes, tokens):
    return {str(each): float(tokens[passes == each].mean())
            for each in brackets if (passes == each).any()}

  def quartiles(passes, tokens):
    """For each bracket [25%, median, 75%] of tokens, None without any."""
    return [np.quantile(tokens[passes == each], [0.25, 0.5, 0.75]).tolist()
            if (passes == each).any() else None for each in brackets]

  by_source = [(name, problem_source == number, candidates.source == number, source == number)
               for number, name in enumerate(candidates.names)]
  return {
    "selection": selection,
    "problems": len(problem_passes),
    "candidates": len(candidates),
    "wrong_candidates_dropped": wrong,
    "bracket_problems": by_bracket(problem_passes),
    "bracket_chosen": dict(enumerate(by_bracket(passes))),
    "bracket_mean_tokens": means(passes, tokens),
    "bracket_mean_tokens_before": means(candidates.passes, candidates.tokens),
    "bracket_quartiles": {"before": quartiles(candidates.passes, candidates.tokens),
                          "after": quartiles(passes, tokens)},
    "source_brackets": {
      name: {"problems": by_bracket(problem_passes[problems]), "chosen": by_bracket(passes[after])}
      for name, problems, _, after in by_source},
    "source_quartiles": {
      name: {"before": quartiles(candidates.passes[before], candidates.tokens[before]),
             "after": quartiles(passes[after], tokens[after])}
      for name, _, before, after in by_source},
    "target_tokens": {name: target.tolist() for name, target in targets.items()},
    "notes": notes,
    "chosen": np.stack([candidates.problem[chosen], candidates.response[chosen]], 1).tolist(),
  }


def read_candidates(lines):
  """Reads the right responses and counts the wrong ones, from lines as in pass_rates.py.

  Returns:
    candidates: Candidates.
    passes: int16 [problems], right answers of the probe.
    source: int16 [problems], index in the candidates' names.
    wrong: number of wrong responses.
  """
  problem_passes, problem_source, wrong = array.array("h"), array.array("h"), 0
  columns = {name: array.array(code) for name, code in (
    ("problem", "i"), ("response", "h"), ("tokens", "i"), ("source", "h"), ("passes", "h"))}
  numbers = {}  # of the sources, in the order of the file
  for line in lines:
    source = numbers.setdefault(line["source"], len(numbers))
    problem_passes.append(line["passes"])
    problem_source.append(source)
    for response, tokens in enumerate(line["tokens"]):
      if tokens is None:
        wrong += 1
        continue
      for name, value in (("problem", line["problem"]), ("response", response),
                          ("tokens", tokens), ("source", source), ("passes", line["passes"])):
        columns[name].append(value)
  names = tuple(sorted(numbers))
  alphabetical = np.int16([names.index(name) for name in numbers])
  columns = {name: np.array(values) for name, values in columns.items()}
  if len(columns["source"]):
    columns["source"] = alphabetical[columns["source"]]
  return (Candidates(**columns, names=names), np.array(problem_passes),
          alphabetical[np.array(problem_source)], wrong)


def length_targets(candidates, *, samples):
  """Target length of each bracket, by source: L_target(p) = (1-p) L(0) + p L(1), in tokens.

  `samples` is the number of the probe's answers to a problem, 8 in the paper.

  Returns:
    targets: {source: float64 [samples + 1]}.
    notes: list of str, one for each end whose bracket is empty, so that the nearest other bracket
      gives its length.
  """
  targets, notes = {}, []
  for index, source in enumerate(candidates.names):
    of_source = candidates.source == index
    passes, tokens = candidates.passes[of_source], candidates.tokens[of_source]
    populated = np.unique(passes)
    if not len(populated):
      continue
    ends = []
    for end in (0, samples):
      nearest = populated[np.argmin(np.abs(populated - end))]  # the lower of two that are as near
      if nearest != end:
        notes.append(f"{source}: no right responses at pass rate {end}/{samples}, "
                     f"length taken from {nearest}/{samples}")
      ends.append(float(np.median(tokens[passes == nearest])))
    rate = np.arange(samples + 1) / samples
    targets[source] = (1 - rate) * ends[0] + rate * ends[1]
  return targets, notes


def select_by_length(candidates, *, count, samples, rng):
  """AdaCS selection: evenly over (source, bracket), closest to the target length first.

  At most one response of a problem is selected. Once a bracket is used up, the others supply the
  rest. Ties in distance are broken at random.

  Returns:
    chosen: int64, indices in `candidates`, at most `count`; fewer where there are fewer problems.
    targets, notes: as `length_targets`.
  """
  targets, notes = length_targets(candidates, samples=samples)
  table = np.array([targets.get(name, np.zeros(samples + 1)) for name in candidates.names])
  distance = np.abs(candidates.tokens - table[candidates.source, candidates.passes])
  order, turn = _shuffle(candidates, rng)
  # The closest response of each problem; of several as close the first in the random order.
  order = order[np.lexsort((np.arange(len(order)), distance[order], candidates.problem[order]))]
  best = order[_starts_run(candidates.problem[order])]
  # Within each bracket the closest first, then the first of each bracket, the second of each, ...
  bracket = candidates.source[best].astype(np.int64) * (samples + 1) + candidates.passes[best]
  by_bracket = np.lexsort((turn[best], distance[best], bracket))
  best, bracket = best[by_bracket], bracket[by_bracket]
  starts = np.flatnonzero(_starts_run(bracket))
  rank = np.arange(len(best)) - np.repeat(starts, np.diff([*starts, len(best)]))
  return best[np.lexsort((bracket, rank))][:count], targets, notes


def select_uniformly(candidates, *, count, rng):
  """The baseline (paper table 4): random problems, and a random response of each."""
  order, _ = _shuffle(candidates, rng)
  _, first = np.unique(candidates.problem[order], return_index=True)
  return order[np.sort(first)][:count]


def _shuffle(candidates, rng):
  """A random order, and for each candidate the rank of the first one of its problem; int64 [C]."""
  order = rng.permutation(len(candidates))
  _, first, which = np.unique(candidates.problem[order], return_index=True, return_inverse=True)
  turn = np.empty(len(order), np.int64)
  turn[order] = first[which]
  return order, turn


def _starts_run(ordered):
  """bool, True where a run of equal values begins."""
  return np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)]
