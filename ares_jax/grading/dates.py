"""Compares dates and times of day: "5 March 2020" is "March 5, 2020", "17:30" is "5:30 PM"."""

import re

_MONTHS = ("january february march april may june july august september october november "
           "december").split()  # fmt: skip
_NUMBER_OF = {month: number for number, month in enumerate(_MONTHS, 1)}
_NUMBER_OF |= {month[:3]: number for number, month in enumerate(_MONTHS, 1)} | {"sept": 9}
_MONTH = rf"(?P<month>{'|'.join(sorted(_NUMBER_OF, key=len, reverse=True))})\.?"
_DAY = r"(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?:(?:, ?| )(?P<year>[0-9]{4}))?"
_DATES = (
  re.compile(rf"{_MONTH} {_DAY}{_YEAR}"),
  re.compile(rf"(?:the )?{_DAY} (?:of )?{_MONTH}{_YEAR}"),
  re.compile(r"(?P<year>[0-9]{4})-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})"),
)
_CLOCK = re.compile(r"([0-9]{1,2}):([0-9]{2})(?: ([ap])m)?")
_HOUR = re.compile(r"([0-9]{1,2}) ?([ap])\.? ?m")


def same_date(answer, truth):
  """Whether two dates or two times of day are the same; None where a side is neither.

  "05/03/2020" is March to some and May to others, so it is not read as a date. Nor is "5:30" read
  as a time without am or pm: it may be a ratio.
  """
  said, wanted = _parse(answer.lower()), _parse(truth.lower())
  return None if said is None or wanted is None else said == wanted


def _parse(text):
  """(year, month, day) or (hour, minute), or None."""
  if match := _HOUR.fullmatch(text):
    text = f"{match[1]}:00 {match[2]}m"
  if match := _CLOCK.fullmatch(text):
    hour, minute, half = int(match[1]), int(match[2]), match[3]
    if half and 1 <= hour <= 12 and minute < 60:
      return hour % 12 + 12 * (half == "p"), minute
    is_24_hours = not half and (hour == 0 or 12 < hour < 24) and minute < 60
    return (hour, minute) if is_24_hours else None
  match = next(filter(None, (form.fullmatch(text) for form in _DATES)), None)
  if match is None:
    return None
  month, day = match["month"], int(match["day"])
  month = _NUMBER_OF[month] if month in _NUMBER_OF else int(month)
  return (match["year"], month, day) if month <= 12 and 1 <= day <= 31 else None
