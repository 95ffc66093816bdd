"""The TensorRT backend's bookkeeping, on a GPU made of numpy whose results equal the toy backend's."""

import random
import sys

import numpy as np
import pytest

from llmopt.optimizer.errors import InputError, MissingExtraError, ResourceError, UnsupportedError
from llmopt.runtime.backends import tensorrt
from llmopt.runtime.backends.base import ExecutionError
from llmopt.runtime.backends.toy import ToyBackend, toy_engine
from llmopt.runtime.engine import Engine
from llmopt.runtime.policy import Policy
from llmopt.runtime.request import Generation, Request
from llmopt.runtime.sampler import Sampling
from llmopt.runtime.text import TextStream, Tokenizer


def pair(tensorrt_of, **options):
    """The backend, and the one that it has to agree with."""
    backend, loaded, device = tensorrt_of(**options)
    return backend, ToyBackend(toy_engine(), slots=backend.slots), loaded, device


def both(name, backends, *arguments):
    """The results of a call on each are the same."""
    first, second = (getattr(each, name)(*arguments).copy() for each in backends)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("graphs", [True, False])
def test_random_calls_give_the_logits_of_the_toy_backend(tensorrt_of, graphs):
    backend, toy, *_ = pair(tensorrt_of, graphs=graphs)
    rng, lengths = random.Random(0), [0] * 4
    for _ in range(200):
        kind = rng.choice(["prefill", "decode", "copy"])
        slot, other = rng.sample(range(4), 2)
        if kind == "prefill":
            lengths[slot] = rng.choice([0, lengths[slot]])
            size = min(rng.randint(1, 16), 100 - lengths[slot])
            if size > 0:
                ids = np.array([rng.randrange(64) for _ in range(size)])
                rows = np.array(rng.choices(range(size), k=rng.randint(0, 3)), np.int64)
                both("prefill", (backend, toy), slot, ids, lengths[slot], rows)
                lengths[slot] += size
        elif kind == "copy":
            length = rng.randint(0, lengths[slot])
            for each in (backend, toy):
                each.copy_prefix(slot, other, length)
            lengths[other] = length
        else:
            count = rng.randint(1, 4)
            ids, held = np.array([rng.randrange(64) for _ in range(count)]), np.array(lengths[:count])
            if held.max() < 120:
                both("decode", (backend, toy), ids, held)
                lengths[:count] = [length + 1 for length in lengths[:count]]


def test_a_batch_of_requests_gets_the_tokens_that_the_toy_gives(tensorrt_of, byte_tokenizer):
    """Through scheduler, prefix cache and sampler, with more requests than slots."""
    tokenizer, answers = Tokenizer(byte_tokenizer), []
    for backend in pair(tensorrt_of, slots=6)[:2]:
        engine = Engine(backend, policy=Policy(running=4))
        rng, requests = random.Random(1), []
        shared = [rng.randrange(64) for _ in range(30)]
        for number in range(20):
            ids = rng.choice([[], shared]) + [rng.randrange(64) for _ in range(rng.randint(1, 30))]
            sampling = Sampling(temperature=rng.choice([0, 1]), seed=number)
            wanted = Generation(max_tokens=rng.randint(1, 20), sampling=sampling)
            requests.append(Request(np.array(ids), wanted, text=TextStream(tokenizer), receive=lambda _: None))
            engine.submit(requests[-1])
        while engine.step():
            pass
        answers.append([request.output for request in requests])
        assert engine.statistics.cached_tokens > 0
    assert answers[0] == answers[1]


def test_more_slots_are_held_than_the_engine_decodes_at_once(tensorrt_of, paper_gpu):
    backend, toy, *_ = pair(tensorrt_of, engine=paper_gpu.compiled_engine(slots=2), slots=5)
    both("prefill", (backend, toy), 4, np.array([1, 2, 3]), 0, np.array([2]))
    for each in (backend, toy):
        each.copy_prefix(4, 1, 3)
        each.prefill(0, np.array([9, 8]), 0, np.array([], np.int64))
    both("decode", (backend, toy), np.array([5, 6]), np.array([2, 3]))
    engine = Engine(backend, policy=Policy())
    assert engine._runner._scheduler._limits.running == 2


def test_a_decode_is_one_replay_with_its_copies_in_it(tensorrt_of):
    backend, loaded, device = tensorrt_of()
    backend.decode(np.array([1, 2]), np.array([0, 0]))
    assert (device.calls, loaded.runs) == (["replay", "wait"], [])


def test_without_graphs_a_decode_queues_everything(tensorrt_of):
    backend, loaded, device = tensorrt_of(graphs=False)
    backend.decode(np.array([1, 2]), np.array([0, 0]))
    assert device.calls == ["upload"] * 3 + ["run", "download", "wait"]
    assert loaded.runs == [(1, (2, 1))]


def test_each_number_of_sequences_has_a_context_of_its_own_and_all_share_their_scratch_memory(tensorrt_of):
    _, loaded, _ = tensorrt_of(slots=3)
    assert [context.profile for context in loaded.contexts] == [0, 1, 1, 1]
    assert len({context.scratch for context in loaded.contexts}) == 1
    assert [context.shapes["past_lengths"] for context in loaded.contexts[1:]] == [(1,), (2,), (3,)]


def test_kernels_are_compiled_before_a_graph_is_captured(tensorrt_of):
    """Of TensorRT for RTX, which compiles them while it runs; the many sizes of prompts are left to it."""
    _, loaded, _ = tensorrt_of(slots=1)
    prefill, decode = loaded.contexts
    assert prefill.config == "managed"
    assert decode.config.strategy == "managed"
    assert decode.config.dynamic_shapes_kernel_specialization_strategy == "eager"


def test_prefill_binds_the_slot_and_decode_the_first_ones(tensorrt_of):
    backend, loaded, _ = tensorrt_of()
    prefill, decode = loaded.contexts[:2]
    slot = 3 * 128 * 4 * 2  # heads, tokens, columns, bytes
    for number in (0, 3, 1):
        backend.prefill(number, np.array([1, 2]), 0, np.array([1]))
        for part in ("0.key", "1.value"):
            assert prefill.addresses[f"present.{part}"] == decode.addresses[f"past.{part}"] + number * slot


def test_the_caller_keeps_what_prefill_gave(tensorrt_of):
    backend, _, _ = tensorrt_of()
    first = backend.prefill(0, np.array([1, 2]), 0, np.array([1]))
    kept = first.copy()
    backend.prefill(1, np.array([3, 4]), 0, np.array([1]))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(("tokens", "start"), [(17, 0), (2, 127), (0, 0)])
def test_what_tensorrt_would_silently_leave_out_is_an_error(tensorrt_of, tokens, start):
    backend, _, _ = tensorrt_of()
    with pytest.raises(ValueError, match="a chunk of"):
        backend.prefill(0, np.zeros(tokens, np.int64), start, np.array([0]))
    with pytest.raises(ValueError, match="128 tokens is full"):
        backend.decode(np.array([1]), np.array([128]))


def test_a_failing_run_is_an_execution_error_and_the_next_run_works(tensorrt_of):
    backend, toy, loaded, _ = pair(tensorrt_of)
    loaded.fails = True
    with pytest.raises(ExecutionError, match="TensorRT could not run: a reason"):
        backend.prefill(0, np.array([1, 2]), 0, np.array([1]))
    loaded.fails = False
    both("prefill", (backend, toy), 0, np.array([1, 2]), 0, np.array([1]))


def test_a_pool_that_does_not_fit_says_what_would(tensorrt_of, paper_gpu):
    slot = 2 * 2 * 3 * 128 * 4 * 2  # layers, keys and values, heads, tokens, columns, bytes
    with pytest.raises(ResourceError, match="4 slots of 128 tokens take") as caught:
        tensorrt_of(device=paper_gpu.Device(memory=3 * slot + 1000))
    assert caught.value.hint == "what fits: --slots 3 --prefix-slots 0"
    with pytest.raises(ResourceError) as caught:
        tensorrt_of(device=paper_gpu.Device(memory=slot))
    assert caught.value.hint == "build with a smaller capacity"


def test_a_capture_that_fails_is_an_error_that_names_the_way_around(tensorrt_of, paper_gpu, monkeypatch):
    def refuse(self, work):
        raise ExecutionError("cudaStreamEndCapture: cudaErrorStreamCaptureInvalidated")

    monkeypatch.setattr(paper_gpu.Device, "capture", refuse)
    with pytest.raises(UnsupportedError, match=r"a decode of 1 sequences could not be captured.*Invalidated") as caught:
        tensorrt_of()
    assert caught.value.hint == "--no-cuda-graphs runs the engine without them"
    tensorrt_of(graphs=False)


def test_an_engine_that_cannot_be_captured_is_an_error_too(tensorrt_of, paper_gpu, monkeypatch):
    monkeypatch.setattr(paper_gpu.Context, "capturable", False)
    with pytest.raises(UnsupportedError, match="cannot be captured"):
        tensorrt_of()


def test_a_context_other_than_the_engines_is_refused(paper_gpu, tmp_path):
    with pytest.raises(InputError, match="96 tokens was asked for, and the engine was compiled for 128"):
        tensorrt.open_backend(tmp_path, paper_gpu.compiled_engine(), slots=1, capacity=96, cuda_graphs=True)
    with pytest.raises(InputError, match="at least one slot"):
        tensorrt.open_backend(tmp_path, paper_gpu.compiled_engine(), slots=0, capacity=128, cuda_graphs=True)


def test_opening_reads_what_was_compiled_for_this_gpu(paper_gpu, tmp_path, monkeypatch):
    engine, device, package = paper_gpu.compiled_engine(), paper_gpu.Device(), paper_gpu.tensorrt()
    package.loads = paper_gpu.Engine(engine, device)
    monkeypatch.setattr(tensorrt, "open_device", lambda: device)
    monkeypatch.setattr("importlib.import_module", lambda name: package)
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt/sm89.engine").write_bytes(b"for this one")
    backend = tensorrt.open_backend(tmp_path, engine, slots=2, capacity=128, cuda_graphs=True)
    assert package.read == [b"for this one"]
    assert backend.prefill(1, np.array([1, 2]), 0, np.array([1])).shape == (1, 64)


def test_a_missing_cuda_python_names_the_extra(paper_gpu, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingExtraError, match="cuda-python is not installed") as caught:
        tensorrt.open_backend(tmp_path, paper_gpu.compiled_engine(), slots=1, capacity=128, cuda_graphs=True)
    assert caught.value.hint == "pip install 'llmopt[tensorrt-rtx]'"
