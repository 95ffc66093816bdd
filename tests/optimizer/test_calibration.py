"""The ``calibration:`` of a recipe, checked before anything is read."""

import pytest
from pydantic import ValidationError

from llmopt.optimizer.calibration import Calibration, form_of


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.txt", "text"), ("wiki.valid.tokens", "text"), ("a", "text"), ("a.JSONL", "jsonl"), ("b/a.parquet", "parquet")],
)
def test_the_suffix_says_what_a_file_is(name, form):
    assert form_of(name) == form


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": "a.json"}, "cannot be told from its suffix"),
        ({"source": "org/name@abc", "file": "a.csv"}, "cannot be told from its suffix"),
        ({"packing": "pad"}, "packing is about a source"),
        ({"field": "messages"}, "field is about a source"),
        ({"source": "a.txt", "split": "train"}, "for a data set of the hub"),
        ({"source": "org/name@abc", "split": "train", "file": "a.txt"}, "give one of them"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        Calibration(**options)


def test_a_format_counts_more_than_the_suffix():
    assert Calibration(source="a.json", format="jsonl").format == "jsonl"


def test_a_data_set_has_a_revision():
    assert Calibration(source="org/name@abc").is_dataset
    assert not Calibration(source="data/chat.jsonl").is_dataset
    assert not Calibration().is_dataset
