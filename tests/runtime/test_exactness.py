"""The promise of the runtime: an answer is the same to the bit, alone and at any load, order, chunking and cache."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from llmopt.runtime.backends.onnxruntime import missing_tokens
from llmopt.runtime.build import open_build
from llmopt.runtime.engine import Engine
from llmopt.runtime.policy import Policy
from llmopt.runtime.request import Generation, Request, Sender
from llmopt.runtime.sampler import Sampling
from llmopt.runtime.text import TextStream


@dataclass
class Traffic:
    """Requests that are the same each time they are made, many of which begin alike.

    Attributes:
        count: How many.
        longest: Tokens of a prompt.
        most: Tokens of an answer.
    """

    build: object
    count: int
    longest: int
    most: int
    beginnings: list = field(default_factory=list)

    def __post_init__(self):
        rng = random.Random(0)
        self.beginnings = [self.tokens(rng, self.longest // 2) for _ in range(4)]

    def tokens(self, rng, count):
        return [rng.randrange(self.build.backend.engine.vocab_size) for _ in range(count)]

    def request(self, number):
        """One request, and the list of what will be said about it."""
        rng, events = random.Random(number), []
        beginning = rng.choice([[], *self.beginnings])
        ids = beginning + self.tokens(rng, rng.choice([1, 2, 3, rng.randint(4, self.longest // 2)]))
        sampling = Sampling(
            temperature=rng.choice([0, 0.7, 1]),
            top_k=rng.choice([0, 20]),
            top_p=rng.choice([1, 0.9]),
            repetition_penalty=rng.choice([1, 1.2]),
            seed=number,
            logprobs=3,
        )
        request = Request(
            np.array(ids),
            Generation(max_tokens=rng.randint(1, self.most), sampling=sampling),
            text=TextStream(self.build.tokenizer),
            receive=events.append,
            sender=Sender(tenant=rng.choice("abc"), priority=rng.randint(-1, 1)),
        )
        return request, events

    def alone(self, engine, number):
        """What the engine answers when there is nothing else to do."""
        request, events = self.request(number)
        engine.submit(request)
        while engine.step():
            pass
        return said(events)

    def together(self, engine, rng):
        """What it answers in a crowd, in random order; some leave early.

        Returns:
            By number what was said, and the numbers of those that left.
        """
        order = list(range(self.count))
        rng.shuffle(order)
        made = {number: self.request(number) for number in order}
        left, waiting = set(), list(order)
        while waiting or engine.step():
            for _ in range(min(len(waiting), rng.randint(0, 4))):
                engine.submit(made[waiting.pop()][0])
            unfinished = [number for number in order if number not in waiting and not ended(made[number][1])]
            if unfinished and rng.random() < 0.1:
                gone = rng.choice(unfinished)
                engine.cancel(made[gone][0])
                left.add(gone)
            if waiting:
                engine.step()
        return {number: said(events) for number, (_, events) in made.items()}, left


def ended(events):
    return bool(events) and events[-1].finish is not None


def said(events):
    return [(event.token, event.text, event.logprob, event.finish) for event in events]


def check(directory, *, count, longest, most, threads, running=16):
    build = open_build(directory, slots=running, kept_slots=5, threads=threads)
    traffic = Traffic(build, count, longest, most)
    quiet = Engine(build.backend, policy=Policy(running=1, shares_prefixes=False, target=0))
    alone = {number: traffic.alone(quiet, number) for number in range(count)}
    for target in (0, 1e-9):  # prompts in large pieces, and in the smallest
        busy = Engine(build.backend, policy=Policy(running=running, target=target))
        together, left = traffic.together(busy, random.Random(count))
        for number in range(count):
            if number in left and together[number][-1][3] == "abort":
                whole = len(together[number]) - 1
                assert together[number][:whole] == alone[number][:whole]
            else:
                assert together[number] == alone[number]
        assert busy.statistics.cached_tokens > 0
        assert busy.statistics.finished["abort"] > 0 or count < 50


@pytest.mark.parametrize(("name", "count"), [("tiny_build", 200), ("tiny_float_build", 70), ("tiny_int4_build", 70)])
def test_answers_are_the_same_to_the_bit_alone_and_under_load(name, count, request):
    check(request.getfixturevalue(name), count=count, longest=120, most=24, threads=1)


@pytest.mark.real_model
def test_answers_of_the_real_model_are_the_same_to_the_bit_alone_and_under_load(smollm2_build):
    check(smollm2_build, count=8, longest=400, most=8, threads=2, running=4)


@pytest.mark.parametrize("name", ["tiny_build", "tiny_float_build", "tiny_int4_build"])
def test_the_manifest_promises_it(name, request):
    assert open_build(request.getfixturevalue(name), threads=1).backend.engine.batch_invariant


@pytest.mark.parametrize("name", ["tiny_build", "tiny_float_build", "tiny_int4_build"])
def test_a_prompt_is_read_to_the_same_bits_wherever_it_is_cut(name, request):
    """Attention computes queries in blocks, here of 32: pieces of 33, 65 and 97 tokens would leave one row alone."""
    backend = open_build(request.getfixturevalue(name), slots=1, kept_slots=0, threads=1).backend
    ids, last = np.random.default_rng(0).integers(0, backend.engine.vocab_size, 110), np.array([0])
    whole = backend.prefill(0, ids, 0, np.array([109]))
    for cut in range(1, 110):
        backend.prefill(0, ids[:cut], 0, last[:0])
        assert (backend.prefill(0, ids[cut:], cut, last + 109 - cut) == whole).all(), cut


@pytest.mark.parametrize("block", [2, 3, 32, 128, 227])
def test_no_block_of_queries_is_left_with_one_row(block):
    for tokens in range(1, 700):
        assert (tokens + missing_tokens(tokens, block)) % block != 1
        assert missing_tokens(tokens, block) <= 3
