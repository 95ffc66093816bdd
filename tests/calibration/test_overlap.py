"""A build is not judged on text it was made with."""

import pytest
import torch

from llmopt.calibration.overlap import _hashed, check_disjoint
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.tokens import SAMPLED, Tokens


def text(name, ids, digest=None, lengths=None):
    return Tokens(name, ids, digest or name, lengths)


@pytest.fixture
def random():
    """Windows of tokens nobody else has."""
    generator = torch.Generator().manual_seed(0)
    return lambda windows=3, tokens=100: torch.randint(0, 50000, (windows, tokens), generator=generator)


def check(calibration, *evaluation):
    check_disjoint(calibration, evaluation, decode=lambda ids: " ".join(map(str, ids)))


def test_other_text_is_fine(random):
    check(text("a.txt", random()), text("b.txt", random()), text("c.txt", random(2, 20)))


def test_the_same_file_is_refused_by_both_names(random):
    with pytest.raises(InputError, match=r"text a\.txt and the evaluation text copy/of/a\.txt are the same file") as c:
        check(text("a.txt", random(), "d"), text("copy/of/a.txt", random(), "d"))
    assert "looks better than it is" in c.value.hint


def test_a_shared_run_of_32_tokens_is_refused_wherever_it_lies(random):
    first, second = random(), random()
    second[2, 40:72] = first[1, 7:39]
    with pytest.raises(InputError, match="share 1 runs of 32 tokens") as caught:
        check(text("a.txt", first), text("b.txt", second))
    assert " ".join(map(str, first[1, 7:39].tolist())) in caught.value.message
    second[2, 71] = 50001
    check(text("a.txt", first), text("b.txt", second))


def test_runs_across_two_windows_are_no_text(random):
    first, second = random(2, 40), random(1, 40)
    second[0, :32] = torch.cat([first[0, -16:], first[1, :16]])
    check(text("a.txt", first), text("b.txt", second))


def test_padding_is_no_text(random):
    first, second = random(), random()
    second[:, 50:] = first[:, 50:] = torch.arange(50)
    full = (text("a.txt", first), text("b.txt", second))
    with pytest.raises(InputError, match="share"):
        check(*full)
    check(text("a.txt", first, lengths=torch.tensor([50, 81, 20])), full[1])


def test_rules_and_white_space_are_no_text(random):
    first, second = random(), random()
    second[0] = first[0] = torch.arange(100) % 11
    check(text("a.txt", first), text("b.txt", second))
    second[0] = first[0] = torch.arange(100) % 12
    with pytest.raises(InputError, match="share"):
        check(text("a.txt", first), text("b.txt", second))


def test_sampled_texts_are_apart_by_their_seeds(random):
    ids = random()
    check(text(SAMPLED, ids, "1"), text(SAMPLED, ids, "2"), text("b.txt", ids))
    check(text("b.txt", ids), text(SAMPLED, ids, "2"))


def test_hashes_are_equal_for_equal_runs_only():
    generator = torch.Generator().manual_seed(0)
    runs = torch.randint(0, 4, (20000, 32), generator=generator)
    runs = torch.cat([runs, runs])
    hashes, _ = _hashed(runs)
    assert torch.equal(hashes[:20000], hashes[20000:])
    assert len(set(hashes.tolist())) == 20000
