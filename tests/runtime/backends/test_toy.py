import numpy as np

from llmopt.runtime.backends.toy import ToyBackend, toy_engine


def test_logits_depend_on_every_token_and_on_order():
    backend = ToyBackend(toy_engine(), slots=4)
    rows = [np.array(ids) for ids in ([1, 2, 3], [2, 1, 3], [1, 2, 4], [7, 2, 3])]
    results = [backend.prefill(slot, ids, 0, np.array([2]))[0] for slot, ids in enumerate(rows)]
    assert len({result.tobytes() for result in results}) == 4


def test_decode_and_prefill_agree_bit_for_bit():
    backend = ToyBackend(toy_engine(), slots=2)
    whole = backend.prefill(1, np.array([1, 2, 3]), 0, np.array([2]))
    backend.prefill(0, np.array([1, 2]), 0, np.array([1]))
    np.testing.assert_array_equal(backend.decode(np.array([3]), np.array([2])), whole)


def test_copied_and_dropped_slots_show_in_the_logits():
    backend = ToyBackend(toy_engine(), slots=2)
    whole = backend.prefill(1, np.array([1, 2, 3]), 0, np.array([2]))
    backend.copy_prefix(1, 0, 2)
    np.testing.assert_array_equal(backend.decode(np.array([3]), np.array([2])), whole)
    backend.drop(0)
    assert not np.array_equal(backend.decode(np.array([3]), np.array([2])), whole)
