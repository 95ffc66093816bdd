import numpy as np
import pytest

from llmopt.runtime.backends.toy import ToyBackend, toy_engine
from llmopt.runtime.speculation import DraftEngine, PromptLookup, Speculation


def lookup(ids, most=4, **options):
    return list(PromptLookup(**options).propose(np.array(ids), most))


def test_what_followed_before_is_guessed_again():
    assert lookup([1, 2, 3, 4, 5, 6, 9, 1, 2]) == [3, 4, 5, 6]


def test_longer_matches_come_first():
    assert lookup([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3], most=1) == [7]


def test_the_latest_place_with_enough_behind_it_is_taken():
    assert lookup([1, 2, 7, 7, 1, 2, 8, 8, 1, 2], most=2) == [8, 8]
    assert lookup([1, 2, 7, 7, 1, 2], most=4) == [7, 7, 1, 2]


def test_nothing_is_guessed_where_nothing_is_alike():
    assert lookup([1, 2, 3, 4]) == []
    assert lookup([1]) == []


def test_a_text_that_repeats_one_token_is_continued():
    assert lookup([5, 5, 5, 5], most=2) == [5]


def greedy(backend, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(backend.prefill(0, np.array(ids), 0, np.array([len(ids) - 1]))[0].argmax()))
    return ids[-count:]


def test_a_smaller_model_guesses_what_it_would_say():
    drafter = DraftEngine(ToyBackend(toy_engine(max_chunk=16), slots=1))
    plain = ToyBackend(toy_engine(max_chunk=128), slots=1)
    ids = list(range(20))
    for _ in range(5):
        assert drafter.propose(np.array(ids), 3) == greedy(plain, ids, 3)
        ids += [*greedy(plain, ids, 2), 7]  # two guesses were right, the third was not
    other = [9, 8, 7]
    assert drafter.propose(np.array(other), 2) == greedy(plain, other, 2)


def test_a_smaller_model_reads_only_what_is_new():
    read = []
    backend = ToyBackend(toy_engine(max_chunk=16), slots=1)
    prefill = backend.prefill
    backend.prefill = lambda slot, ids, start, rows: read.append((start, len(ids))) or prefill(slot, ids, start, rows)
    drafter = DraftEngine(backend)
    ids = list(range(10))
    guess = drafter.propose(np.array(ids), 3)
    drafter.propose(np.array([*ids, guess[0], guess[1], 5]), 3)
    assert read == [(0, 10), (12, 1)]


def test_a_smaller_model_with_a_short_context_guesses_less():
    drafter = DraftEngine(ToyBackend(toy_engine(capacity=12), slots=1))
    assert len(drafter.propose(np.arange(10), 5)) == 2
    assert drafter.propose(np.arange(12), 5) == []


def measured(**options):
    speculation = Speculation(PromptLookup(), **options)
    for count in (1, 2, 3):
        speculation.note_decode(count, 0.01 * (1 + 0.1 * count))
    return speculation


def test_decoding_is_measured_before_anything_is_guessed():
    speculation = Speculation(PromptLookup())
    assert not speculation.pays(1)
    speculation.note_decode(1, 0.01)
    assert speculation.pays(1)


def test_it_pays_where_it_yields_more_tokens_a_second():
    speculation = measured()
    speculation.note_verify(3.0, 0.015)  # 200 tokens/s; decoding yields 91 alone and 167 for two
    assert speculation.pays(1)
    assert speculation.pays(2)
    assert not speculation.pays(3)


def test_it_never_pays_for_more_than_the_drafter_can_follow():
    speculation = Speculation(PromptLookup(most_sequences=1))
    speculation.note_decode(2, 100.0)
    assert not speculation.pays(2)
    assert not speculation.pays(0)


def test_what_does_not_pay_is_tried_again_from_time_to_time():
    speculation = measured()
    speculation.note_verify(1.0, 0.05)
    tries = [speculation.pays(1) for _ in range(200)]
    assert 0 < sum(tries) < 5


def test_guesses_that_are_right_make_up_for_the_time():
    speculation = measured()
    for _ in range(60):
        speculation.note_verify(1.0, 0.02)
    assert not speculation.pays(1)
    for _ in range(60):
        speculation.note_verify(4.0, 0.02)
    assert speculation.pays(1)
    assert speculation._gained == pytest.approx(4.0, abs=0.1)
