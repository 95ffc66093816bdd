import random

import pytest

from llmopt.runtime.scheduler import Copy, Scheduler


class Books:
    """What the slots hold, kept by obeying the scheduler's steps to the letter."""

    def __init__(self, slots, scheduler):
        self.slots = [[] for _ in range(slots)]
        self.scheduler = scheduler
        self.prompts = {}
        self.tokens = {}

    def add(self, request, prompt):
        self.prompts[request], self.tokens[request] = prompt, []
        self.scheduler.add(request, prompt)

    def run(self, max_chunk, min_chunk):
        step = self.scheduler.plan()
        assert sum(chunk.length for chunk in step.chunks) <= max_chunk
        for chunk in step.chunks:
            prompt = self.prompts[chunk.request]
            assert chunk.length >= min(min_chunk, prompt)
            del self.slots[chunk.slot][chunk.start :]
            assert len(self.slots[chunk.slot]) == chunk.start
            assert all(owner == chunk.request for owner, _ in self.slots[chunk.slot])
            self.slots[chunk.slot] += [(chunk.request, chunk.start + i) for i in range(chunk.length)]
            assert chunk.completes == (chunk.start + chunk.length == prompt)
        for slot, (request, length) in enumerate(zip(step.decoding, step.lengths, strict=True)):
            del self.slots[slot][length:]
            self.slots[slot].append((request, length))
        self.check()
        return step

    def remove(self, request):
        for copy in self.scheduler.remove(request):
            self.slots[copy.destination] = self.slots[copy.source][: copy.length]
            assert len(self.slots[copy.destination]) == copy.length
        del self.prompts[request]
        self.check()

    def check(self):
        running = self.scheduler.running
        assert len(running) <= len(self.slots)
        assert len(running) + self.scheduler.waiting == len(self.prompts)
        for slot, request in enumerate(running):
            held = self.slots[slot]
            assert held == [(request, i) for i in range(len(held))]
            if slot < len(running) - 1:
                assert len(held) >= self.prompts[request]


@pytest.mark.parametrize("seed", range(40))
def test_the_books_are_right_after_every_step_of_random_traffic(seed):
    rng = random.Random(seed)
    slots, min_chunk = rng.randint(1, 6), rng.randint(1, 4)
    max_chunk = rng.randint(2 * min_chunk - 1, 24)
    scheduler = Scheduler(slots=slots, max_chunk=max_chunk, min_chunk=min_chunk)
    books, arrived, decoded = Books(slots, scheduler), 0, 0
    for _ in range(200):
        for _ in range(rng.choice([0, 0, 1, 2])):
            books.add(arrived, rng.choice([1, 2, rng.randint(1, 60)]))
            arrived += 1
        step = books.run(max_chunk, min_chunk)
        decoded += len(step.decoding)
        ended = [r for r in step.decoding if rng.random() < 0.15]
        cancelled = [r for r in books.prompts if r not in ended and rng.random() < 0.02]
        for request in ended + cancelled:
            books.remove(request)
    while scheduler.has_work:
        for request in books.run(max_chunk, min_chunk).decoding:
            books.remove(request)
    assert decoded > 0
    assert not books.prompts


def test_requests_are_admitted_in_order():
    scheduler = Scheduler(slots=2, max_chunk=8, min_chunk=2)
    for name, prompt in (("a", 3), ("b", 3), ("c", 3)):
        scheduler.add(name, prompt)
    assert [chunk.request for chunk in scheduler.plan().chunks] == ["a", "b"]
    assert scheduler.plan().decoding == ("a", "b")
    scheduler.remove("a")
    step = scheduler.plan()
    assert [chunk.request for chunk in step.chunks] == ["c"]
    assert step.decoding == ("b",)


def test_decoding_goes_on_while_a_long_prompt_is_written():
    scheduler = Scheduler(slots=2, max_chunk=8, min_chunk=2)
    scheduler.add("short", 2)
    scheduler.plan()
    scheduler.add("long", 20)
    steps = [scheduler.plan() for _ in range(3)]
    assert [(c.start, c.length) for step in steps for c in step.chunks] == [(0, 8), (8, 8), (16, 4)]
    assert all(step.decoding == ("short",) for step in steps)


def test_a_chunk_never_leaves_a_single_token_behind():
    scheduler = Scheduler(slots=1, max_chunk=8, min_chunk=2)
    scheduler.add("x", 17)
    assert [scheduler.plan().chunks[0].length for _ in range(3)] == [8, 7, 2]


def test_a_prompt_of_one_token_is_one_chunk():
    scheduler = Scheduler(slots=1, max_chunk=8, min_chunk=2)
    scheduler.add("x", 1)
    assert scheduler.plan().chunks[0].length == 1


def test_a_gap_is_closed_by_the_last_ready_request_and_the_one_being_written():
    scheduler = Scheduler(slots=4, max_chunk=8, min_chunk=2)
    for name, prompt in (("a", 2), ("b", 2), ("c", 2), ("long", 50)):
        scheduler.add(name, prompt)
    scheduler.plan()
    assert scheduler.remove("a") == [Copy(2, 0, 2), Copy(3, 2, 2)]
    assert scheduler.running == ("c", "b", "long")


def test_removing_what_waits_copies_nothing():
    scheduler = Scheduler(slots=1, max_chunk=8, min_chunk=2)
    scheduler.add("a", 2)
    scheduler.add("b", 2)
    scheduler.plan()
    assert scheduler.remove("b") == []
    assert scheduler.waiting == 0


def test_a_smaller_chunk_can_be_asked_for():
    scheduler = Scheduler(slots=1, max_chunk=8, min_chunk=2)
    scheduler.add("x", 8, max_chunk=4)
    assert [(c.start, c.length) for c in scheduler.plan().chunks] == [(0, 4), (4, 4)]


def test_chunk_sizes_that_cannot_make_up_every_prompt_are_refused():
    with pytest.raises(ValueError, match="cannot make up"):
        Scheduler(slots=1, max_chunk=2, min_chunk=2)
