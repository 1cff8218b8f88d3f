"""Pages for tests of `decode_step`: what sampling/pages.py would give, laid out at once."""

import jax.numpy as jnp
import numpy as np

from ares_jax.models import paged

A = 4  # tokens of a page


def lay_out(config, k_LPTKH, v_LPTKH, length_P, prompt_B, tokens, *, seed=0):
  """(Pages, table [B, M]) for rows of `tokens` more tokens each, after the prompts they continue.

  Rows share the full pages of their prompt and have a copy of the last; -1 = an idle row.
  """
  prompts, width = len(length_P), -(-(k_LPTKH.shape[2] + tokens) // A)
  numbers = iter(np.random.default_rng(seed).permutation((prompts + len(prompt_B)) * width))
  total = (prompts + len(prompt_B)) * width
  table_PM = np.full((prompts, -(-k_LPTKH.shape[2] // A)), total, np.int32)
  for prompt, length in enumerate(length_P):
    table_PM[prompt, : -(-length // A)] = [next(numbers) for _ in range(-(-length // A))]
  pages = paged.write_prompts(paged.empty_pages(config, total, A, k_LPTKH.dtype),
                              jnp.asarray(table_PM), k_LPTKH, v_LPTKH)
  table_BM = np.full((len(prompt_B), width), total, np.int32)
  for row, prompt in enumerate(prompt_B):
    if prompt >= 0:
      shared = length_P[prompt] // A
      table_BM[row, :shared] = table_PM[prompt, :shared]
      table_BM[row, shared:] = [next(numbers) for _ in range(width - shared)]
      if length_P[prompt] % A:
        pages = paged.copy_page(pages, config.layers, int(table_PM[prompt, shared]),
                                int(table_BM[row, shared]))
  return pages, table_PM, table_BM


def reads(table_PM, table_BM, length_P, query_B, done, *, group, prompt_tokens, live):
  """Reads of rows that have read `done` tokens after their prompts; query P * G = idle."""
  active_B = query_B < len(length_P) * group
  length_B = length_P[np.minimum(query_B // group, len(length_P) - 1)]
  return paged.Reads(
    table=jnp.asarray(table_BM), length=jnp.asarray(length_B + done), active=jnp.asarray(active_B),
    own=None, prompt_length=jnp.asarray(length_B), prompts=jnp.asarray(table_PM),
    prompts_length=jnp.asarray(length_P), query=jnp.asarray(query_B), group=group,
    prompt_tokens=prompt_tokens, live=live)
