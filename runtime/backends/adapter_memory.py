"""Where an engine finds its adapters: their factors in memory, and whose each sequence of a call takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from llmopt.optimizer.lora.adapter_file import AdapterFile
from llmopt.optimizer.manifest import LoraSlots
from llmopt.runtime.backends.slot_pool import aligned_zeros

__all__ = ["INPUTS", "AdapterMemory"]

_CHOSEN, _FACTORS, _RANKS = INPUTS = ("adapters", "lora.factors", "lora.ranks")
"""What an engine with the feature ``lora`` takes besides its other inputs."""


class AdapterMemory:
    """Adapters in the slots 1 to ``lora.slots``; a sequence with 0 has none.

    Pages of it are claimed only when they are written: an adapter takes the memory of its own rank.

    Args:
        lora: What the manifest says.
        sequences: The most of one call.
    """

    def __init__(self, lora: LoraSlots, *, sequences: int) -> None:
        self.lora = lora
        # ml_dtypes gives numpy its bfloat16: what is written is rounded to the nearest.
        dtype = np.dtype(ml_dtypes.bfloat16 if lora.dtype == "bfloat16" else np.float32)
        self._factors = aligned_zeros((lora.slots, lora.size), dtype)
        self._ranks = np.zeros((lora.slots, len(lora.modules)), np.int64)
        self._chosen = np.zeros(sequences, np.int64)

    def load(self, slot: int, file: AdapterFile) -> None:
        """Read an adapter into a slot, in place of what was there.

        Raises:
            VerificationError: The file is missing, damaged, or of another engine. The slot then has no adapter.
        """
        self._ranks[slot - 1] = 0
        factors = file.read(self.lora)
        row = self._factors[slot - 1]
        for number, module in enumerate(self.lora.modules):
            if (found := factors.get(module.name)) is None:
                continue
            row[module.down : module.down + found.down.size] = found.down.ravel()
            row[module.up : module.up + found.up.size] = found.up.ravel()
            if module.biased:
                begin = module.up + self.lora.max_rank * module.outputs
                row[begin : begin + module.outputs] = 0 if found.bias is None else found.bias
            self._ranks[slot - 1, number] = len(found.down)

    def choose(self, slots: Sequence[int]) -> None:
        """Say whose factors the sequences of the next call take, in its order; it stays so until it is said again."""
        self._chosen[: len(slots)] = slots

    def inputs(self, sequences: int) -> Mapping[str, npt.NDArray[Any]]:
        """What is to be bound, once, for calls of so many sequences; it is this object's own memory."""
        return {_CHOSEN: self._chosen[:sequences], _FACTORS: self._factors, _RANKS: self._ranks}
