import math

import numpy as np
import pytest

from llmopt.runtime.sampler import Row, Sampling, sample, score

VOCAB = 300


@pytest.fixture(params=["our kernel", "numpy"], autouse=True)
def _weights_of(request, monkeypatch):
    """Every test runs where llmopt has its library and where it has not."""
    if request.param == "numpy":
        monkeypatch.setattr("llmopt.runtime.sampler.weigh_logits", lambda logits, temperatures: None)


def naive(logits, sampling, prompt, output, uniform, blocked=()):
    """One row at a time, sorting everything, in float64."""
    x = [float(v) for v in logits]
    for token in set(prompt) | set(output):
        x[token] = x[token] / sampling.repetition_penalty if x[token] > 0 else x[token] * sampling.repetition_penalty
    for token in set(output):
        x[token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    for token, bias in sampling.logit_bias.items():
        x[token] += bias
    for token in blocked:
        x[token] = -math.inf
    if sampling.temperature == 0:
        return x.index(max(x))
    highest = max(x)
    weights = [math.exp((v - highest) / sampling.temperature) for v in x]
    order = sorted(range(len(x)), key=lambda i: (-weights[i], i))
    kept = [i for i in order if weights[i] >= sampling.min_p]
    if 0 < sampling.top_k < len(x):
        kept = [i for i in kept if weights[i] >= weights[order[sampling.top_k - 1]]]
    if sampling.top_p < 1:
        total, held, nucleus = sum(weights[i] for i in kept), 0.0, []
        for i in kept:
            nucleus.append(i)
            held += weights[i]
            if held >= sampling.top_p * total:
                break
        kept = nucleus
    kept = sorted(kept)
    target, held = uniform * sum(weights[i] for i in kept), 0.0
    for i in kept:
        held += weights[i]
        if held > target:
            return i
    return kept[-1]


OPTIONS = [
    Sampling(temperature=0),
    Sampling(temperature=0, repetition_penalty=3.0),
    Sampling(temperature=0, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={7: 2.0, 11: -100.0}),
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=1.7, top_k=1),
    Sampling(temperature=1.7, top_k=20),
    Sampling(top_k=5000),
    Sampling(top_p=0.9),
    Sampling(top_p=1e-6),
    Sampling(temperature=2.0, min_p=0.1),
    Sampling(temperature=1.3, top_k=40, top_p=0.7, min_p=0.01, repetition_penalty=1.2, logit_bias={3: 5.0}),
    Sampling(frequency_penalty=-0.7, presence_penalty=-0.2),
]


@pytest.mark.parametrize("trial", range(20))
def test_every_option_agrees_with_a_naive_sampler(trial):
    rng = np.random.default_rng(trial)
    logits = (rng.standard_normal((len(OPTIONS), VOCAB)) * 3).astype(np.float32)
    prompts = [rng.integers(0, VOCAB, 20) for _ in OPTIONS]
    outputs = [rng.integers(0, VOCAB, int(rng.integers(0, 30))).tolist() for _ in OPTIONS]
    options = [Sampling(**{f: getattr(o, f) for f in o.__slots__} | {"seed": trial}) for o in OPTIONS]
    rows = [Row(o, p, out) for o, p, out in zip(options, prompts, outputs, strict=True)]
    for row in rows[::2]:
        row.blocked = np.array([int(logits[0].argmax()), 5])
    uniform = np.random.Generator(np.random.Philox(trial)).random()
    before = logits.copy()
    tokens, _ = sample(logits, rows)
    expected = [
        naive(logits[i], options[i], prompts[i].tolist(), outputs[i], uniform, rows[i].blocked)
        for i in range(len(rows))
    ]
    assert tokens.tolist() == expected
    np.testing.assert_array_equal(logits, before)


def test_a_row_draws_the_same_alone_and_in_any_batch():
    rng = np.random.default_rng(1)
    options = [Sampling(**{f: getattr(o, f) for f in o.__slots__} | {"seed": 9, "logprobs": 3}) for o in OPTIONS]
    steps = [(rng.standard_normal((len(options), VOCAB)) * 2).astype(np.float32) for _ in range(8)]

    def run(picked):
        rows = [Row(options[i], np.arange(4), []) for i in picked]
        found = {i: [] for i in picked}
        for logits in steps:
            tokens, logprobs = sample(logits[picked], rows)
            for i, row, token, logprob in zip(picked, rows, tokens.tolist(), logprobs, strict=True):
                row.output.append(token)
                found[i].append((token, logprob))
        return found

    together, reverse = run(list(range(len(options)))), run(list(range(len(options)))[::-1])
    for i in range(len(options)):
        assert run([i])[i] == together[i] == reverse[i]


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draws = 4000
    rows = [Row(Sampling(seed=i), np.array([0]), []) for i in range(draws)]
    tokens, _ = sample(np.tile(logits, (draws, 1)), rows)
    shares = np.bincount(tokens, minlength=4) / draws
    # Four standard errors of a share of one half.
    np.testing.assert_allclose(shares, np.exp(logits), atol=4 * 0.5 / math.sqrt(draws))


def test_a_vanishing_temperature_is_greedy():
    logits = np.array([[1.0, 30.0, 2.0]], np.float32)
    assert sample(logits, [Row(Sampling(temperature=1e-30, seed=1), np.array([0]), [])])[0].tolist() == [1]


def test_top_k_keeps_ties():
    logits = np.array([[1.0, 2.0, 2.0, 2.0, 0.0]], np.float32)
    drawn = {int(sample(logits, [Row(Sampling(top_k=2, seed=s), np.array([0]), [])])[0][0]) for s in range(60)}
    assert drawn == {1, 2, 3}


def test_equal_seeds_give_equal_tokens_and_no_seed_gives_others():
    logits = np.zeros((1, VOCAB), np.float32)

    def tokens(seed):
        row = Row(Sampling(seed=seed), np.array([0]), [])
        return [int(sample(logits, [row])[0][0]) for _ in range(12)]

    assert tokens(3) == tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)


def test_logprobs_are_of_the_raw_logits():
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((1, VOCAB)).astype(np.float32)
    row = Row(Sampling(temperature=0, logprobs=4, logit_bias={9: 100.0}), np.array([0]), [])
    tokens, (entry,) = sample(logits, [row])
    exact = logits[0].astype(np.float64) - np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert tokens[0] == entry.token == 9
    # float32 logits, one float32 exponential per token.
    assert entry.logprob == pytest.approx(exact[9], abs=1e-5)
    best = np.argsort(-exact)[:4]
    assert [token for token, _ in entry.top] == best.tolist()
    np.testing.assert_allclose([value for _, value in entry.top], exact[best], atol=1e-5)


def test_a_token_has_one_value_as_chosen_and_among_the_best():
    logits = np.random.default_rng(3).standard_normal((5, VOCAB)).astype(np.float32)
    for entry in score(logits, logits.argmax(axis=1), 2):
        assert entry.logprob == entry.top[0][1]
        assert entry.token == entry.top[0][0]


def test_no_alternatives_are_named_when_none_are_asked_for():
    logits = np.zeros((1, VOCAB), np.float32)
    assert score(logits, np.array([4]), 0)[0].top == ()
    assert sample(logits, [Row(Sampling(), np.array([0]), [])])[1] == [None]
