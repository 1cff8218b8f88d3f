"""What does not fit is said before a run begins, with what to turn."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from ares_jax import check, mesh, setup

# As in train_test: the programs of that run, which a cache of compiled programs has.
CHANGES = {"aepo__filter__batches": 2}


@pytest.fixture(scope="module")
def small():
  config = tiny.read(**CHANGES)
  return config, setup.model_and_tokenizer(config.model)[0]


def test_the_largest_programs_are_compiled_and_what_is_too_large_is_refused(small, monkeypatch):
  lines = []
  monkeypatch.setattr(check, "_limit", lambda: 2_000_000.0)
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    checked = check.check(*small, lines.append)
    with pytest.raises(ValueError) as error:
      check.require(checked, *small)
  assert [one.name for one in checked] == ["warmup", "adacs", "reshard", "prefill", "decode",
                                           "aepo_step"] and len(lines) == 6
  over = [one.name for one in checked if not one.fits]
  assert "aepo_step" in over and all(one.bytes > 0 for one in checked)
  assert str(error.value).startswith(", ".join(over) + " need more memory")
  assert "turn first: --config.warmup.microbatch=2" in str(error.value)
  assert "--config.model.remat=block" in str(error.value) and "\n" not in str(error.value)
  assert f"| {over[0]} |" in check.table(checked) and "too many | 0.002 |" in check.table(checked)


def test_the_longest_shapes_come_first_where_there_are_shorter_ones(small, tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(check, "check", lambda *_: calls.append(1) or [
    check.Checked("decode", None, None, 0.0)])
  check.longest_first(*small, str(tmp_path), print)
  assert not calls  # one shape: the first batch has it
  several = tiny.read(prompt__max_tokens=(20, 26), prompt__windows=(4, 4)), small[1]
  with pytest.raises(ValueError, match="decode need more .* turn first: --config.mesh.model"):
    check.longest_first(*several, str(tmp_path), print)
  (tmp_path / "aepo" / "5").mkdir(parents=True)  # a run that goes on
  monkeypatch.setattr(check, "newest", lambda folder: 5)
  check.longest_first(*several, str(tmp_path), print)
  assert len(calls) == 1


def test_out_of_memory_is_one_line_that_names_the_knobs(small):
  with pytest.raises(ValueError, match="^out of device memory: RESOURCE_EXHAUSTED.* turn first: "):
    with check.naming_knobs(*small):
      jnp.zeros(2**47).block_until_ready()
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    with check.naming_knobs(*small):
      raise jax.errors.JaxRuntimeError("INTERNAL: a bug")
