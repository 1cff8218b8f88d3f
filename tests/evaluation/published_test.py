"""Options and truths as benchmarks write them inside texts."""

import pytest

from ares_jax.evaluation.published import accepted_truths, options_in


@pytest.mark.parametrize("text, options", [
  ("Which? ()\nChoices:\nA:40°\nB:60°", ["40°", "60°"]),
  ("Is it? choice: (A) Yes (B) No", ["Yes", "No"]),
  ("Is it? choice:(A) A (B) B (C) both", ["A", "B", "both"]),
  ("From point A. The line B. is which? A. up; B. down", ["up", "down"]),
  ("A. 300, 400;B. 400, 300; C. neither", ["300, 400", "400, 300", "neither"]),
  ("Which? A) 10 B) 12", ["10", "12"]), ("Choices:\nA:\nB:", ["", ""]),
  ("Point A. What is its x?", []), ("Find AB.", []), ("", []), ("A. one C. three", []),
])
def test_options_stand_behind_letters_in_order(text, options):
  assert options_in(text) == options


@pytest.mark.parametrize("published, accepted", [
  (r"Area $=9 \pi \mathrm{cm}^{2}$", [r"Area =9 \pi \mathrm{cm}^{2}"]),
  ("Area $=113.097$ units $^{2}$", ["Area =113.097 units ^{2}"]), (r"$=(4,0)$", ["$(4,0)$"]),
  (r"=\frac{7}{4}", [r"\frac{7}{4}"]), (r"315^\circT", [r"315^\circ"]), ("329° T", ["329°"]),
  (r"{8}{5} \pi", [r"\frac{8}{5} \pi"]), ("C\nD", ["C, D"]),
  (r"$90^{\circ}$,$60^{\circ}$", [r"90^{\circ},60^{\circ}"]),
  ("35/4 (or fill in $$8.75$$)", ["35/4", "$$8.75$$"]), ("5 (or 6)", ["5", "6"]),
  ("30${}^\\circ $", [r"30^\circ"]),
  ("The area is $12$", ["12"]), ("12 cm² (approx.)", ["12 cm²"]), ("About $5.2$", ["5.2"]),
  (r"$\$20$", [r"\$20"]), ("The answer is unknown", []), ("about time", []), ("$=", []),
  ("x + y", []), ("$x$", []), ("$$x$$", []), ("$20", []), ("AT", []), ("Choose one (or none", []),
])
def test_a_truth_is_also_accepted_as_it_would_be_written(published, accepted):
  assert accepted_truths(published) == [published, *accepted]


@pytest.mark.parametrize("published, restored", [
  ("35掳", "35°"), ("118掳T", "118°T"), ("5Â°", "5°"), ("楼", "楼"), ("3楼", "3楼"), ("陆", "陆"),
  ("é", "é"), ("3厘米", "3厘米")])
def test_wrongly_decoded_signs_are_restored(published, restored):
  assert accepted_truths(published)[0] == restored
