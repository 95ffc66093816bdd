"""Where slots lie and what is copied between them; the pool on a GPU in the host's memory, by the same calls."""

import numpy as np
import pytest

from llmopt.runtime.backends.session import Provider
from llmopt.runtime.backends.slot_pool import GpuPool, HostPool

SHAPE = (4, 2, 6, 3)  # slots, heads, tokens, columns
SLOT_BYTES = 2 * 6 * 3 * 2


@pytest.fixture(params=["host", "gpu"])
def pool(request):
    """Three tensors of float16."""
    return HostPool(3, SHAPE, 2) if request.param == "host" else GpuPool(3, 4, SLOT_BYTES, Provider(), device="cpu")


def contents(pool, tensor):
    """uint16 ``[slots, heads, tokens, columns]``, as they lie there."""
    import ctypes

    memory = (ctypes.c_uint8 * (4 * SLOT_BYTES)).from_address(pool.address(tensor, 0))
    return np.frombuffer(memory, np.uint16).reshape(SHAPE)


def test_slots_lie_one_behind_the_other_and_tensors_apart(pool):
    addresses = [pool.address(tensor, 0) for tensor in range(3)]
    assert len(set(addresses)) == 3
    for tensor, address in enumerate(addresses):
        assert [pool.address(tensor, slot) - address for slot in range(4)] == [slot * SLOT_BYTES for slot in range(4)]
        assert not contents(pool, tensor).any()


def test_a_copy_has_at_least_the_prefix_and_touches_no_other_slot(pool):
    """All bit patterns survive, those of float16's NaN too."""
    rng, before = np.random.default_rng(0), []
    for tensor in range(3):
        contents(pool, tensor)[...] = rng.integers(0, 1 << 16, SHAPE, dtype=np.uint16)
        before.append(contents(pool, tensor).copy())
    pool.copy(3, 1, 4)
    for tensor in range(3):
        found = contents(pool, tensor)
        np.testing.assert_array_equal(found[1, :, :4], before[tensor][3, :, :4])
        np.testing.assert_array_equal(found[[0, 2, 3]], before[tensor][[0, 2, 3]])
