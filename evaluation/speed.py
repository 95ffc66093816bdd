"""How fast a build runs: prefill, decode, time to first token, load time and memory, in a process of its own.

``measure_speed`` starts ``python -m llmopt.evaluation.speed``, so that load time and peak memory are the engine's alone
and no other library's threads take part. This file must not import torch.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from llmopt.optimizer.errors import InputError, LlmoptError, UnsupportedError
from llmopt.optimizer.manifest import Engine, Manifest
from llmopt.runtime.backends.base import Backend, IntArray
from llmopt.runtime.backends.encoder import EncoderBackend
from llmopt.runtime.backends.opening import (
    Executor,
    open_backend,
    open_encoder_backend,
    pick_encoder,
    pick_engine,
    slot_capacity,
)

__all__ = ["Plan", "Rate", "Speed", "measure_speed", "run_encoder_plan", "run_plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        prompts: (sequences, tokens of each) of every prefill.
        batches: Sequences decoded together.
        past: Tokens each sequence holds when decoding starts.
        steps: Tokens decoded per sequence.
        repeats: Timed rounds over all shapes, after one that is not timed.
        threads: Of the engine.
        executor: Which of a build's engines is measured, and by what it is executed.
    """

    prompts: tuple[tuple[int, int], ...] = ((1, 512), (8, 128))
    batches: tuple[int, ...] = (1, 4, 8, 16)
    past: int = 128
    steps: int = 64
    repeats: int = 3
    threads: int = 1
    executor: Executor = field(default_factory=Executor)

    @property
    def slots(self) -> int:
        """Sequences held at the same time."""
        return max([sequences for sequences, _ in self.prompts] + list(self.batches))

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence."""
        return max([tokens for _, tokens in self.prompts] + ([self.past + self.steps] if self.batches else []))


@dataclass(frozen=True, slots=True)
class Rate:
    """The times of one shape.

    Attributes:
        kind: ``prefill``, ``decode``, or ``encode`` of an encoder.
        sequences: Processed together.
        tokens: Of each prompt; for decode, held when it starts.
        rate: Median tokens/s over all sequences; of an encoder, texts/s.
        spread: (slowest - fastest) / median time of the rounds.
        latency: Median seconds: until the first token of a prompt batch, or of one decode step.
    """

    kind: str
    sequences: int
    tokens: int
    rate: float
    spread: float
    latency: float


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured.

    Attributes:
        rates: In the plan's order, prefills first.
        load_seconds: From opening the build to an engine that can run.
        peak_bytes: Largest resident memory of the process.
        threads: Of the engine.
        cpu_features: Instruction sets of this machine that matrix kernels use.
    """

    rates: tuple[Rate, ...]
    load_seconds: float
    peak_bytes: int
    threads: int
    cpu_features: tuple[str, ...]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Speed":
        """What ``dataclasses.asdict`` gave."""
        rates = tuple(Rate(**each) for each in data["rates"])
        return Speed(**{**data, "rates": rates, "cpu_features": tuple(data["cpu_features"])})


def measure_speed(directory: Path, plan: Plan) -> Speed:
    """Run ``plan`` on an engine of the build in ``directory``, in a new process.

    Raises:
        InputError: No build there, one without an engine that fits, or shapes beyond what the engine takes.
        UnsupportedError: The engine cannot be loaded here.
        LlmoptError: The process ended without a result.
    """
    manifest = Manifest.load(directory)
    if not manifest.all_engines:
        raise InputError(f"{directory} has no engine that could be measured")
    if manifest.encoders:
        _check_encoder_plan(directory, plan)
    pick = pick_encoder if manifest.encoders else pick_engine
    engine = pick(directory, manifest, plan.executor)
    if plan.capacity > engine.capacity:
        raise InputError(
            f"sequences of {plan.capacity} tokens were asked for, the engine takes {engine.capacity}",
            hint="shorten --prompt, or --past and --decode",
        )
    together = max(plan.batches, default=0)
    if isinstance(engine, Engine) and together > (engine.slots or together):
        raise InputError(
            f"{together} sequences decoded together were asked for, the engine takes {engine.slots}", hint="see --batch"
        )
    order = json.dumps({"directory": str(directory), **asdict(plan)})
    child = subprocess.run(
        [sys.executable, "-P", "-m", "llmopt.evaluation.speed", order],
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise LlmoptError(f"the measuring process ended with {child.returncode}: {child.stderr[-2000:].strip()}")
    answer = json.loads(child.stdout.splitlines()[-1])
    if "error" in answer:
        raise UnsupportedError(answer["error"], hint=answer["hint"])
    return Speed.from_dict(answer)


def _check_encoder_plan(directory: Path, plan: Plan) -> None:
    if plan.batches:
        raise InputError(
            f"{directory} is a build of an encoder, which decodes nothing",
            hint="leave --batch, --past and --decode out",
        )


def run_plan(backend: Backend, plan: Plan) -> tuple[Rate, ...]:
    """Time every shape once per round, so that a slow phase of the machine touches all of them.

    The prompts are random tokens, decoding goes on from what prefill left: neither changes how long it takes.
    """
    random = np.random.default_rng(0)
    tokens = random.integers(0, backend.engine.vocab_size, (plan.slots, plan.capacity), dtype=np.int64)
    if plan.batches:
        for slot in range(max(plan.batches)):
            _prefill(backend, slot, tokens[slot, : plan.past])
    actions: dict[tuple[str, int, int], Callable[[], object]] = {}
    for sequences, length in plan.prompts:
        actions["prefill", sequences, length] = partial(_prefill_all, backend, tokens[:sequences, :length])
    for sequences in plan.batches:
        steps = tokens[:sequences, plan.past : plan.past + plan.steps].T.copy()
        actions["decode", sequences, plan.past] = partial(_decode, backend, steps, plan.past)
    return _timed(actions, plan)


def run_encoder_plan(backend: EncoderBackend, plan: Plan) -> tuple[Rate, ...]:
    """The same of an encoder: each of the plan's prompts is a batch of texts of equal length."""
    random = np.random.default_rng(0)
    actions: dict[tuple[str, int, int], Callable[[], object]] = {}
    for texts, tokens in plan.prompts:
        ids = random.integers(0, backend.engine.vocab_size, (texts, tokens)).tolist()
        actions["encode", texts, tokens] = partial(backend.vectors, ids, batch=texts)
    return _timed(actions, plan)


def _timed(actions: Mapping[tuple[str, int, int], Callable[[], object]], plan: Plan) -> tuple[Rate, ...]:
    """Every action once per round; (kind, sequences, tokens) -> action."""
    seconds: dict[tuple[str, int, int], list[float]] = {shape: [] for shape in actions}
    for number in range(plan.repeats + 1):
        for shape, action in actions.items():
            started = time.perf_counter()
            action()
            if number:
                seconds[shape].append(time.perf_counter() - started)
    return tuple(_rate(shape, times, plan.steps) for shape, times in seconds.items())


def _rate(shape: tuple[str, int, int], times: list[float], steps: int) -> Rate:
    kind, sequences, tokens = shape
    middle = median(times)
    units = {"prefill": tokens, "decode": steps, "encode": 1}[kind]
    latency = middle / steps if kind == "decode" else middle
    return Rate(kind, sequences, tokens, sequences * units / middle, (max(times) - min(times)) / middle, latency)


def _prefill_all(backend: Backend, ids: IntArray) -> None:
    """Prompts int64 ``[n, tokens]``, one after the other, up to the first token of each."""
    for slot, sequence in enumerate(ids):
        _prefill(backend, slot, sequence)


def _prefill(backend: Backend, slot: int, ids: IntArray) -> int:
    """The most likely token after ``ids`` int64 ``[tokens]``."""
    longest = backend.engine.max_chunk
    for start in range(0, len(ids), longest):
        chunk = ids[start : start + longest]
        is_last = start + len(chunk) == len(ids)
        logits = backend.prefill(slot, chunk, start, np.array([len(chunk) - 1] if is_last else [], np.int64))
    return int(logits[0].argmax())


def _decode(backend: Backend, steps: IntArray, past: int) -> None:
    """Append ``steps`` int64 ``[steps, n]`` to the first n slots, which hold ``past`` tokens."""
    for number, ids in enumerate(steps):
        backend.decode(ids, np.full(len(ids), past + number, np.int64)).argmax(-1)


def _cpu_features() -> tuple[str, ...]:
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm")
    path = Path("/proc/cpuinfo")
    words = set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()
    return tuple(name for name in known if name in words)


def _opened(manifest: Manifest, directory: Path, plan: Plan) -> Callable[[], tuple[Rate, ...]]:
    """What runs ``plan`` on the build's engine, which is loaded now."""
    if manifest.encoders:
        chosen = pick_encoder(directory, manifest, plan.executor)
        encoder = open_encoder_backend(directory, chosen, plan.executor, threads=plan.threads)
        return partial(run_encoder_plan, encoder, plan)
    engine = pick_engine(directory, manifest, plan.executor)
    capacity = slot_capacity(engine, plan.capacity)
    backend = open_backend(directory, engine, plan.executor, slots=plan.slots, capacity=capacity, threads=plan.threads)
    return partial(run_plan, backend, plan)


def _main() -> None:
    """The measuring process: the order as JSON in, the answer as JSON out."""
    order = json.loads(sys.argv[1])
    directory = Path(order.pop("directory"))
    prompts = tuple((sequences, tokens) for sequences, tokens in order.pop("prompts"))
    executor = Executor(**order.pop("executor"))
    plan = Plan(**{**order, "prompts": prompts, "batches": tuple(order["batches"])}, executor=executor)
    try:
        started = time.perf_counter()
        run = _opened(Manifest.load(directory), directory, plan)
        loaded = time.perf_counter() - started
    except LlmoptError as error:
        answer: dict[str, Any] = {"error": error.message, "hint": error.hint}
    else:
        rates = run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        answer = asdict(Speed(rates, loaded, peak, plan.threads, _cpu_features()))
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main()
