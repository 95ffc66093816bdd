"""The picture of auto_bits' table: points, bars, and which row was taken."""

import pytest

from llmopt.evaluation.choices import choices_of

TABLE = [
    {"bits": 4.25, "kl": 0.3, "shares": {"W4A16 g64": 1.0}},
    {"bits": 4.5, "kl": 0.2, "shares": {"W4A16 g64": 0.75, "W8A16": 0.25}, "chosen": True},
    {"bits": 8.0, "kl": 0.0, "shares": {"W8A16": 1.0}},
]


def test_every_row_is_a_point_and_a_bar_and_the_one_taken_stands_out() -> None:
    found = choices_of(TABLE)
    assert [mark.colour for _, _, mark in found.plot.points] == ["c0", "c4", "c0"]
    xs, ys = zip(*(point[:2] for point in found.plot.points), strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # downwards is less
    assert [row.is_taken for row in found.rows] == [False, True, False]
    assert [row.spent for row in found.rows] == ["4.250", "4.500", "8.000"]
    assert [[piece.width for piece in row.bar] for row in found.rows] == [[1000], [750, 250], [1000]]


def test_a_scheme_has_one_colour_in_all_bars() -> None:
    found = choices_of(TABLE)
    assert found.rows[1].bar[1].colour == found.rows[2].bar[0].colour == found.legend[1].colour
    assert [piece.name for piece in found.legend] == ["W4A16 g64", "W8A16"]


@pytest.mark.parametrize(
    ("kind", "value", "words"), [("bytes", 101_500_000, "101.500"), ("milliseconds", 3.25, "3.250")]
)
def test_other_budgets_have_units_of_their_own(kind: str, value: float, words: str) -> None:
    found = choices_of([{kind: value, "kl": 0.1, "shares": {"W8A16": 1.0}, "chosen": True}])
    assert found.rows[0].spent == words
