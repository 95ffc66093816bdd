"""Text sampled from the source model itself, so that a build can be judged on a machine that has no data.

The text is what the model considers likely, which is where a quantized model should agree with it. It does not say how
good the model is: use KL divergence and agreement on it, not perplexity.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from llmopt.calibration.reference import Reference, fast_dtype
from llmopt.optimizer.cache import cache_root, digest_of, locked, publish
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.model import DenseWeight, Model, Weight
from llmopt.optimizer.tokens import SAMPLED, Tokens
from llmopt.optimizer.weight_rounding import refuse_damaged
from llmopt.optimizer.weight_store import WeightStore, save_tensors

__all__ = ["Purpose", "Sampling", "sample_tokens", "sampling_key"]

Purpose = Literal["evaluation", "calibration"]

_VERSION = 3
"""Of the procedure below: a change that changes the text must change this number."""

_BATCH_TOKENS = 1 << 15
"""Of texts decoded together, which bounds the cache of keys and values. A step reads all weights, so many short texts
cost less than few long ones."""

_RESIDENT_BYTES = 1 << 30
"""A model up to this size is read once; a larger one again for each token, a layer at a time."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What to sample.

    Attributes:
        purpose: What the text is for. The two never share a seed, so no build is judged on what it was made with.
        windows: How many, written side by side.
        tokens: Tokens per window.
        seed: The recipe's.
        longest: Tokens of a text at most: longer windows are several texts one behind the other. None: a window is one.
        temperature: Above 0; 1 draws from the model's own distribution.
    """

    purpose: Purpose
    windows: int
    tokens: int
    seed: int = 0
    temperature: float = 1.0
    longest: int | None = None

    @property
    def texts(self) -> tuple[int, int]:
        """How many texts are written for the windows, and tokens of each."""
        length = min(self.tokens, self.longest or self.tokens)
        return self.windows * -(-self.tokens // length), length

    @property
    def generator(self) -> torch.Generator:
        """Even seeds for evaluation, odd ones for calibration."""
        return torch.Generator().manual_seed(2 * self.seed + (self.purpose == "calibration"))


def sample_tokens(
    model: Model,
    wanted: Sampling,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tokens:
    """Windows of text that ``model`` writes, from the cache where it wrote them before.

    Each text starts with the model's first token, and a new one begins after an end-of-text token.

    Args:
        model: The source model.
        wanted: How much, and from which seed.
        threads: PyTorch threads; None keeps the process's number.
        progress: Called with (finished, total) decoding steps.

    Raises:
        InputError: The windows are longer than the model's context, or its logits are not numbers.
        PassError: They are not, because a weight has values that are not finite.
    """
    longest = model.config.get("max_position_embeddings")
    if longest is not None and wanted.tokens > longest:
        raise InputError(f"windows of {wanted.tokens} tokens were asked for, the model's context has {longest}")
    directory = cache_root() / "samples" / digest_of(sampling_key(model, wanted))
    with locked(directory):
        if not directory.is_dir():
            with publish(directory) as partial:
                ready = _ready_to_decode(model, partial / "weights")
                ids = _write(ready, wanted, threads=threads, progress=progress)
                shutil.rmtree(partial / "weights", ignore_errors=True)
                save_tensors({"ids": ids}, partial / "ids.safetensors")
        ids = load_file(directory / "ids.safetensors")["ids"]
    return Tokens(name=SAMPLED, ids=ids, digest=hashlib.sha256(ids.numpy().tobytes()).hexdigest())


def sampling_key(model: Model, wanted: Sampling) -> dict[str, Any]:
    """Everything that determines the text, as plain data."""
    return {"sampler": _VERSION, "torch": torch.__version__, "source": model.source.digest, **asdict(wanted)}


def _write(model: Model, wanted: Sampling, *, threads: int | None, progress: Callable[[int, int], None]) -> Tensor:
    """The windows, int64 ``[windows, tokens]``."""
    reference = Reference(model, threads=threads, resident=_stays_in_memory(model), dtype=fast_dtype())
    generator = wanted.generator
    first, ends = _first_token(model.config), _end_tokens(model.config)
    texts, length = wanted.texts
    size = max(_BATCH_TOKENS // length, 1)
    batches = []
    for done in range(0, texts, size):
        ids = _starts(min(size, texts - done), first, model.config["vocab_size"], generator)
        columns, cache = [ids], DynamicCache()
        for step in range(1, length):
            logits = reference.decode(ids[:, None], cache)
            if logits.isnan().any():
                refuse_damaged(model)
                raise InputError(
                    f"{model.source.spec} writes no text: its logits are not numbers",
                    hint="its weights are finite, so what it computes overflows; try a checkpoint in another dtype",
                )
            sharpened = logits.float() if wanted.temperature == 1 else logits.float() / wanted.temperature
            drawn = _draw(sharpened, generator)
            if first is not None:
                drawn = torch.where(torch.isin(ids, ends), first, drawn)
            ids = drawn
            columns.append(ids)
            progress(done // size * length + step + 1, -(-texts // size) * length)
        batches.append(torch.stack(columns, dim=1))
    return torch.cat(batches).reshape(wanted.windows, -1)[:, : wanted.tokens].contiguous()


def _stays_in_memory(model: Model) -> bool:
    """Whether the weights are few enough to be kept; otherwise each step reads them, as long as nothing else needs the
    memory from the system's cache of the file.
    """
    return sum(prod(weight.shape) for weight in model.weights.values()) * fast_dtype().itemsize <= _RESIDENT_BYTES


def _ready_to_decode(model: Model, directory: Path) -> Model:
    """The model, its weights unpacked into ``directory`` where it is a large one in a GGUF file.

    Each step would dequantize them again, which takes longer than everything else.
    """
    if _stays_in_memory(model) or not any(name.endswith(".gguf") for name in model.source.files):
        return model
    directory.mkdir()
    store, dtype = WeightStore(directory), fast_dtype()
    unpacked: dict[str, Weight] = {}
    for name, weight in model.weights.items():
        values = torch.cat([block.to(dtype) for block in weight.dense_blocks()])
        unpacked |= store.keep({name: DenseWeight.of(values)})
    return model.with_weights(unpacked)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row, int64 ``[n]``, with the probabilities of softmax(``logits`` float32 ``[n, vocab]``).

    By inverting the cumulative distribution: five times as fast as torch.multinomial on large vocabularies.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    point = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).clamp(max=logits.shape[-1] - 1)[:, 0]


def _starts(count: int, first: int | None, vocab: int, generator: torch.Generator) -> Tensor:
    if first is not None:
        return torch.full((count,), first)
    return torch.randint(0, vocab, (count,), generator=generator)


def _first_token(config: Mapping[str, Any]) -> int | None:
    """What a text begins with: the beginning-of-text token, else the end of the text before it."""
    if config.get("bos_token_id") is not None:
        return int(config["bos_token_id"])
    ends = _end_tokens(config)
    return int(ends[0]) if len(ends) else None


def _end_tokens(config: Mapping[str, Any]) -> Tensor:
    ends = config.get("eos_token_id")
    listed = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return torch.tensor(listed, dtype=torch.int64)
