"""A row that cannot be used: which one, the kind of its fault, and the reason in words."""

# What a fault is counted under.
CODES = {
  "record": "not a JSON object",
  "question": "missing or empty, or not one question",
  "answer": "missing, empty, or without the box or mark that its schema asks for",
  "truth": "counts as wrong when a model writes it",
  "response": "missing where one is needed",
  "pass_rate": "not measured, or no number from 0 to 1, where curation takes it from the data",
  "image_missing": "there is no such file",
  "image": "cannot be decoded, too large, too narrow, or outside the data's folder",
  "marks": "not as many image marks as images",
  "length": "longer than the largest shape",
}


class BadRow(ValueError):
  """Names the row; `code` is one of CODES."""

  def __init__(self, row, code, reason):
    super().__init__(f"row {row}: {reason}")
    if code not in CODES:
      raise KeyError(code)
    self.code, self.reason = code, str(reason)
