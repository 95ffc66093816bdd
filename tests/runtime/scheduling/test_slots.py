import numpy as np
import pytest

from llmopt.runtime.scheduling.slots import Copy, SlotPool


def ids(*parts):
    """Tokens: each part is 20 of one kind."""
    return np.repeat(np.array(parts, np.int64), 20)


def admit(pool, tokens, **options):
    admission = pool.admit(tokens, None, most=options.get("most", len(tokens) - 2))
    reused = admission.held.length
    admission.held.length = len(tokens)
    pool.share(admission.held, tokens)
    return admission.held, admission.copies, reused


def test_what_was_kept_longest_without_use_makes_room():
    pool = SlotPool(3)
    for kind in (1, 2, 3):
        held, _, _ = admit(pool, ids(kind))
        pool.release(held, (), keep=True)
    # The last stood where the next is written each time, and was moved away; all three are still there.
    assert sorted(held.shared[0] for held in pool.kept) == [1, 2, 3]
    assert pool.shareable(ids(1, 9), None, 40) == 20
    held, _, reused = admit(pool, ids(1, 9))
    assert reused == 20
    pool.release(held, (), keep=True)
    held, _, reused = admit(pool, ids(5))
    assert reused == 0
    assert pool.shareable(ids(2), None, 20) == 0
    assert pool.shareable(ids(1, 9), None, 40) == 40


def test_a_sequence_that_another_continues_is_not_kept_twice():
    pool = SlotPool(4)
    first, _, _ = admit(pool, ids(1))
    second, _, _ = admit(pool, ids(1, 2))
    assert pool.release(first, (second,), keep=True) == (Copy(1, 0, 40),)
    assert not pool.kept


def test_a_prompt_that_continues_a_kept_sequence_takes_its_place():
    pool = SlotPool(2)
    held, _, _ = admit(pool, ids(1))
    pool.release(held, (), keep=True)
    _, copies, reused = admit(pool, ids(1, 2))
    assert (copies, reused) == ((), 20)
    assert not pool.kept


def test_a_sequence_in_the_way_is_moved_and_its_beginning_stays_where_it_is():
    pool = SlotPool(2)
    held, _, _ = admit(pool, ids(1, 2))
    pool.release(held, (), keep=True)
    _, copies, reused = admit(pool, ids(1, 3))
    assert (copies, reused) == ((Copy(0, 1, 40),), 20)
    assert [each.slot for each in pool.kept] == [1]


def test_a_finished_sequence_is_moved_behind_those_that_run():
    pool = SlotPool(4)
    first, _, _ = admit(pool, ids(1))
    last, _, _ = admit(pool, ids(2))
    assert pool.release(first, (last,), keep=True) == (Copy(0, 2, 20), Copy(1, 0, 20))
    assert ([each.slot for each in pool.active], [each.slot for each in pool.kept]) == ([0], [2])


def test_nothing_is_kept_where_all_slots_run():
    pool = SlotPool(2)
    first, _, _ = admit(pool, ids(1))
    last, _, _ = admit(pool, ids(2))
    assert pool.release(first, (last,), keep=True) == (Copy(1, 0, 20),)
    assert not pool.kept


def test_what_is_short_is_not_shared():
    pool = SlotPool(2)
    held, _, _ = admit(pool, np.arange(8))
    pool.release(held, (), keep=True)
    assert not pool.kept


def test_a_pool_that_shares_nothing_keeps_nothing():
    pool = SlotPool(2, shares=False)
    held, _, _ = admit(pool, ids(1))
    pool.release(held, (), keep=True)
    assert not pool.kept
    assert pool.shareable(ids(1), None, 20) == 0


def test_no_more_run_than_there_are_slots():
    pool = SlotPool(1)
    admit(pool, ids(1))
    with pytest.raises(ValueError, match="no slot"):
        pool.admit(ids(2), None, most=0)


def test_clearing_forgets_what_is_kept():
    pool = SlotPool(2)
    held, _, _ = admit(pool, ids(1))
    pool.release(held, (), keep=True)
    pool.clear()
    assert pool.shareable(ids(1), None, 20) == 0
