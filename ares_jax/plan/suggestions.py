"""Suggests settings for programs that need more memory than a device has, or much less."""

import math

GIB = 2**30


def suggestions(names, config, model, devices):
  """Flags to try first, each with its reason; empty without names.

  `names` are those of programs that do not fit: "warmup", "adacs" or parts of an AEPO iteration;
  `devices` is the number of devices of all slices together.
  """
  found = [f"--config.{stage}.microbatch={getattr(config, stage).microbatch // 2}"
           for stage in ("warmup", "adacs")
           if stage in names and getattr(config, stage).microbatch > 1]
  wider = _wider_meshes(config.mesh, model, devices)
  if {"reshard", "prefill", "decode"} & set(names):
    # Keys and values whose heads do not divide are replicated.
    by_heads = [parts for parts in wider if model.kv_heads % parts == 0]
    if by_heads:
      found.append(f"--config.mesh.model={by_heads[0]} (splits the weights of rollouts, and their "
                   "keys and values)")
    found.append(f"--config.engine.cache_gib={config.engine.cache_gib / 2:g} (fewer answers at "
                 "once; takes more time)")
  if "prefill" in names:
    read = max(devices // config.mesh.model, config.engine.read // 2)
    found.append(f"--config.engine.read={read} (prompts a call), or a smaller prompt.max_pixels "
                 "with smaller prompt.windows")
  if "aepo_step" in names:
    found += _for_the_update(config, model, devices // config.mesh.model, wider)
  if names:
    found.append("a larger slice (weights, gradients and moments are split over all its chips)")
  return tuple(dict.fromkeys(found))


def larger_cache(engine, rounds, left, chip):
  """Flags that give keys and values some of the bytes `left` of a chip, () if that is not worth it.

  `rounds` times the cache of the EngineConfig hold a whole rollout. A tenth of the chip stays free,
  as programs of other shapes take some bytes more.
  """
  gib = min(int(engine.cache_gib + (left - chip.memory / 10) / GIB),
            math.ceil(rounds * engine.cache_gib))
  if rounds == 1 or gib < 1.5 * engine.cache_gib:
    return ()
  return (f"--config.engine.cache_gib={gib} (more answers at once: while they are drawn, "
          f"{left / GIB:.1f} GiB of a chip are free)",)


def _for_the_update(config, model, rows, wider):
  """Suggestions for aepo_step; `rows`: devices that split packed rows."""
  settings, found = config.aepo, []
  if model.remat != "block":
    found.append("--config.model.remat=block (keeps only the inputs of a block)")
  if settings.microbatch > rows:
    found.append(f"--config.aepo.microbatch={max(rows, settings.microbatch // 2)} (packed rows of "
                 "a gradient)")
  if wider:
    found.append(f"--config.mesh.model={wider[0]} (splits weights, and heads or a row's tokens)")
  found.append(f"--config.aepo.sampling.max_tokens={settings.sampling.max_tokens // 2}")
  if not config.model.lora.rank:
    found.append("--config.aepo.optimizer.moments=factored (2 bytes a weight instead of 8)")
    found.append("--config.model.lora.rank=16 (trains adapters alone)")
  return found


def _wider_meshes(mesh, model, devices):
  """Values above mesh.model that divide a slice's devices and the model's sizes, in order."""
  in_slice = devices // mesh.slice
  return [parts for parts in range(mesh.model + 1, in_slice + 1)
          if in_slice % parts == model.mlp % parts == model.vocab % parts == 0]
