import os
import subprocess
import sys
import time

import numpy as np
import pytest

from ares_jax.data import grade


@pytest.mark.parametrize(
  "text, box",
  [
    (r"<think> 1 </think> \boxed{8}", "8"),
    (r"<think> \boxed{1} </think> \boxed{8}", "8"),
    (r"<think> \boxed{1} </think> 8", None),
    (r"<think> \boxed{1}", None),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"a </think> \boxed{ 2 }", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{1} and \boxed{2", "1"),
    (r"\boxed{ \boxed{3}", "3"),
    (r"\boxed{\boxed{3}}", r"\boxed{3}"),
    (r"\boxed {4}", "4"),
    (r"\boxed{}", ""),
    ("8", None),
    ("", None),
  ],
)
def test_takes_the_last_balanced_box_after_the_thinking(text, box):
  assert grade.extract_boxed(text) == box


@pytest.mark.parametrize(
  "text, formed, thinks",
  [
    (r"<think> 3 + 5 = 8 </think> \boxed{8}", True, True),
    (r"<think> </think> \boxed{8}", True, False),
    ("<think>\n3\n</think>\n\n" + r"So \boxed{8}.", True, True),
    (r"<think> 3 </think> 8", False, True),
    (r"<think> \boxed{8} </think>", False, True),
    (r"<think> \boxed{8}", False, True),
    (r"3 </think> \boxed{8}", False, False),
    (r"\boxed{8}", False, False),
    (r"<think> 3 </think> \boxed{8", False, True),
    (r"first <think> 3 </think> \boxed{8}", False, True),
    ("", False, False),
  ],
)
def test_the_format_is_thinking_then_a_box(text, formed, thinks):
  assert grade.well_formed(text) is formed
  assert grade.thought(text) is thinks


def test_long_hostile_texts_are_fast():
  began = time.process_time()
  for piece in ("\\boxed{", "{", "}", "</think>", "<think>", "\\", "\\boxed{1"):
    text = piece * (10**6 // len(piece))
    grade.extract_boxed(text)
    grade.well_formed(text)
  assert time.process_time() - began < 2


def test_plain_answers_are_graded_without_workers():
  texts = [r"<think> a </think> \boxed{8}", r"\boxed{3}", "8", r"<think> b </think> \boxed{7}"]
  with grade.GradingPool(workers=1) as pool:
    correct, formatted, timed_out = pool.grade(texts * 64, ["8", "3", "8", "8"] * 64)
    began = time.process_time()
    pool.grade(texts * 64, ["8", "3", "8", "8"] * 64)
    assert time.process_time() - began < 0.1  # 256 answers, a step of the small run
    assert pool._pool is None
  assert correct.dtype == formatted.dtype == np.float32 and timed_out == 0
  np.testing.assert_array_equal(correct[:4], [1, 1, 0, 0])
  np.testing.assert_array_equal(formatted[:4], [1, 0, 0, 1])


# The workers of one pool serve all tests below: each start costs a second.
@pytest.fixture(scope="module")
def pool():
  with grade.GradingPool(workers=2, timeout=2.0) as made:
    yield made


def box(text):
  return f"<think> a </think> \\boxed{{{text}}}"


def test_formulas_go_to_workers_in_order_and_are_remembered(pool):
  truths = [f"{i}x+1" for i in range(2, 12)] * 2
  texts = [box(f"1+{i}x" if i % 3 else f"1-{i}x") for i in range(2, 12)] * 2
  correct, _, timed_out = pool.grade(texts, truths)
  np.testing.assert_array_equal(correct, [float(i % 3 != 0) for i in range(2, 12)] * 2)
  assert timed_out == 0 and pool._pool is not None
  began = time.perf_counter()
  again, _, _ = pool.grade(texts, truths)
  np.testing.assert_array_equal(again, correct)
  assert time.perf_counter() - began < 0.05


def test_a_worker_has_no_jax_no_main_module_and_no_environment(pool):
  pool.grade([box("x+2")], ["2+x"])
  loaded = pool._pool.schedule(_modules, timeout=10).result()
  assert not {"jax", "torch", "tensorflow", "transformers"} & set(loaded)
  assert "math_verify" in loaded and "ares_jax" in loaded
  assert pool._pool.schedule(_environment, timeout=10).result() == []


@pytest.mark.parametrize("fault", ["_hang", "_die", "_eat"])
def test_a_worker_that_hangs_dies_or_eats_memory_is_replaced(pool, monkeypatch, fault):
  monkeypatch.setattr(grade, "_same_in_worker", globals()[fault])
  formula = f"x+{len(fault)}"
  began = time.perf_counter()
  correct, formatted, timed_out = pool.grade([box(formula), box("8")], [f"y{formula}y", "8"])
  np.testing.assert_array_equal(correct, [0, 1])
  assert timed_out == 0  # y is not in the answer: settled here
  correct, formatted, timed_out = pool.grade([box(formula), box("8")], [f"{formula}+0x", "8"])
  np.testing.assert_array_equal(correct, [0, 1])
  np.testing.assert_array_equal(formatted, [1, 1])
  assert timed_out == 1 and time.perf_counter() - began < 20
  monkeypatch.undo()
  correct, _, timed_out = pool.grade([box(f"{formula}1")], [f"{len(fault)}1+x"])
  assert (correct[0], timed_out) == (1.0, 0)


def _modules():
  return sorted({name.split(".")[0] for name in sys.modules})


def _environment():
  return sorted(os.environ)


def _hang(answer, truth):
  time.sleep(60)


def _die(answer, truth):
  os._exit(1)


def _eat(answer, truth):
  return len(bytearray(3 << 30)) > 0


def test_truths_are_checked():
  with grade.GradingPool(workers=1) as pool:
    with pytest.raises(ValueError, match="2 responses but 1 truths"):
      pool.grade(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="is not a text"):
      pool.grade([box("8")], [""])
    assert pool.grade([], [])[2] == 0
    correct, _, _ = pool.grade([box("6")], [["5", "6"]])
    assert correct[0] == 1
  with pytest.raises(ValueError, match="workers is 0"):
    grade.GradingPool(workers=0)


def test_a_program_that_imports_jax_is_not_imported_by_its_workers(tmp_path):
  (tmp_path / "program.py").write_text(
    "import jax\n"
    "from ares_jax.data import grade\n"
    "print('imported as', __name__)\n"
    "if __name__ == '__main__':\n"
    "  with grade.GradingPool(workers=1) as pool:\n"
    r"    print(pool.grade([r'\boxed{x+1}'], ['1+x'])[0][0], __file__ is not None, __spec__.name)"
    "\n"
  )
  environment = os.environ | {"PYTHONPATH": f"{os.getcwd()}{os.pathsep}{tmp_path}"}
  result = subprocess.run(
    [sys.executable, "-m", "program"], env=environment, capture_output=True, text=True, timeout=60
  )
  assert result.stdout == "imported as __main__\n1.0 True program\n", result.stderr
