"""launch/colab.ipynb runs from top to bottom, in small."""

import pathlib
import re
import shutil

import pytest
import tiny

pytestmark = pytest.mark.slow

NOTEBOOK = pathlib.Path(__file__).parent.parent / "launch" / "colab.ipynb"
nbformat = pytest.importorskip("nbformat")


@pytest.fixture(scope="module")
def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_has_no_outputs_and_no_machine_paths(notebook):
  nbformat.validate(notebook)
  for cell in notebook.cells:
    assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)
    assert re.findall(r"""["'(= ]/(?!dev/)\w+""", cell.source) == []


@pytest.fixture(scope="module")
def done(notebook, tmp_path_factory):
  """The notebook after it has run in a copy of the checkout, where its run may be left."""
  nbclient = pytest.importorskip("nbclient")
  folder = tmp_path_factory.mktemp("checkout")
  for name in ("ares_jax", "configs", "docs", "launch"):
    shutil.copytree(NOTEBOOK.parent.parent / name, folder / name,
                    ignore=shutil.ignore_patterns("__pycache__"))
  shutil.copy(NOTEBOOK.parent.parent / "requirements.txt", folder)
  values = tiny.values(warmup__steps=0, aepo__steps=1).to_dict()
  (folder / "small.py").write_text(
    "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
    f"  return ConfigDict({values!r})\n")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("CONFIG", "small.py")
    # The copy is what is tested, whatever is installed.
    patch.setenv("PYTHONPATH", str(folder))
    patch.delenv("MODEL", raising=False)
    client = nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3",
                                     resources={"metadata": {"path": str(folder / "launch")}})
    return client.execute(), folder


def shown(notebook, kind):
  """Every output of a kind, such as "text/html", in order; "text" is what was printed."""
  outputs = [output for cell in notebook.cells if cell.cell_type == "code"
             for output in cell.outputs]
  if kind == "text":
    return "".join(output.text for output in outputs if output.output_type == "stream")
  return [output.data[kind] for output in outputs if "data" in output and kind in output.data]


def test_the_sentence_is_tinted_and_drawn(done):
  notebook, _ = done
  assert "two equal choices: 0.693" in shown(notebook, "text") and "N_HE: 4" in shown(
    notebook, "text")
  tints = shown(notebook, "text/html")[0]
  assert tints.count("<span") == 28 and tints.count("border-left") == 4
  assert tints.count("border-bottom") == 7 and len(shown(notebook, "image/png")) == 1


def test_both_stages_run_and_their_report_stands_on_the_page(done):
  notebook, folder = done
  lines = (folder / "runs" / "notebook_small" / "metrics.jsonl").read_text().splitlines()
  assert len(lines) == 3
  page = shown(notebook, "text/html")[-1]
  assert "<iframe srcdoc=" in page and "Report of" in page
  text = shown(notebook, "text")
  assert "aepo 1/1" in text and "report.html" in text
  assert "no model: set MODEL" in text
