"""What a server reads beside weights, so that it answers as the run's own sampler does."""

import dataclasses
import pathlib
import re

from ares_jax.models import hf_processor
from ares_jax.models.config import VisionConfig
from ares_jax.models.hf_files import read_object, write_object

TEMPLATES = "additional_chat_templates"  # transformers' folder for all but the first
_GENERATION = "generation_config.json"
_SETTINGS = (".json", ".txt", ".jinja", ".model")
_LICENCE = re.compile(r"licen[cs]e|notice|copying|use_policy", re.IGNORECASE)
# Of weights that an export does not hold: another format's index, adapters, a trainer's state.
_LEFT_OUT = re.compile(r"adapter_.*|trainer_state\.json|.*\.bin\.index\.json")


@dataclasses.dataclass(frozen=True)
class Serving:
  """How a run made its prompts and drew its answers."""

  end: tuple[int, ...]  # ids that end an answer
  never: tuple[int, ...]  # ids that are never drawn
  pad: int | None  # id that fills a batch, of the tokenizer
  temperature: float  # > 0
  top_p: float  # in (0, 1]
  top_k: int  # 0 keeps the whole vocabulary
  vocab: int  # size of the vocabulary
  min_pixels: int  # least area of an image
  max_pixels: int  # largest area of an image
  max_tokens: int  # longest prompt and answer together

  def write(self, folder: pathlib.Path, vision: VisionConfig | None) -> None:
    """Writes generation_config.json and the limits of images into a folder of Hugging Face form.

    Of a generation_config.json that is there, only the ids of tokens stay: its sampling settings,
    such as a repetition penalty, are not those that the policy was trained with.
    """
    path = folder / _GENERATION
    before = read_object(path) if path.is_file() else {}
    ids = {"bos_token_id": before.get("bos_token_id"), "pad_token_id":
           self.pad if before.get("pad_token_id") is None else before["pad_token_id"]}
    write_object(path, {name: token for name, token in ids.items() if token is not None} | {
      "eos_token_id": list(self.end), "suppress_tokens": list(self.never), "do_sample": True,
      "temperature": self.temperature, "top_p": self.top_p,
      # Servers differ on whether 0 or -1 keeps the whole vocabulary, and transformers' default is
      # 50; all of them understand the size.
      "top_k": self.top_k or self.vocab})
    if vision:
      hf_processor.write_limits(folder, vision, min_pixels=self.min_pixels,
                                max_pixels=self.max_pixels)


def is_kept(path: pathlib.Path) -> bool:
  """Whether a file of a base belongs into an export of its trained weights, as it is."""
  settings = path.suffix in _SETTINGS and not _LEFT_OUT.fullmatch(path.name)
  return path.is_file() and (settings or bool(_LICENCE.match(path.name)))


def set_dtype(folder: pathlib.Path, dtype: str) -> None:
  """Names another dtype of the weights in a folder's config.json."""
  fields = read_object(folder / "config.json")
  fields.setdefault("torch_dtype", dtype)
  for part in (fields, fields.get("text_config"), fields.get("vision_config")):
    if isinstance(part, dict):
      part.update({name: dtype for name in ("torch_dtype", "dtype") if name in part})
  write_object(folder / "config.json", fields)
