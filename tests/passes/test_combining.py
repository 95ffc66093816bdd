"""Changes made into one: element by element as the papers say it, and what is drawn at random by its properties."""

import pytest
import torch

from llmopt.passes._combining import Combination

GENERATOR = torch.Generator().manual_seed(0)
CHANGES = [torch.randn(12, 10, generator=GENERATOR) for _ in range(3)]
WEIGHTS = [0.5, -2.0, 1.0]


def naive_ties(density: float, sign: str) -> torch.Tensor:
    """Element by element."""
    kept = []
    for change in CHANGES:
        ranked = sorted((-abs(float(value)), place) for place, value in enumerate(change.flatten()))
        largest = {place for _, place in ranked[: int(density * change.numel())]}
        kept.append([float(v) if place in largest else 0.0 for place, v in enumerate(change.flatten())])
    merged = []
    for values in zip(*kept, strict=True):
        votes = values if sign == "total" else [(value > 0) - (value < 0) for value in values]
        elected = 1 if sum(votes) >= 0 else -1
        agreeing = [w * v for w, v in zip(WEIGHTS, values, strict=True) if v * elected > 0]
        merged.append(sum(agreeing) / max(len(agreeing), 1))
    return torch.tensor(merged).reshape(12, 10)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.25, 0.6, 1.0])
def test_ties_is_what_the_paper_says_of_every_element(density, sign) -> None:
    found = Combination("ties", density, sign).of("w", CHANGES, WEIGHTS)
    torch.testing.assert_close(found, naive_ties(density, sign), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["magnitude_prune", "dare_linear"])
def test_where_everything_is_kept_it_is_the_sum(method) -> None:
    expected = sum(change * weight for change, weight in zip(CHANGES, WEIGHTS, strict=True))
    assert torch.equal(
        Combination(method, 1.0).of("w", CHANGES, WEIGHTS), Combination("linear").of("w", CHANGES, WEIGHTS)
    )
    torch.testing.assert_close(Combination("linear").of("w", CHANGES, WEIGHTS), expected)


def test_pruning_by_magnitude_keeps_the_largest() -> None:
    found = Combination("magnitude_prune", 0.25).of("w", CHANGES[:1], [1.0])
    threshold = CHANGES[0].abs().flatten().sort(descending=True).values[29]
    assert torch.equal(found, CHANGES[0] * (CHANGES[0].abs() >= threshold))


def test_dare_keeps_its_share_and_what_is_kept_makes_up_for_the_rest() -> None:
    ones = torch.ones(400, 500)
    found = Combination("dare_linear", 0.3, seed=4).of("w", [ones], [1.0])
    assert set(found.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.3)}
    # 200,000 draws: the share has a standard deviation of 0.001, the mean one of 0.0034.
    assert float((found != 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.017)


def test_dare_draws_by_seed_weight_and_adapter() -> None:
    def kept(seed, name, count=1):
        return Combination("dare_linear", 0.5, seed=seed).of(name, [torch.ones(40, 40)] * count, [1.0] * count)

    assert torch.equal(kept(1, "a"), kept(1, "a"))
    assert not torch.equal(kept(1, "a"), kept(2, "a"))
    assert not torch.equal(kept(1, "a"), kept(1, "b"))
    assert set(kept(1, "a", count=2).unique().tolist()) == {0.0, 2.0, 4.0}


def test_dare_ties_adds_what_agrees() -> None:
    found = Combination("dare_ties", 0.5, seed=2).of("w", [torch.ones(40, 40), -3 * torch.ones(40, 40)], [1.0, 1.0])
    # Only the first is kept, or the second, or both, where the second has the larger sum; or none.
    assert set(found.unique().tolist()) == {2.0, -6.0, 0.0}
