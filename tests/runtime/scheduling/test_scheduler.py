import random

import numpy as np
import pytest

from llmopt.runtime.scheduling.scheduler import Limits, Prompt, Scheduler
from llmopt.runtime.scheduling.slots import Copy


class Memory:
    """The slots' tokens, kept by obeying the scheduler to the letter; one token stands for its keys and values."""

    def __init__(self, limits, rng):
        self.limits = limits
        self.rng = rng
        self.slots = [[] for _ in range(limits.slots)]
        self.scheduler = Scheduler(limits)
        self.prompts = {}
        self.answers = {}
        self.adapter_of = {}
        self.adapters = {0: None}
        self.loads = 0
        self.copied = 0
        self.decoded = 0

    def add(self, request, ids, **options):
        self.prompts[request], self.answers[request] = ids, []
        self.adapter_of[request] = options.get("adapter")
        self.scheduler.add(request, Prompt(ids=np.array(ids), **options))

    def copy(self, copies):
        for copy in copies:
            assert len(self.slots[copy.source]) >= copy.length
            self.slots[copy.destination] = self.slots[copy.source][: copy.length]

    def step(self, budget=None):
        step = self.scheduler.plan(budget)
        most = max(budget or self.limits.max_chunk, self.limits.least_budget)
        assert sum(chunk.length for chunk in step.chunks) <= most
        for chunk in step.chunks:
            self.write(chunk)
        for request, adapter in zip(step.decoding, step.adapters, strict=True):
            assert self.adapters[adapter] == self.adapter_of[request]
        for slot, (request, length) in enumerate(zip(step.decoding, step.lengths, strict=True)):
            del self.slots[slot][length:]
            assert self.slots[slot] == self.prompts[request] + self.answers[request]
            self.answers[request].append(self.rng.randrange(4))
            self.slots[slot].append(self.answers[request][-1])
            self.decoded += 1
        self.check()
        return step

    def write(self, chunk):
        if chunk.load is not None:
            self.load(chunk.load)
        assert self.adapters[chunk.adapter] == self.adapter_of[chunk.request]
        self.copy(chunk.copies)
        prompt = self.prompts[chunk.request]
        assert chunk.length >= min(self.limits.min_chunk, len(prompt))
        del self.slots[chunk.slot][chunk.start :]
        assert self.slots[chunk.slot] == prompt[: chunk.start]
        self.slots[chunk.slot] += prompt[chunk.start : chunk.start + chunk.length]
        assert chunk.completes == (self.slots[chunk.slot] == prompt)
        assert chunk.cached in (0, chunk.start)
        self.copied += chunk.cached

    def load(self, load):
        """That nobody who runs loses its adapter shows at its next chunk or token."""
        assert 0 < load.slot <= self.limits.adapters
        assert load.adapter not in self.adapters.values()
        self.adapters[load.slot] = load.adapter
        self.loads += 1

    def remove(self, request, *, keep=True, shares_answer=False):
        written = np.array(self.prompts[request] + self.answers[request]) if shares_answer else None
        self.copy(self.scheduler.remove(request, keep=keep, written=written))
        del self.prompts[request], self.answers[request]
        self.check()

    def check(self):
        """Every sequence that runs or may be shared is where the books say, and no slot is used twice."""
        pool, running = self.scheduler.pool, self.scheduler.running
        assert len(running) <= self.limits.running
        assert len(running) + self.scheduler.waiting == len(self.prompts)
        places = [held.slot for held in (*pool.active, *pool.kept)]
        assert len(set(places)) == len(places)
        assert [held.slot for held in pool.active] == list(range(len(running)))
        for held, request in zip(pool.active, running, strict=True):
            whole = self.prompts[request] + self.answers[request]
            assert self.slots[held.slot][: held.length] == whole[: held.length]
            is_last = held.slot == len(running) - 1
            assert is_last or held.length >= len(self.prompts[request])
        for held in (*pool.active, *pool.kept):
            if held.shared is not None:
                assert self.slots[held.slot][: len(held.shared)] == held.shared.tolist()
        assert all(held.shared is not None for held in pool.kept)
        assert not pool.kept or self.limits.shares
        used = {self.adapter_of[request] for request in running} - {None}
        assert self.scheduler.adapters.in_use == len(used) <= self.limits.adapters
        assert used <= set(self.scheduler.adapters.resident)


def some_prompt(rng):
    """Often one of a few beginnings, so that much can be shared."""
    beginning = [rng.randrange(3)] * rng.choice([0, 20, 30]) + [7] * rng.choice([0, 20])
    return beginning + [rng.randrange(4) for _ in range(rng.choice([1, 2, rng.randint(1, 40)]))]


@pytest.mark.parametrize("seed", range(60))
def test_the_books_are_right_after_every_step_of_random_traffic(seed):
    rng = random.Random(seed)
    min_chunk, slots = rng.randint(1, 4), rng.randint(1, 8)
    limits = Limits(
        slots=slots,
        running=rng.randint(1, slots),
        max_chunk=rng.randint(2 * min_chunk - 1, 40),
        min_chunk=min_chunk,
        shares=seed % 5 > 0,
        adapters=rng.randint(0, 4),
    )
    adapters = [None, *range(rng.choice([1, 3, 9]))] if limits.adapters else [None]
    memory, arrived = Memory(limits, rng), 0
    for _ in range(250):
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            adapter = rng.choice(adapters)
            options = {"tenant": rng.choice("abc"), "priority": rng.randint(-1, 1), "adapter": adapter}
            options["namespace"] = (rng.choice(["", "x"]), adapter)
            memory.add(arrived, some_prompt(rng), is_scored=rng.random() < 0.1, **options)
            arrived += 1
        decoding = memory.step(rng.choice([None, 1, 10, 80])).decoding
        ended = [r for r in decoding if rng.random() < 0.15]
        cancelled = [r for r in memory.prompts if r not in ended and rng.random() < 0.02]
        for request in ended + cancelled:
            is_ready = request in decoding
            memory.remove(request, keep=rng.random() < 0.9, shares_answer=is_ready and seed % 2 == 0)
    while memory.scheduler.has_work:
        for request in memory.step().decoding:
            memory.remove(request)
    assert memory.decoded > 0
    assert not memory.prompts


def test_a_request_waits_for_the_requests_of_one_adapter_only():
    """Others may pass it as long as they do not use the one that is to make room."""
    limits = Limits(slots=8, running=8, max_chunk=16, min_chunk=2, adapters=2)
    memory = Memory(limits, random.Random(0))
    for number, adapter in enumerate(["a", "a", "b", "c"]):
        memory.add(number, [1, 2, 3], adapter=adapter, arrival=number)
    memory.step()
    assert memory.scheduler.running == (0, 1, 2)
    for number, adapter in enumerate([None, "a", "b", "d"], start=4):
        memory.add(number, [1, 2, 3], adapter=adapter, arrival=number)
    memory.step()
    assert memory.scheduler.running == (0, 1, 2, 4, 5)  # b has the fewest users: nobody else gets it
    memory.remove(2)
    memory.step()
    assert set(memory.scheduler.running) == {0, 1, 4, 5, 3}  # c came before the other one for b
    assert memory.adapters == {0: None, 1: "a", 2: "c"}


def test_an_adapter_stays_until_its_slot_is_needed():
    limits = Limits(slots=4, running=4, max_chunk=16, min_chunk=2, adapters=2)
    memory = Memory(limits, random.Random(0))
    for number, adapter in enumerate(["a", "b", "a", "c", "a", "b"]):
        memory.add(number, [1, 2, 3], adapter=adapter)
        memory.step()
        memory.remove(number)
    # a is there the second and the third time; b made room for c, and comes back in its place.
    assert memory.loads == 4
    assert set(memory.adapters.values()) == {None, "a", "b"}


def test_nobody_waits_for_ever_for_an_adapter():
    rng = random.Random(3)
    memory = Memory(Limits(slots=4, running=4, max_chunk=16, min_chunk=2, adapters=2), rng)
    memory.add(0, [1, 2], adapter="popular")
    memory.add(1, [1, 2], adapter="other")
    memory.step()
    memory.add("rare", [1, 2], adapter="rare", arrival=1)
    for number in range(2, 200):
        memory.add(number, [1, 2], adapter=rng.choice(["popular", "other"]), arrival=number)
        memory.step()
        if "rare" in memory.scheduler.running:
            break
        for request in memory.scheduler.running:
            if request != "rare" and rng.random() < 0.3:
                memory.remove(request)
    assert number < 30


def test_random_traffic_does_share():
    rng = random.Random(0)
    memory = Memory(Limits(slots=6, running=3, max_chunk=16, min_chunk=2), rng)
    for number in range(100):
        memory.add(number, some_prompt(rng))
    while memory.scheduler.has_work:
        for request in memory.step().decoding:
            memory.remove(request)
    assert memory.copied > 500


def scheduler_of(slots=2, **options):
    return Scheduler(Limits(**({"slots": slots, "running": slots, "max_chunk": 8, "min_chunk": 2} | options)))


def prompt(length, first=100, **options):
    return Prompt(ids=np.arange(first, first + length), **options)


def test_requests_are_admitted_in_order():
    scheduler = scheduler_of(2)
    for name, length in (("a", 3), ("b", 3), ("c", 3)):
        scheduler.add(name, prompt(length))
    assert [chunk.request for chunk in scheduler.plan().chunks] == ["a", "b"]
    assert scheduler.plan().decoding == ("a", "b")
    scheduler.remove("a")
    step = scheduler.plan()
    assert [chunk.request for chunk in step.chunks] == ["c"]
    assert step.decoding == ("b",)


def test_decoding_goes_on_while_a_long_prompt_is_written():
    scheduler = scheduler_of(2)
    scheduler.add("short", prompt(2))
    scheduler.plan()
    scheduler.add("long", prompt(20))
    steps = [scheduler.plan() for _ in range(3)]
    assert [(c.start, c.length) for step in steps for c in step.chunks] == [(0, 8), (8, 8), (16, 4)]
    assert all(step.decoding == ("short",) for step in steps)


def test_a_chunk_never_leaves_a_single_token_behind():
    scheduler = scheduler_of(1)
    scheduler.add("x", prompt(17))
    assert [scheduler.plan().chunks[0].length for _ in range(3)] == [8, 7, 2]


def test_a_prompt_of_one_token_is_one_chunk():
    scheduler = scheduler_of(1)
    scheduler.add("x", prompt(1))
    assert scheduler.plan().chunks[0].length == 1


def test_a_gap_is_closed_by_the_last_ready_request_and_the_one_being_written():
    scheduler = scheduler_of(4, max_chunk=16)
    for name, length in (("a", 2), ("b", 2), ("c", 2), ("long", 50)):
        scheduler.add(name, prompt(length))
    scheduler.plan()
    assert scheduler.remove("a") == (Copy(2, 0, 2), Copy(3, 2, 10))
    assert scheduler.running == ("c", "b", "long")


def test_removing_what_waits_copies_nothing():
    scheduler = scheduler_of(1)
    scheduler.add("a", prompt(2))
    scheduler.add("b", prompt(2))
    scheduler.plan()
    assert scheduler.remove("b") == ()
    assert scheduler.waiting == 0


def test_a_smaller_chunk_can_be_asked_for():
    scheduler = scheduler_of(1)
    scheduler.add("x", prompt(8, max_chunk=4))
    assert [(c.start, c.length) for c in scheduler.plan().chunks] == [(0, 4), (4, 4)]


def test_chunk_sizes_that_cannot_make_up_every_prompt_are_refused():
    with pytest.raises(ValueError, match="cannot make up"):
        scheduler_of(1, max_chunk=2)


def test_more_slots_than_run_are_needed_to_run_that_many():
    with pytest.raises(ValueError, match="cannot run"):
        Limits(slots=2, running=3, max_chunk=8, min_chunk=2)


def test_a_budget_limits_what_a_step_writes_but_never_stops_it():
    scheduler = scheduler_of(1)
    scheduler.add("x", prompt(12))
    assert [scheduler.plan(budget).chunks[0].length for budget in (5, 1, 1)] == [5, 3, 2]


def test_a_prompt_begins_with_what_another_wrote():
    scheduler = scheduler_of(3, max_chunk=64)
    scheduler.add("a", prompt(40))
    scheduler.add("b", Prompt(ids=np.array([*range(100, 130), 1, 2, 3])))
    first, second = scheduler.plan().chunks
    assert (first.start, first.length, first.copies) == (0, 40, ())
    assert (second.start, second.length, second.copies) == (30, 3, (Copy(0, 1, 30),))


def test_the_same_prompt_again_reads_the_fewest_tokens_that_are_exact():
    scheduler = scheduler_of(2, max_chunk=64)
    scheduler.add("a", prompt(40))
    scheduler.plan()
    scheduler.remove("a", keep=True)
    scheduler.add("b", prompt(40))
    (chunk,) = scheduler.plan().chunks
    assert (chunk.start, chunk.length, chunk.copies) == (38, 2, ())


def test_prompts_of_other_namespaces_are_not_shared():
    scheduler = scheduler_of(2, max_chunk=64)
    scheduler.add("a", prompt(40, namespace="a"))
    scheduler.add("b", prompt(40, namespace="b"))
    assert scheduler.plan().chunks[1].start == 0


def test_a_prompt_that_is_scored_is_read_whole():
    scheduler = scheduler_of(2, max_chunk=64)
    scheduler.add("a", prompt(40))
    scheduler.add("b", prompt(40, is_scored=True))
    assert [chunk.start for chunk in scheduler.plan().chunks] == [0, 0]


def test_guesses_that_were_right_count_as_written():
    scheduler = scheduler_of(1)
    scheduler.add("a", prompt(4))
    scheduler.plan()
    scheduler.plan()
    scheduler.advance("a", 3)
    assert scheduler.plan().lengths == (8,)


def test_tenants_get_equal_shares():
    scheduler = scheduler_of(1, max_chunk=64)
    for number in range(6):
        scheduler.add(("greedy", number), prompt(40, first=1000 * number, tenant="greedy"))
    scheduler.add(("modest", 0), prompt(40, first=9000, tenant="modest"))
    order = []
    while scheduler.has_work:
        order += [chunk.request for chunk in scheduler.plan().chunks]
        scheduler.remove(order[-1])
    assert order.index(("modest", 0)) == 1
