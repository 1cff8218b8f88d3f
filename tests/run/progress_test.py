import io

from ares_jax.run import progress as progress_lib


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_progress_shows_the_time_left_of_a_resumed_stage():
  clock, stream = Clock(), io.StringIO()
  progress = progress_lib.Progress(100, "aepo", start=40, stream=stream, clock=clock)
  progress.update(40)
  clock.now = 20.0
  progress.update(50, "accuracy 0.61")  # 10 steps in 20 s, 50 to go
  assert stream.getvalue() == "aepo 40/100\naepo 50/100 2.00 s/step, 1m40s left  accuracy 0.61\n"


def test_the_first_step_compiles_and_does_not_count_later():
  clock, stream = Clock(), io.StringIO()
  progress = progress_lib.Progress(10, "aepo", stream=stream, clock=clock, every=0.0)
  for clock.now, step in ((30.0, 1), (31.0, 2), (32.0, 3)):
    progress.update(step)
  lines = stream.getvalue().splitlines()
  assert "30.00 s/step" in lines[0]
  assert "1.00 s/step, 0m08s left" in lines[1] and "1.00 s/step, 0m07s left" in lines[2]


def test_plain_lines_come_every_ten_seconds_and_at_the_end():
  clock, stream = Clock(), io.StringIO()
  progress = progress_lib.Progress(30, "aepo", stream=stream, clock=clock)
  for step in range(1, 31):
    clock.now = float(step)
    progress.update(step)
  assert [line.split()[1] for line in stream.getvalue().splitlines()] == [
    "1/30", "11/30", "21/30", "30/30"
  ]  # fmt: skip


def test_on_a_terminal_progress_is_one_line():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream, clock = Terminal(), Clock()
  progress = progress_lib.Progress(2, "aepo", stream=stream, clock=clock)
  clock.now = 7200.0
  progress.update(1)
  progress.update(2)
  progress.close()
  text = stream.getvalue()
  assert text.count("\n") == 1 and text.endswith("\n") and "2h00m left" in text
  assert "[##########..........] aepo 1/2" in text
