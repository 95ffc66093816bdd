"""Low-rank changes are added to the rows that have an adapter, and to no others."""

import ml_dtypes
import numpy as np
import pytest

_MAX_RANK = 20


@pytest.fixture
def case():
    """``case(rows, adapters, ...)``: the operator's inputs for two linears whose results lie in columns of y."""

    def make(adapters, *, inputs=40, sizes=(24, 35), width=70, slots=3, biased=False, seed=0):
        generator = np.random.default_rng(seed)
        rows = len(adapters)
        parts, at, column = [], 0, 3
        for i, size in enumerate(sizes):
            parts.append((i, at, at + _MAX_RANK * inputs, column, size, int(biased)))
            at += _MAX_RANK * inputs + (_MAX_RANK + biased) * size
            column += size + 2
        return {
            "y": generator.standard_normal((rows, width), np.float32),
            "x": generator.standard_normal((rows, inputs), np.float32),
            "adapters": np.array(adapters, np.int64)[:, None],
            # Numbers that bfloat16 has too.
            "factors": generator.standard_normal((slots, at)).astype(ml_dtypes.bfloat16).astype(np.float32),
            "ranks": np.array([[4, 20], [7, 1], [0, 16]], np.int64)[:slots],
            "parts": np.array(parts, np.int64),
        }

    return make


def naive(y, x, adapters, factors, ranks, parts, scale=None):
    """The same in float64, a row at a time."""
    found = y.astype(np.float64)
    for row, slot in enumerate(adapters[:, 0]):
        for number, down_at, up_at, column, size, biased in parts if slot else ():
            rank, own = ranks[slot - 1, number], factors[slot - 1].astype(np.float64)
            if rank == 0:  # this adapter has nothing for this linear
                continue
            down = own[down_at : down_at + rank * x.shape[1]].reshape(rank, x.shape[1])
            added = own[up_at : up_at + rank * size].reshape(rank, size).T @ (down @ x[row])
            if biased:
                added += own[up_at + _MAX_RANK * size :][:size]
            found[row, column : column + size] += added if scale is None else added / scale[row, 0]
    return found


@pytest.fixture(params=["LoraAdd", "LoraAddBfloat16"])
def lora_add(request, run_kernel):
    def call(case, scale=None):
        inputs = dict(case)
        if request.param == "LoraAddBfloat16":
            inputs["factors"] = case["factors"].astype(ml_dtypes.bfloat16)
        inputs = [*inputs.values(), *([] if scale is None else [scale])]
        return run_kernel(request.param, inputs, [np.float32], max_rank=_MAX_RANK)[0]

    return call


@pytest.mark.parametrize("adapters", [[1], [0, 2, 0], [1, 2, 3, 3, 0, 1], [2] * 31 + [0] * 5 + [1] * 14])
@pytest.mark.parametrize("biased", [False, True])
def test_each_row_gets_its_own_adapter(lora_add, case, adapters, biased):
    inputs = case(adapters, biased=biased)
    # Sums of 40 products and of 20: errors of a few 1e-6 at magnitudes of about 100.
    np.testing.assert_allclose(lora_add(inputs), naive(**inputs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", [(16, 32), (48, 5)])
@pytest.mark.parametrize("inputs", [16, 33, 7])
def test_widths_that_are_no_multiple_of_a_vector(lora_add, case, sizes, inputs):
    made = case([3, 1, 2, 2], sizes=sizes, inputs=inputs)
    np.testing.assert_allclose(lora_add(made), naive(**made), rtol=1e-5, atol=1e-4)


def test_a_row_without_an_adapter_stays_as_it_is_to_the_bit(lora_add, case):
    inputs = case([0, 2, 0, 1, 0])
    assert np.array_equal(lora_add(inputs)[::2], inputs["y"][::2])
    assert np.array_equal(lora_add(case([0] * 5)), case([0] * 5)["y"])


def test_columns_of_no_part_stay_as_they_are(lora_add, case):
    inputs = case([1, 2])
    found = lora_add(inputs)
    outside = [0, 1, 2, 27, 28, *range(64, 70)]
    assert np.array_equal(found[:, outside], inputs["y"][:, outside])


def test_a_row_has_the_same_bits_whatever_is_beside_it(lora_add, case):
    adapters = [2, 2, 2, 1, 0, 3, 3, 2, *[1] * 30]
    inputs = case(adapters, biased=True)
    together = lora_add(inputs)
    for row in (0, 2, 3, 5, 7, 20, 37):
        alone = {name: array[row : row + 1] if len(array) == len(adapters) else array for name, array in inputs.items()}
        assert np.array_equal(lora_add(alone)[0], together[row])


def test_with_a_scale_the_product_is_that_of_integers(lora_add, case):
    inputs = case([1, 0, 3, 3], biased=True)
    scale = np.array([[0.5], [2.0], [3.0], [0.0]], np.float32)
    inputs["x"][3] = 0
    found = lora_add(inputs, scale)
    np.testing.assert_allclose(found[:3], naive(**inputs, scale=np.maximum(scale, 1e-9))[:3], rtol=1e-5, atol=1e-4)
    assert np.array_equal(found[3], inputs["y"][3])


@pytest.mark.parametrize("adapter", [-1, 4])
def test_an_adapter_that_does_not_exist_is_refused(lora_add, case, adapter):
    with pytest.raises(Exception, match=f"adapters 1 to 3, not {adapter}"):
        lora_add(case([1, adapter]))


def test_a_rank_beyond_the_engines_is_refused(lora_add, case):
    inputs = case([1])
    inputs["ranks"][0, 0] = _MAX_RANK + 1
    with pytest.raises(Exception, match="rank is beyond"):
        lora_add(inputs)
