import pytest

from llmopt.optimizer.errors import ResourceError
from llmopt.runtime.backends.toy import toy_engine
from llmopt.runtime.sizing import choose_sizes, pool_bytes

ENGINE = toy_engine(capacity=128).model_copy(
    update={"num_layers": 3, "kv_heads": 2, "head_dim": 16, "kv_dtype": "float32"}
)
SLOT = 2 * 3 * 2 * 16 * 4 * 100
"""Bytes of 100 tokens."""


def sizes(memory, running=None, kept=None):
    found = choose_sizes(ENGINE, capacity=100, running=running, kept=kept, memory=memory * SLOT)
    return found.running, found.slots


def test_a_slot_has_keys_and_values_of_every_layer():
    assert pool_bytes(ENGINE, 8, 100) == 8 * SLOT


def test_as_many_are_kept_as_run_where_memory_allows():
    assert sizes(100) == (16, 32)
    assert sizes(100, running=5) == (5, 10)
    assert sizes(100, running=5, kept=0) == (5, 5)


def test_running_requests_get_the_memory_first():
    assert sizes(20) == (16, 20)
    assert sizes(7) == (7, 7)
    assert sizes(7, running=5) == (5, 7)


def test_what_was_asked_for_has_to_fit():
    assert sizes(7, running=5, kept=2) == (5, 7)
    with pytest.raises(ResourceError, match="8 slots of 100 tokens") as caught:
        sizes(7, running=5, kept=3)
    assert caught.value.hint == "what fits: --context 87 or 7 slots"
    assert caught.value.exit_code == 7


def test_a_slot_that_does_not_fit_says_how_long_one_may_be():
    with pytest.raises(ResourceError, match="one slot of 100 tokens") as caught:
        choose_sizes(ENGINE, capacity=100, running=None, memory=SLOT // 2)
    assert caught.value.hint == "what fits: --context 50"
    with pytest.raises(ResourceError) as caught:
        choose_sizes(ENGINE, capacity=100, running=None, memory=10)
    assert caught.value.hint == "give it more --memory"


def test_half_of_what_is_free_may_be_used(monkeypatch):
    class Memory:
        available = 10 * SLOT

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    assert choose_sizes(ENGINE, capacity=100, running=None).slots == 5


def test_sizes_are_said_in_words():
    said = str(choose_sizes(ENGINE, capacity=100, running=3, memory=100 * SLOT))
    assert said.startswith("3 requests of up to 100 tokens at once, 3 more kept for prompts that begin alike: at most ")
