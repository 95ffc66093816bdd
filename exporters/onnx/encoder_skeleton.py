"""transformers' module of an encoder as a graph in which every weight is still a name.

Linears, tables and norms are replaced by modules that export as one node naming the part, before torch traces
anything: the exporter then has no weights to copy, transpose or fold, and what it writes is the same for every scheme.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from llmopt.exporters.onnx.composites import DOMAIN, OPSET
from llmopt.optimizer.encoder_module import encoder_module, pooled
from llmopt.optimizer.model import Model
from llmopt.optimizer.pooling import Pooling

__all__ = ["LINEAR", "NORM", "TABLE", "encoder_skeleton"]

LINEAR, TABLE, NORM = "Linear", "Table", "Norm"
"""Operators of the domain ``llmopt`` that name a module, in the attribute ``module``. They have no body."""

_ATTENTION = "llmopt_export"


def encoder_skeleton(model: Model, layer: int | None = None) -> ir.Model:
    """The graph of an encoder with pooling: ai.onnx operators and ``LINEAR``, ``TABLE`` and ``NORM``.

    Args:
        model: Of its weights only the names matter.
        layer: The number of the only one to keep; None keeps all.
    """
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if model.encoder.has_token_types else [])]
    stem = model.encoder.layers[0].name.rpartition(".")[0]
    return _traced(model.config, model.pooling, names, stem, layer)


def _traced(
    config: Mapping[str, Any], pooling: Pooling, names: Sequence[str], stem: str, layer: int | None
) -> ir.Model:
    """The graph as far as it depends on these: seconds of work, which tests do once for equal ones."""
    _register_attention()
    network: Any = encoder_module(config, attention=_ATTENTION)
    _name_parts(network)
    if layer is not None:
        network.set_submodule(stem, nn.ModuleList([network.get_submodule(stem)[layer]]))
    graph = _exported(_Pooled(network, pooling, names), names)
    graph.producer_name = "llmopt"
    graph.producer_version = None
    return graph


class _Pooled(nn.Module):
    """The encoder and the pooling behind it, with its inputs by position."""

    def __init__(self, network: nn.Module, pooling: Pooling, names: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.pooling = pooling
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(self.names, inputs, strict=True))
        hidden: Tensor = self.network(**given).last_hidden_state
        return hidden, pooled(hidden, given["attention_mask"], self.pooling)


class _Part(nn.Module):
    """One node in the place of a module with weights."""

    def __init__(self, op_type: str, module: str, columns: int, **attributes: float) -> None:
        super().__init__()
        self.op_type = f"{DOMAIN}::{op_type}"
        self.attributes: dict[str, Any] = {"module": module, **attributes}
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        looks_up = not x.is_floating_point()
        shape = (*x.shape, self.columns) if looks_up else (*x.shape[:-1], self.columns)
        y: Tensor = torch.onnx.ops.symbolic(self.op_type, (x,), self.attributes, dtype=torch.float32, shape=shape)
        return y


def _name_parts(network: nn.Module) -> None:
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear):
            network.set_submodule(name, _Part(LINEAR, name, module.out_features))
        elif isinstance(module, nn.Embedding):
            network.set_submodule(name, _Part(TABLE, name, module.embedding_dim))
        elif isinstance(module, nn.LayerNorm):
            network.set_submodule(name, _Part(NORM, name, module.normalized_shape[-1], epsilon=module.eps))
    left = [name for name, _ in network.named_parameters()]
    assert not left, f"{left} are weights of no linear, table or norm"


def _register_attention() -> None:
    """Have transformers compute attention by operators that a graph pass knows, and masks without an index per row."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, _added_mask)


def _attend(
    module: nn.Module,  # noqa: ARG001 - transformers hands it over
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of query, key and value ``[n, heads, t, head_dim]``: ``[n, t, heads, head_dim]``."""
    scores = query @ key.transpose(2, 3) * scaling + attention_mask
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2), None


def _added_mask(
    q_length: int, kv_length: int, mask_function: Callable[..., Tensor], attention_mask: Tensor, **_: Any
) -> Tensor:
    """What is added to scores: 0, or the smallest float where a token does not see another.

    float32 ``[n, 1, 1, t]``, or ``[n, 1, t, t]`` where ``mask_function`` (of batch, head, query and key) says that it
    depends on the query. ``attention_mask`` ``[n, t]`` is whether there is a token.
    """
    seen = attention_mask.to(torch.bool).unsqueeze(1).unsqueeze(1)
    if mask_function.__name__ != "bidirectional_mask_function":
        queries, keys = torch.arange(q_length).unsqueeze(1), torch.arange(kv_length).unsqueeze(0)
        seen = seen & mask_function(0, 0, queries, keys)
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def _exported(network: nn.Module, names: Sequence[str]) -> ir.Model:
    """Trace ``network`` with any number of texts of any number of tokens."""
    example = tuple(torch.ones(2, 5, dtype=torch.int64) for _ in names)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            network.eval(),
            example,
            dynamo=True,
            dynamic_shapes={"inputs": tuple({0: batch, 1: tokens} for _ in names)},
            input_names=list(names),
            output_names=["last_hidden_state", "sentence_embedding"],
            opset_version=OPSET,
            verbose=False,
            optimize=True,
        )
    assert program is not None
    graph: ir.Model = program.model
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says to its own developers."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
