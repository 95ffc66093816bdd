"""Sums over blocks of logits against the textbook formulas in float64."""

import math

import pytest
import torch

from llmopt.evaluation.distance import Distance, kl_divergence, negative_log_likelihood


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(20, 300, generator=generator) * 4 + 30
    return source, source + torch.randn(20, 300, generator=generator) * 0.2


def naive_kl(source, engine):
    p, q = source.double().softmax(-1), engine.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


def test_kl_is_the_textbook_formula(logits):
    # Logits near 40 are known to 4e-6 in float32.
    torch.testing.assert_close(kl_divergence(*logits), naive_kl(*logits), rtol=1e-4, atol=1e-6)


def test_kl_of_equal_logits_is_exactly_zero(logits):
    source, _ = logits
    assert (kl_divergence(source, source.clone()) == 0).all()


def test_a_constant_added_to_all_logits_changes_nothing(logits):
    source, engine = logits
    torch.testing.assert_close(kl_divergence(source, engine + 8), kl_divergence(source, engine), rtol=1e-4, atol=1e-6)


def test_kl_survives_probabilities_that_vanish():
    source, engine = torch.tensor([[0.0, -300.0]]), torch.tensor([[-300.0, 0.0]])
    torch.testing.assert_close(kl_divergence(source, engine), torch.tensor([300.0], dtype=torch.float64))


def test_a_tiny_perturbation_has_the_kl_of_its_second_order_expansion():
    """KL is half the variance of the perturbation under p, to leading order."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(1, 5000, generator=generator)
    change = torch.randn(1, 5000, generator=generator) * 1e-2
    p = source.double().softmax(-1)
    variance = (p * change.double() ** 2).sum() - (p * change.double()).sum() ** 2
    torch.testing.assert_close(kl_divergence(source, source + change).sum(), variance / 2, rtol=2e-2, atol=0)


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
