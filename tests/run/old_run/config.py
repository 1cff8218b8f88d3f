"""The config of the run in run.tar.xz: tests/tiny.py with a smaller model."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
import tiny  # noqa: E402


def get_config():
  return tiny.values(
    model__sizes__embed=16, model__sizes__layers=1, model__sizes__heads=1,
    model__sizes__head_dim=16, model__sizes__mlp=16, model__sizes__vision__depth=1,
    model__sizes__vision__hidden=4, model__sizes__vision__heads=1, model__sizes__vision__mlp=8,
    model__sizes__vision__out=16, model__sizes__vision__full_attention=(),
    data__digits__problem__columns=1, data__digits__teacher__first_captions=0.0,
    data__digits__teacher__first_drills=0.0, data__digits__teacher__varied=False,
    warmup__optimizer__warmup_steps=30, adacs__optimizer__warmup_steps=30,
    warmup__loop__save_every=2, adacs__loop__save_every=2,
    aepo__steps=4, aepo__loop__save_every=2, aepo__entropy__window=2,
    aepo__loss__equal_groups="normalize", aepo__kl__beta=(0.1, 0.1, 0.1))
