"""Windows of text and where their text ends."""

import torch

from llmopt.optimizer.tokens import SAMPLED, Tokens

IDS = torch.arange(6).reshape(2, 3)


def test_windows_without_lengths_are_full() -> None:
    text = Tokens("some.txt", IDS, "d")
    assert text.mask.tolist() == [[True] * 3] * 2
    assert text.count == 6


def test_the_mask_ends_where_the_text_of_a_window_ends() -> None:
    text = Tokens("some.txt", IDS, "d", lengths=torch.tensor([2, 3]))
    assert text.mask.tolist() == [[True, True, False], [True, True, True]]
    assert text.count == 5


def test_sampled_text_is_known_by_its_name() -> None:
    assert Tokens(SAMPLED, IDS, "d").is_sampled
    assert not Tokens("some.txt", IDS, "d").is_sampled
