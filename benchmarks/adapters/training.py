"""Trains a LoRA adapter with PEFT and leaves its files; nothing of llmopt is in it but the reading of the text."""

import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.benchmarks.adapters.tickets import Conversation
from llmopt.calibration.documents import Document
from llmopt.calibration.encoding import Encoder
from llmopt.optimizer.errors import InputError, MissingExtraError

__all__ = ["TARGETS", "Training", "packed", "require_peft", "train"]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Every linear of a layer, as they are called in Llama and its relatives."""


@dataclass(frozen=True, slots=True)
class Training:
    """How an adapter is trained.

    Attributes:
        rank: Of every product.
        steps: Of AdamW, whose rate rises for a tenth of them and falls to 0 in a line.
        batch: Windows a step.
        rate: Its highest value.
        seed: Of the first factors; the second begin as 0.
    """

    rank: int = 16
    steps: int = 32
    batch: int = 2
    rate: float = 2e-3
    seed: int = 0


def require_peft() -> None:
    """See to it that the training can run at all.

    Raises:
        MissingExtraError: PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "dev")


def packed(conversations: Sequence[Conversation], tokenizer_dir: Path, *, tokens: int) -> Tensor:
    """Windows int64 ``[n, tokens]`` of whole conversations one behind the other, the last of each cut off at its end.

    Raises:
        InputError: There are too few for one window, or the model has no chat template.
    """
    encoder = Encoder(tokenizer_dir)
    windows, window = [], list[int]()
    for place, conversation in enumerate(conversations, start=1):
        window += encoder.encode(Document(f"conversation {place}", conversation))
        if len(window) >= tokens:
            windows.append(window[:tokens])
            window = []
    if not windows:
        raise InputError(
            f"{len(conversations)} conversations do not fill a window of {tokens} tokens", hint="take more of them"
        )
    return torch.tensor(windows)


def train(
    checkpoint: Path,
    windows: Tensor,
    adapter: Path,
    settings: Training,
    *,
    base: str,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train an adapter on windows of tokens and save it as PEFT does. The same on the same machine and threads.

    Args:
        checkpoint: The base, in float32.
        windows: int64 ``[n, tokens]``, taken in their order, again from the first when all were seen.
        adapter: The folder for its files.
        settings: See there.
        base: What the adapter's configuration calls the base.
        progress: Called with each step's number, from 1, and its loss in nats a token.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(settings.seed)
    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    wanted = LoraConfig(
        task_type="CAUSAL_LM", r=settings.rank, lora_alpha=2 * settings.rank, target_modules=list(TARGETS)
    )
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT asks by a name that has gone
        adapted: Any = get_peft_model(network, wanted)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.train()
    for step, loss in enumerate(_descend(adapted, windows, settings), start=1):
        progress(step, loss)
    adapted.save_pretrained(adapter, save_embedding_layers=False)


def _descend(adapted: Any, windows: Tensor, settings: Training) -> Iterator[float]:
    """Every step of the training; yields its loss."""
    optimizer = torch.optim.AdamW(
        [each for each in adapted.parameters() if each.requires_grad], lr=settings.rate, weight_decay=0.0
    )
    warm = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (settings.steps - step) / (settings.steps - warm + 1))
    )
    order = itertools.cycle(range(len(windows)))
    for _ in range(settings.steps):
        batch = windows[list(itertools.islice(order, settings.batch))]
        loss = adapted(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield loss.item()
