"""Bars and numbers of the pages."""

import pytest

from llmopt.evaluation.pages import measured, megabytes, segments


def test_segments_lie_one_behind_the_other_and_share_the_bar():
    first, second = segments({"b": 3, "a": 1, "c": 0}, ["a", "b", "c"], total=8)
    assert (first.name, first.colour, first.x, first.width) == ("a", "c0", 0, 125)
    assert (second.name, second.colour, second.x, second.width) == ("b", "c1", 125, 375)
    assert second.text == "3"


def test_a_colour_belongs_to_a_name_whatever_else_the_bar_has():
    names = [f"n{i}" for i in range(11)]
    assert [s.colour for s in segments({"n7": 1, "n8": 1, "n10": 1}, names, total=3)] == ["c7", "c8", "c8"]


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [("kl", 0.059_17, "0.0592"), ("top1", 0.850_586, "85.06%"), ("perplexity", 19.1666, "19.167")],
)
def test_metrics_are_written_as_people_read_them(metric, value, text):
    assert measured(metric, value) == text


def test_sizes_are_in_megabytes_or_gigabytes():
    assert (megabytes(138_228_391), megabytes(999), megabytes(3.2e9)) == ("138.2 MB", "0.0 MB", "3.20 GB")
