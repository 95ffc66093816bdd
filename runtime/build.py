"""Opens a build directory for use: checked, its engine loaded, its slots allocated, its tokenizer read."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from llmopt.optimizer.errors import RejectedError
from llmopt.optimizer.manifest import MANIFEST_NAME, Manifest, sha256_of
from llmopt.optimizer.tokenizer_config import read_object
from llmopt.runtime.backends.base import Backend
from llmopt.runtime.backends.opening import Executor, free_memory, open_backend, pick_engine, slot_capacity
from llmopt.runtime.catalogue import Catalogue
from llmopt.runtime.sizing import Sizes, choose_sizes
from llmopt.runtime.structured.grammar import Grammars
from llmopt.runtime.text import Tokenizer

__all__ = [
    "DEFAULT_CONTEXT",
    "Build",
    "default_threads",
    "holds_encoder",
    "open_build",
    "refuse_rejected",
]

DEFAULT_CONTEXT = 2048

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Build:
    """A build that is ready to run.

    Attributes:
        directory: Where it lies.
        manifest: What it says about itself.
        backend: Its engine, loaded.
        tokenizer: Its tokenizer.
        fingerprint: The first digits of the manifest's sha256: equal for equal builds.
        sizes: Of its slot pool.
        grammars: What compiles constraints for its tokenizer.
        adapters: What requests may choose among.
    """

    directory: Path
    manifest: Manifest
    backend: Backend
    tokenizer: Tokenizer
    fingerprint: str
    sizes: Sizes
    grammars: Grammars
    adapters: Catalogue


def open_build(
    directory: Path,
    *,
    slots: int | None = None,
    kept_slots: int | None = None,
    memory: int | None = None,
    context: int | None = None,
    threads: int | None = None,
    executor: Executor | None = None,
    verify: bool = False,
    force: bool = False,
) -> Build:
    """Check and load a build.

    Args:
        directory: The build.
        slots: Requests that run at the same time; 16, or as many as fit, when omitted.
        kept_slots: Further slots, whose contents prompts may begin with; as many again, or as fit, when omitted.
        memory: Bytes that keys and values may take; half of what is free when omitted.
        context: Tokens per request, prompt and answer together; the engine's capacity, at most 2048, when omitted.
        threads: Of one run; the cores this process may use when omitted.
        executor: Which of its engines is executed, and by what; the best that runs here when omitted.
        verify: Whether to compare every file's digest; sizes are always compared.
        force: Whether to open a build that missed its gates.

    Raises:
        InputError: No build there, or options it cannot be opened with.
        RejectedError: The build missed its gates.
        VerificationError: A file is not what the manifest says.
        MissingExtraError: What executes the engine is not installed.
        UnsupportedError: The engine cannot be executed here.
        ResourceError: The slots do not fit in memory.
    """
    manifest = Manifest.load(directory, verify=verify)
    if manifest.verdict.status == "rejected":
        refuse_rejected(directory, manifest, force=force)
    executor = executor or Executor()
    engine = pick_engine(directory, manifest, executor)
    capacity = slot_capacity(engine, DEFAULT_CONTEXT) if context is None else context
    tokenizer = Tokenizer(directory)
    # A checkpoint may name an end token its vocabulary lacks; no row of logits has a place for it.
    tokenizer.stop_ids = frozenset(token for token in tokenizer.stop_ids if token < engine.vocab_size)
    free = None if memory is not None else free_memory(directory, engine, executor)
    sizes = choose_sizes(engine, capacity=capacity, running=slots, kept=kept_slots, memory=memory, free=free)
    backend = open_backend(
        directory, engine, executor, slots=sizes.slots, capacity=capacity, threads=threads or default_threads()
    )
    logger.info("the engine is %s for %s; %s", engine.exporter, engine.target, sizes)
    fingerprint = "fp_" + sha256_of(directory / MANIFEST_NAME)[:16]
    grammars = Grammars(tokenizer, engine.vocab_size)
    adapters = Catalogue(directory, engine.lora)
    return Build(directory, manifest, backend, tokenizer, fingerprint, sizes, grammars, adapters)


def default_threads() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0))


def holds_encoder(directory: Path) -> bool:
    """Whether the build makes vectors of texts; what is wrong with it is found by whoever opens it."""
    entries = read_object(directory / MANIFEST_NAME).get("encoders")
    return bool(entries)


def refuse_rejected(directory: Path, manifest: Manifest, *, force: bool) -> None:
    """Refuse a build that missed its gates; with ``force`` only say so.

    Raises:
        RejectedError: Without ``force``.
    """
    missed = [gate for gate in manifest.verdict.gates if not gate.passed]
    named = ", ".join(f"{gate.gate.get('metric')} is {gate.value:.4g}" for gate in missed) or "no gate is named"
    if not force:
        raise RejectedError(
            f"{directory} was rejected when it was built: {named}", hint="build a better one, or use --force"
        )
    logger.warning("%s was rejected when it was built: %s", directory, named)
