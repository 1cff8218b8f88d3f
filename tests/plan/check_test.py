"""Programs that do not fit are refused before a run begins, with suggestions."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from ares_jax.models import weights
from ares_jax.plan import check, programs
from ares_jax.run import model as model_lib
from ares_jax.system import mesh


@pytest.fixture(scope="module")
def small():
  config = tiny.read()
  return config, model_lib.model_config(config.model)


def program(name, size):
  """A Program that adds 1 to `size` floats, beside 1000 bytes."""
  return programs.Program(name, 1, lambda: jax.jit(lambda x: x + 1).trace(
    jax.ShapeDtypeStruct((size,), jnp.float32)), 1000.0)


def test_programs_that_do_not_fit_are_refused_with_suggestions(small, monkeypatch, capfd):
  large = 10**6
  monkeypatch.setattr(check, "_device_bytes", lambda: 2e6)
  monkeypatch.setattr(check, "sft_program", lambda config, model, stage: program(
    stage, large if stage == "warmup" else 4))
  monkeypatch.setattr(check, "aepo_programs", lambda *_: (program("decode", 4),
                                                     program("aepo_step", large)))
  checked = check.check_programs(*small, (5,))
  assert [one.name for one in checked] == ["warmup", "adacs", "decode", "aepo_step"]
  assert "compiling the longest shape of decode ...\n" in capfd.readouterr().err
  assert checked[2].bytes == 1000 + 2 * 16
  assert [one.fits for one in checked] == [False, True, True, False]
  assert "| warmup | 0.007, too many | 0.002 |" in check.memory_table(checked)
  assert check.memory_table(checked).endswith("an upper bound.")
  with pytest.raises(ValueError, match="^warmup, aepo_step need more memory than a") as error:
    check.require_fit(checked, *small)
  assert "try first: --config.warmup.microbatch=2; --config.model.remat=block" in str(error.value)
  assert "\n" not in str(error.value)
  check.require_fit([one for one in checked if one.fits], *small)


def test_fine_tuning_is_checked_with_every_example_in_a_row_of_its_own(small):
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    traced = programs.sft_program(*small, "warmup").trace()
  state, metrics = traced.out_info
  rows = small[0].warmup.batch
  assert "grad_norm" in metrics and f"[{rows},80]" in str(traced.jaxpr.in_avals)
  assert jax.tree.structure(state.params) == jax.tree.structure(
    weights.abstract(weights.weight_table(small[1]), mesh.make_mesh(1, 1, jax.devices()[:1]),
                     jnp.float32))


def test_the_longest_shapes_are_compiled_first_if_some_are_shorter(small, tmp_path, monkeypatch):
  calls, end = [], (5, 6)
  monkeypatch.setattr(check, "_device_bytes", lambda: 2e6)
  # The upper bound of fine-tuning is no reason to refuse a run.
  monkeypatch.setattr(check, "sft_program", lambda *_: program("warmup", 10**6))
  monkeypatch.setattr(check, "aepo_programs", lambda config, model, end: calls.append(end) or [
    program("decode", 10**6)])
  check.compile_longest_first(*small, end, str(tmp_path))
  assert not calls  # there is one shape, which the first batch has
  several = tiny.read(prompt__max_tokens=(20, 26), prompt__windows=(4, 4)), small[1]
  advice = "^decode need more .* try first: --config.engine.cache_gib"
  with pytest.raises(ValueError, match=advice):
    check.compile_longest_first(*several, end, str(tmp_path))
  (tmp_path / "aepo" / "5").mkdir(parents=True)  # a run that resumes
  monkeypatch.setattr(check, "newest_step", lambda folder: 5)
  check.compile_longest_first(*several, end, str(tmp_path))
  assert calls == [end]  # the run's own, which are part of the compiled program


def test_out_of_memory_becomes_one_line_with_suggestions(small, tmp_path, monkeypatch):
  ends = {"warmup": small[0].warmup.steps, "adacs": small[0].adacs.steps}
  for finished, advice in (([], "--config.warmup.microbatch"), (["warmup"], "--config.adacs.micro"),
                           (["warmup", "adacs"], "--config.engine.cache_gib")):
    done = {str(tmp_path / stage): ends[stage] for stage in finished}
    monkeypatch.setattr(check, "newest_step", lambda folder, done=done: done.get(str(folder)))
    with pytest.raises(ValueError, match=f"^out of device memory: RESOURCE_EXHAUSTED.* try first: "
                       f"{advice}"), check.suggest_on_oom(*small, str(tmp_path)):
      jnp.zeros(2**47).block_until_ready()
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    with check.suggest_on_oom(*small, str(tmp_path)):
      raise jax.errors.JaxRuntimeError("INTERNAL: a bug")
