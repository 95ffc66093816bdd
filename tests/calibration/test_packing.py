"""Documents packed into windows, against packing one token at a time."""

import pytest
import torch

from llmopt.calibration.packing import concatenated, padded
from llmopt.optimizer.errors import InputError

END = 9
DOCUMENTS = [[1, 2, 3], [4, 5, END], [], [6, 7, 8, 1, 2], [3]]


def joined(documents, *, windows, tokens, end=END, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return concatenated(documents, windows=windows, tokens=tokens, end=end, name="some.txt", generator=generator)


def test_documents_are_joined_with_one_end_of_text_and_cut():
    rows = joined(DOCUMENTS, windows=7, tokens=2)
    stream = [1, 2, 3, END, 4, 5, END, 6, 7, 8, 1, 2, END, 3, END]
    assert sorted(rows.tolist()) == sorted([stream[start : start + 2] for start in range(0, 14, 2)])
    assert rows.dtype == torch.int64


def test_without_an_end_of_text_token_documents_touch():
    assert joined([[1, 2, 3], [4]], windows=1, tokens=4, end=None).tolist() == [[1, 2, 3, 4]]


def test_the_seed_draws_windows_of_a_long_document():
    rows = [joined([list(range(100, 300))], windows=4, tokens=10, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert len(rows[0].flatten().unique()) == 40


def test_no_more_documents_are_asked_for_than_needed():
    asked = []
    rows = joined((asked.append(n) or [n] * 9 for n in range(1000)), windows=3, tokens=10)
    assert len(rows) == 3
    assert asked == [0, 1, 2]


@pytest.mark.parametrize(
    ("tokens", "hint"), [(2, "samples: 7 would fit"), (40, "fewer tokens")], ids=["too few windows", "not even one"]
)
def test_too_little_text_says_what_would_fit(tokens, hint):
    with pytest.raises(
        InputError, match=rf"some\.txt has 15 tokens, 8 samples of {tokens} tokens need {8 * tokens}"
    ) as c:
        joined(DOCUMENTS, windows=8, tokens=tokens)
    assert hint in c.value.hint


def test_padded_windows_hold_one_document_each():
    ids, lengths = padded(DOCUMENTS, windows=4, tokens=4, padding=0, name="some.txt")
    assert ids.tolist() == [[1, 2, 3, 0], [4, 5, END, 0], [6, 7, 8, 1], [3, 0, 0, 0]]
    assert lengths.tolist() == [3, 3, 4, 1]


def test_too_few_documents_say_what_would_fit():
    with pytest.raises(InputError, match=r"some\.txt has 4 documents with text, 5 samples need one each") as caught:
        padded(DOCUMENTS, windows=5, tokens=4, padding=0, name="some.txt")
    assert "samples: 4 would fit" in caught.value.hint


def test_no_text_at_all_is_said():
    with pytest.raises(InputError, match="has 0 tokens") as caught:
        joined([], windows=1, tokens=2)
    assert caught.value.hint == "it has no text"
