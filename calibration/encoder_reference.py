"""Runs an encoder ``Model`` in torch, which is what its engines are measured against."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llmopt.calibration.activations import quantize_activations
from llmopt.optimizer.encoder_module import encoder_module, pooled
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.pooling import Pooling
from llmopt.optimizer.tokens import Tokens

__all__ = ["EncoderReference"]

_BATCH = 32
"""Texts run at the same time, of about equal length."""


class EncoderReference:
    """transformers' module with the model's weights as floats, and rounded inputs where their schemes say so.

    Args:
        model: The encoder; all its weights are in memory while this object is.
        pooling: How vectors of tokens become one; None: as the model says.
        threads: PyTorch threads; None keeps the process's number.
    """

    def __init__(self, model: Model, *, pooling: Pooling | None = None, threads: int | None = None) -> None:
        self._model = model
        self._pooling = pooling or model.pooling
        self._threads = threads
        self._network: Any = encoder_module(model.config)
        values = {name: model.weights[name].dense() for name, _ in self._network.named_parameters()}
        self._network.load_state_dict(values, strict=False, assign=True)
        for name in model.linears():
            weight = model.weights[f"{name}.weight"]
            if isinstance(weight, QuantWeight) and weight.scheme.input_activations is not None:
                self._network.get_submodule(name).register_forward_pre_hook(_rounds_inputs(weight))

    def vectors(self, texts: Tokens, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
        """The vector of each text, float32 ``[n, d]``.

        Args:
            texts: Padded on their right.
            progress: Called with (finished, total) texts.
        """
        lengths = texts.mask.sum(1)
        found: list[Tensor] = []
        order = lengths.argsort()
        with self._running():
            for first in range(0, len(order), _BATCH):
                rows = order[first : first + _BATCH]
                longest = int(lengths[rows].max())
                mask = texts.mask[rows, :longest].to(torch.int64)
                found.append(self.pooled(texts.ids[rows, :longest], mask))
                progress(sum(map(len, found)), len(order))
        return torch.cat(found)[order.argsort()]

    def pooled(self, ids: Tensor, mask: Tensor, token_types: Tensor | None = None) -> Tensor:
        """The vector of each text of a batch, float32 ``[n, d]``.

        Args:
            ids: int64 ``[n, t]``; what they are where there is no token does not matter.
            mask: int64 ``[n, t]``, 1 where there is a token.
            token_types: int64 ``[n, t]``, of encoders whose tokens have types; None: all of the first.
        """
        with torch.no_grad():
            return pooled(self.hidden(ids, mask, token_types), mask, self._pooling)

    def hidden(self, ids: Tensor, mask: Tensor, token_types: Tensor | None = None) -> Tensor:
        """The vector of each token, float32 ``[n, t, d]``; see ``pooled``."""
        ids = torch.where(mask > 0, ids, self._model.config.get("pad_token_id") or 0)
        types = {} if token_types is None else {"token_type_ids": token_types}
        with torch.no_grad():
            hidden: Tensor = self._network(input_ids=ids, attention_mask=mask, **types).last_hidden_state
        return hidden

    @contextmanager
    def _running(self) -> Iterator[None]:
        before = torch.get_num_threads()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _rounds_inputs(weight: QuantWeight) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    spec = weight.scheme.input_activations
    assert spec is not None

    def rounded(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantize_activations(inputs[0], spec), *inputs[1:])

    return rounded
