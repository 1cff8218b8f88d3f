"""Summarises a data set: rows by source, lengths, image sizes, rows that cannot be used, cost."""

import collections
import dataclasses

import numpy as np

from ares_jax.data.bad_row import printable

_BARS, _WIDTH = 12, 40  # lines of a histogram, characters of its longest bar


def _field(make):
  return dataclasses.field(default_factory=make)


@dataclasses.dataclass
class Summary:
  """Counts over the rows read; those that cannot be used are in `bad` alone."""

  looked_at: int
  sources: collections.Counter = _field(collections.Counter)  # rows by source
  bad: collections.Counter = _field(collections.Counter)  # rows by (code, message of the first one)
  left_out: collections.Counter = _field(collections.Counter)  # rows by what they do not show
  with_images: int = 0  # rows
  tokens: list = _field(list)  # of every prompt
  image_tokens: list = _field(list)  # of every prompt
  images: list = _field(list)  # (height, width) px of every image after resizing
  responses: list = _field(list)  # tokens of every response of a teacher


def spread(size, rows):
  """Numbers of `rows` of `size` rows, evenly spread; all where `rows` is 0 or more than `size`."""
  if rows == 0 or rows >= size:
    return range(size)
  return [number * size // rows for number in range(rows)]


def summarize(source, encoder, *, rows, examine):
  """Summary of as many `rows`, evenly spread, of a source; 0 is all.

  `examine` is a function of (numbers, measure) that yields validation.Examined, for example
  RunData.examine with a kind of data.
  """
  def measure(row, prompt):
    teacher = row.get("responses") or [row[field] for field in ("response",) if field in row]
    return (row["source"], len(prompt.tokens), [grid for _, grid in prompt.images],
            [len(encoder.chat.response(text)) for text in teacher], row.get("left_out", ()))

  numbers = spread(len(source), rows)
  found = Summary(len(numbers))
  first = {}
  for seen in examine(numbers, measure):
    if seen.bad:
      found.bad[seen.bad.code, first.setdefault(seen.bad.code, str(seen.bad))] += 1
      continue
    name, tokens, grids, responses, left_out = seen.measured
    found.sources[name] += 1
    found.left_out.update(left_out)
    found.with_images += bool(grids)
    found.tokens.append(tokens)
    found.image_tokens.append(
      sum(frames * height * width for frames, height, width in grids) // encoder.merge**2)
    found.images += [(height * encoder.patch, width * encoder.patch) for _, height, width in grids]
    found.responses += responses
  return found


def summary_text(name, source, found, *, limit, group, answer):
  """The Summary `found` of a source as text with a histogram.

  Args:
    limit: largest number of tokens of a prompt.
    group: samples of a prompt, where there are no teacher's responses.
    answer: largest number of tokens of a sample.
  """
  scale = len(source) / max(found.looked_at, 1)
  lines = [f"{name}: {len(source)} rows, {found.looked_at} read"]
  lines += [f"  {printable(label)}: {rows} rows" for label, rows in found.sources.most_common(20)]
  lines += [f"  CANNOT BE USED ({code}): {rows} rows, the first: {message}"
            for (code, message), rows in found.bad.most_common()]
  lines += [f"  not read: {printable(what)}: {rows} rows"
            for what, rows in found.left_out.most_common(20)]
  lines.append(f"images: {found.with_images} of {len(found.tokens)} rows have images")
  if not found.tokens:
    return "\n".join(lines)
  lines += [f"prompt tokens (limit {limit}): {_quantiles(found.tokens)}; "
            f"{sum(found.image_tokens) / max(sum(found.tokens), 1):.0%} of them image tokens",
            *text_bars(found.tokens)]
  if found.images:
    areas = [height * width for height, width in found.images]
    height, width = found.images[int(np.argmax(areas))]
    lines.append(f"{len(found.images) / len(found.tokens):.2f} images a row; megapixels after "
                 f"resizing {_quantiles(np.array(areas) / 1e6, '.2f')}; "
                 f"largest {width} x {height}")
  if found.responses:
    lines.append(f"teacher's response tokens: {_quantiles(found.responses)}")
    cost = (sum(found.tokens) + sum(found.responses)) * scale
    lines.append(f"tokens in an epoch: {_count(cost)} of prompts and responses")
  else:
    answers = len(found.tokens) * scale * group * answer
    lines.append(f"tokens in an epoch: {_count(sum(found.tokens) * scale)} of prompts; at most "
                 f"{_count(answers)} of answers ({group} of up to {answer} to each prompt)")
  return "\n".join(lines)


def text_bars(values):
  """Lines of a histogram, for a terminal."""
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
