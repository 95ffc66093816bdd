"""Moments of inputs: the weighted sums, token by token."""

import pytest
import torch

from llmopt.calibration import hessian as module
from llmopt.calibration.hessian import Moments

ROWS = torch.randn(37, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 37)[:, None]


@pytest.mark.parametrize(("weighting", "power"), [("none", 0), ("inverse_norm", 1), ("unit_norm", 2)])
def test_a_token_counts_by_its_norm(weighting, power, monkeypatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 5)
    exact = ROWS + 0.1
    moments = Moments(12, weighting=weighting, paired=True)
    for first in (0, 20):
        moments.add(ROWS[first : first + 20], exact[first : first + 20])
        assert moments.matrix.any()  # asking for it changes nothing of what is added next
    matrix, cross = torch.zeros(12, 12, dtype=torch.float64), torch.zeros(12, 12, dtype=torch.float64)
    for x, y in zip(ROWS.double(), exact.double(), strict=True):
        weight = x.square().mean() ** (-power / 2)
        matrix += weight * torch.outer(x, x)
        cross += weight * torch.outer(y - x, x)
    # Products of 20 rows are summed in float32.
    torch.testing.assert_close(moments.matrix, matrix, rtol=1e-5, atol=1e-6 * float(matrix.max()))
    # Multiplied in bfloat16 on some CPUs, which has 8 bits.
    torch.testing.assert_close(moments.cross, cross, rtol=0, atol=2**-7 * float(cross.abs().max()))
    assert torch.equal(moments.importance, moments.matrix.diagonal().float())


def test_a_token_of_zeros_counts_nothing() -> None:
    moments = Moments(4, weighting="unit_norm")
    moments.add(torch.zeros(3, 4))
    assert torch.equal(moments.matrix, torch.zeros(4, 4, dtype=torch.float64))


def test_one_huge_token_decides_the_plain_moments_and_not_those_of_unit_norm() -> None:
    rows = torch.cat([torch.eye(4)[1:], 1000 * torch.eye(4)[:1]])
    shares = {}
    for weighting in ("none", "unit_norm"):
        moments = Moments(4, weighting=weighting)
        moments.add(rows)
        shares[weighting] = float(moments.importance[0] / moments.importance.sum())
    assert shares["none"] > 0.999
    assert shares["unit_norm"] == pytest.approx(0.25)
