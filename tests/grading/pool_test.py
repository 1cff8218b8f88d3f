import concurrent.futures.process
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ares_jax.grading import pool as pool_lib
from ares_jax.grading import response, sandbox
from ares_jax.grading.answer import Truth
from ares_jax.system import heartbeat


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
  assert response.extract_boxed(text) == box


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
  assert response.well_formed(text) is formed
  assert response.shows_work(text) is thinks


def test_long_hostile_texts_are_fast():
  began = time.process_time()
  for piece in ("\\boxed{", "{", "}", "</think>", "<think>", "\\", "\\boxed{1"):
    text = piece * (10**6 // len(piece))
    response.extract_boxed(text)
    response.well_formed(text)
  assert time.process_time() - began < 2


def test_plain_answers_are_graded_without_workers():
  texts = [r"<think> a </think> \boxed{8}", r"\boxed{3}", "8", r"<think> b </think> \boxed{7}"]
  with pool_lib.GradingPool(workers=1) as pool:
    correct, format_ok, timed_out = pool.grade(texts * 64, ["8", "3", "8", "8"] * 64)
    began = time.process_time()
    pool.grade(texts * 64, ["8", "3", "8", "8"] * 64)
    assert time.process_time() - began < 0.1  # 256 answers, a step of the small run
    assert pool._pool is None
  assert correct.dtype == format_ok.dtype == np.float32 and timed_out == 0
  np.testing.assert_array_equal(correct[:4], [1, 1, 0, 0])
  np.testing.assert_array_equal(format_ok[:4], [1, 0, 0, 1])


# The workers of one pool serve all tests below: each start costs a second.
@pytest.fixture(scope="module")
def pool():
  with pool_lib.GradingPool(workers=2, timeout=2.0) as made:
    yield made


def box(text):
  return f"<think> a </think> \\boxed{{{text}}}"


def test_formulas_go_to_workers_in_order_and_are_remembered(pool, monkeypatch):
  truths = [f"{i}x+1" for i in range(2, 12)] * 2
  texts = [box(f"1+{i}x" if i % 3 else f"1-{i}x") for i in range(2, 12)] * 2
  correct, _, timed_out = pool.grade(texts, truths)
  np.testing.assert_array_equal(correct, [float(i % 3 != 0) for i in range(2, 12)] * 2)
  assert timed_out == 0 and pool._pool is not None
  monkeypatch.setattr(pool, "_submit", lambda pair: pytest.fail(f"{pair} is asked again"))
  again, _, _ = pool.grade(texts, truths)
  np.testing.assert_array_equal(again, correct)


def test_the_options_and_the_question_of_a_row_count(pool):
  boxes = Truth.of({"answer": ["B", "4x8x12"], "options": ["4x6x16", "4x8x12"]})
  power = Truth.of({"answer": "1024", "question": "What is 2^{10}?"})
  correct, _, _ = pool.grade([box(said) for said in ("4x8x12", "4x6x16", "B", "2^{10}", "1024")],
                             [boxes, boxes, boxes, power, power])
  np.testing.assert_array_equal(correct, [1, 0, 1, 0, 1])


def test_results_are_in_order_of_index_whatever_the_order_of_arrival(pool):
  grading = pool.begin()
  for index, text in ((2, box("3+y")), (0, box("8")), (3, r"\boxed{9}"), (1, box("y+3"))):
    grading.add(index, text, ["8", "3+y", "y+3", "8"][index])
  correct, format_ok, timed_out = grading.finish()
  np.testing.assert_array_equal(correct, [1, 1, 1, 0])
  np.testing.assert_array_equal(format_ok, [1, 1, 1, 0])
  assert timed_out == 0


def test_a_worker_has_no_jax_no_main_module_and_no_environment(pool):
  pool.grade([box("x+2")], ["2+x"])
  loaded = pool._pool.schedule(_modules, timeout=10).result()
  assert not {"jax", "torch", "tensorflow", "transformers"} & set(loaded)
  assert "math_verify" in loaded and "ares_jax" in loaded
  assert pool._pool.schedule(_environment, timeout=10).result() == ([], "")


def test_a_new_worker_is_a_copy_of_a_process_that_has_the_parsers(pool):
  pool.grade([box("x+4")], ["4+x"])
  before = pool._pool.schedule(_fork, timeout=10).result()
  for _ in range(2):  # both workers
    assert pool._pool.schedule(time.sleep, args=[60], timeout=0.1).exception() is not None
  after = pool._pool.schedule(_fork, timeout=10).result()
  # The server is neither this process nor started anew; a start takes seconds, this takes 0.2 s.
  assert before[0] == after[0] != os.getpid() and after[1]


@pytest.mark.parametrize("failure", ["_hang", "_die", "_eat"])
def test_a_worker_that_hangs_dies_or_eats_memory_is_replaced(pool, monkeypatch, failure):
  monkeypatch.setattr(pool_lib, "_same_in_worker", globals()[failure])
  formula = f"x+{ord(failure[1])}"  # one of its own: verdicts are kept
  began = time.perf_counter()
  correct, format_ok, timed_out = pool.grade([box(formula), box("8")], [f"y{formula}y", "8"])
  np.testing.assert_array_equal(correct, [0, 1])
  assert timed_out == 0  # y is not in the answer: settled here
  correct, format_ok, timed_out = pool.grade([box(formula), box("8")], [f"{formula}+0x", "8"])
  np.testing.assert_array_equal(correct, [0, 1])
  np.testing.assert_array_equal(format_ok, [1, 1])
  assert timed_out == 1 and time.perf_counter() - began < 20
  monkeypatch.undo()
  correct, _, timed_out = pool.grade([box(f"{formula}1")], [f"{ord(failure[1])}1+x"])
  assert (correct[0], timed_out) == (1.0, 0)
  # What ran out of time once has its time again.
  correct, _, timed_out = pool.grade([box(formula)], [f"{formula}+0x"])
  assert (correct[0], timed_out) == (1.0, 0)


def _modules():
  return sorted({name.split(".")[0] for name in sys.modules})


def _fork():
  return os.getppid(), "math_verify" in sys.modules


def _environment():
  with open("/proc/self/environ", encoding="utf-8") as file:
    return sorted(os.environ), file.read().strip("\x00")


def _hang(answer, truth):
  time.sleep(60)


def _die(answer, truth):
  os._exit(1)


def _eat(answer, truth):
  return len(bytearray(3 << 30)) > 0


def test_truths_are_checked():
  with pool_lib.GradingPool(workers=1) as pool:
    with pytest.raises(ValueError, match="2 responses but 1 truths"):
      pool.grade(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="is not a text"):
      pool.grade([box("8")], [""])
    assert pool.grade([], [])[2] == 0
    correct, _, _ = pool.grade([box("6")], [["5", "6"]])
    assert correct[0] == 1
  with pytest.raises(ValueError, match="workers is 0"):
    pool_lib.GradingPool(workers=0)


def test_too_many_timeouts_stop_the_run(monkeypatch):
  monkeypatch.setattr(pool_lib, "_same_in_worker", _hang)
  texts, truths = [box("x+1"), box("x+2"), box("8"), box("9")], ["1+x", "2+x", "8", "8"]
  with pool_lib.GradingPool(workers=2, timeout=0.2, timeout_share=0.4) as pool:
    with pytest.raises(pool_lib.GraderError, match=r"2 of 4 answers timed out.* 'x\+1' for '1\+x'"):
      pool.grade(texts, truths)
    correct, _, timed_out = pool.grade(texts * 2 + [box("8")] * 4, truths * 2 + ["8"] * 4)
    assert timed_out == 4 and correct.sum() == 6  # 4 of 12 are bearable


USERS = """
import time

def listed(response, truth):
  return truth == ["1", "one"] and response.endswith("1") or len(response) > 10**4

def half(response, truth):
  return 0.5

def breaks(response, truth):
  raise KeyError("no such unit")

def leaves(response, truth):
  raise SystemExit(0)

def stops(response, truth):
  raise KeyboardInterrupt

class Odd(BaseException):
  def __str__(self):
    raise RuntimeError

def odd(response, truth):
  raise Odd

def nan(response, truth):
  return float("nan")

def hangs(response, truth):
  time.sleep(60)

number = 3
"""


@pytest.fixture(scope="module")
def users(tmp_path_factory):
  folder = tmp_path_factory.mktemp("users")
  (folder / "my_grader.py").write_text(USERS)
  (folder / "leaving_grader.py").write_text("raise SystemExit(0)")
  sys.path.insert(0, str(folder))
  yield
  sys.path.remove(str(folder))


def test_a_users_grader_sees_the_response_and_the_truth_as_in_the_data(users):
  with pool_lib.GradingPool(workers=1, grader="my_grader:listed") as pool:
    correct, format_ok, _ = pool.grade(["says 1", "says 2", box("1")], [["1", "one"], "2", "1"])
    long = "x" * 10**5
    assert pool.grade([long + "1"], ["1"])[0] == 1 == pool.grade([long + "1"], ["1"])[0]
    assert sum(len(key[0]) for key in pool._verdicts) < 200  # digests of long responses
    # It wants no box: its truths are not to be told by one.
    assert list(pool.bad_truths([{"id": "a", "answer": ["1", "one"]}])) == []
  np.testing.assert_array_equal(correct, [1, 0, 0])
  np.testing.assert_array_equal(format_ok, [0, 0, 1])


@pytest.mark.parametrize("name, words", [
  ("breaks", "grader 'my_grader:breaks' raises KeyError: 'no such unit'"),
  ("leaves", "grader 'my_grader:leaves' raises SystemExit: 0"),
  ("stops", "grader 'my_grader:stops' raises KeyboardInterrupt"),
  ("odd", "grader 'my_grader:odd' raises Odd"),
  ("half", "grader 'my_grader:half' returns 0.5, neither 0 nor 1"),
  ("nan", "grader 'my_grader:nan' returns nan, neither 0 nor 1"),
  ("hangs", "grader 'my_grader:hangs' hangs or dies .*limit 0.3 s. on 'says 8' for '8'"),
])
def test_a_users_grader_that_fails_is_named(users, name, words):
  with pool_lib.GradingPool(workers=1, timeout=0.3, grader=f"my_grader:{name}") as pool:
    with pytest.raises(pool_lib.GraderError, match=words):
      pool.grade(["says 8"], ["8"])


def test_a_users_grader_that_failed_is_named_at_the_next_response(users):
  with pool_lib.GradingPool(workers=1, timeout=5.0, grader="my_grader:breaks") as pool:
    grading = pool.begin()
    grading.add(0, "says 8", "8")
    concurrent.futures.wait(grading._waiting.values())
    with pytest.raises(pool_lib.GraderError, match="grader 'my_grader:breaks' raises KeyError"):
      grading.add(1, "says 9", "9")


def test_a_stop_signal_to_the_workers_is_not_blamed_on_the_grader(users):
  others = multiprocessing.active_children()
  with heartbeat.stop_signals(), pool_lib.GradingPool(workers=1, timeout=60.0,
                                                      grader="my_grader:hangs") as pool:
    pair = ("says 8", Truth("8"))
    future = pool.verdict(pair)
    while not future.running():
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    for child in multiprocessing.active_children():
      if child not in others:
        child.kill()
    with pytest.raises(heartbeat.StopRequested):
      pool.wait(pair, future)
    broken = concurrent.futures.Future()
    broken.set_exception(concurrent.futures.process.BrokenProcessPool())
    with pytest.raises(heartbeat.StopRequested):
      pool.wait(pair, broken)


@pytest.mark.parametrize("name, words", [
  ("layerd", "is neither 'layered' nor 'release'"), ("my_grader:number", "is int, not a function"),
  ("leaving_grader:f", "does not load: SystemExit: 0"),
  ("my_grader:nothing", "does not load: AttributeError"), ("no_module:f", "ModuleNotFoundError"),
])
def test_an_invalid_grader_is_refused_at_once(users, name, words):
  with pytest.raises(ValueError, match=words):
    pool_lib.GradingPool(grader=name)


def test_the_releases_grader_runs_in_the_same_sandbox():
  if not sandbox.has_release_grader():
    with pytest.raises(ValueError, match="needs the package mathruler"):
      pool_lib.GradingPool(grader="release")
    pytest.skip("mathruler is not installed")
  with pool_lib.GradingPool(workers=1, timeout=3.0, grader="release") as pool:
    correct, _, timed_out = pool.grade(
      [box("8"), box("9"), box(r"\frac{1}{2}"), "8", box("9^{9^{9^9}}+1")],
      ["8", "8", "1/2", "8", "3+x"])
  np.testing.assert_array_equal(correct, [1, 0, 1, 0, 0])
  assert timed_out <= 1


def test_truths_that_no_answer_equals_are_found(pool):
  rows = [{"id": "good", "answer": "8"}, {"id": "formula", "answer": r"2\sqrt{3}"},
          {"id": "list", "answer": ["A", "12 cm"]}, {"id": "open", "answer": r"\frac{1}{2"},
          {"id": "lost brace", "answer": r"\boxed{8"}, {"id": "shut", "answer": "8}"}]
  assert [row["id"] for row in pool.bad_truths(iter(rows), batch=4)] == ["open", "shut"]


PIECES = [
  "\\frac", "\\sqrt", "\\sum_", "\\int", "\\prod", "\\binom", "\\begin{pmatrix}",
  "\\end{pmatrix}", "{", "}", "(", ")", "[", "]", "^", "^{", "_{", "!", "\\boxed{", "\\text{",
  "\\mathrm{", "\\left(", "\\right)", "$", "%", "&", "\\\\", "=", "<", "\\le", "\\pm", "\\cup",
  "\\infty", "\\overline{", "\\log", "\\sin", "+", "-", "*", "/", ".", ",", ";", " ", "x", "y",
  "e", "i", "\\pi", "A", "B.", "or", "not", "12", "3", "0", "10^{10}", "__import__('os')",
  "eval(", "lambda:", "\x00", "\u202e", "\u200b", "\u0663", "\uff15", "\u0430", "\ud800",
  "9" * 50, "(" * 9, "{" * 9, "^{9" * 4, "!" * 4,
]  # fmt: skip


# 10,000 of them: ARES_FUZZ=10000 python -m pytest tests/grading/pool_test.py -k hostile_mixture
@settings(max_examples=int(os.environ.get("ARES_FUZZ", 500)), deadline=None, derandomize=True,
          database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_no_hostile_mixture_is_accepted_or_hangs(pool, said):
  truths = ["7919", "7919+x", r"7919\sqrt{3}", "Paris", "(7919, 2)", "7919 cm"]
  pool.grade([box("x+3")], ["3+x"])  # the first formula starts the workers
  began = time.perf_counter()
  correct, _, _ = pool.grade([box(said)] * len(truths), truths)
  assert not correct.any(), said
  assert time.perf_counter() - began < 30  # 2 s each on two workers


def test_a_program_that_imports_jax_is_not_imported_by_its_workers(tmp_path):
  (tmp_path / "program.py").write_text(
    "import jax\n"
    "from ares_jax.grading import pool\n"
    "print('imported as', __name__)\n"
    "if __name__ == '__main__':\n"
    "  with pool.GradingPool(workers=1) as grading:\n"
    r"    correct = grading.grade([r'\boxed{x+1}'], ['1+x'])[0][0]" "\n"
    "    print(correct, __file__ is not None, __spec__.name)"
    "\n"
  )
  environment = os.environ | {"PYTHONPATH": f"{os.getcwd()}{os.pathsep}{tmp_path}"}
  result = subprocess.run(
    [sys.executable, "-m", "program"], env=environment, capture_output=True, text=True, timeout=60
  )
  assert result.stdout == "imported as __main__\n1.0 True program\n", result.stderr
