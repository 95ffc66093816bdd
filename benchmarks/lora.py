"""What adapters cost an engine: without any in use, and with one for each sequence of a batch.

``python -m llmopt.benchmarks.lora --model SPEC`` lowers a model twice, with ``lora`` and without, and runs both engines
by turns in one process, because this kind of machine changes its speed from minute to minute. Adapters are random; what
they cost does not depend on their numbers.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmopt.benchmarks.report import markdown, say
from llmopt.exporters.onnx.exporter import Onnx
from llmopt.exporters.onnx.lora import LoraOptions
from llmopt.optimizer.cache import cache_root
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.lora.adapter_file import ModuleFactors, write_adapter
from llmopt.optimizer.manifest import Engine, LoraSlots
from llmopt.optimizer.model import Model
from llmopt.optimizer.sources import load_model
from llmopt.passes.round_to_nearest import RoundToNearest
from llmopt.runtime.backends.onnxruntime import OnnxRuntimeBackend, open_backend

__all__ = ["Cost", "costs", "main"]

_CAPACITY = 1024


@dataclass(frozen=True, slots=True)
class Cost:
    """Times of one kind of call, in pairs that ran one behind the other.

    Attributes:
        what: The call.
        base: Milliseconds of the engine without adapters, the median.
        ratio: Of the time with adapters to that without, the median of the pairs.
    """

    what: str
    base: float
    ratio: float


def costs(
    base: OnnxRuntimeBackend,
    other: OnnxRuntimeBackend,
    *,
    sequences: int,
    past: int,
    rounds: int,
    steps: int = 8,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Cost]:
    """Compare two engines of one model, of which ``other`` has an adapter in each of its first slots."""
    memory = other.adapters
    assert memory is not None
    ids = np.random.default_rng(0).integers(0, base.engine.vocab_size, max(sequences, past))
    lengths = np.full(sequences, past)
    prompt, last = ids[:past], np.array([past - 1])

    def decode(backend: OnnxRuntimeBackend) -> None:
        for _ in range(steps):
            backend.decode(ids[:sequences], lengths)

    def prefill(backend: OnnxRuntimeBackend) -> None:
        backend.prefill(0, prompt, 0, last)

    found = []
    for in_use in (0, sequences):
        chosen = [number % memory.lora.slots + 1 if in_use else 0 for number in range(sequences)]
        memory.choose(chosen)
        adapters = f"{len(set(chosen))} adapters" if in_use else "none in use"
        for what, run in ((f"a step of {sequences} sequences", decode), (f"a prompt of {past} tokens", prefill)):
            name = f"{what}, {'its adapter' if in_use and run is prefill else adapters}"
            pairs = [(_seconds(run, base, clock), _seconds(run, other, clock)) for _ in range(rounds + 1)][1:]
            calls = steps if run is decode else 1
            milliseconds = statistics.median(1000 * first / calls for first, _ in pairs)
            found.append(Cost(name, milliseconds, statistics.median(second / first for first, second in pairs)))
    return found


def _seconds(
    run: Callable[[OnnxRuntimeBackend], None], backend: OnnxRuntimeBackend, clock: Callable[[], float]
) -> float:
    began = clock()
    run(backend)
    return clock() - began


def _engine(model: Model, directory: Path, options: LoraOptions | None) -> Engine:
    context = PassContext(verify="none")
    engine, _ = Onnx(lora=options, capacity=min(_CAPACITY, model.decoder.max_positions)).export(
        model, directory, context
    )
    assert isinstance(engine, Engine)
    return engine


def _fill(backend: OnnxRuntimeBackend, lora: LoraSlots, folder: Path, *, rank: int) -> None:
    """A random adapter in every slot."""
    generator = np.random.default_rng(1)
    assert backend.adapters is not None
    for slot in range(1, lora.slots + 1):
        factors = {
            module.name: ModuleFactors(
                generator.standard_normal((rank, module.inputs), np.float32) * np.float32(0.01),
                generator.standard_normal((rank, module.outputs), np.float32) * np.float32(0.01),
            )
            for module in lora.modules
        }
        backend.adapters.load(slot, write_adapter("random", folder / "random.safetensors", factors))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="as in a recipe")
    parser.add_argument("--scheme", help="of the base's linears, as W8A8; omitted: float")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="*", help="linears that take adapters; omitted: all of the layers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of factors; omitted: as the base has it")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--past", type=int, default=256, help="tokens of each sequence, and of the prompt")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="instead of time: where others use the cores too; for one thread"
    )
    given = parser.parse_args(arguments)
    model = load_model(given.model, cache=cache_root())
    if given.scheme:
        model = RoundToNearest(scheme=given.scheme).run(model, PassContext())
    options = LoraOptions(
        max_rank=max(given.rank, 32), slots=given.sequences, dtype=given.dtype, targets=given.targets or None
    )
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, kind) for kind in ("base", "lora")]
        engines = [_engine(model, folder, each) for folder, each in zip(folders, (None, options), strict=True)]
        backends = [
            open_backend(folder, engine, slots=given.sequences, capacity=engine.capacity, threads=given.threads)
            for folder, engine in zip(folders, engines, strict=True)
        ]
        lora = engines[1].lora
        assert lora is not None
        _fill(backends[1], lora, Path(name), rank=given.rank)
        clock = time.process_time if given.cpu_time else time.perf_counter
        found = costs(*backends, sequences=given.sequences, past=given.past, rounds=given.rounds, clock=clock)
    base = f"{given.scheme or 'float'} base, {given.threads} threads{', CPU time' if given.cpu_time else ''}"
    say(f"rank {given.rank} in {lora.dtype} on {len(lora.modules)} linears, {base}")
    print(markdown(["call", "base, ms", "with lora"], [[c.what, f"{c.base:.2f}", f"{c.ratio:.3f}"] for c in found]))


if __name__ == "__main__":
    main()
