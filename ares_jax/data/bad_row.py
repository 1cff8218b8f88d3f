"""The error for a row that cannot be used."""

# Kinds of errors, by which bad rows are counted.
CODES = {
  "record": "not a JSON object",
  "question": "missing or empty, or not one question",
  "answer": "missing, empty, or without the box or mark that its schema asks for",
  "truth": "counts as wrong when a model writes it",
  "response": "missing where one is needed",
  "pass_rate": "not measured, or not a number from 0 to 1, where curation takes it from the data",
  "image_missing": "there is no such file",
  "image": "cannot be decoded, too large, too narrow, or outside the data's folder",
  "marks": "not as many image marks as images",
  "length": "longer than the largest shape",
}


class BadRow(ValueError):
  """A row cannot be used. `code` is a key of CODES, `reason` says why."""

  def __init__(self, row, code, reason):
    super().__init__(f"row {row}: {reason}")
    if code not in CODES:
      raise KeyError(code)
    self.code, self.reason = code, str(reason)
