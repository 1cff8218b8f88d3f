"""What a data set holds: rows by source, lengths, image sizes, rows that cannot be used, cost."""

import collections
import concurrent.futures
import dataclasses

import numpy as np

from ares_jax.data.bad_row import BadRow
from ares_jax.data.images import count_windows

_BARS, _WIDTH = 12, 40  # lines of a histogram, characters of its longest bar


@dataclasses.dataclass
class Summary:
  """Of the rows looked at; those that cannot be used are in `bad` alone."""

  looked_at: int
  sources: collections.Counter  # rows by source
  bad: collections.Counter  # rows by (code, whole message of the first one)
  tokens: list  # of every prompt
  image_tokens: list  # of every prompt
  images: list  # (height, width) px of every image as the model sees it
  responses: list  # tokens of every response of a teacher


def spread(size, rows):
  """Numbers of `rows` rows of `size`, evenly spread; all where rows is 0 or more than there are."""
  return range(size) if rows in (0, size) or rows > size else [
    number * size // rows for number in range(rows)]


def summarize(source, encoder, *, rows, threads):
  """Summary of some rows of a source; images are not decoded, but for their headers.

  Args:
    source: random access to rows.
    encoder: prompts.Encoder.
    rows: how many are looked at, evenly spread; 0 is all.
    threads: that read.
  """
  chat, limit = encoder.chat, encoder.config

  def look(number):
    try:
      row = source[number]
      tokens, grids = encoder.size(row)
      windows = count_windows(grids, window=encoder.window, patch=encoder.patch,
                              merge=encoder.merge)
      if tokens > limit.max_tokens[-1] or windows > limit.windows[-1]:
        raise BadRow(row["id"], "length", f"{tokens} tokens and {windows} vision windows, the "
                     f"limit is {limit.max_tokens[-1]} and {limit.windows[-1]}")
    except BadRow as error:
      return error
    teacher = row.get("responses") or [row[field] for field in ("response",) if field in row]
    return row["source"], tokens, grids, [len(chat.response(text)) for text in teacher]

  numbers = spread(len(source), rows)
  found = Summary(len(numbers), collections.Counter(), collections.Counter(), [], [], [], [])
  first = {}
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for start in range(0, len(numbers), 1024):  # a pool would hold all rows at once
      for seen in pool.map(look, numbers[start : start + 1024]):
        if isinstance(seen, BadRow):
          found.bad[seen.code, first.setdefault(seen.code, str(seen))] += 1
          continue
        name, tokens, grids, responses = seen
        found.sources[name] += 1
        found.tokens.append(tokens)
        found.image_tokens.append(
          sum(frames * height * width for frames, height, width in grids) // encoder.merge**2)
        found.images += [(height * encoder.patch, width * encoder.patch)
                         for _, height, width in grids]
        found.responses += responses
  return found


def summary_text(name, source, found, *, limit, group, answer):
  """The summary in words and bars.

  Args:
    name: of the stage's data.
    source: what was looked at.
    found: its Summary.
    limit: tokens of the longest prompt allowed.
    group: samples a prompt, where no teacher answers.
    answer: longest sample, tokens.
  """
  scale = len(source) / max(found.looked_at, 1)
  lines = [f"{name}: {len(source)} rows, {found.looked_at} looked at"]
  lines += [f"  {label}: {rows} rows" for label, rows in found.sources.most_common(20)]
  lines += [f"  CANNOT BE USED ({code}): {rows} rows, the first: {message}"
            for (code, message), rows in found.bad.most_common()]
  if not found.tokens:
    return "\n".join(lines)
  lines += [f"prompt tokens (limit {limit}): {_quantiles(found.tokens)}; "
            f"{sum(found.image_tokens) / max(sum(found.tokens), 1):.0%} are of images",
            *text_bars(found.tokens)]
  if found.images:
    areas = [height * width for height, width in found.images]
    height, width = found.images[int(np.argmax(areas))]
    lines.append(f"images: {len(found.images) / len(found.tokens):.2f} a row; megapixels as the "
                 f"model sees them {_quantiles(np.array(areas) / 1e6, '.2f')}; "
                 f"largest {width} x {height}")
  if found.responses:
    lines.append(f"teacher's response tokens: {_quantiles(found.responses)}")
    cost = (sum(found.tokens) + sum(found.responses)) * scale
    lines.append(f"tokens an epoch: {_count(cost)} of prompts and responses")
  else:
    prompts, rows = sum(found.tokens) * scale, len(found.tokens) * scale
    lines.append(f"tokens an epoch: {_count(prompts)} of prompts, read once each; at most "
                 f"{_count(rows * group * answer)} of answers ({group} of up to {answer} a prompt)")
  return "\n".join(lines)


def text_bars(values):
  """Lines of a histogram for a terminal."""
  counts, edges = np.histogram(values, bins=min(_BARS, 1 + int(np.ptp(values))))
  marks = ["#" * round(_WIDTH * count / counts.max()) for count in counts]
  return [f"  {low:7.0f} to {high:7.0f} {mark:{_WIDTH}} {count}"
          for low, high, mark, count in zip(edges[:-1], edges[1:], marks, counts, strict=True)]


def _quantiles(values, form=".0f"):
  marks = np.quantile(values, [0.5, 0.9, 0.99, 1.0])
  return ", ".join(f"{label} {mark:{form}}" for label, mark in
                   zip(("median", "90%", "99%", "most"), marks, strict=True))


def _count(tokens):
  for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if tokens >= size:
      return f"{tokens / size:.1f} {unit}"
  return f"{tokens:.0f}"
