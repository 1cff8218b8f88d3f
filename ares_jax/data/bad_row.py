"""The error for a row that cannot be used, and texts from data made fit for a terminal."""

# Kinds of errors, by which bad rows are counted.
CODES = {
  "record": "not a JSON object, or a value that is no text or number",
  "question": "missing or empty, or a dialogue that cannot be read",
  "answer": "missing, empty, no text or number, or without the box or mark its schema asks for",
  "truth": "counts as wrong when a model writes it, or is no answer but a text around one",
  "response": "missing where one is needed",
  "pass_rate": "not measured, or not a number from 0 to 1, where curation takes it from the data",
  "image_missing": "there is no such file",
  "image": "cannot be decoded, too large, too narrow, or outside the data's folder",
  "unread": "no image is read, but a column looks like images",
  "video": "video or sound, which no model here reads",
  "marks": "not as many image marks as images",
  "length": "longer than the largest shape",
}
_SHOWN = 80  # letters of a value
_NAME = 200  # letters of a row's id
_REASON = 600  # letters of a reason


class BadRow(ValueError):
  """A row cannot be used. `code` is a key of CODES, `reason` says why."""

  def __init__(self, row, code, reason):
    self.code, self.reason = code, printable(reason, _REASON)
    super().__init__(f"row {printable(row, _NAME)}: {self.reason}")
    if code not in CODES:
      raise KeyError(code)


def printable(value, limit=_SHOWN):
  """The text of a value with escapes for what a terminal would obey, and at most `limit` letters.

  The middle of a longer text is left out.
  """
  text = str(value)
  if len(text) > limit:
    end = limit // 3
    text = f"{text[: limit - end]} ... {len(text) - limit} more letters ... {text[-end:]}"
  return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
