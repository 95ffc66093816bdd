"""A GPU made of numpy, and TensorRT's calls on it: what is queued happens when somebody waits, and not before."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from llmopt.optimizer.errors import ResourceError
from llmopt.optimizer.manifest import EncoderEngine, Engine, TensorInfo
from llmopt.runtime.backends.tensorrt import TensorRTBackend
from llmopt.runtime.backends.tensorrt_program import Program
from llmopt.runtime.backends.toy import toy_logits

LAYERS, KV_HEADS, HEAD_DIM = 2, 3, 4
PARTS = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]


class FakeDevice:
    """See ``Device``. Addresses are far apart, so that one that is off by anything is nobody's."""

    name, architecture, stream = "Paper GPU", "sm89", 77

    def __init__(self, memory: int = 1 << 24) -> None:
        self.calls: list[str] = []
        self._blocks: dict[int, np.ndarray] = {}
        self._memory = memory
        self._queue: list = []
        self._graph: list | None = None

    def free_bytes(self) -> int:
        return self._memory - sum(block.nbytes for block in self._blocks.values())

    def allocate(self, size: int) -> int:
        if size > self.free_bytes():
            raise ResourceError("cudaMalloc: cudaErrorMemoryAllocation (out of memory)")
        pointer = (len(self._blocks) + 1) << 40
        self._blocks[pointer] = np.zeros(size, np.uint8)
        return pointer

    def host_buffer(self, shape, dtype):
        return np.zeros(shape, dtype)

    def bytes_at(self, pointer: int, size: int) -> np.ndarray:
        block, offset = self._blocks[pointer >> 40 << 40], pointer & ((1 << 40) - 1)
        assert offset + size <= block.nbytes, "outside of what was allocated"
        return block[offset : offset + size]

    def array_at(self, pointer: int, shape, dtype) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes_at(pointer, size).view(dtype).reshape(shape)

    def enqueue(self, what: str, work) -> None:
        self.calls.append(what)
        (self._queue if self._graph is None else self._graph).append(work)

    def upload(self, pointer, source):
        assert source.flags.c_contiguous
        target = self.bytes_at(pointer, source.nbytes)
        self.enqueue("upload", lambda: target.__setitem__(slice(None), source.reshape(-1).view(np.uint8)))

    def download(self, destination, pointer):
        source = self.bytes_at(pointer, destination.nbytes)
        self.enqueue("download", lambda: destination.reshape(-1).view(np.uint8).__setitem__(slice(None), source))

    def copy_rows(self, destination, source, *, rows, width, pitch):
        pairs = [
            (self.bytes_at(destination + row * pitch, width), self.bytes_at(source + row * pitch, width))
            for row in range(rows)
        ]
        self.enqueue("copy", lambda: [target.__setitem__(slice(None), origin) for target, origin in pairs])

    def wait(self):
        self.calls.append("wait")
        queued, self._queue = self._queue, []
        for work in queued:
            work()

    def capture(self, work):
        self._graph = []
        try:
            work()
            return self._graph
        finally:
            self._graph = None

    def replay(self, graph):
        self.calls.append("replay")
        self._queue += graph

    def close(self):
        self.calls.append("close")


class FakeContext:
    """An IExecutionContext. It computes what the toy backend does, of tokens that it keeps in the cache."""

    capturable = True

    def __init__(self, engine: "FakeEngine", config) -> None:
        self._engine = engine
        self.config = config
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile: int | None = None
        self.scratch: tuple[int, int] | None = None

    def set_device_memory(self, memory, size):
        self.scratch = memory, size

    def set_optimization_profile_async(self, profile, stream):
        assert stream == FakeDevice.stream
        self.profile = profile
        return True

    def set_tensor_address(self, name, address):
        assert name in self._engine.names
        self.addresses[name] = address
        return True

    def set_input_shape(self, name, shape):
        low, high = self._engine.profile_of(name, self.profile)
        is_fine = all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True))
        if is_fine:
            self.shapes[name] = shape
        return is_fine

    def is_stream_capturable(self, stream):
        assert stream == FakeDevice.stream
        return self.capturable

    def execute_async_v3(self, stream):
        assert stream == FakeDevice.stream
        assert self.addresses.keys() == self._engine.names
        for part in self._engine.parts:
            assert self.addresses[f"past.{part}"] == self.addresses[f"present.{part}"]
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        self._engine.runs.append((self.profile, shapes["input_ids"]))
        self._engine.device.enqueue("run", lambda: self._engine.compute(addresses, shapes))
        return not self._engine.fails


class FakeEngine:
    """An ICudaEngine, of the toy's vocabulary: each KV tensor has the token in all elements of its place."""

    num_optimization_profiles = 2
    parts: Sequence[str] = PARTS
    device_memory_size_v2 = 1000

    def __init__(self, engine: Engine, device: FakeDevice) -> None:
        self.engine = engine
        self.device = device
        self.names = {tensor.name for tensor in [*engine.inputs, *engine.outputs]}
        self.num_io_tensors = len(self.names)
        self.runs: list = []
        self.contexts: list[FakeContext] = []
        self.fails = False

    def get_tensor_name(self, index):
        return sorted(self.names)[index]

    def get_tensor_shape(self, name):
        return (-1, *self.profile_of(name, 0)[1][1:])

    def get_tensor_dtype(self, name):
        return "half"

    def get_aliased_input_tensor(self, name):
        return name.replace("present.", "past.")

    def create_runtime_config(self):
        config = SimpleNamespace(strategy=None)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        return config

    def create_execution_context(self, config):
        self.contexts.append(FakeContext(self, config))
        return self.contexts[-1]

    def profile_of(self, name, profile):
        """Smallest and largest shape: prefill has one sequence, decode one token each."""
        engine = self.engine
        batch, tokens = ((1, engine.max_chunk), (engine.slots, 1))[profile]
        rows = max(batch, tokens)
        cache = (engine.kv_heads, engine.capacity, engine.head_dim)
        if name.startswith("past."):
            return (1, *cache), (batch, *cache)
        largest = {"input_ids": (batch, tokens), "past_lengths": (batch,), "logit_rows": (rows,)}[name]
        return (1,) * len(largest), largest

    def compute(self, addresses, shapes):
        read = self.device.array_at
        ids = read(addresses["input_ids"], shapes["input_ids"], np.int64)
        lengths = read(addresses["past_lengths"], shapes["past_lengths"], np.int64)
        rows = read(addresses["logit_rows"], shapes["logit_rows"], np.int64)
        caches = [read(addresses[f"past.{part}"], shapes[f"past.{part}"], np.float16) for part in PARTS]
        tokens = ids.shape[1]
        for cache in caches:
            for row, length in enumerate(lengths):
                cache[row, :, length : length + tokens] = ids[row][None, :, None]
        logits = read(addresses["logits"], (len(rows), self.engine.vocab_size), np.float32)
        for number, place in enumerate(rows):
            row, token = divmod(int(place), tokens)
            held = [cache[row, :, : lengths[row] + token + 1] for cache in caches]
            agreed = np.unique(np.stack([each.transpose(1, 0, 2).reshape(each.shape[1], -1) for each in held]), axis=0)
            assert len(agreed) == 1, "the caches differ"
            first = agreed[0]
            assert (first == first[:, :1]).all(), "heads or columns differ"
            logits[number] = toy_logits(first[:, 0].astype(np.int64), self.engine.vocab_size)


class FakeEncoder(FakeEngine):
    """The same of an encoder: column j of a vector is j + 1 times the sum of the text's ids."""

    num_optimization_profiles = 1
    parts = ()

    def profile_of(self, name, profile):
        assert profile == 0
        return (1, 1), (self.engine.slots, self.engine.capacity)

    def compute(self, addresses, shapes):
        ids, mask = (
            self.device.array_at(addresses[name], shapes[name], np.int64) for name in ("input_ids", "attention_mask")
        )
        vectors = self.device.array_at(addresses["sentence_embedding"], (len(ids), self.engine.hidden_size), np.float32)
        vectors[:] = (ids * mask).sum(1)[:, None] * np.arange(1, self.engine.hidden_size + 1)


def compiled_encoder(*, slots=3, capacity=8) -> EncoderEngine:
    """The manifest entry of a compiled encoder."""
    inputs = [TensorInfo(name=n, dtype="int64", dims=["batch", "tokens"]) for n in ("input_ids", "attention_mask")]
    return EncoderEngine(
        exporter="tensorrt",
        target="tensorrt",
        path="tensorrt/model.onnx",
        inputs=inputs,
        outputs=[TensorInfo(name="sentence_embedding", dtype="float32", dims=["batch", 4])],
        num_layers=1,
        hidden_size=4,
        vocab_size=100,
        capacity=capacity,
        slots=slots,
        pad_token=9,
        pooling="mean",
        normalize=False,
        dtype="float16",
        compiled={"sm89": "tensorrt/sm89.engine"},
    )


def compiled_engine(*, vocab_size=64, capacity=128, max_chunk=16, slots=8) -> Engine:
    """The manifest entry of a compiled engine that is as large as the toy."""
    cache = ["batch", KV_HEADS, capacity, HEAD_DIM]
    inputs = [("input_ids", ["batch", "tokens"]), ("past_lengths", ["batch"]), ("logit_rows", ["rows"])]
    return Engine(
        exporter="tensorrt",
        target="tensorrt",
        path="tensorrt/model.onnx",
        inputs=[
            *(TensorInfo(name=name, dtype="int64", dims=dims) for name, dims in inputs),
            *(TensorInfo(name=f"past.{part}", dtype="float16", dims=cache) for part in PARTS),
        ],
        outputs=[
            TensorInfo(name="logits", dtype="float32", dims=["rows", vocab_size]),
            *(TensorInfo(name=f"present.{part}", dtype="float16", dims=cache) for part in PARTS),
        ],
        num_layers=LAYERS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        kv_dtype="float16",
        vocab_size=vocab_size,
        capacity=capacity,
        slots=slots,
        max_chunk=max_chunk,
        min_chunk=2,
        batch_invariant=False,
        compiled={"sm89": "tensorrt/sm89.engine", "sm120": "tensorrt/sm120.engine"},
    )


def fake_tensorrt() -> SimpleNamespace:
    """A package with the names of tensorrt_rtx that are used, and what it will load: ``loads``."""

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

    package = SimpleNamespace(
        __name__="tensorrt_rtx",
        __version__="1.7.1",
        ILogger=ILogger,
        DataType=SimpleNamespace(HALF="half", BF16="bf16"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="managed"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        loads=None,
        read=[],
    )

    class Runtime:
        def __init__(self, log):
            self._log = log

        def deserialize_cuda_engine(self, data):
            package.read.append(data)
            if package.loads is None:
                self._log.log(1, "a version tag does not match")
            return package.loads

    package.Runtime = Runtime
    return package


@pytest.fixture
def paper_gpu():
    """The classes and functions above."""
    return SimpleNamespace(
        Device=FakeDevice, Engine=FakeEngine, Encoder=FakeEncoder, Context=FakeContext,
        compiled_engine=compiled_engine, compiled_encoder=compiled_encoder, tensorrt=fake_tensorrt,
    )  # fmt: skip


@pytest.fixture
def tensorrt_of():
    """Makes a TensorRT backend on the paper GPU: ``backend, fake engine, device``."""

    def make(engine=None, *, slots=4, graphs=True, device=None):
        engine, device = engine or compiled_engine(), device or FakeDevice()
        loaded = FakeEngine(engine, device)
        log = SimpleNamespace(last=lambda: "a reason")
        program = Program(fake_tensorrt(), loaded, device, log=log, runtime=None)
        backend = TensorRTBackend(program, engine, device, slots=slots, graphs=graphs)
        loaded.runs.clear()
        device.calls.clear()
        return backend, loaded, device

    return make
