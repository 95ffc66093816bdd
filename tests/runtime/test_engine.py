import random
import threading

import numpy as np
import pytest

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.lora.adapter_file import ModuleFactors, write_adapter
from llmopt.runtime.backends.base import ExecutionError
from llmopt.runtime.backends.toy import ToyBackend, toy_engine
from llmopt.runtime.engine import Engine, EngineClosedError, QueueFullError, QueueLimits
from llmopt.runtime.policy import Policy
from llmopt.runtime.request import ContextLengthError, Generation, Request, Sender
from llmopt.runtime.sampler import Sampling, score
from llmopt.runtime.speculation import Speculation
from llmopt.runtime.text import TextStream, Tokenizer

VOCAB = 258


@pytest.fixture
def tokenizer(byte_tokenizer):
    return Tokenizer(byte_tokenizer)


class Asked:
    """A request and everything that was said about it."""

    def __init__(self, tokenizer, prompt, *, stop=(), sender=None, guide=None, adapter=None, **generation):
        self.events = []
        self.done = threading.Event()
        options = {"max_tokens": 10, "sampling": Sampling(temperature=0)} | generation
        self.request = Request(
            np.array(prompt),
            Generation(**options),
            text=TextStream(tokenizer, stop=stop),
            receive=self._receive,
            sender=sender,
            guide=guide,
            adapter=adapter,
        )

    def _receive(self, event):
        self.events.append(event)
        if event.finish:
            self.done.set()

    @property
    def tokens(self):
        return [event.token for event in self.events if event.token is not None]

    @property
    def text(self):
        return "".join(event.text for event in self.events)

    @property
    def finish(self):
        return self.events[-1].finish if self.events else None


def backend(slots=4, **options):
    return ToyBackend(toy_engine(vocab_size=VOCAB, capacity=96), slots=slots, **options)


def run(engine, *asked):
    for one in asked:
        engine.submit(one.request)
    while engine.step():
        pass


def greedy(prompt, count, **options):
    """A plain loop without slots, batches or chunks."""
    ids = list(prompt)
    for _ in range(count):
        fresh = ToyBackend(toy_engine(vocab_size=VOCAB, capacity=96, max_chunk=96), slots=1)
        ids.append(int(fresh.prefill(0, np.array(ids), 0, np.array([len(ids) - 1]))[0].argmax()))
    return ids[len(prompt) :]


def test_greedy_answers_are_those_of_a_plain_loop(tokenizer):
    asked = Asked(tokenizer, [5, 6, 7], max_tokens=12)
    run(Engine(backend()), asked)
    assert asked.tokens == greedy([5, 6, 7], 12)
    assert asked.finish == "length"


@pytest.mark.parametrize("seed", range(10))
def test_requests_in_parallel_answer_as_they_do_alone(tokenizer, seed):
    rng = random.Random(seed)

    def one(i):
        r = random.Random(1000 * seed + i)
        prompt = [r.randrange(VOCAB) for _ in range(r.choice([1, 2, 17, 40, r.randint(1, 60)]))]
        sampling = Sampling(temperature=r.choice([0, 1.0]), top_k=r.choice([0, 5]), seed=i, logprobs=2)
        return Asked(tokenizer, prompt, max_tokens=r.randint(1, 20), sampling=sampling, stop_ids=frozenset({7, 8}))

    together = [one(i) for i in range(15)]
    engine, waiting = Engine(backend(slots=rng.randint(1, 5))), list(together)
    while waiting or engine.step():
        for _ in range(min(len(waiting), rng.randint(0, 3))):
            engine.submit(waiting.pop(0).request)
        if waiting:
            engine.step()
    for i, asked in enumerate(together):
        alone = one(i)
        run(Engine(backend(slots=1)), alone)
        assert alone.tokens == asked.tokens
        assert [e.logprob for e in alone.events] == [e.logprob for e in asked.events]
        assert (alone.text, alone.finish) == (asked.text, asked.finish)


def test_a_stop_token_ends_the_answer_and_is_not_in_its_text(tokenizer):
    expected = greedy([1, 2], 10)
    asked = Asked(tokenizer, [1, 2], stop_ids=frozenset({expected[4]}))
    run(Engine(backend()), asked)
    assert asked.tokens == expected[:5]
    assert asked.finish == "stop"
    stream = TextStream(tokenizer)
    assert asked.text == "".join(stream.push(token) for token in expected[:4]) + stream.finish()


def test_min_tokens_blocks_stop_tokens(tokenizer):
    first = greedy([1, 2], 1)[0]
    asked = Asked(tokenizer, [1, 2], stop_ids=frozenset({first}), min_tokens=3)
    run(Engine(backend()), asked)
    assert len(asked.tokens) >= 3
    assert first not in asked.tokens[:3]


def test_a_stop_string_ends_the_answer(tokenizer):
    free = Asked(tokenizer, [9, 9], max_tokens=40)
    run(Engine(backend()), free)
    stop = free.text[5:7]
    asked = Asked(tokenizer, [9, 9], max_tokens=40, stop=[stop])
    run(Engine(backend()), asked)
    assert asked.text == free.text[: free.text.index(stop)]
    assert asked.finish == "stop"


def test_a_prompt_is_scored_like_by_one_call(tokenizer):
    prompt = [random.Random(3).randrange(VOCAB) for _ in range(50)]
    asked = Asked(tokenizer, prompt, max_tokens=0, prompt_logprobs=2)
    run(Engine(backend()), asked)
    whole = ToyBackend(toy_engine(vocab_size=VOCAB, capacity=96, max_chunk=96), slots=1)
    logits = whole.prefill(0, np.array(prompt), 0, np.arange(49))
    assert asked.request.prompt_logprobs == score(logits, np.array(prompt[1:]), 2)
    assert (asked.tokens, asked.finish) == ([], "length")


def test_what_does_not_fit_is_refused_and_what_just_fits_is_served(tokenizer):
    engine = Engine(backend())
    with pytest.raises(ContextLengthError, match="the context has 96 tokens, but the prompt has 90"):
        engine.submit(Asked(tokenizer, [1] * 90, max_tokens=7).request)
    asked = Asked(tokenizer, [1] * 90, max_tokens=6)
    run(engine, asked)
    assert len(asked.tokens) == 6


def test_cancelling_frees_the_slot_in_the_same_step(tokenizer):
    engine = Engine(backend(slots=1))
    first, second = Asked(tokenizer, [1, 2], max_tokens=50), Asked(tokenizer, [3, 4])
    engine.submit(first.request)
    engine.submit(second.request)
    engine.step()
    assert second.events == []
    engine.cancel(first.request)
    engine.step()
    assert first.finish == "abort"
    assert len(second.tokens) == 1
    run(engine)
    assert second.tokens == greedy([3, 4], 10)


def test_cancelling_what_has_ended_does_nothing(tokenizer):
    engine, asked = Engine(backend()), Asked(tokenizer, [1, 2])
    run(engine, asked)
    engine.cancel(asked.request)
    engine.step()
    assert asked.finish == "length"


class Failing:
    """Raises in the n-th run of a kind."""

    def __init__(self, kind, at, error=ExecutionError):
        self.kind, self.left, self.error = kind, at, error

    def __call__(self, kind, slots):
        if kind == self.kind:
            self.left -= 1
            if self.left == 0:
                raise self.error("broken")


def test_a_failing_prefill_ends_one_request_alone(tokenizer):
    asked = [Asked(tokenizer, [i, 2, 3]) for i in range(4)]
    run(Engine(backend(before_run=Failing("prefill", 2))), *asked)
    assert [one.finish for one in asked] == ["length", "error", "length", "length"]
    assert asked[1].events[-1].error == "broken"
    for i in (0, 2, 3):
        assert asked[i].tokens == greedy([i, 2, 3], 10)


def test_a_failing_decode_ends_its_rows_and_the_prompt_being_written_goes_on(tokenizer):
    engine = Engine(backend(before_run=Failing("decode", 2)))
    short, long = Asked(tokenizer, [1, 2, 3]), Asked(tokenizer, list(range(60)))
    run(engine, short, long)
    assert short.finish == "error"
    assert long.tokens == greedy(range(60), 10)


def test_logits_that_are_no_numbers_end_their_request(tokenizer):
    broken = backend()
    decode = broken.decode

    def half_broken(ids, lengths):
        logits = decode(ids, lengths)
        logits[0, 3] = np.nan
        return logits

    broken.decode = half_broken
    asked = [Asked(tokenizer, [1, 2, 3]), Asked(tokenizer, [4, 5, 6], max_tokens=2)]
    run(Engine(broken), *asked)
    assert [one.finish for one in asked] == ["error", "length"]


def test_the_thread_serves_and_stops(tokenizer):
    engine, asked = Engine(backend()), [Asked(tokenizer, [i, 1]) for i in range(6)]
    engine.start()
    for one in asked:
        engine.submit(one.request)
    for i, one in enumerate(asked):
        assert one.done.wait(10)
        assert one.tokens == greedy([i, 1], 10)
    engine.stop()
    assert not engine.is_alive
    with pytest.raises(EngineClosedError):
        engine.submit(asked[0].request)


def test_a_stop_behind_other_messages_is_obeyed(tokenizer):
    engine, asked = Engine(backend()), Asked(tokenizer, [1, 2])
    engine.cancel(asked.request)
    engine._inbox.put(("stop", None))
    engine.start()
    engine._thread.join(10)
    assert not engine.is_alive


def test_stopping_aborts_what_runs(tokenizer):
    started, go = threading.Event(), threading.Event()

    def wait(kind, slots):
        started.set()
        go.wait(10)

    engine, asked = Engine(backend(before_run=wait)), Asked(tokenizer, [1, 2])
    engine.start()
    engine.submit(asked.request)
    assert started.wait(10)
    assert engine.seconds_in_step > 0
    threading.Timer(0.05, go.set).start()
    engine.stop()
    assert asked.finish == "abort"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_ends_all_requests_and_the_engine(tokenizer):
    engine = Engine(backend(before_run=Failing("decode", 3, error=ZeroDivisionError)))
    asked = [Asked(tokenizer, [i, 1]) for i in range(6)]
    engine.start()
    for one in asked:
        try:
            engine.submit(one.request)
        except EngineClosedError:
            one.done.set()
    assert all(one.done.wait(10) for one in asked)
    assert {one.finish for one in asked} <= {"error", None}
    assert asked[0].events[-1].error == "the engine stopped: broken"
    engine.stop()
    assert not engine.is_alive


def shared_prompt(rng):
    beginning = [rng.randrange(3)] * rng.choice([0, 20, 30])
    return beginning + [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, rng.randint(1, 30)]))]


@pytest.mark.parametrize("seed", range(12))
def test_answers_do_not_depend_on_what_was_shared_or_cancelled(tokenizer, seed):
    rng = random.Random(seed)
    slots = rng.randint(1, 6)
    policy = Policy(running=rng.randint(1, slots), is_exact=seed % 3 > 0, target=rng.choice([0, 1e-6]))

    def one(i):
        r = random.Random(1000 * seed + i)
        sampling = Sampling(temperature=r.choice([0, 1.0]), seed=i)
        sender = Sender(tenant=r.choice("ab"), priority=r.randint(-1, 1), cache_salt=r.choice(["", "", "x"]))
        return Asked(tokenizer, shared_prompt(r), max_tokens=r.randint(1, 20), sampling=sampling, sender=sender)

    together, engine, cached = [one(i) for i in range(40)], Engine(backend(slots=slots), policy=policy), 0
    waiting, cancelled = list(together), set()
    while waiting or engine.step():
        for _ in range(min(len(waiting), rng.randint(0, 3))):
            engine.submit(waiting.pop(0).request)
        if rng.random() < 0.1:
            gone = rng.choice(together)
            engine.cancel(gone.request)
            cancelled.add(gone)
        if waiting:
            engine.step()
    for i, asked in enumerate(together):
        cached += asked.request.cached_tokens
        alone = one(i)
        run(Engine(backend(slots=1)), alone)
        if asked in cancelled and asked.finish == "abort":
            assert asked.tokens == alone.tokens[: len(asked.tokens)]
        else:
            assert (alone.tokens, alone.text, alone.finish) == (asked.tokens, asked.text, asked.finish)
    assert engine.statistics.cached_tokens <= cached
    assert slots == 1 or cached > 0


def test_a_second_turn_reads_only_what_is_new_where_answers_may_be_shared(tokenizer):
    first = Asked(tokenizer, list(range(30)), max_tokens=8)
    engine = Engine(backend(slots=2), policy=Policy(is_exact=False))
    run(engine, first)
    second = Asked(tokenizer, [*range(30), *first.tokens, 1, 2, 3, 4], max_tokens=4)
    run(engine, second)
    assert second.request.cached_tokens == 30 + 7  # the last token of an answer is never written
    assert second.tokens == greedy([*range(30), *first.tokens, 1, 2, 3, 4], 4)


def test_an_exact_second_turn_shares_the_first_prompt_alone(tokenizer):
    first = Asked(tokenizer, list(range(30)), max_tokens=8)
    engine = Engine(backend(slots=2))
    run(engine, first)
    second = Asked(tokenizer, [*range(30), *first.tokens, 1, 2, 3, 4], max_tokens=4)
    run(engine, second)
    assert second.request.cached_tokens == 30


def test_a_request_ends_when_its_time_is_over(tokenizer):
    asked = Asked(tokenizer, [1, 2], max_tokens=50, sender=Sender(timeout=0.0))
    other = Asked(tokenizer, [1, 2], max_tokens=5)
    engine = Engine(backend())
    run(engine, asked, other)
    assert (asked.finish, other.finish) == ("timeout", "length")
    assert engine.statistics.finished == {"timeout": 1, "length": 1}


def test_too_many_requests_or_tokens_are_refused(tokenizer):
    engine = Engine(backend(), limits=QueueLimits(requests=2, tokens=40))
    large = Asked(tokenizer, [1] * 30, max_tokens=50)
    engine.submit(large.request)  # alone it may be larger than the limit
    with pytest.raises(QueueFullError) as caught:
        engine.submit(Asked(tokenizer, [1], max_tokens=1).request)
    assert caught.value.retry_after >= 1
    run(engine)
    for _ in range(2):
        engine.submit(Asked(tokenizer, [1], max_tokens=1).request)
    with pytest.raises(QueueFullError, match="2 sequences"):
        engine.submit(Asked(tokenizer, [1], max_tokens=1).request)


@pytest.mark.parametrize(
    ("prompt", "words"), [([], "empty"), ([VOCAB], "the model has 0 .. 257"), ([-1], "the model has 0 .. 257")]
)
def test_prompts_that_make_no_sense_are_refused(tokenizer, prompt, words):
    with pytest.raises(InputError, match=words):
        Engine(backend()).submit(Asked(tokenizer, prompt).request)


class Counting:
    """Allows one token after the other, and is complete at the fifth."""

    words = (VOCAB + 31) // 32

    def __init__(self, first=40, broken_at=None):
        self.next, self.last, self.broken_at = first, first + 5, broken_at

    @property
    def is_complete(self):
        return self.next == self.last

    def fill(self, mask):
        if self.next == self.broken_at:
            raise InputError("a broken guide")
        mask[:] = 0
        mask[self.next // 32] = np.uint32(1 << self.next % 32).astype(np.int32)

    def accept(self, token):
        assert token == self.next
        self.next += 1


def test_a_guided_answer_obeys_and_ends_when_it_is_complete(tokenizer):
    guided = Asked(tokenizer, [1, 2, 3], guide=Counting(), min_tokens=8, stop_ids=frozenset({257}))
    free = Asked(tokenizer, [1, 2, 3])
    run(Engine(backend()), guided, free)
    assert (guided.tokens, guided.finish) == ([40, 41, 42, 43, 44], "stop")
    assert free.tokens == greedy([1, 2, 3], 10)


def test_a_broken_guide_ends_its_request_alone(tokenizer):
    guided, free = Asked(tokenizer, [1, 2, 3], guide=Counting(broken_at=42)), Asked(tokenizer, [1, 2, 3])
    run(Engine(backend()), guided, free)
    assert (guided.tokens, guided.finish, guided.events[-1].error) == ([40, 41], "error", "a broken guide")
    assert free.finish == "length"


class Knowing:
    """Guesses what the toy will say, with a mistake now and then."""

    most_sequences = 2

    def __init__(self):
        self.guesses = 0

    def propose(self, ids, most):
        self.guesses += 1
        right = greedy(list(ids), most)
        if self.guesses % 3 == 0:
            right[-1] = (right[-1] + 1) % VOCAB
        return right


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_change_nothing_but_the_number_of_steps(tokenizer, temperature):
    def ask():
        sampling = Sampling(temperature=temperature, seed=5, logprobs=1)
        return [Asked(tokenizer, [1 + i] * 20, max_tokens=20, sampling=sampling) for i in range(2)]

    plain, guessed = ask(), ask()
    slow = Engine(backend())
    run(slow, *plain)
    policy = Policy(is_exact=False, speculation=Speculation(Knowing(), tokens=4))
    fast = Engine(backend(), policy=policy)
    fast._runner._policy.speculation.note_decode(1, 100.0)
    fast._runner._policy.speculation.note_decode(2, 100.0)
    run(fast, *guessed)
    for one, other in zip(plain, guessed, strict=True):
        assert one.tokens == other.tokens
        assert [event.logprob for event in one.events] == [event.logprob for event in other.events]
    assert fast.statistics.generated_tokens == slow.statistics.generated_tokens
    if temperature == 0:
        assert fast.statistics.steps < slow.statistics.steps / 2
        assert 0 < fast.statistics.accepted_tokens < fast.statistics.drafted_tokens


def test_a_drafter_that_fails_costs_nothing_but_its_guesses(tokenizer, caplog):
    class Broken(Knowing):
        def propose(self, ids, most):
            raise ExecutionError("no memory")

    asked = Asked(tokenizer, [1, 2], max_tokens=5)
    run(Engine(backend(), policy=Policy(is_exact=False, speculation=Speculation(Broken()))), asked)
    assert asked.tokens == greedy([1, 2], 5)
    assert "no tokens are guessed in this step: no memory" in caplog.text


def test_guessing_needs_leave_to_depend_on_the_load():
    with pytest.raises(InputError, match="speculation"):
        Policy(speculation=Speculation(Knowing()))


def test_a_first_token_is_told_before_the_others_go_on(tokenizer):
    told = []
    engine = Engine(
        backend(before_run=lambda kind, slots: told.append(kind)), deliver=lambda events: told.append("told")
    )
    for prompt in ([1, 2], [3, 4]):
        engine.submit(Asked(tokenizer, prompt, max_tokens=9).request)
        engine.step()
    assert told == ["prefill", "told", "prefill", "told", "decode", "told"]


def test_what_shares_a_prompt_whose_run_failed_fails_too(tokenizer):
    def broken(kind, slots):
        if kind == "prefill" and slots.start == 0:
            raise ExecutionError("broken")

    engine = Engine(ToyBackend(toy_engine(vocab_size=VOCAB, capacity=96, max_chunk=96), slots=4, before_run=broken))
    first, second = (Asked(tokenizer, [7] * 30 + tail) for tail in ([], [1]))
    run(engine, first, second)
    assert (first.finish, second.finish) == ("error", "error")
    assert "shares" in second.events[-1].error


def test_what_was_done_is_counted(tokenizer):
    engine = Engine(backend(slots=2))
    run(engine, Asked(tokenizer, [3] * 40, max_tokens=5), Asked(tokenizer, [3] * 40, max_tokens=5))
    counted = engine.statistics
    assert (counted.prompt_tokens, counted.cached_tokens, counted.generated_tokens) == (80, 38, 10)
    assert (counted.running, counted.waiting, counted.held_tokens) == (0, 0, 0)
    assert counted.step_seconds >= counted.prefill_seconds + counted.decode_seconds > 0


@pytest.fixture
def adapter_of(tmp_path):
    """``adapter_of(name, number)``: an adapter of the toy, which is a number."""

    def make(name, number):
        factors = ModuleFactors(np.array([[number]], np.float32), np.zeros((1, 1), np.float32))
        return write_adapter(name, tmp_path / f"{name}.safetensors", {"toy": factors})

    return make


def adapted_backend(adapters=2, slots=4, **options):
    return ToyBackend(toy_engine(vocab_size=VOCAB, capacity=96, adapters=adapters), slots=slots, **options)


def alone(tokenizer, prompt, adapter, **options):
    """What an engine answers that has nothing else to do."""
    engine, asked = Engine(adapted_backend()), Asked(tokenizer, prompt, adapter=adapter, **options)
    engine.submit(asked.request)
    while engine.step():
        pass
    return asked.tokens


def test_more_adapters_than_slots_answer_as_if_each_were_alone(tokenizer, adapter_of):
    adapters = [None, *(adapter_of(f"a{number}", number) for number in range(1, 6))]
    rng = random.Random(0)
    # Many begin alike, and few with one adapter.
    prompts = [[*range(30), *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 30)))] for _ in range(40)]
    engine = Engine(adapted_backend(adapters=2))
    asked = [Asked(tokenizer, prompt, adapter=adapters[i % 6]) for i, prompt in enumerate(prompts)]
    for each in asked:
        engine.submit(each.request)
        engine.step()
    while engine.step():
        assert engine.statistics.adapters_in_use <= 2
    for i, (each, prompt) in enumerate(zip(asked, prompts, strict=True)):
        assert each.tokens == alone(tokenizer, prompt, adapters[i % 6])
    statistics = engine.statistics
    assert statistics.cached_tokens > 0
    assert statistics.adapter_loads >= 5
    assert statistics.adapter_requests == {f"a{number}": 7 if number < 4 else 6 for number in range(1, 6)}


def test_what_was_computed_with_one_adapter_is_not_begun_with_by_another(tokenizer, adapter_of):
    first, second = adapter_of("first", 1), adapter_of("second", 2)
    engine, prompt = Engine(adapted_backend()), list(range(40))
    found = []
    for adapter in (None, first, second, first, None):
        asked = Asked(tokenizer, prompt, adapter=adapter)
        engine.submit(asked.request)
        while engine.step():
            pass
        assert asked.tokens == alone(tokenizer, prompt, adapter)
        found.append(asked.request.cached_tokens)
    assert found[:3] == [0, 0, 0]
    assert min(found[3:]) > 30


def test_an_adapter_that_cannot_be_read_ends_its_own_requests(tokenizer, adapter_of):
    broken, sound = adapter_of("broken", 1), adapter_of("sound", 2)
    content = broken.path.read_bytes()
    broken.path.write_bytes(content[:-4] + b"oops")
    engine = Engine(adapted_backend())
    asked = [
        Asked(tokenizer, [1, 2, 3, number], adapter=each) for number, each in enumerate((broken, broken, sound, None))
    ]
    for each in asked:
        engine.submit(each.request)
    while engine.step():
        pass
    assert [each.finish for each in asked] == ["error", "error", "length", "length"]
    assert "was changed since it was added" in asked[0].events[-1].error
    broken.path.write_bytes(content)
    again = Asked(tokenizer, [1, 2, 3], adapter=broken)
    engine.submit(again.request)
    while engine.step():
        pass
    assert again.tokens == alone(tokenizer, [1, 2, 3], broken)


def test_an_engine_that_takes_no_adapters_refuses_requests_with_one(tokenizer, adapter_of):
    with pytest.raises(InputError, match="takes no adapters"):
        Engine(backend()).submit(Asked(tokenizer, [1], adapter=adapter_of("a", 1)).request)


def test_guessed_tokens_are_verified_with_the_adapter(tokenizer, adapter_of):
    class Fives:
        most_sequences = 2

        def propose(self, ids, most):
            return [5] * most

    adapter, prompt = adapter_of("a", 3), [1, 2, 3, 4] * 6
    guessed = Speculation(Fives())
    engine = Engine(adapted_backend(), policy=Policy(is_exact=False, speculation=guessed))
    asked = [Asked(tokenizer, prompt, adapter=each, max_tokens=30) for each in (adapter, None)]
    for each in asked:
        engine.submit(each.request)
        while engine.step():
            pass
    assert engine.statistics.drafted_tokens > 0
    assert [each.tokens for each in asked] == [
        alone(tokenizer, prompt, each, max_tokens=30) for each in (adapter, None)
    ]


def test_an_engine_knows_which_adapters_are_in_use(tokenizer, adapter_of):
    adapter, engine = adapter_of("a", 1), Engine(adapted_backend())
    asked = Asked(tokenizer, [1, 2], adapter=adapter)
    assert not engine.uses(adapter)
    engine.submit(asked.request)
    assert engine.uses(adapter)
    while engine.step():
        pass
    assert not engine.uses(adapter)
