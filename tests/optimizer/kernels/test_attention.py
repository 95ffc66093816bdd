"""Attention over the cache: the numbers of a plain double precision one, and the same bits in every chunk and batch."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmopt.optimizer import kernels

CLOSE = 1e-5
"""Of values around 1: sums of up to 200 products of float32, and exponentials off by 2e-7."""


@pytest.fixture
def attend(run_kernel):
    """``attend(feeds, heads=6, kv_heads=2, packed=False, ...)``: output and both caches."""

    def call(feeds: Mapping[str, np.ndarray], *, heads=6, kv_heads=2, packed=False, threads=2, **attributes: Any):
        int8 = feeds["past_key"].dtype == np.int8
        inputs = [feeds["query"], feeds["key"], feeds["value"]]
        if packed:
            inputs = [np.concatenate(inputs, axis=2), None, None]
        total = np.array(feeds["last"].max() + 1, np.int32)
        inputs += [feeds["past_key"], feeds["past_value"], feeds["last"], total]
        if "cosines" in feeds:
            inputs += [feeds["cosines"], feeds["sines"]]
            attributes["do_rotary"] = 1
        if int8:
            inputs += [None] * (12 - len(inputs)) + [feeds["key_scale"], feeds["value_scale"]]
        name = "GroupQueryAttentionInt8" if int8 else "GroupQueryAttention"
        dtypes = [np.float32] + [feeds["past_key"].dtype] * 2
        attributes |= {"num_heads": heads, "kv_num_heads": kv_heads}
        return run_kernel(name, inputs, dtypes, threads=threads, **attributes)

    return call


def plain(feeds, *, heads=6, kv_heads=2, window=None, softcap=0.0, scale=None):
    """Token by token, head by head, in float64."""
    batch, tokens = feeds["query"].shape[:2]
    columns = feeds["past_key"].shape[3]
    scale = columns**-0.5 if scale is None else scale
    caches = [feeds[f"past_{kind}"].copy() for kind in ("key", "value")]
    output = np.zeros((batch, tokens, heads * columns))
    for b in range(batch):
        for t in range(tokens):
            place = feeds["last"][b] + 1 - tokens + t
            for cache, kind in zip(caches, ("key", "value"), strict=True):
                for head, x in enumerate(feeds[kind][b, t].reshape(kv_heads, columns)):
                    cache[b, head, place] = stored(feeds, kind, head, turned(feeds, x, place) if kind == "key" else x)
    for b in range(batch):
        for t in range(tokens):
            place = feeds["last"][b] + 1 - tokens + t
            first = 0 if window is None else max(0, place - window + 1)
            for head, x in enumerate(feeds["query"][b, t].reshape(heads, columns)):
                seen = [
                    loaded(feeds, kind, head * kv_heads // heads, cache[b, head * kv_heads // heads, first : place + 1])
                    for cache, kind in zip(caches, ("key", "value"), strict=True)
                ]
                scores = seen[0] @ turned(feeds, x, place) * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                output[b, t, head * columns : (head + 1) * columns] = weights @ seen[1] / weights.sum()
    return output, *caches


def turned(feeds, x, position):
    if "cosines" not in feeds:
        return x
    cosines, sines = feeds["cosines"][position], feeds["sines"][position]
    half = len(cosines)
    a, b = x[:half], x[half : 2 * half]
    return np.concatenate([a * cosines - b * sines, b * cosines + a * sines, x[2 * half :]])


def stored(feeds, kind, head, x):
    if f"{kind}_scale" not in feeds:
        return x
    scale = feeds[f"{kind}_scale"].reshape(-1, len(x))[head]
    return np.clip(np.rint(x / scale), -128, 127)


def loaded(feeds, kind, head, cache):
    if f"{kind}_scale" not in feeds:
        return cache.astype(np.float64)
    return cache.astype(np.float64) * feeds[f"{kind}_scale"].reshape(-1, cache.shape[1])[head]


def check(attend, feeds, *, heads=6, kv_heads=2, packed=False, **options):
    names = {"window": "local_window_size"}
    attributes = {names.get(name, name): value for name, value in options.items()}
    found = attend(feeds, heads=heads, kv_heads=kv_heads, packed=packed, **attributes)
    expected = plain(feeds, heads=heads, kv_heads=kv_heads, **options)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=CLOSE)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("past", "tokens"), [([70], 100), ([0], 130), ([0, 60, 128], 1), ([3, 90], 7)])
def test_output_and_caches_are_those_of_a_plain_attention(attend, feeds, past, tokens, int8):
    check(attend, feeds(past, tokens, int8=int8))


@pytest.mark.parametrize("columns", [8, 24, 80, 128])
@pytest.mark.parametrize("int8", [False, True])
def test_heads_of_any_width(attend, feeds, columns, int8):
    check(attend, feeds([50], 20, columns=columns, rotated=8, int8=int8))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (14, 2), (9, 3), (60, 1)])
def test_any_number_of_queries_share_a_key(attend, feeds, heads, kv_heads):
    check(attend, feeds([40], 9, heads=heads, kv_heads=kv_heads), heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_a_window_hides_what_lies_before_it(attend, feeds, window):
    check(attend, feeds([90], 70), window=window)
    check(attend, feeds([150, 3], 1), window=window)


def test_scale_soft_cap_and_packed_inputs(attend, feeds):
    check(attend, feeds([20], 70), scale=0.5, softcap=2.0, packed=True)
    check(attend, feeds([20], 70, rotated=0, int8=True), packed=True)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"local_window_size": 33}])
def test_a_token_has_the_same_bits_in_every_chunk(attend, feeds, int8, options):
    whole = feeds([0], 150, int8=int8)
    expected = attend(whole, **options)
    for sizes in ([1] * 150, [64, 64, 22], [2, 129, 19], [63, 1, 1, 85]):
        caches, parts, first = [whole["past_key"], whole["past_value"]], [], 0
        for size in sizes:
            chunk = {**whole, "past_key": caches[0], "past_value": caches[1]}
            chunk |= {name: whole[name][:, first : first + size] for name in ("query", "key", "value")}
            first += size
            chunk["last"] = np.array([first - 1], np.int32)
            output, *caches = attend(chunk, **options)
            parts.append(output)
        assert np.array_equal(np.concatenate(parts, axis=1), expected[0]), sizes
        assert all(np.array_equal(one, other) for one, other in zip(caches, expected[1:], strict=True))


@pytest.mark.parametrize("int8", [False, True])
def test_a_sequence_has_the_same_bits_in_every_batch(attend, feeds, int8):
    together = feeds([0, 7, 64, 130, 199], 1, int8=int8)
    expected = attend(together)
    for row in range(5):
        alone = {name: array[row : row + 1] if len(array) == 5 else array for name, array in together.items()}
        assert np.array_equal(attend(alone, threads=1)[0], expected[0][row : row + 1])


def test_what_was_in_a_slot_before_does_not_matter(attend, feeds):
    clean = feeds([30], 5)
    spoilt = {**clean, "past_key": clean["past_key"].copy(), "past_value": clean["past_value"].copy()}
    for name in ("past_key", "past_value"):
        spoilt[name][:, :, 35:] = np.nan
    assert np.array_equal(attend(spoilt)[0], attend(clean)[0])


def test_a_number_that_is_none_stays_visible(attend, feeds):
    spoilt = feeds([30], 1)
    spoilt["past_key"][0, 1, 10, 3] = np.nan
    output = attend(spoilt)[0].reshape(2, -1)
    assert np.isfinite(output[0]).all()
    assert np.isnan(output[1]).all()


@pytest.mark.parametrize("last", [200, 3, -1])
def test_tokens_beyond_the_cache_are_refused(attend, feeds, last):
    given = {**feeds([30], 5), "last": np.array([last], np.int32)}
    with pytest.raises(Exception, match=rf"a sequence of {last + 1} tokens, 5 of them new, does not fit"):
        attend(given)


def test_shapes_that_do_not_fit_together_are_refused(attend, feeds):
    given = feeds([30], 5)
    for name, array, reason in (
        ("key", given["key"][:, :4], "keys, values or lengths do not fit the queries"),
        ("query", given["query"][:, :, :64], "the query does not have the columns of its heads"),
        ("past_value", given["past_value"][:, :1], "shapes of query and cache do not fit together"),
        ("sines", given["sines"][:, :4], "the tables of cosines and sines do not fit the heads"),
    ):
        with pytest.raises(Exception, match=reason):
            attend({**given, name: array})


@pytest.mark.skipif("LLMOPT_KERNELS" in os.environ, reason="this is the run that the test starts")
@pytest.mark.parametrize("lesser", ["avx2", "plain"])
def test_other_instructions_pass_the_same_tests(lesser):
    asked = {**os.environ, "LLMOPT_KERNELS": lesser}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    process = subprocess.run(command, env=asked, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout[-3000:]


def test_the_instructions_asked_for_are_used():
    assert kernels.instructions() in (os.environ.get("LLMOPT_KERNELS") or ("avx512", "avx2", "plain"))
