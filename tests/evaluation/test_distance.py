"""Sums over blocks of logits against the textbook formulas in float64."""

import math

import pytest
import torch

from llmopt.evaluation.distance import Distance, negative_log_likelihood


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(20, 300, generator=generator) * 4 + 30
    return source, source + torch.randn(20, 300, generator=generator) * 0.2


def test_likelihood_is_cross_entropy(logits):
    source, _ = logits
    ids = torch.arange(20)
    expected = torch.nn.functional.cross_entropy(source.double(), ids, reduction="none")
    torch.testing.assert_close(negative_log_likelihood(source, ids), expected, rtol=1e-5, atol=1e-5)


def test_blocks_sum_to_the_whole(logits):
    source, engine = logits
    ids = torch.arange(19)
    whole, parts = Distance(), Distance()
    whole.add(source, engine, ids)
    parts.add(source[:7], engine[:7], ids[:7])
    parts.add(source[7:], engine[7:], ids[7:])
    assert (parts.positions, parts.targets, parts.agreements) == (20, 19, whole.agreements)
    assert parts.mean_kl == pytest.approx(whole.mean_kl, rel=1e-12)
    assert parts.perplexities == pytest.approx(whole.perplexities, rel=1e-12)
    assert parts.largest == whole.largest == float((source - engine).abs().max())


def test_agreement_and_perplexity_count_what_they_say():
    source = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 1.0]])
    engine = torch.tensor([[3.0, 1.0], [2.0, 1.0], [2.0, 1.0], [0.0, 0.0]])
    distance = Distance()
    distance.add(source, engine, torch.tensor([0, 0, 0]))
    assert distance.top1 == 0.75
    right, wrong = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    assert distance.perplexities[1] == pytest.approx(math.exp((2 * right + wrong) / 3))
