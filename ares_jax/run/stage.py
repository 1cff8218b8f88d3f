"""The record that every stage of a run gets."""

import dataclasses

from ares_jax.models import lora
from ares_jax.sampling.rollout import Generator


@dataclasses.dataclass(frozen=True)
class StageContext:
  """Settings that all stages of a run share; weights, rows and config differ by stage."""

  generator: Generator
  workdir: str  # folder of the run
  seed: int  # seed of shuffles, samples and ties
  threads: int  # threads that read rows
  base: lora.Base | None = None  # frozen weights under the trained adapters; None without adapters
