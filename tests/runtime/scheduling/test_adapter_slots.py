"""Which adapter lies where: used ones stay, and of the others the one that was not taken for longest goes."""

import pytest

from llmopt.runtime.scheduling.adapter_slots import AdapterLoad, AdapterSlots


def test_an_adapter_is_read_once_while_it_stays():
    slots = AdapterSlots(2)
    assert slots.take("a") == AdapterLoad("a", 1)
    assert slots.take("a") is None
    assert slots.take("b") == AdapterLoad("b", 2)
    assert (slots.slot_of("a"), slots.slot_of("b")) == (1, 2)
    slots.release("b")
    assert slots.take("b") is None


def test_the_one_that_was_not_taken_for_longest_makes_room():
    slots = AdapterSlots(2)
    for adapter in ("a", "b", "a"):
        slots.take(adapter)
        slots.release(adapter)
    assert slots.take("c") == AdapterLoad("c", 2)
    assert set(slots.resident) == {"a", "c"}


def test_what_is_in_use_cannot_be_evicted():
    slots = AdapterSlots(2)
    slots.take("a"), slots.take("b"), slots.take("b")
    slots.release("b")
    assert slots.in_use == 2
    assert not slots.has_room("c")
    assert slots.has_room("b")
    with pytest.raises(ValueError, match="all adapters are in use"):
        slots.take("c")
    slots.release("b")
    assert slots.has_room("c")
    assert slots.take("c") == AdapterLoad("c", 2)


def test_the_one_to_wait_for_has_the_fewest_users():
    slots = AdapterSlots(3)
    for adapter in ("a", "a", "b", "c"):
        slots.take(adapter)
    assert slots.spared() == "b"
    slots.take("b")
    assert slots.spared() == "c"
    assert AdapterSlots(0).spared() is None


def test_only_what_nobody_uses_is_forgotten():
    slots = AdapterSlots(1)
    slots.take("a")
    assert not slots.forget("a")
    slots.release("a")
    assert slots.forget("a")
    assert slots.take("a") == AdapterLoad("a", 1)


def test_an_engine_without_adapters_has_room_for_none():
    assert not AdapterSlots(0).has_room("a")
