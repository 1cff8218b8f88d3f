from ares_jax.system import tables


def test_columns_are_aligned():
  assert tables.text_table(["arm", "n"], [["a", 10], ["long name", 2]]).split("\n") == [
    "arm         n", "a          10", "long name   2"]


def test_a_markdown_table_reads_as_text_too():
  assert tables.markdown_table(["", "n"], [["a", 10], ["long name", 2]]) == [
    "|           | n   |", "| ---       | --- |", "| a         | 10  |", "| long name | 2   |"]


def test_numbers_have_significant_digits_and_none_is_a_dash():
  assert [tables.format_number(value) for value in (0.12345, 1234.5, None)] == [
    "0.123", "1.23e+03", "-"]
