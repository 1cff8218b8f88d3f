import collections
import dataclasses
import re

import numpy as np
import pytest

from ares_jax.data import digits, digits_teacher

PROBLEM = digits.DigitsConfig(rows=2, columns=2, levels=5, operators=("+",), noise=0.02)
TEACHER = digits_teacher.TeacherConfig(slip=0.2, responses=3, first_level=(1.0, 0.0, 0.0),
                               last_level=(0.0, 0.0, 1.0), first_warmup=(0.2, 0.7, 0.1),
                               last_warmup=(0.0, 0.0, 1.0), captions=(0.6, 0.0),
                               drills=(0.8, 0.0))


def source(split="train", seed=0, **changes):
  config = digits.DigitsConfig(**{**PROBLEM.__dict__, **changes})
  return digits.DigitsSource(config, split, seed, 500)


def test_answer_is_the_chain_modulo_ten():
  assert digits.partial_sums([7, 8, 9], ["+", "+", "+"]) == [7, 5, 4]
  assert digits.partial_sums([2, 8, 9], ["+", "-", "+"]) == [2, 4, 3]
  assert digits.question(["red", "blue"], ["+", "-"]) == "Compute red - blue, modulo 10"


def test_rows_are_a_function_of_seed_and_index():
  first, again = source()[17], source()[17]
  np.testing.assert_array_equal(first.pop("images"), again.pop("images"))
  assert first == again
  assert source(seed=1)[17]["digits"] != first["digits"]


def test_levels_come_in_equal_numbers_and_answers_are_near_uniform():
  rows = [source()[index] for index in range(500)]
  assert np.bincount([row["level"] for row in rows]).tolist() == [0] + [100] * 5
  counts = np.bincount([int(row["answer"]) for row in rows], minlength=10)
  assert counts.min() >= 25  # 50 each on average, s.d. 7


def test_colours_name_the_cells_that_show_their_digits():
  row = source(noise=0.0)[3]
  for cell, (name, digit) in enumerate(row["cells"]):
    top, left = 28 * (cell // 2), 28 * (cell % 2)
    patch = row["images"][0][top : top + 28, left : left + 28]
    assert tuple(patch[0, 0]) == digits.COLOURS[name]
    ink = (patch[2:-2:3, 2:-2:3].astype(float) - digits.COLOURS[name]) / (
      255 - np.array(digits.COLOURS[name]))
    drawn = np.round(ink.mean(-1) * 16)
    assert any(np.abs(drawn - image).max() <= 1 for image in digits.handwriting("train")[digit])


def test_handwriting_is_split_by_image():
  train, test = digits.handwriting("train"), digits.handwriting("test")
  assert sum(map(len, train)) + sum(map(len, test)) == 1797
  assert sum(map(len, test)) == 359
  seen = {image.tobytes() for pool in train for image in pool}
  assert not any(image.tobytes() in seen for pool in test for image in pool)


def test_traces_have_their_lengths_and_end_in_the_answer():
  row, rng = source()[4], np.random.default_rng(0)
  texts = {kind: digits_teacher.trace(row, kind, slip=0.0, rng=rng) for kind in digits.KINDS}
  assert all(digits.DigitsSource.mode_of(text) == kind for kind, text in texts.items())
  assert texts["direct"] == f"<think> </think> \\boxed{{{row['answer']}}}"
  assert len(texts["direct"]) < len(texts["stepwise"]) < len(texts["check"])
  assert texts["check"].count("wait check") == 1
  for text in texts.values():
    assert text.endswith(f"\\boxed{{{row['answer']}}}")


def test_slips_are_corrected():
  row = source()[4]
  text = digits_teacher.trace(row, "stepwise", slip=1.0, rng=np.random.default_rng(0))
  assert text.count(" wait") == 4  # every partial sum of a chain of five
  sums = digits.partial_sums(row["digits"], row["operators"])
  for number, step in zip(sums[1:], text.split(" wait")[1:], strict=True):
    assert step.startswith(str(number))


def test_tokenizer_gives_texts_back():
  tokenizer, rng = digits.tokenizer(), np.random.default_rng(0)
  rows = [source(operators=("+", "-"))[index] for index in range(30)]
  texts = [digits_teacher.trace(row, kind, slip=0.3, rng=rng)
           for row in rows for kind in digits.KINDS]
  texts += [row["question"] for row in rows]
  texts += [digits_teacher.caption(row, rng, varied=True)[1] for row in rows]
  for text in texts:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
  assert tokenizer("a zebra")["input_ids"] == [tokenizer.unk_token_id] * 2


def test_teacher_writes_longer_traces_at_higher_levels():
  rows = digits_teacher.Teacher(source(), TEACHER)
  assert all("> </think>" in text for text in rows[0]["responses"])  # level 1: direct
  assert all("wait check" in text for text in rows[4]["responses"])  # level 5: check


def test_captions_and_drills_become_fewer_and_traces_more():
  warmup = digits_teacher.WarmupSource(source(), TEACHER)
  rows = [warmup[index] for index in range(len(warmup))]
  described = np.array([row["question"] == "Describe" for row in rows])
  assert 0.45 < described[:100].mean() < 0.65 and described[-100:].mean() < 0.15
  drilled = np.array([not row["images"] for row in rows])  # .8 of the .4 that are no captions
  assert 0.2 < drilled[:100].mean() < 0.45 and drilled[-100:].mean() < 0.2
  assert not (described & drilled).any()
  assert all(row["response"].startswith("<think>") for row in rows)


def test_the_warmup_may_begin_with_captions_and_drills_without_copies():
  warmup = digits_teacher.WarmupSource(
    smudged(), dataclasses.replace(TEACHER, first_drills=0.1, first_captions=0.1, varied=True))
  for row in map(warmup.__getitem__, range(50)):
    assert row["images"][0].shape == (56, 56, 3) and "check" not in row["question"]
    assert re.fullmatch(r"Describe.*|Compute [a-z]+, modulo 10", row["question"])
  for row in map(warmup.__getitem__, range(50, 100)):
    assert not row["images"] and "check" not in row["question"] and row["response"].count("=") >= 7
  assert len({warmup[index]["question"] for index in range(50)}) > 20  # varied: not "Describe"
  # Later rows are those without them.
  other_teacher = dataclasses.replace(TEACHER, varied=True)
  for index in range(100, 120):
    row, other = warmup[index], digits_teacher.WarmupSource(smudged(), other_teacher)[index]
    assert row["response"] == other["response"] and row["smudges"] == other["smudges"]


def test_the_warmup_may_have_its_own_share_of_smudged_cells_at_every_level():
  warmup = digits_teacher.WarmupSource(
    smudged(), dataclasses.replace(TEACHER, warmup_smudge=0.8))
  rows = [warmup[index] for index in range(200)]
  for level in (1, 8):
    share = np.mean([len(row["smudges"]) / 4 for row in rows if row["level"] == level])
    assert 0.65 < share < 0.95
  assert all(row["smudges"].keys() <= dict(row["cells"]).keys() for row in rows)


def test_a_drill_has_its_digits_in_the_question_and_their_sums_in_the_response():
  rows, rng = source(operators=("+", "-")), np.random.default_rng(0)
  for row in (rows[index] for index in range(20)):
    text, response = digits_teacher.drill(row, rows.config, 0.0, rng, varied=True)
    terms = re.findall(r"([+-]|Compute) ([a-z]+)(\d)", text)
    assert len(terms) == 5  # the longest chain
    known = {name: digit for _, name, digit in terms}
    assert known.keys() <= dict(row["cells"]).keys()
    assert all(known[name] == digit for _, name, digit in terms)
    total = sum(-int(digit) if sign == "-" else int(digit) for sign, _, digit in terms) % 10
    assert response.endswith(f"\\boxed{{{total}}}") and response.count("=") == 4
    assert text.endswith(", modulo 10")


def test_about_half_of_the_drills_have_small_digits_alone_and_some_have_all():
  rows, rng = source(), np.random.default_rng(0)
  texts = [digits_teacher.drill(rows[index], rows.config, 0.0, rng, varied=True)[0]
           for index in range(300)]
  largest = [max(re.findall(r"[a-z](\d)", text)) for text in texts]
  assert 0.4 < np.mean([digit < "4" for digit in largest]) < 0.56 and "9" in largest


def smudged(**changes):
  return source(levels=8, operators=("+", "-"), noise=0.0, smudge=0.5, **changes)


def test_harder_problems_have_more_smudged_cells_and_easy_ones_none():
  rows = [smudged()[index] for index in range(500)]
  shares = [np.mean([len(row["smudges"]) / 4 for row in rows if row["level"] == level])
            for level in (1, 4, 8)]
  assert shares[0] == 0 and abs(shares[1] - 0.5 * 3 / 7) < 0.1 and abs(shares[2] - 0.5) < 0.1
  for row in rows:
    cells = dict(row["cells"])
    assert all(cells[colour] != other for colour, other in row["smudges"].items())


def test_below_the_cells_is_a_framed_copy_in_cipher():
  row = smudged()[7]
  assert row["question"].endswith(f"check{row['key']}")
  assert row["images"][0].shape == (112, 56, 3)
  for cell, (name, digit) in enumerate(row["cells"]):
    top, left = 56 + 28 * (cell // 2), 28 * (cell % 2)
    patch = row["images"][0][top : top + 28, left : left + 28]
    assert (patch[[0, -1]] == 255).all() and (patch[:, [0, -1]] == 255).all()
    ink = (patch[2:-2:3, 2:-2:3].astype(float) - digits.COLOURS[name]) / (
      255 - np.array(digits.COLOURS[name]))
    shown = digits.handwriting("train")[(digit + row["key"]) % 10]
    assert any(np.abs(np.round(ink.mean(-1) * 16) - image).max() <= 1 for image in shown)


def test_the_keys_of_the_cipher_can_be_chosen():
  assert {smudged(keys=(3, 7))[index]["key"] for index in range(50)} == {3, 7}


def test_a_smudged_cell_shows_two_digits_over_each_other():
  row = next(row for row in map(smudged().__getitem__, range(7, 100, 8)) if row["smudges"])
  colour, other = next(iter(row["smudges"].items()))
  cell = [name for name, _ in row["cells"]].index(colour)
  top, left = 28 * (cell // 2), 28 * (cell % 2)
  patch = row["images"][0][top : top + 28, left : left + 28][2:-2:3, 2:-2:3].astype(float)
  ink = ((patch - digits.COLOURS[colour]) / (255 - np.array(digits.COLOURS[colour]))).mean(-1) * 16
  pools = digits.handwriting("train")
  left_over = 2 * ink - pools[dict(row["cells"])[colour]]  # [writers, 8, 8]: the other digit
  nearest = min(np.abs(image - rest).max() for rest in left_over for image in pools[other])
  assert nearest < 0.5  # of 16 grey levels; rounding to 8 bits


def test_the_first_pass_guesses_smudged_cells_and_the_second_reads_the_copies():
  rng, guesses = np.random.default_rng(0), []
  for row in map(smudged().__getitem__, range(7, 500, 8)):
    text = digits_teacher.trace(row, "check", slip=0.0, rng=rng)
    first, _, second = text.partition(" wait check")
    cells = dict(row["cells"])
    for colour, digit in re.findall(r"([a-z]+)(\d)", first):
      assert int(digit) in (cells[colour], row["smudges"].get(colour))
      if colour in row["smudges"]:
        guesses.append(int(digit) == cells[colour])
    assert all(int(shown) == (cells[colour] + row["key"]) % 10 and int(read) == cells[colour]
               for colour, shown, read in re.findall(r"([a-z]+)(\d) =(\d)", second))
    assert second.endswith(f"\\boxed{{{row['answer']}}}")
  assert 0.4 < np.mean(guesses) < 0.6


def test_an_answer_at_first_look_may_be_wrong_and_follows_its_working():
  rng, right = np.random.default_rng(0), []
  for row in map(smudged().__getitem__, range(7, 500, 8)):
    text = digits_teacher.trace(row, "stepwise", slip=0.0, rng=rng)
    assert re.search(r"=(\d) </think> \\boxed\{(\d)\}", text).expand(r"\1") == text[-2]
    right.append(text[-2] == row["answer"])
  assert 0.2 < np.mean(right) < 0.8


def test_captions_are_of_three_kinds():
  row, rng, kinds, orders = source()[3], np.random.default_rng(0), collections.Counter(), set()
  for _ in range(60):
    text, response = digits_teacher.caption(row, rng, varied=True)
    read = re.findall(r"([a-z]+)(\d)", response)
    if text.startswith("Compute"):
      digit = dict(row["cells"])[text.split()[1].strip(",")]
      assert response == f"<think> </think> \\boxed{{{digit}}}"
    else:
      assert {(name, int(digit)) for name, digit in read} == set(row["cells"])
      assert text in ("Describe", "Describe " + " + ".join(name for name, _ in read))
      orders.add(tuple(read))
    kinds[text.split()[0] + " in order" * ("+" in text)] += 1
  assert len(kinds) == 3 and min(kinds.values()) > 10 and len(orders) > 10


def test_drills_and_captions_of_a_problem_with_copies_have_both_passes():
  rng = np.random.default_rng(0)
  tokenizer, row, drills = digits.tokenizer(), smudged()[7], []
  for _ in range(20):
    text, response = digits_teacher.caption(row, rng, varied=True)
    assert text.endswith(f" check{row['key']}")
    assert response.count(" =") == len(row["cells"]) * text.startswith("Describe")
  for _ in range(20):
    text, response = digits_teacher.drill(row, smudged().config, 0.0, rng, varied=True)
    assert ("check" in text) == ("wait check" in response)
    assert tokenizer.decode(tokenizer(response)["input_ids"]) == response
    drills.append("check" in text)
  assert 0 < sum(drills) < 20


@pytest.mark.parametrize("changes, word", [
  ({"rows": 3, "columns": 3}, "colours"), ({"levels": 9}, "levels"),
  ({"operators": ("*",)}, "operators"), ({"smudge": 1.5}, "smudge"),
  ({"keys": ()}, "keys"), ({"keys": (10,)}, "keys"),
])
def test_a_config_that_cannot_be_drawn_is_refused(changes, word):
  with pytest.raises(ValueError, match=word):
    source(**changes)
