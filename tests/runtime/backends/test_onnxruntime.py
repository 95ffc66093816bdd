import sys

import numpy as np
import pytest

from llmopt.optimizer.errors import InputError, MissingExtraError, UnsupportedError
from llmopt.runtime.backends import onnxruntime
from llmopt.runtime.backends.base import ExecutionError
from llmopt.runtime.backends.onnxruntime import OnnxRuntimeBackend, open_backend
from llmopt.runtime.backends.session import Provider, open_session
from llmopt.runtime.backends.slot_pool import GpuPool

# float32 against float64, one layer of width 64: a few hundred roundings of values around one.
TOLERANCE = 2e-4


def opened(tiny, *, slots=4, capacity=64):
    return open_backend(tiny.directory, tiny.engine, slots=slots, capacity=capacity, threads=1)


def all_rows(backend, slot, ids, start=0):
    return backend.prefill(slot, np.array(ids), start, np.arange(len(ids)))


def test_prefill_agrees_with_the_plain_layer(tiny_engine):
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    np.testing.assert_allclose(all_rows(opened(tiny_engine), 2, ids), tiny_engine.logits(ids), atol=TOLERANCE)


def test_chunks_of_two_or_more_give_the_bits_of_one_call(tiny_engine):
    backend, ids = opened(tiny_engine), list(range(17))
    whole = all_rows(backend, 0, ids)
    parts, start = [], 0
    for size in (5, 2, 7, 3):
        parts.append(all_rows(backend, 3, ids[start : start + size], start))
        start += size
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_decode_of_ragged_rows_continues_each_slot(tiny_engine):
    backend = opened(tiny_engine)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11, 12]]
    for slot, prompt in enumerate(prompts):
        all_rows(backend, slot, prompt)
    for step in range(3):
        fresh = np.array([20 + step, 30 + step, 40 + step])
        logits = backend.decode(fresh, np.array([len(p) for p in prompts]))
        prompts = [[*p, int(t)] for p, t in zip(prompts, fresh, strict=True)]
        expected = [tiny_engine.logits(p)[-1] for p in prompts]
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


def test_decode_of_a_row_does_not_depend_on_its_batch(tiny_engine):
    backend = opened(tiny_engine)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 9]]
    for slot, prompt in enumerate(prompts):
        all_rows(backend, slot, prompt)
    together = backend.decode(np.array([7, 7, 7]), np.array([3, 5, 2])).copy()
    alone = opened(tiny_engine)
    for row, prompt in enumerate(prompts):
        all_rows(alone, 0, prompt)
        np.testing.assert_array_equal(alone.decode(np.array([7]), np.array([len(prompt)]))[0], together[row])


def test_only_the_wanted_rows_are_returned(tiny_engine):
    backend, ids = opened(tiny_engine), np.array([3, 1, 4, 1, 5])
    whole = backend.prefill(0, ids, 0, np.arange(5))
    np.testing.assert_array_equal(backend.prefill(1, ids, 0, np.array([4, 1])), whole[[4, 1]])
    assert backend.prefill(1, ids, 0, np.array([], np.int64)).shape == (0, tiny_engine.engine.vocab_size)


def test_a_copied_prefix_continues_like_the_original(tiny_engine):
    backend = opened(tiny_engine)
    all_rows(backend, 2, [1, 2, 3, 4])
    backend.copy_prefix(2, 0, 4)
    np.testing.assert_allclose(
        backend.decode(np.array([5]), np.array([4]))[0], tiny_engine.logits([1, 2, 3, 4, 5])[-1], atol=TOLERANCE
    )


def test_a_full_slot_can_be_filled_to_the_last_token(tiny_engine):
    backend = opened(tiny_engine, slots=2, capacity=6)
    all_rows(backend, 0, [1, 2, 3, 4, 5])
    logits = backend.decode(np.array([6]), np.array([5]))
    np.testing.assert_allclose(logits[0], tiny_engine.logits([1, 2, 3, 4, 5, 6])[-1], atol=TOLERANCE)


def test_other_slots_are_left_alone(tiny_engine):
    backend = opened(tiny_engine)
    expected = all_rows(backend, 1, [1, 2, 3])
    all_rows(backend, 0, [9, 8, 7, 6])
    all_rows(backend, 2, [9, 8, 7, 6])
    backend.decode(np.array([5]), np.array([4]))
    np.testing.assert_array_equal(backend.prefill(1, np.array([2, 3]), 1, np.arange(2)), expected[1:])


def test_a_failing_run_is_an_execution_error_and_the_next_run_works(tiny_engine):
    backend = opened(tiny_engine)
    with pytest.raises(ExecutionError):
        backend.prefill(0, np.array([1, 2]), 0, np.array([77]))
    np.testing.assert_allclose(all_rows(backend, 0, [1, 2]), tiny_engine.logits([1, 2]), atol=TOLERANCE)


def test_a_context_beyond_the_engine_is_refused(tiny_engine):
    with pytest.raises(InputError, match="the engine has 96"):
        opened(tiny_engine, capacity=97)


def test_an_unknown_feature_is_refused(tiny_engine):
    engine = tiny_engine.engine.model_copy(update={"features": ["query_lengths"]})
    with pytest.raises(UnsupportedError, match="query_lengths"):
        open_backend(tiny_engine.directory, engine, slots=1, capacity=8, threads=1)


@pytest.mark.parametrize("host", ["avx2", "vnni"])
def test_an_engine_built_with_vnni_is_refused_where_its_products_would_overflow(tiny_engine, host, monkeypatch):
    monkeypatch.setattr("llmopt.runtime.backends.session.host_instructions", lambda: host)
    engine = tiny_engine.engine.model_copy(update={"features": ["vnni"]})
    if host == "vnni":
        assert open_backend(tiny_engine.directory, engine, slots=1, capacity=8, threads=1).capacity == 8
        return
    with pytest.raises(UnsupportedError, match="integer products would overflow"):
        open_backend(tiny_engine.directory, engine, slots=1, capacity=8, threads=1)


def test_a_manifest_that_describes_another_engine_is_refused(tiny_engine):
    engine = tiny_engine.engine.model_copy(update={"outputs": tiny_engine.engine.outputs[:-1]})
    with pytest.raises(UnsupportedError, match=r"disagree about present\.0\.value"):
        open_backend(tiny_engine.directory, engine, slots=1, capacity=8, threads=1)


def test_a_file_that_is_no_model_is_refused(tiny_engine, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UnsupportedError, match="cannot load"):
        open_backend(tmp_path, tiny_engine.engine, slots=1, capacity=8, threads=1)


def test_the_engine_is_executed_as_it_was_verified(tiny_engine):
    """Basic optimizations fold constants; the others would fuse operators that the lowering left apart."""
    import onnxruntime as ort

    options = opened(tiny_engine)._session.get_session_options()
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC


def test_a_missing_onnxruntime_names_the_extra(tiny_engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError) as caught:
        opened(tiny_engine)
    assert caught.value.hint == "pip install 'llmopt[cpu]'"


def in_a_gpus_pool(tiny, *, slots=4, capacity=64):
    """As on a GPU, with the host's memory for the GPU's: inputs are bound anew in every call, slots copied whole."""
    engine = tiny.engine
    session = open_session(tiny.directory / engine.path, 1)
    size = engine.kv_heads * capacity * engine.head_dim * 4
    pool = GpuPool(2, slots, size, Provider(), device="cpu")
    backend = OnnxRuntimeBackend(session, engine, pool, slots=slots, capacity=capacity)
    return backend, pool


def test_a_pool_on_a_gpu_gives_the_results_of_one_in_the_host(tiny_engine):
    backend, _ = in_a_gpus_pool(tiny_engine)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11, 12]]
    for slot, prompt in enumerate(prompts):
        all_rows(backend, slot, prompt)
    backend.copy_prefix(1, 3, 5)
    np.testing.assert_allclose(
        all_rows(backend, 3, [13, 14], 5)[-1], tiny_engine.logits([4, 5, 6, 7, 8, 13, 14])[-1], atol=TOLERANCE
    )
    for step in range(3):
        fresh = np.array([20 + step, 30 + step, 40 + step])
        logits = backend.decode(fresh, np.array([len(p) for p in prompts]))
        prompts = [[*p, int(t)] for p, t in zip(prompts, fresh, strict=True)]
        np.testing.assert_allclose(logits, [tiny_engine.logits(p)[-1] for p in prompts], atol=TOLERANCE)


def test_on_a_gpu_every_decode_binds_its_inputs_anew(tiny_engine, monkeypatch):
    """ONNX Runtime copies them there when they are bound."""
    bound = []
    right = onnxruntime._bind_input
    monkeypatch.setattr(
        onnxruntime, "_bind_input", lambda b, name, values: bound.append(name) or right(b, name, values)
    )
    backend, pool = in_a_gpus_pool(tiny_engine)
    for is_on_gpu in (False, True):
        if is_on_gpu:
            pool.device = "cuda"
        bound.clear()
        for _ in range(3):
            backend.decode(np.array([1]), np.array([0]))
        assert len(bound) == (9 if is_on_gpu else 3)


def test_a_cache_of_a_type_that_numpy_does_not_know_is_bound_by_its_number():
    assert onnxruntime._element_type("bfloat16") == 16
    assert onnxruntime._element_type("float16") == np.float16
    with pytest.raises(UnsupportedError, match="the cache has dtype float7"):
        onnxruntime._element_type("float7")
