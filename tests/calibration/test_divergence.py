"""The KL divergence of logits against the textbook formula in float64."""

import pytest
import torch

from llmopt.calibration.divergence import kl_divergence


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
