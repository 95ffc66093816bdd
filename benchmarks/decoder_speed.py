"""Measures one engine in a process of its own: prefill and decode in tokens per second, as JSON.

``python -m llmopt.benchmarks.decoder_speed {llmopt,genai} PATH`` is started by ``against_genai``, once per engine and
round. Both engines run in the ONNX Runtime of this environment, over key/value buffers that are written in place.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["DECODE_BATCHES", "PREFILL_SHAPES", "main"]

PREFILL_SHAPES = ((1, 512), (8, 128))
"""Sequences and tokens of each."""

DECODE_BATCHES = (1, 4, 8, 16)
PAST = 128
STEPS = 32
CAPACITY = 1024
REPEATS = 3

Ids = npt.NDArray[np.int64]


class Decoder(Protocol):
    """An engine with a cache for up to 16 sequences."""

    vocab_size: int

    def prefill(self, ids: Ids) -> None:
        """Start sequences: ``[batch, tokens]`` into an empty cache, logits of each last token."""

    def decode(self, ids: Ids, past: int) -> None:
        """Append one token, ``[batch]``, to sequences of ``past`` tokens."""


class LlmoptDecoder:
    """A build, through the runtime's backend: prefill is one call per sequence, decode one call for all."""

    def __init__(self, directory: Path, threads: int) -> None:
        from llmopt.optimizer.manifest import Manifest
        from llmopt.runtime.backends.onnxruntime import open_backend

        engine = Manifest.load(directory).engines[0]
        self.vocab_size = engine.vocab_size
        self._chunk = engine.max_chunk
        self._backend = open_backend(
            directory, engine, slots=max(DECODE_BATCHES), capacity=min(CAPACITY, engine.capacity), threads=threads
        )

    def prefill(self, ids: Ids) -> None:
        """See ``Decoder.prefill``."""
        last = ids.shape[1] - 1
        for slot, sequence in enumerate(ids):
            for start in range(0, len(sequence), self._chunk):
                chunk = sequence[start : start + self._chunk]
                rows = np.array([last - start] if last < start + self._chunk else [], np.int64)
                self._backend.prefill(slot, chunk, start, rows)

    def decode(self, ids: Ids, past: int) -> None:
        """See ``Decoder.decode``."""
        self._backend.decode(ids, np.full(len(ids), past, np.int64))


class GenaiDecoder:
    """A model.onnx of onnxruntime-genai's builder, batched as its own engine does it: one call for all sequences."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._ort = ort
        self._session = ort.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
        names = [each.name for each in self._session.get_inputs()]
        self._cache_names = [name for name in names if name.startswith("past_key_values.")]
        self._needs_positions = "position_ids" in names
        config = json.loads((path / "genai_config.json").read_text("utf-8"))["model"]
        self.vocab_size = int(config["vocab_size"])
        self._kv_heads = int(config["decoder"]["num_key_value_heads"])
        self._head_dim = int(config["decoder"]["head_size"])
        self._caches: dict[int, dict[str, Any]] = {}

    def prefill(self, ids: Ids) -> None:
        """See ``Decoder.prefill``. Built with default options, it computes the logits of every token."""
        self._run(ids, 0)

    def decode(self, ids: Ids, past: int) -> None:
        """See ``Decoder.decode``."""
        self._run(ids[:, None], past)

    def _run(self, ids: Ids, past: int) -> None:
        batch, tokens = ids.shape
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        binding.bind_cpu_input("attention_mask", np.ones((batch, past + tokens), np.int64))
        if self._needs_positions:
            positions = np.broadcast_to(np.arange(past, past + tokens), (batch, tokens))
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for name, value in self._cache(batch).items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)

    def _cache(self, batch: int) -> dict[str, Any]:
        if batch not in self._caches:
            self._caches = {batch: {name: self._zeros(batch) for name in self._cache_names}}
        return self._caches[batch]

    def _zeros(self, batch: int) -> Any:
        array = np.zeros((batch, self._kv_heads, CAPACITY, self._head_dim), np.float32)
        return self._ort.OrtValue.ortvalue_from_numpy(array)


def measure(decoder: Decoder, tokens: Ids) -> dict[str, float]:
    """Tokens per second of every shape: the median of ``REPEATS`` runs after one to warm up."""
    speeds = {}
    for batch, length in PREFILL_SHAPES:
        ids = tokens[: batch * length].reshape(batch, length)
        speeds[f"prefill {batch}x{length}"] = batch * length / _median_seconds(partial(decoder.prefill, ids))
    for batch in DECODE_BATCHES:
        decoder.prefill(tokens[: batch * PAST].reshape(batch, PAST))
        steps = tokens[: batch * STEPS].reshape(STEPS, batch)

        def generate(steps: Ids = steps) -> None:
            for step, ids in enumerate(steps):
                decoder.decode(ids, PAST + step)

        speeds[f"decode B{batch}"] = batch * STEPS / _median_seconds(generate)
    return speeds


def _median_seconds(action: Callable[[], object]) -> float:
    action()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def main() -> None:
    """Measure the engine named on the command line and print its speeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=["llmopt", "genai"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tokens", type=Path, help="an int64 .npy file of at least 2048 token ids; omitted: random ids"
    )
    arguments = parser.parse_args()
    decoder: Decoder
    if arguments.kind == "llmopt":
        decoder = LlmoptDecoder(arguments.path, arguments.threads)
    else:
        decoder = GenaiDecoder(arguments.path, arguments.threads)
    if arguments.tokens:
        tokens = np.load(arguments.tokens)
    else:
        tokens = np.random.default_rng(0).integers(100, decoder.vocab_size, 2048)
    print(json.dumps(measure(decoder, tokens)))


if __name__ == "__main__":
    main()
