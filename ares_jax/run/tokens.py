"""Opens the tokenizer of a model, and checks it against the model: which tokens an answer may hold.

V vocabulary.
"""

import copy
import dataclasses
import pathlib

import numpy as np

from ares_jax.data.template import CLOSE, THINK, Template
from ares_jax.models.config import ModelConfig
from ares_jax.models.hf_files import Folder, read_object


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The tokens that a model reads and writes."""

  tokenizer: object  # a `transformers` fast tokenizer with a chat template
  end: tuple[int, ...]  # ids that end an answer
  allowed: np.ndarray  # bool [V], tokens that an answer may hold


def check_tokens(config: ModelConfig, tokenizer, folder: Folder = "") -> Tokens:
  """Tokens of a model. Model and tokenizer are compared here, and nowhere else.

  Args:
    config: sizes of the model.
    tokenizer: from `open_tokenizer`, or any fast one with a chat template.
    folder: the Hugging Face folder that may hold generation_config.json; "" for none.

  Raises:
    ValueError: the tokenizer cannot spell its own template; it has ids that the model has no
      embedding for; the template writes another token than `config.image_token` for an image; or an
      id that ends answers is outside of the vocabulary.
  """
  where = f"{folder}: " if folder else ""
  try:
    template = Template(tokenizer)
    _check_spelling(template)
    _check_ids(config, template)
    end = end_tokens(folder, template)
    outside = [token for token in end if not 0 <= token < config.vocab]
    if outside:
      raise ValueError(f"answers end with the ids {list(end)}, of which {outside} are outside the "
                       f"vocabulary of {config.vocab}; correct generation_config.json")
  except ValueError as error:
    raise ValueError(f"{where}{error}") from error
  return Tokens(tokenizer, end, allowed_tokens(tokenizer, config.vocab, end))


def open_tokenizer(folder: Folder):
  """The tokenizer of a Hugging Face folder, with the chat template that its processor would use.

  `<think>` and `</think>` are ordinary tokens in it, even if the folder calls them special: a
  special token is never drawn, and is left out of texts.

  Raises:
    ValueError: transformers cannot read it, or it is not a fast one.
  """
  import transformers

  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    backend = tokenizer.backend_tokenizer
  except Exception as error:  # of any kind: broken files surface as errors of several libraries
    reason = " ".join(str(error).split())[:300]
    raise ValueError(f"{folder}: transformers cannot read its tokenizer ({type(error).__name__}: "
                     f"{reason}); download its tokenizer files again") from error
  template = _processor_template(pathlib.Path(folder))
  if template is not None:
    tokenizer.chat_template = template
  added = tokenizer.added_tokens_decoder.values()
  marks = [str(token) for token in added if token.special and str(token) in (THINK, CLOSE)]
  if marks:
    from tokenizers import AddedToken

    backend.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    tokenizer = copy.deepcopy(tokenizer)  # only a copy treats them as it says they are
  return tokenizer


def _processor_template(folder: pathlib.Path) -> str | None:
  """The chat template of the folder's processor, in transformers' order; None: the tokenizer's."""
  for name in ("processor_config.json", "chat_template.json"):
    if (folder / name).is_file():
      template = read_object(folder / name).get("chat_template")
      if isinstance(template, dict):
        template = template.get("default")
      if template is not None:
        return template
  return None


def _check_spelling(template: Template) -> None:
  # "user" is a word of every chat template, so even a tokenizer of few words has it.
  text = template.prompt([{"type": "text", "text": "user"}])
  ids = template.tokenizer(text, add_special_tokens=False)["input_ids"]
  spelled = template.tokenizer.decode(ids)
  if "".join(spelled.split()) != "".join(text.split()):
    raise ValueError(f"the tokenizer reads the prompt {text!r} as {len(ids)} tokens, which spell "
                     f"{spelled!r}; tokenizer.json, or vocab.json and merges.txt, is missing or of "
                     "another model")


def _check_ids(config: ModelConfig, template: Template) -> None:
  tokenizer = template.tokenizer
  token, last = max((index, token) for token, index in tokenizer.get_vocab().items())
  if token >= config.vocab:
    raise ValueError(f"the tokenizer has ids up to {token} ({last!r}), but the model's vocabulary "
                     f"has {config.vocab}; take the tokenizer and config.json from one model")
  if config.image_token is None or not template.takes_parts:
    return
  text = template.prompt([{"type": "image"}, {"type": "text", "text": "user"}])
  ids = tokenizer(text, add_special_tokens=False)["input_ids"]
  if ids.count(config.image_token) != 1:
    raise ValueError(
      f"config.json has image_token_id {config.image_token}, in the tokenizer "
      f"{tokenizer.convert_ids_to_tokens(config.image_token)!r}, which the chat template does not "
      f"write once for an image: {text!r}; take tokenizer, template and config.json from one model")


def end_tokens(folder: Folder, template: Template) -> tuple[int, ...]:
  """Ids that end an answer: those of generation_config.json, and the end of a turn in the template.

  The tokenizer's end of text takes the place of the first where the file names none.
  """
  path = pathlib.Path(folder) / "generation_config.json"
  ids = read_object(path).get("eos_token_id") if folder and path.is_file() else None
  ids = ids if isinstance(ids, list) else [ids]
  if ids in ([], [None]):
    own = template.tokenizer.eos_token_id
    ids = [] if own is None else [own]
  if not all(type(token) is int for token in ids):
    raise ValueError(f"generation_config.json: eos_token_id is {ids}; ids are needed")
  return tuple(dict.fromkeys([*ids, template.end]))


def allowed_tokens(tokenizer, vocab: int, end: tuple[int, ...]) -> np.ndarray:
  """bool [V]: tokens that an answer may hold: those of `end` and all that are not special."""
  allowed = np.zeros(vocab, bool)
  allowed[list(tokenizer.get_vocab().values())] = True
  special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
  allowed[special] = False
  allowed[list(end)] = True
  return allowed
