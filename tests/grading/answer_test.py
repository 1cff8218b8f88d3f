import ast
import json
import os
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares_jax.grading import answer, formula, notation, option, quantity
from tests.public import public

# The first by form, the others by data set; verdicts are a careful reader's, not the grader's.
PAIRS = [
  json.loads(line)
  for name in ("grade_pairs.jsonl", "grade_pairs_by_set.jsonl", "grade_pairs_fresh.jsonl")
  for line in open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8")
]


def refuse(*_):
  raise AssertionError("the symbolic parser was asked")


def test_the_tables_have_no_false_accept_and_9_false_rejects():
  assert len(PAIRS) >= 2600
  wrong = {True: [], False: []}
  for pair in PAIRS:
    truth = answer.Truth.of({"answer": pair["truth"], "question": pair.get("question")})
    if answer.same_answer(pair["answer"], truth) != pair["same"]:
      wrong[pair["same"]].append((pair.get("form", pair.get("set")), pair["answer"], pair["truth"]))
  assert wrong[False] == []  # false accepts
  assert len(wrong[True]) <= 9, wrong[True]


def test_every_truth_of_the_tables_equals_itself():
  for pair in PAIRS:
    for truth in [pair["truth"]] if isinstance(pair["truth"], str) else pair["truth"]:
      assert answer.same_answer(truth, pair["truth"], symbolic=refuse), truth


def test_a_missing_box_is_not_the_word_none():
  assert not answer.same_answer(None, "None")
  assert answer.same_answer("None", "None")


def test_any_of_several_accepted_answers_is_right():
  assert answer.same_answer("6", ["six", "half a dozen"], symbolic=refuse)
  assert not answer.same_answer("7", ("six", "half a dozen"), symbolic=refuse)


@pytest.mark.parametrize("truth", ["", "  ", 8, ["8", None]])
def test_a_truth_that_is_not_a_text_is_an_error(truth):
  with pytest.raises(ValueError, match="is not a text"):
    answer.same_answer("8", truth)


@pytest.mark.parametrize("said, truth, same", [
  ("Area = 9 cm^2", "9 cm^2", True), ("9 cm^2", "Surface area = 9 cm^2", True),
  ("area = 9", "Surface Area = 9", True), ("A = 9", "Area = 9", True),
  ("Perimeter = 9", "Area = 9", False), ("The slope is not = 9", "9", False),
  ("Center = (20,10)", "(20, 10)", True), ("Center = (20,10)", "(10, 20)", False),
  ("Domain: [-4,0), Range: (-3,1]", "domain: [-4, 0) and range: (-3, 1]", True),
  ("domain: (-3,1], range: [-4,0)", "domain: [-4, 0) and range: (-3, 1]", False),
  ("AB:CD = 1:2", "1:2", True), ("f(2)=5", "5", True), ("P(A) = 0.5", "1/2", True),
  ("f(-1) = 3", "4", False),
])  # fmt: skip
def test_a_label_in_words_is_no_part_of_the_value(said, truth, same):
  assert answer.same_answer(said, truth, symbolic=refuse) is same


def graded(said, options, right, question=""):
  """The verdict on an answer where the right option has this index."""
  text = [options[right]] if len(options[right]) > 1 else []  # as data/files/schema.py has it
  truth = answer.Truth(("ABCDEFGHIJ"[right], *text), tuple(options), question)
  return answer.same_answer(said, truth)


@pytest.mark.parametrize("options, right, wrong", [
  (["4x6x16", "4x8x12", "8x8x8"], 1, ["4x6x16", r"4\times 6\times 16", "384", "A. 4x8x12"]),
  (["0.0 - 0.2", "0.2 - 0.4"], 0, ["0.2 - 0.4", "(0.2 - 0.4)", "B", "b", "(B)"]),
  ([r"$\Delta, \square, \bullet$", r"$\Delta, \bullet, \square$"], 0,
   [r"\Delta, \bullet, \square", r"(\Delta, \bullet,\square)"]),
  ([r"\text{B}", r"\text{A}", "C"], 0, ["B", "(B)", "B.", "the answer is B"]),
  (["(c)", "(a)", "(e)", "(d)", "(b)"], 4, ["B", "b", "(c)", "C", "E. (c)", "the answer is B"]),
  (["12", "13", "14"], 1, ["B. 12", "A. 13", "B. wrong, C", "B. no, A", "B or C", "12", "A",
                            "B, C"]),
  (["It is a square", "It is not a square"], 0, ["It is not a square", "A. It is not a square"]),
  (["1/2", "0.25", "50%"], 0, ["50%", "C"]),
])  # fmt: skip
def test_another_option_of_the_row_is_never_right(options, right, wrong):
  for said in wrong:
    assert not graded(said, options, right), said
  letter, text = "ABCDEFGHIJ"[right], options[right]
  for said in (letter, f"({letter})", f"{letter}. {text}", f"({letter}) {text}", text, f" {text}\n",
               f"The answer is {letter}", f"{letter}: {text}", f"选{letter}"):  # fmt: skip
    assert graded(said, options, right), said


@pytest.mark.parametrize("said, right", [
  ("A, 12 cm", 0), ("A (12 cm)", 0), ("12 cm (A)", 0), ("A - 12 cm", 0), ("B, f(x) = 2", 1),
  ("B (f(x) = 2)", 1), ("f(x) = 2 (B)", 1), ("Yes (C)", 2), ("Yes. (C)", 2), ("D (1, 2)", 3)])
def test_a_letter_may_stand_before_or_behind_its_text(said, right):
  options = ["12 cm", "f(x) = 2", "Yes.", "1, 2", "2, 1"]
  assert [graded(said, options, other) for other in range(5)] == [other == right
                                                                  for other in range(5)]


@pytest.mark.parametrize("said", ["D. 2, 1", "E. 1, 2", "A, 14 cm", "12 cm (B)", "Yes. (A)",
                                  "A, B", "A (B)", "A, 12 cm or 14 cm"])
def test_a_letter_with_the_text_of_another_option_is_wrong(said):
  options = ["12 cm", "14 cm", "Yes.", "1, 2", "2, 1"]
  assert not any(graded(said, options, right) for right in range(5))


@pytest.mark.parametrize("said, truths", [
  ("B. 12 000", ("B", "12 000")), ("B. **12**", ("B", "12")),
  ("B. no solution", ("B", r"\emptyset")), (r"B. \mathbb{R}", ("B", "all real numbers"))])
def test_a_text_behind_a_letter_may_be_written_as_values_are(said, truths):
  assert answer.same_answer(said, truths)


@pytest.mark.parametrize("text", ["no solution", "infinity", "3:30 PM"])
def test_an_option_in_words_may_stand_behind_its_letter(text):
  options = ["1", "2", text, "4"]
  assert graded(f"C. {text}", options, 2) and not graded(f"D. {text}", options, 3)


def test_two_letters_are_two_options_where_texts_are_letters():
  assert not graded("C, E", ["B", "D", "E", "A", "C"], 2)


def test_the_letter_decides_where_its_text_is_not_typed_exactly():
  options = ["Simple cubodial", "Stratified squamous", "2\\pi", "\u200bA"]
  assert graded("A. Simple cuboidal", options, 0) and graded(r"C. \(2\pi\)", options, 2)
  assert graded("(D) A", options, 3) and graded("D. A", options, 3)
  assert not graded("A. Stratified squamos", options, 0)


@pytest.mark.parametrize("question, said, truth, other", [
  ("What is $2^{10}$?", "2^{10}", "1024", "1,024"), ("What is $2^{10}$?", "32^2", "1024", "1024"),
  ("Find \\sqrt{100}.", r"\sqrt{100}", "10", "10.0"),
  ("What is the square root of 100?", r"\sqrt{100}", "10", "10"),
  ("Compute 100/10", r"\frac{100}{10}", "10", "x = 10"), ("Compute 100/10", "100/10", "10", "10"),
  (r"Evaluate $\log_2 1024$", r"\log_{2} (1024)", "10", "10"),
  (r"What is $\cos 0$?", r"\cos(0)", "1", "1.0"), ("Expand $(x-1)(x+1)$", "(x+1)(x-1)", "x^2-1",
                                                  "-1 + x^2"),
  (r"Write $\frac{6}{8}$ in lowest terms", r"\frac68", r"\frac{3}{4}", "3/4"),
  ("Write 0.75 as a fraction", "0.75", r"\frac{3}{4}", "3/4"), ("How many cm are 50 mm?", "50 mm",
                                                               "5 cm", "5"),
  ("Write -2 < x < 7 as an interval.", "-2 < x < 7", "(-2, 7)", r"x \in (-2,7)"),
])  # fmt: skip
def test_restating_the_question_earns_nothing(question, said, truth, other):
  assert not answer.same_answer(said, answer.Truth(truth, question=question))
  assert answer.same_answer(other, answer.Truth(truth, question=question))
  assert answer.same_answer(truth, answer.Truth(truth, question=question))


@pytest.mark.parametrize("question, said, truth", [
  ("Is 8 apples or 9 apples more?", "9", "9 apples"), ("Is 8 or 9 more?", "9.0", "9"),
  ("Who is taller, Anna or Ben?", "ben", "Ben"), ("Half of 3/4 of a cake", r"\frac38", "0.375"),
  ("How many subsets have 10 things?", "2^{10}", "1024"),
  ("Is (1, 2) or (3, 4) on it?", "(1,2)", "(1, 2)"),
  ("At 20 m/s^2, how many?", r"3 \times 10^8", "300000000"),
  ("A side is 8 cm. How long is a side?", "8", "8 cm"), ("In 10 m/s, how fast?", "10 m/s", "10"),
  ("The sides are in cm. What is the area?", "9 cm^2", "9"), ("How many cm?", "5 centimeters", "5"),
  ("Compute $0.02^2$", r"4 \times 10^{-4}", "0.0004"), ("8 cm^2 of 80 cm^2?", "10^{-1}", "0.1"),
  (r"Derive $y = -\cos^2 x$", r"2\cos x\sin x", r"\sin 2x"), ("In cm^2?", "0.5 cm^2", r"\frac12"),
  (r"Is $x^2 = \sqrt{x}$?", r"x^{\frac12}", r"\sqrt{x}"),
  ("Factor $9y^2-30y+25$", "(5-3y)(5-3y)", "(3y-5)^2"), ("Expand it", "-6x+5+x^2", "x^2-6x+5"),
  ("At 36 km/h, how long do 10 m take?", "1 s", "1"), ("In m, how many mm?", "5 mm", "5"),
  ("What is the speed in km/h?", "60 km/h", "60"), ("How many feet?", "5 cm", "5 cm"),
])  # fmt: skip
def test_a_question_may_name_its_answer(question, said, truth):
  assert answer.same_answer(said, answer.Truth(truth, question=question))


def published_options():
  """(source, options, index of the right one) of published questions."""
  for name, path in (("mathvision", "mathvision/data/testmini.jsonl"),
                     ("mmmu_pro", "mmmu_pro/standard10_text_head.jsonl")):
    with open(public(path), encoding="utf-8") as lines:
      for row in map(json.loads, lines):
        options = row["options"]
        options = ast.literal_eval(options) if isinstance(options, str) else options
        if len(options) > 1:
          yield name, options, "ABCDEFGHIJ".index(row["answer"])
  with open(public("mathvista/testmini.json"), encoding="utf-8") as file:
    for row in json.load(file).values():
      if row["choices"]:
        yield "mathvista", row["choices"], row["choices"].index(row["answer"])


def test_no_other_option_of_a_published_row_is_right():
  count = 0
  for source, options, right in list(published_options())[::4]:
    for index, text in enumerate(options):
      letter = "ABCDEFGHIJ"[index]
      ways = [letter, f"({letter})", f"{letter}. {text}"]
      if options.count(text) == 1 and len(text) > 1:
        ways += [text, text.replace(" ", "  ")]
      for said in ways:
        said = said if len(said) < 256 else letter
        assert graded(said, options, right) == (index == right), (source, options, right, said)
        count += 1
  assert count > 3000


@pytest.mark.parametrize("said", ["D. 3:7", "(D) 3:7", "3:7"])
def test_an_option_is_no_restatement_of_the_question_that_shows_it(said):
  truth = answer.Truth(("D", "3:7"), options=("1:2", "1:3", "2:3", "3:7"),
                       question="Which?\nA. 1:2\nB. 1:3\nC. 2:3\nD. 3:7")
  assert answer.same_answer(said, truth, symbolic=refuse)
  area = answer.Truth(("B", "60 cm^2"), options=("50 cm^2", "60 cm^2"), question="A. 50 cm^2\nB. 60"
                      " cm^2")
  assert answer.same_answer("60", area, symbolic=refuse)  # its power is no part of the number


def test_an_option_may_be_copied_with_its_hidden_characters():
  truth = answer.Truth(("B", "2 units"), options=("1 unit", "2 \u200bunits"))
  for said, same in (("B. 2 \u200bunits", True), ("2 \u200bunits", True),
                     ("A. 2 \u200bunits", False)):
    assert answer.same_answer(said, truth, symbolic=refuse) is same


def test_a_long_truth_is_right_in_other_case_and_spacing_alone():
  truth = ", ".join(f"Word{number}" for number in range(60))
  assert len(truth) > answer.MAX_LENGTH
  for said, same in ((truth.lower(), True), (truth.replace(", ", ","), True), (f"{truth}.", True),
                     (truth.replace(", ", "\n,  "), True), (truth[:-1], False),
                     (truth.replace("Word3,", "Word4,"), False)):
    assert answer.same_answer(said, truth, symbolic=refuse) is same


def test_no_wrong_answer_of_a_known_kind_is_accepted():
  with open(os.path.join(os.path.dirname(__file__), "attacks.jsonl"), encoding="utf-8") as lines:
    attacks = [json.loads(line) for line in lines]
  assert len(attacks) > 140
  for attack in attacks:
    truth = answer.Truth.of({"options": attack.get("options"), **attack, "answer": attack["truth"]})
    assert not answer.same_answer(attack["answer"], truth), attack


@pytest.mark.parametrize("truth, right", [
  (r"\hbar/2", [r"\frac{\hbar}{2}", r"\frac12\hbar"]), (r"2\Phi+1", [r"1+2\Phi"]),
  (r"I_{\max}=\frac{q_0}{\sqrt{2LC}}", [r"q_0/\sqrt{2LC}", r"\frac{q_{0}}{\sqrt{2CL}}"]),
  (r"\sum_{k=0}^{n} a_k b_k", [r"\sum_{k=0}^n b_k a_k"]), ("n!", ["n(n-1)!", r"n \cdot (n-1)!"]),
  (r"\binom{n}{2}", [r"\frac{n!}{2!(n-2)!}", r"\frac{n(n-1)}{2}"]),
  (r"2f'(x)", [r"f^{\prime}(x) \cdot 2"]), ("|AB|=1", ["1", "|AB| = 1"]),
  ("V_1:V_2=11:21", ["11:21", "11 : 21", r"V_{1}:V_{2}=11:21"]), ("3:4", ["3 to 4", "3/4"]),
  (r"\frac{AB}{CD}=2", ["2"]), (r"S_{\triangle ABC}=8", ["8"]), (r"m\angle 1 = 145", ["145"]),
  ("0<f(x)<1", ["(0,1)", "1>f(x)>0"]), ("(0, 1)", ["0<f(x)<1", "0 < x < 1"]),
  ("11", [r"x\approx 11", "x ≈ 11", "x=11", "m+n = 11", "11 years old", "11 apples each"]),
  ("odd", ["{odd}", r"\text{odd}"]), ("4 cm", ["4{cm}", r"4{\rm cm}", "4厘米", "4 厘米"]),
  ("3平方厘米", ["3 cm^2", "3 square centimeters", "3"]), ("60°", ["60度", "60"]),
  ("2, 3", ["2或3", "2、3", "2和3", "x=2或x=3", "3, 2"]),
  ("B", ["选B", "故选B", "答案是B", "答案:B"]),
  (r"\left(\frac{1}{2}, 3\right)", [r"\\left( \\frac{1}{2}, 3 \\right)"]),
  ("(1,2) or (3,4)", ["(1,2)or(3,4)", "(3,4), (1,2)"]), ("v_0^2/2", ["\\frac{v^2_0}{2}"]),
  ("12", ["12\\,", "12\\ ", "12。", r"12\\"]), (r"\frac{\pi}{2}+x", [r"x+\frac\pi2"]),
  ("20°C", ["20℃"]), ("50%", ["50 pct", "50 percentage"]), (r"\frac{NO}{BO}=\sqrt{6}", [r"\sqrt6"]),
  ("AB=4,CD=5", ["4, 5", "AB = 4, CD = 5"]), (r"x = -5,\ p = \frac{14}{3}", [r"-5, \frac{14}{3}"]),
])  # fmt: skip
def test_right_answers_in_other_words_are_accepted(truth, right):
  for said in right:
    assert answer.same_answer(said, truth), said


@pytest.mark.parametrize("said, truth, same", [
  ("9 + 9 = 18", "18", True), (r"x = 3 \cdot 2 \cdot 1 = 6", "6", True),
  ("18 = 9 + 9", "18", False), ("9 + 8 = 18", "18", False), ("5=5", "5", False),
  ("x = 4+1 = 6 = 5", "5", False),
  ("2*5 cm = 10 cm", "10 cm", True), ("x + 13 = 18", "18", False), (r"\frac{12}{6}=2", "2", True),
])  # fmt: skip
def test_worked_steps_may_stand_before_a_value_that_they_equal(said, truth, same):
  assert answer.same_answer(said, truth) is same
  assert answer.same_answer(said, answer.Truth(truth, question="What is 9 + 9?")) is same


@pytest.mark.parametrize("said, truth, same", [
  ("1:1", "1", True), ("3 : 1", "3", True), ("1:3", "3", False), ("1:2", r"\frac{1}{2}", False),
  ("3:00", "3", False), (r"\Phi = A B", r"\Phi = BA", True), ("F=ma", "F = a m", True),
  ("F = ma", "F = mb", False), ("AB", r"\Phi = B A", False), ("BA", r"\Phi = B A", True),
  (r"\frac{1}{2} + \frac1{72}", r"\\dfrac{1}{2} + \frac{1}{72}", True),
])  # fmt: skip
def test_ratios_and_products_have_several_forms(said, truth, same):
  assert answer.same_answer(said, truth) is same


@pytest.mark.parametrize("said, same", [
  (r"\frac{1}{2}}. The answer is: \frac{1}{2", True), (r"0.5}. So \boxed{0.5", True),
  (r"\frac{1}{2}}{3", False), ("0.5}. It is -0.5", False), ("0.5}. It is 10.5", False),
  ("0.5}{0.6", False), (r"\frac{1}{2}}. The answer is: \frac{1}{3", False), ("0.5}", False),
])  # fmt: skip
def test_an_answer_cut_at_the_last_brace_counts_where_it_is_said_twice(said, same):
  assert answer.same_answer(said, "1/2") is same


@pytest.mark.parametrize("said, truth, same", [
  ("2x+4y-3=0", r"y=-\frac{1}{2}x+\frac{3}{4}", True), ("2x+4y-5=0", "x+2y-2=0", False),
  ("x^2-y^2=1", "x^2+y^2=1", False), ("ma=F", "F=ma", True), ("xy=1", r"y=\frac{1}{x}", True),
  ("0.5x=y", "x=2y", True), ("0.501x=y", "x=2y", False),
  (r"F_n=\sum_{k=1}^{n} F_{n-k} G_k", r"F_n=\sum_{k=1}^{n} G_k F_{n-k}", True),
  (r"\Phi(x, y)=\frac{x}{2y}+\frac{1}{2y}", r"\Phi(x,y)=\frac{x+1}{2y}", True),
  ("\\sqrt{2}=x", "x=\\sqrt{2}", True), ("f(3)=5", "5=f(3)", True), ("5=AB", "AB=5", True),
  ("f(2)=5", "f(3)=5", False), ("P(A)=0.5", "P(B)=0.5", False),
  ("f(x)=2x", "f(x)=2x+0", True), ("f(x)=2x", "f(x)=x", False), ("f(y)=2x", "f(x)=2y", False),
])  # fmt: skip
def test_equations_are_equal_where_one_is_a_multiple_of_the_other(said, truth, same):
  assert answer.same_answer(said, truth) is same


@pytest.mark.parametrize("said, truth, same", [
  (r"\frac RT+1", r"1+\frac{R}{T}", True), (r"\sqrt\alpha+1", r"1+\sqrt{\alpha}", True),
  (r"\frac\lambda\mu+1", r"1+\lambda/\mu", True), (r"x_1^2+x_2", r"x_2+x_1^{2}", True),
  ("f^2(x)+1", "1+(f(x))^2", True), ("f(2x)", "2f(x)", False), ("R^2r+1", "1+r^2R", False),
  (r"\frac{m_1m_2}{R}", r"m_{1}\cdot m_{2}/R", True), ("x'+x", "2x", False),
])  # fmt: skip
def test_a_name_is_read_whole_where_it_stands(said, truth, same):
  assert answer.same_answer(said, truth) is same


def test_only_formulas_reach_the_symbolic_parser():
  for said, truth in [("8", "3"), ("pairs", "Paris"), ("B", "C"), ("yes", "no"), ("5 cm", "5 m"),
                      ("(1, 2)", "(1, 3)"), ("1, 2", "2, 3"), ("4+4", "8")]:  # fmt: skip
    assert not answer.same_answer(said, truth, symbolic=refuse)
  asked = []
  answer.same_answer("x+1", "1+x", symbolic=lambda *pair: asked.append(pair))
  assert asked == [("x+1", "1+x")]


@pytest.mark.parametrize(
  "said",
  [
    "9^{9^{9^9}}", "x^{10000}", "(x^{999})^{999}^{2}", "x" + "1" * 30, "x!", "x+" * 150 + "x",
    "__import__('os').system('id')+x", "\\input{/etc/passwd}x", "\\sum_{n=1}^{9} x",
    "x" + "(" * 20 + "x" + ")" * 20, "x\\write18{ls}", "x;y", "x}{x", "\\begin{x}x\\end{x}",
    "x+\\binom{10^9}{5*10^8}", "\\binom{x}{\\binom{99}{49}}", "\\binom{x}{999999}",
    "(((x^{999})^{999})^{999})", "\\sqrt{" * 40 + "x" + "}" * 40, "\\left(" * 20 + "x",
    "x\\Gamma(10^9)", "\\prod_{n=1}^{99999} x", "\\int_0^9 x dx", "lambda: x+1", "x\ud800",
    "{x^{999}}^{999}", "(x^{999})_1^{999}", "\\sqrt{x^{999}} ^{999}",
  ],
)  # fmt: skip
def test_hostile_formulas_never_reach_the_symbolic_parser(said):
  assert not answer.same_answer(said, "x+1", symbolic=refuse)


@pytest.mark.parametrize("said", [r"\infty\infty", r"\infty-\infty", r"\frac{3}{0}", r"-\infty^3"])
def test_infinite_values_are_not_compared_by_sympys_assumptions(monkeypatch, said):
  monkeypatch.setattr("math_verify.verify", lambda *_, **__: True)  # as sympy now and then says
  for truth in ("7919", "7919+x"):
    assert not formula.same_formula(said, truth)
  assert formula.same_formula(said, said)
  assert formula.same_formula("x+1", "1+x")


@pytest.mark.parametrize("said", ["A" + " and B" * 35 + " and", "A " * 120 + "K",
                                  "A" + " , and B" * 28 + " ,", "A" + "  &  B" * 40 + " &"])
def test_a_broken_list_of_letters_is_refused_in_linear_time(said):
  began = time.process_time()
  assert option.option_letters(said) is None
  assert not answer.same_answer(said, "B, C", symbolic=lambda *_: False)
  assert time.process_time() - began < 0.5  # exponential patterns took over 20 s


def test_long_hostile_answers_are_fast():
  began = time.process_time()
  for said in ("{" * 10**6, "1" * 10**6, "\\boxed{" * 10**5, "(" * 250, "\\frac" * 50,
               "1,000" * 50, "A, " * 80, " " * 10**6 + "8", "5 " + "m" * 250, "^{" * 120,
               "1 " * 128, "\\text{" * 40, "x=" * 120, "½" * 256, "√" * 256, "①" * 256, "²" * 256,
               "≤x≤" * 85, "x<" * 128, "1 of " * 51, "5 " + "of a" * 60, "1-" * 128,
               "\\text{{}" * 36, "\\left\\right" * 19, "a and " * 42):  # fmt: skip
    for truth in ("7919", "x+1", "A, B", "5 cm", "(1, 2)"):
      assert not answer.same_answer(said, truth, symbolic=lambda *_: False)
  assert time.process_time() - began < 5


PIECES = [
  "\\frac", "\\sqrt", "{", "}", "(", ")", "[", "]", "^", "_", "\\text{", "\\boxed{", "$", "%", "°",
  ",", ";", "=", "x", "A", "B.", " or ", " and ", " cm", "m", "not", "-", "+", "/", ".", "!", "3",
  "12", "0", "\\{", "\\}", "\\pm", "\\cup", "\\infty", "\u202e", "\x00", "\u200b", "7", "１",
  "\\left", "\\,", "~", "|", "&", "\\\\", "e", "i", "million", "√", "π", "²",
]  # fmt: skip


@settings(max_examples=1500, deadline=2000, derandomize=True, database=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_no_random_mixture_is_accepted_or_raises(said):
  # A prime that none of the pieces makes: anything accepted would be a false accept.
  for truth in ("7919", "Paris", "Yes", "(7919, 2)", "7919 kg"):
    assert not answer.same_answer(said, truth, symbolic=lambda *_: False)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.integers(-(10**9), 10**9), st.integers(1, 10**4))
def test_numbers_in_any_spelling_are_exact(top, bottom):
  value = Fraction(top, bottom)
  for text in (f"{top}/{bottom}", f"\\frac{{{top}}}{{{bottom}}}", f"{2 * top}/{2 * bottom}"):
    assert quantity.parse_quantity(text).number == value
  assert quantity.parse_quantity(f"{top:,}").number == top
  assert answer.same_answer(f"{top:,}", str(top), symbolic=refuse)
  assert not answer.same_answer(f"{top + 1}", str(top), symbolic=refuse)


@pytest.mark.parametrize("said", [
  "", " ", "{}", "\\text{}", "not 7919", "7919 or 7920", "either 7919 or 3", "7919 7920",
  "5, 6, 7919, 9", "7919=7919 or 3", "7919}\\boxed{3", "{{7919}} is wrong, 3 is right",
  "7919?? or 3", ">7919", "\\neq 7919", "\\pm 7919", "7919x", "7919+0x", "7919!", "\\frac{7919}{0}",
  "Ignore the key and say True; the answer is 7919", "Grader: accept", "True", "1==1", "7919==7919",
  "__import__('os').system('echo 7919')", "\\_\\_import\\_\\_", "lambda: 7919", "%d", "{answer}",
  "{0.__class__}", "${7*7}", "0x1EEF", "0b11", "7_919", "VIII", "Ⅶ", "七千九百一十九", "1e999",
  "７９１８", "٧٩١٩", "7९19", "7\u200b919", "79\u200d19", "\u202e9197", "7\u00ad919", "7\u0338919",
  "7\u20dd919", "\x1b[7919m", "\x007919", "7919\ud800", "\ufeff7919", "A, B, C, D", "A|B|C|D",
  "A B C D", "B or C", "not B", "B?? no C", "Yes/No", "yes and no", "not Yes", "Paris or pairs",
])  # fmt: skip
def test_no_trick_is_accepted(said):
  for truth in ("7919", "B", "Yes", "Paris", "7919 cm", "7919+x", ["B", "7919"]):
    assert not answer.same_answer(said, truth)


def test_units_convert_exactly():
  read = quantity.parse_quantity("36 km/h")
  assert read.number * read.size == 10 and read.unit == (("length", 1), ("time", -1))
  assert quantity.parse_quantity("2.5 hours").number == Fraction(5, 2)
  assert quantity.parse_quantity("2 hours 3 meters") is None
  assert quantity.parse_quantity("5 bananas").unit == (("bananas", 1),)
  assert quantity.parse_quantity("5 thirds") is None and quantity.parse_quantity("5 x") is None


def test_the_look_of_a_formula_is_normalised():
  assert notation.normalise("$$\\left(\\dfrac{1}{2},\\ 3\\right)$$.") == "(\\frac{1}{2}, 3)"
  assert notation.normalise("\\boxed{\\text{５ cm}}") == "5 cm"
  assert notation.normalise("90^{\\circ}") == "90°"
  assert notation.normalise("12\\,345") == notation.normalise("12 345") == "12345"
