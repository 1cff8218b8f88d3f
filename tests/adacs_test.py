import json

import numpy as np
import pytest
import tiny

from ares_jax import adacs
from ares_jax.data.sources import Mixture
from ares_jax.run import config as run_config
from ares_jax.run import setup
from ares_jax.run.setup import StageContext

PROBE = adacs.Probe(params=None, max_tokens=8)


class Source:
  """Problems whose teacher answers right briefly, right at length, and wrong."""

  def __len__(self):
    return 4

  def __getitem__(self, index):
    return {"id": str(index), "source": "s", "question": "1?", "images": [], "answer": "1",
            "pass_rate": [0, 1.0, 0.95, 0.5][index],
            "responses": ["<think> </think> \\boxed{1}", "<think> wait wait </think> \\boxed{1}",
                          "<think> </think> \\boxed{2}"]}


@pytest.fixture(scope="module")
def curate():
  """Function of (folder, config's changes) that curates the Source."""
  with setup.open_run(tiny.read(), check=False) as run:
    def curate(folder, shard=None, **changes):
      config = run_config.CurateConfig(**dict(selection="adacs", pass_rates="column", problems=4,
                                              samples=8, count=4, batch=3) | changes)
      context = StageContext(run.generator, str(folder), seed=0, threads=1)
      if shard:
        return adacs.measure_pass_rates(PROBE, Source(), config, context, shard=shard,
                                        path=str(folder / "curation.jsonl"))
      return adacs.curate(PROBE, Source(), config, context)

    yield curate


def probe(monkeypatch, passes):
  monkeypatch.setattr(adacs.Probe, "passes",
                      lambda self, prompts, *_: np.array(passes)[prompts.prompt_id])


@pytest.mark.parametrize("pass_rates", ["probe", "column"])
def test_curation_drops_wrong_answers_and_is_kept(curate, tmp_path, monkeypatch, pass_rates):
  probe(monkeypatch, [0, 8, 8, 4] if pass_rates == "probe" else None)
  selected = curate(tmp_path, pass_rates=pass_rates)
  report = json.loads((tmp_path / "curation.json").read_text())
  assert report["candidates"] == 8 and report["wrong_candidates_dropped"] == 4
  assert report["bracket_problems"] == [1, 0, 0, 0, 1, 0, 0, 0, 2]
  assert all("boxed{1}" in selected[index]["response"] for index in range(4))
  assert "<svg" in (tmp_path / "curation.html").read_text()
  probe(monkeypatch, None)
  again = curate(tmp_path, pass_rates=pass_rates)
  assert [again[i]["response"] for i in range(4)] == [selected[i]["response"] for i in range(4)]


@pytest.mark.parametrize("pass_rates", ["probe", "column"])
def test_a_stopped_curation_goes_on_after_its_last_complete_line(curate, tmp_path, monkeypatch,
                                                              pass_rates):
  probe(monkeypatch, [0, 8, 8, 4])
  curate(tmp_path, pass_rates=pass_rates)
  report, lines = (tmp_path / "curation.json"), (tmp_path / "curation.jsonl")
  complete, written = report.read_text(), lines.read_text()
  report.unlink()
  lines.write_text(written.splitlines(keepends=True)[0] + '{"problem": 1, "pas')
  probe(monkeypatch, [None, 8, 8, 4])  # the first is not asked
  curate(tmp_path, pass_rates=pass_rates)
  assert report.read_text() == complete and lines.read_text() == written


def test_shards_made_apart_are_the_curation_of_one(curate, tmp_path, monkeypatch):
  probe(monkeypatch, [0, 8, 8, 4])
  complete, apart = tmp_path / "complete", tmp_path / "apart"
  complete.mkdir()
  curate(complete, pass_rates="probe")

  def keep(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("config.json", {"seed": 0, "curate": {"samples": 8, "count": 4}}),
                         ("fingerprint.json", {"data.sft": "4 rows"})):
      (folder / name).write_text(json.dumps(values | {
        key: value for key, value in changes.items() if key in values}))

  keep(apart)
  for number in (2, 0):
    folder = apart / "curation" / f"0000{number}-of-00003"
    keep(folder, curate={"samples": 8, "count": 9})  # what is chosen may differ
    curate(folder, shard=(number, 3), pass_rates="probe")
  with pytest.raises(ValueError, match="the shards 1/3 are missing or not finished"):
    curate(apart, pass_rates="probe")
  folder = apart / "curation" / "00001-of-00003"
  keep(folder, **{"data.sft": "5 rows"})
  curate(folder, shard=(1, 3), pass_rates="probe")
  with pytest.raises(ValueError, match="00001-of-00003 was made with other values of data.sft"):
    curate(apart, pass_rates="probe")
  keep(folder)
  probe(monkeypatch, None)  # nobody is asked again
  curate(apart, pass_rates="probe")
  for name in ("curation.json", "curation.html"):
    assert (apart / name).read_text() == (complete / name).read_text()
  with pytest.raises(ValueError, match="shard 5 of 5: the number must be below 5, which must be"):
    curate(folder, shard=(5, 5))


def test_a_part_of_several_sources_is_refused(tmp_path):
  mixed = Mixture([Source(), Source()], [1.0, 3.0])
  config = run_config.CurateConfig(selection="adacs", pass_rates="column", problems=6, samples=8,
                                   count=6, batch=3)
  with pytest.raises(ValueError, match="6 problems of 8 in 2 sources: .* curate.problems=8, or"):
    adacs.measure_pass_rates(PROBE, mixed, config, StageContext(None, str(tmp_path), 0, 1),
                             path=str(tmp_path / "curation.jsonl"))


def test_rows_without_candidates_are_named_before_the_probe(tmp_path):
  config = run_config.CurateConfig(selection="adacs", pass_rates="probe", problems=1,
                                   samples=8, count=1, batch=1)
  with pytest.raises(ValueError, match="row 7: has no 'responses'"):
    adacs.curate(PROBE, [{"id": "7"}], config, StageContext(None, str(tmp_path), 0, 1))
