"""A linear and a low-rank change of it go through the same changes of basis."""

import torch

from llmopt.optimizer.basis import Basis, Scaled, Shifted, Turned, followed
from llmopt.optimizer.basis_file import read_bases, save_bases
from llmopt.optimizer.rotation import Rotation

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def rotation(size: int) -> Rotation:
    orthogonal, _ = torch.linalg.qr(random(size, size))
    return Rotation(random(size).sign(), (orthogonal,))


HEAD = rotation(3)
BASIS = Basis(
    columns=(Shifted(random(8)), Scaled(random(8)), Turned(rotation(4)), Shifted(random(8)), Scaled(random(8))),
    rows=(Scaled(random(9)), Turned(HEAD, ((0, 3), (6, 9)))),
)


def by_matrices(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``BASIS`` of a linear, written out."""
    shift, scale, turned, later, factors = BASIS.columns
    block = turned.rotation.matrix()
    right = torch.diag(scale.factors) @ torch.block_diag(block, block)
    left = torch.block_diag(HEAD.matrix(), torch.eye(3, dtype=torch.float64), HEAD.matrix()).T
    left = left @ torch.diag(BASIS.rows[0].factors)
    moved = bias + weight @ shift.values + weight @ right @ later.values
    return left @ weight @ right @ torch.diag(factors.factors), left @ moved


def test_a_linear_is_multiplied_from_both_sides() -> None:
    weight, bias = random(9, 8), random(9)
    for found, expected in zip(BASIS.linear(weight, bias), by_matrices(weight, bias), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_linear_without_a_bias_gets_one_where_a_constant_was_taken_out() -> None:
    weight = random(9, 8)
    torch.testing.assert_close(
        BASIS.linear(weight)[1], by_matrices(weight, torch.zeros(9, dtype=torch.float64))[1], rtol=0, atol=1e-12
    )
    assert Basis(columns=BASIS.columns[1:3]).linear(weight)[1] is None


def test_the_change_of_a_linear_is_the_product_of_its_changed_factors() -> None:
    weight, bias, down, up = random(9, 8), random(9), random(2, 8), random(9, 2)
    merged = BASIS.linear(weight + up @ down, bias)
    base = BASIS.linear(weight, bias)
    new_down, new_up, added = BASIS.factors(down, up)
    assert (new_down.shape, new_up.shape) == (down.shape, up.shape)
    torch.testing.assert_close(base[0] + new_up @ new_down, merged[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(base[1] + added, merged[1], rtol=0, atol=1e-12)


def test_what_happens_later_comes_behind() -> None:
    first, second = (
        Basis(columns=BASIS.columns[:3], rows=BASIS.rows[:1]),
        Basis(columns=BASIS.columns[3:], rows=BASIS.rows[1:]),
    )
    assert followed({"a": first}, {"a": second, "b": first}) == {"a": BASIS, "b": first}


def test_on_disk_nothing_is_lost_and_what_is_shared_is_there_once(tmp_path) -> None:
    bases = {"a": BASIS, "b": Basis(rows=BASIS.rows), "c": Basis(columns=(BASIS.columns[1],))}
    save_bases(bases, tmp_path / "bases")
    alone = {"a": BASIS}
    save_bases(alone, tmp_path / "alone")
    read = read_bases(tmp_path / "bases")
    weight, bias = random(9, 8), random(9)
    assert read.keys() == bases.keys()
    for module, basis in bases.items():
        for found, expected in zip(read[module].linear(weight, bias), basis.linear(weight, bias), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # memory lies elsewhere, sums differ
    assert (tmp_path / "bases").stat().st_size < (tmp_path / "alone").stat().st_size + 500
