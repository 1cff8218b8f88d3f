"""Judges, and the example that asks a service over HTTP: on loopback one is slow, fails, lies."""

import collections
import http.server
import json
import pathlib
import threading
import time

import numpy as np
import pytest

from ares_jax.grading import functions, judge
from ares_jax.grading.judge import Judge, JudgeConfig
from ares_jax.grading.pool import GraderError, GradingPool
from ares_jax.grading.scoring import ScoreConfig, Scorer

ROOT = pathlib.Path(__file__).parent.parent.parent
EXAMPLE = f"judge:{ROOT}/examples/http_judge.py:score"


class Service:
  """A chat service. A question names what happens before its verdict, "slow,500,maybe"."""

  def __init__(self):
    self.log, self.running, self.most = [], 0, 0
    self.before = collections.defaultdict(list)  # question: what is still to happen
    lock, service = threading.Lock(), self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        question = prompt.splitlines()[1]
        with lock:
          service.log.append(question)
          service.running += 1
          service.most = max(service.most, service.running)
          events = service.before[question]
          event = events.pop(0) if events else ""
        time.sleep(0.6 if event == "slow" else 0.02)
        with lock:
          service.running -= 1
        right = "\nseven\n" in prompt.split("-----")[1]
        said = {"maybe": "yes and no", "html": None}.get(event, "YES." if right else "No")
        reply = json.dumps({"choices": [{"message": {"content": said}}]})
        try:
          self.send_response(500 if event == "500" else 200)
          self.end_headers()
          self.wfile.write(b"<html>busy</html>" if event == "html" else reply.encode())
        except OSError:
          pass  # the judge no longer waits

      def log_message(self, *_):
        pass

    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def service(monkeypatch):
  made = Service()
  host, port = made.server.server_address
  for name, value in {"JUDGE_URL": f"http://{host}:{port}/v1", "JUDGE_MODEL": "m",
                      "no_proxy": host, "NO_PROXY": host}.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(judge, "_PAUSE", 0.01)
  yield made
  made.server.shutdown()


def score(tmp_path, answers, *, failure="stop", function=EXAMPLE, **config):
  """Scores of [(question, answer)] by the judge of a process that keeps its results."""
  how = JudgeConfig(**{"timeout": 0.3, "retries": 3} | config)
  with GradingPool(1) as grader, Judge(how, str(tmp_path / "judge.jsonl")) as made, \
      Scorer(ScoreConfig(function, failure=failure), grader, workers=1, timeout=1.0, max_tokens=9,
             judge=made) as scorer:
    scoring = scorer.begin()
    for index, (question, answer) in enumerate(answers):
      scoring.add(index, answer, {"id": question, "question": question, "answer": ["7"]}, [1])
    return scoring.finish()[3]


def test_a_service_that_is_slow_fails_and_lies_is_asked_again(tmp_path, service):
  service.before |= {"a": ["slow", "500"], "b": ["html", "maybe"], "c": []}
  scores = score(tmp_path, [("a", "seven"), ("b", "eight"), ("c", "seven")])
  np.testing.assert_array_equal(scores.accuracy, [1, 0, 1])
  assert collections.Counter(service.log) == {"a": 3, "b": 3, "c": 1}
  lines = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
  assert {line["ids"][0]: line["calls"] for line in lines} == {"a": 3, "b": 3, "c": 1}
  # A run that resumes asks nothing twice, but what it has not asked.
  scores = score(tmp_path, [("a", "seven"), ("b", "seven"), ("c", "seven")])
  np.testing.assert_array_equal(scores.accuracy, [1, 1, 1])
  assert collections.Counter(service.log) == {"a": 3, "b": 4, "c": 1}


def test_a_judge_that_goes_on_failing_stops_the_run_or_drops_the_answer(tmp_path, service):
  service.before["a"] = ["maybe"] * 9
  asked = [("a", "seven"), ("b", "seven")]
  with pytest.raises(GraderError, match="says 'yes and no', neither YES nor NO on 'seven'"):
    score(tmp_path, asked, retries=1, timeout=5.0)
  scores = score(tmp_path, asked, retries=1, timeout=5.0, failure="drop")
  np.testing.assert_array_equal(scores.failed, [True, False])
  assert service.log.count("a") == 4 and service.log.count("b") == 1  # a failure is not kept
  service.before["c"] = ["slow"] * 9
  with pytest.raises(GraderError, match=r"takes longer than reward.judge.timeout = 0.3 s"):
    score(tmp_path, [("c", "seven")], retries=0)


def test_calls_at_one_time_are_limited(tmp_path, service):
  score(tmp_path, [(f"q{number}", "seven") for number in range(12)], concurrency=3, timeout=9.0)
  assert service.most == 3 and len(service.log) == 12


def test_the_budget_counts_all_calls_of_a_run(tmp_path, service):
  score(tmp_path, [("a", "seven"), ("b", "seven")], budget=3)
  with pytest.raises(GraderError, match="budget of 3 calls is used up; raise reward.judge.budget"):
    score(tmp_path, [("a", "seven"), ("c", "seven"), ("d", "seven")], budget=3)
  assert len(service.log) == 3


def test_answers_are_judged_while_others_are_added(tmp_path, service):
  with Judge(JudgeConfig()) as made:
    function, = functions.read_functions(EXAMPLE)
    answer = {"response": "seven", "truth": ["7"], "tokens": [1], "entropies": None,
              "row": {"id": "a", "question": "a"}, "columns": {}, "step": 0}
    future = made.submit(function, [answer])
    deadline = time.monotonic() + 5
    while not future.done() and time.monotonic() < deadline:
      time.sleep(0.01)  # nobody waits for the future
    assert future.result() == [{"score": 1.0}]


def test_an_async_function_of_a_batch_needs_no_prefix(tmp_path, service):
  function = f"{pathlib.Path(__file__).parent}/rewards/trl.py:slow_reward"
  scores = score(tmp_path, [("a", "seven"), ("b", "eight")], function=function)
  np.testing.assert_array_equal(scores.reward, [0.5, 0.5])
