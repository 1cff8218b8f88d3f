import pytest
import tiny

from ares_jax.run import config as run_config
from ares_jax.system.config import ConfigError


@pytest.mark.parametrize("changes, message", [
  (dict(seed=-1), "config.seed = -1 is outside 0..2**32 - 1"),
  (dict(seed=2**32), "config.seed = 4294967296 is outside"),
  (dict(seed=10**30), f"config.seed = {10**30} is outside"),
  (dict(aepo__sampling__temperature=0.0), "config.aepo.sampling.temperature = 0 draws the same"),
  (dict(aepo__sampling__temperature=float("inf")), "config.aepo.sampling.temperature = inf must"),
  (dict(grade__timeout=float("inf")), "config.grade.timeout = inf s must be > 0 and finite"),
])
def test_values_that_no_run_can_use_are_refused(changes, message):
  for new in (True, False):
    with pytest.raises(ConfigError) as error:
      run_config.read_config(tiny.values(**changes), new=new)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("changes, message", [
  (dict(aepo__sampling__top_k=1), "config.aepo.sampling.top_k = 1: all 4 answers to a prompt"),
  (dict(aepo__entropy__window=13), "config.aepo.entropy.window = 13 tokens is longer than any ans"),
  (dict(warmup__optimizer__warmup_steps=3),
   "config.warmup.optimizer.warmup_steps = 3 is more than warmup.steps = 2"),
  (dict(adacs__optimizer__warmup_steps=3), "config.adacs.optimizer.warmup_steps = 3 is more than"),
  (dict(aepo__optimizer__warmup_steps=4), "config.aepo.optimizer.warmup_steps = 4 is more than"),
  (dict(aepo__filter__batches=2, aepo__filter__low=0.3, aepo__filter__high=0.4),
   "config.aepo.filter.low = 0.3, high = 0.4: every group of 4 answers would be dropped"),
  (dict(evaluate__temperature=0.0), "config.evaluate.temperature = 0.0: the evaluate.samples = 2"),
])
def test_settings_that_make_a_run_pointless_are_refused_for_new_runs(changes, message):
  with pytest.raises(ConfigError) as error:
    run_config.read_config(tiny.values(**changes))
  assert str(error.value).startswith(message) and "\n" not in str(error.value)
  run_config.read_config(tiny.values(**changes), new=False)  # one that has begun goes on


def test_int8_pages_need_the_correction_between_sampler_and_trainer():
  int8 = dict(engine__int8_pages=True, aepo__loss__old_logprob="sampler")
  with pytest.raises(ConfigError, match="engine.int8_pages = True .* set aepo.loss.old_logprob"):
    run_config.read_config(tiny.values(**int8))
  run_config.read_config(tiny.values(**int8 | dict(aepo__loss__old_logprob="recompute")))
  run_config.read_config(tiny.values(**int8, aepo__steps=0))


@pytest.mark.parametrize("changes", [
  dict(seed=2**32 - 1), dict(aepo__entropy__window=12), dict(aepo__optimizer__warmup_steps=3),
  dict(aepo__steps=0, aepo__sampling__top_k=1, aepo__entropy__window=13),
  dict(adacs__steps=0, adacs__optimizer__warmup_steps=30),
  dict(adacs__steps=1, adacs__epochs=2.0, adacs__optimizer__warmup_steps=5),
  dict(aepo__filter__low=0.3, aepo__filter__high=0.4),  # one batch: nothing is dropped
  dict(evaluate__temperature=0.0, evaluate__samples=1)])
def test_limits_and_settings_of_stages_that_are_left_out_are_accepted(changes):
  run_config.read_config(tiny.values(**changes))
