"""Calls users' reward functions: ours, EasyR1's, TRL's and verl's, each as its trainer calls it.

An answer is a dict: "response" (text), "truth" (as the data have it), "tokens" (ids of the
response), "entropies" (nats, one a token; None before decoding ends), "row" (the row of
data/sources.py), "columns" (the record as the file has it) and "step" (iterations before it).
"""

import ast
import collections.abc
import dataclasses
import functools
import inspect
import math
import sys
import types

from ares_jax.grading.sandbox import describe, load_function

FORMS = ("answer", "batch", "easyr1", "trl", "trl_text", "verl")
_JUDGE = "judge"
_TEXTS = ("list[str]", "List[str]", "typing.List[str]")  # annotations of TRL's plain texts
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # TRL keeps these names to itself


@dataclasses.dataclass(frozen=True)
class RewardFunction:
  """A user's function, and how it is called."""

  target: str  # "FILE.py:NAME" or "package.module:NAME"
  form: str  # one of FORMS
  arguments: tuple = ()  # pairs (name, value), keyword arguments of every call
  is_judge: bool = False  # runs in this process: it is async, or the user says so

  @property
  def name(self):
    """The function's own name, that of its component where it returns a number."""
    return self.target.rpartition(":")[2]

  @property
  def takes_batch(self):
    """Whether one call gets all answers."""
    return self.form not in ("answer", "verl")

  @property
  def wants_entropies(self):
    """Whether its signature names the entropies, which are known after decoding."""
    function = load_function(self.target, "reward function")
    return "entropies" in inspect.signature(function).parameters

  @functools.cached_property
  def wants_images(self):
    """Whether the text of its module speaks of images, which are large: no other one gets them."""
    try:
      module = inspect.getmodule(load_function(self.target, "reward function"))
      return "image" in inspect.getsource(module)
    except (OSError, TypeError):  # there is no text
      return True


def read_functions(text, arguments=""):
  """RewardFunctions of "[FORM:]FILE.py:NAME", or of several such texts with commas.

  FORM is one of FORMS, or "judge"; without it the signature decides. `arguments` are keyword
  arguments as in a call, "max_length=2048, scale=0.5".

  Raises:
    ValueError: a function does not load, or the arguments are not of this form.
  """
  pairs = tuple(_read_arguments(arguments).items())
  functions = []
  for part in filter(None, map(str.strip, text.split(","))):
    words, forms = part.split(":"), []
    while words[0] in (*FORMS, _JUDGE):
      forms.append(words.pop(0))
    target = ":".join(words)
    function = load_function(target, "reward function")
    form = next((form for form in forms if form != _JUDGE), None) or _form_of(function)
    functions.append(RewardFunction(target, form, pairs, _JUDGE in forms or _is_async(function)))
  names = [function.name for function in functions]
  if len({*names}) < len(names):
    raise ValueError(f"reward.function = {text!r}: two functions have one name, under which their "
                     "values would be logged; rename one")
  return functions


def _read_arguments(text):
  try:
    call = ast.parse(f"f({text})", mode="eval").body
    if call.args:
      raise ValueError(f"{ast.unparse(call.args[0])} has no name")
    return {word.arg: ast.literal_eval(word.value) for word in call.keywords}
  except (ValueError, SyntaxError) as error:
    raise ValueError(f"reward.arguments = {text!r} are not of the form \"name=2048, "
                     f"other=0.5\": {error}") from error


def _form_of(function):
  """The form that a signature shows."""
  parameters = inspect.signature(function).parameters
  first = next(iter(parameters), "")
  if first in ("reward_inputs", "reward_input"):
    return "easyr1"
  if "completions" in parameters or "completion_ids" in parameters:
    completions = parameters.get("completions")
    hint = completions.annotation if completions else ""
    hint = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    return "trl_text" if hint in _TEXTS else "trl"
  if "solution_str" in parameters:
    return "verl"
  return "batch" if first == "responses" else "answer"


def _is_async(function):
  return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
    type(function).__call__)  # an object that is called like a function


def call_function(function, answers):
  """The results of a RewardFunction, one an answer: a dict of components, or how it failed, a text.

  A component is a finite float, or None where the function has no value for the answer.
  """
  try:
    return results(function, answers, prepare_call(function, answers)())
  except MemoryError:
    raise
  except BaseException as error:  # sys.exit() too; a signal ends a worker without an exception
    return [how_it_failed(function, error)] * len(answers)


def how_it_failed(function, error):
  """The exception of a user's function in words; for TRL's forms with what may help."""
  other = {"trl": "plain texts, write trl_text", "trl_text": "messages, write trl"}
  hint = ""
  if function.form in other and isinstance(error, TypeError | AttributeError):
    hint = f" (if it expects {other[function.form]}: before it)"
  return f"raises {describe(error)}{hint}"


def prepare_call(function, answers):
  """A function without arguments that calls the user's with these answers, as its form has it."""
  user = load_function(function.target, "reward function")
  extra = dict(function.arguments)
  columns = _columns(answers)
  one = {key: values[0] for key, values in columns.items()}
  responses, truths = ([answer[key] for answer in answers] for key in ("response", "truth"))
  texts = function.form == "trl_text"
  if function.form == "answer":
    return _call(user, one, extra, given={"response": responses[0], "truth": truths[0]})
  if function.form == "batch":
    return _call(user, columns, extra, given={"responses": responses, "truths": truths})
  if function.form == "verl":
    return _call(user, {"data_source": answers[0]["row"].get("source"), "extra_info": one,
                        "solution_str": responses[0], "ground_truth": _ground_truth(answers[0])},
                 extra)
  if function.form == "easyr1":
    inputs = [{key: values[index] for key, values in columns.items()} | {
      "response": answer["response"], "response_length": len(answer["tokens"]),
      "ground_truth": _ground_truth(answer)} for index, answer in enumerate(answers)]
    if _takes_one(user):
      return lambda: [user(one, **extra) for one in inputs]
    return lambda: user(inputs, **extra)
  return _call(user, {key: values for key, values in columns.items() if key not in _NOT_COLUMNS} | {
    "prompts": [answer["row"]["question"] if texts else _dialogue(answer["row"])
                for answer in answers],
    "completions": responses if texts else [[{"role": "assistant", "content": response}]
                                            for response in responses],
    "completion_ids": [answer["tokens"] for answer in answers],
    "trainer_state": types.SimpleNamespace(global_step=answers[0]["step"]),
    "log_extra": lambda *_: None, "log_metric": lambda *_: None}, extra)


def _call(function, values, extra, given=types.MappingProxyType({})):
  """A call with `given` by position, the `values` that the signature names, and `extra`.

  A function that takes any keywords gets all values; one that takes keywords alone gets the `given`
  by their names. ValueError where a parameter has no value.
  """
  parameters = list(inspect.signature(function).parameters.values())
  kinds = {parameter.kind for parameter in parameters}
  if kinds <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}:
    values, given = values | given, {}
  first, others = ({parameter.name: parameter for parameter in some}
                   for some in (parameters[: len(given)], parameters[len(given):]))
  takes_all = inspect.Parameter.VAR_KEYWORD in kinds
  named = extra | {name: value for name, value in values.items() if name not in first | extra
                   and (takes_all or name in others)}
  lacking = [name for name, parameter in others.items()
             if parameter.default is parameter.empty and name not in named
             and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]
  if lacking:
    raise ValueError(f"its parameter {lacking[0]!r} is no column of the data and no field of a "
                     f"row; there are {', '.join(sorted(values))}")
  return lambda: function(*given.values(), **named)


def _columns(answers):
  """{name: values} of all that is known of the answers besides response and truth.

  A column of the file goes before a field of the row that has the same name.
  """
  found = [answer["row"] | answer["columns"] | {
    name: answer[name] for name in ("tokens", "entropies", "step")} for answer in answers]
  names = dict.fromkeys(name for each in found for name in each)
  return {name: [each.get(name) for each in found] for name in names}


def _ground_truth(answer):
  """EasyR1's and verl's ground truth: the file's own column, or the first accepted truth."""
  for name in ("answer", "ground_truth"):
    if isinstance(answer["columns"].get(name), str):
      return answer["columns"][name]
  return answer["truth"] if isinstance(answer["truth"], str) else answer["truth"][0]


def _takes_one(function):
  """Whether EasyR1 calls this function answer by answer: its parameter or its file says so."""
  first = next(iter(inspect.signature(function).parameters), "")
  kind = getattr(sys.modules.get(getattr(function, "__module__", "")), "REWARD_TYPE", "")
  return first == "reward_input" or first != "reward_inputs" and kind == "sequential"


def _dialogue(row):
  return [*row.get("history", ()), {"role": "user", "content": row["question"]}]


def results(function, answers, returned):
  """What `call_function` returns, of what the user's function returned."""
  if not function.takes_batch:
    if function.form == "verl" and isinstance(returned, collections.abc.Mapping):
      if "score" not in returned:
        return [f"returns {_shown(returned)}, which has no 'score'"]
      # verl takes "score" for the reward; texts among the others, such as "pred", are no numbers.
      returned = {"overall" if key == "score" else key: value for key, value in returned.items()
                  if key == "score" or not isinstance(value, str)}
    return [_components(function.name, returned)]
  if not isinstance(returned, collections.abc.Iterable) or isinstance(returned, dict | str):
    return [f"returns {_shown(returned)}, no list of scores"] * len(answers)
  found = list(returned)
  if len(found) != len(answers):
    return [f"returns {len(found)} scores for {len(answers)} answers"] * len(answers)
  return [_components(function.name, value) for value in found]


def _components(name, value):
  """{component: float or None}, or a text that says what is wrong with the value."""
  values = value if isinstance(value, collections.abc.Mapping) else {name: value}
  found = {}
  for key, each in values.items():
    try:
      if isinstance(each, str | bytes):
        raise TypeError
      found[str(key)] = None if each is None else float(each)
    except Exception:  # a value of any class of the user's
      return f"returns {_shown(value)}, neither a number nor a dict of numbers"
    if each is not None and not math.isfinite(found[str(key)]):
      return f"returns {_shown(value)}, which is not finite"
  return found if found else "returns an empty dict"


def _shown(value):
  return repr(value)[:200]
