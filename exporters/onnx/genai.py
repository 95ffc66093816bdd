"""The engine's graph with the inputs and outputs that onnxruntime-genai binds, and the config that it reads.

Its contract was established by trying (onnxruntime-genai 0.18): ids, an attention mask over everything read so far, and
caches in; logits of the last token of each row and caches out. What lies between is the engine's own graph.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from llmopt.exporters.onnx.adapter_inputs import with_defaults
from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.optimizer.decoder import Decoder
from llmopt.optimizer.hf_config import read_json
from llmopt.optimizer.model import Model

__all__ = ["genai_config", "with_genai_interface", "write_genai_files"]

_IDS, _MASK, _LOGITS = "input_ids", "attention_mask", "logits"

_CONTRACT = ("past_lengths", "logit_rows")
"""What our runtime says outright, and genai by the mask."""

_PAST, _PRESENT = "past_key_values.{i}.{kind}", "present.{i}.{kind}"


def with_genai_interface(graph: ir.Model) -> ir.Model:
    """Change the lowered graph of an engine, in place, into one that onnxruntime-genai runs.

    A row's tokens are those under its mask; shorter prompts of a batch are padded on the right. The number of cached
    tokens is the mask's sum less the tokens of this call, or 0 where a padded prompt has fewer.

    Args:
        graph: Behind the graph passes, with the engine contract's inputs and outputs.

    Returns:
        ``graph``.
    """
    values = {str(value.name): value for value in graph.graph.inputs}
    mask = ir.Value(name=_MASK, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(("batch_size", "total_length")))
    builder = GraphBuilder()
    made = _lengths_and_rows(builder, values[_IDS], mask)
    for value in builder.initializers:
        graph.graph.register_initializer(value)
    first = graph.graph[0]
    graph.graph.insert_before(first, builder.nodes)
    for name, value in zip(_CONTRACT, made, strict=True):
        ir.convenience.replace_all_uses_with(values[name], value)
        graph.graph.inputs.remove(values[name])
    graph.graph.inputs.insert(1, mask)
    values[_IDS].shape = ir.Shape(("batch_size", "sequence_length"))
    with_defaults(graph.graph)
    _rename_caches(graph.graph)
    _declare_logits(graph.graph)
    return graph


def _lengths_and_rows(builder: GraphBuilder, ids: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """``past_lengths`` int64 ``[batch]``, and of each row the flat index of its last token, int64 ``[batch]``."""
    zero, one = (builder.constant(np.int64(number), f"genai.{number}") for number in (0, 1))
    axis = builder.constant(np.array([1]), "genai.axis")
    total = builder.op("ReduceSum", mask, axis, keepdims=0, name="genai.total_lengths")
    rows = builder.op("Squeeze", builder.op("Shape", ids, start=0, end=1), name="genai.rows")
    tokens = builder.op("Squeeze", builder.op("Shape", ids, start=1, end=2), name="genai.tokens")
    past = builder.op("Max", builder.op("Sub", total, tokens), zero, name="genai.past_lengths")
    last = builder.op("Sub", builder.op("Sub", total, past), one, name="genai.last_tokens")
    first = builder.op("Mul", builder.op("Range", zero, rows, one), tokens, name="genai.first_tokens")
    return past, builder.op("Add", first, last, name="genai.logit_rows")


def _rename_caches(graph: ir.Graph) -> None:
    """``past.0.key`` -> ``past_key_values.0.key``, and the names of dimensions that others know."""
    for value in graph.inputs:
        if str(value.name).startswith("past."):
            value.name = f"past_key_values.{str(value.name).removeprefix('past.')}"
            _set_dims(value, "past_sequence_length")
    for value in graph.outputs:
        if str(value.name).startswith("present."):
            _set_dims(value, "total_sequence_length")


def _set_dims(value: ir.Value, length: str) -> None:
    assert value.shape is not None
    _, heads, _, width = value.shape
    value.shape = ir.Shape(("batch_size", heads, length, width))


def _declare_logits(graph: ir.Graph) -> None:
    """``[batch, vocab]`` -> ``[batch, 1, vocab]``, which tells genai that there is one row for each sequence."""
    place = next(i for i, value in enumerate(graph.outputs) if value.name == _LOGITS)
    rows = graph.outputs[place]
    rows.name = "logits.rows"
    assert rows.shape is not None
    builder = GraphBuilder()
    logits = builder.op("Unsqueeze", rows, builder.constant(np.array([1]), "logits.axis"), name=_LOGITS)
    logits.type, logits.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("batch_size", 1, rows.shape[1]))
    for value in builder.initializers:
        graph.register_initializer(value)
    graph.extend(builder.nodes)
    graph.outputs[place] = logits


def write_genai_files(model: Model, folder: Path, *, capacity: int) -> None:
    """Write the config and the tokenizer's files beside a graph ``model.onnx``.

    Args:
        model: The source of both.
        folder: Exists.
        capacity: The longest sequence in tokens.
    """
    for path in sorted(model.source.tokenizer_dir.iterdir()):
        shutil.copyfile(path, folder / path.name)
    tokens = read_json(folder / "generation_config.json")
    config = genai_config(model.decoder, tokens, filename="model.onnx", capacity=capacity)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "genai_config.json").write_text(text + "\n", encoding="utf-8")


def genai_config(decoder: Decoder, tokens: Mapping[str, Any], *, filename: str, capacity: int) -> dict[str, Any]:
    """``genai_config.json``; it refuses keys that it does not know, so nothing of ours is in it.

    Args:
        decoder: The model.
        tokens: ``generation_config.json``: ids of special tokens, and how to sample.
        filename: Of the graph, in the same folder.
        capacity: The longest sequence in tokens.
    """
    end = tokens.get("eos_token_id", 0)
    first_end = end[0] if isinstance(end, list) else end
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    presents = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    attention = decoder.layers[0].attention
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": tokens.get("bos_token_id") or first_end,
            "eos_token_id": end,
            "pad_token_id": tokens.get("pad_token_id") or first_end,
            "context_length": capacity,
            "vocab_size": decoder.vocab_size,
            "decoder": {
                # Fused and verified already, and opened as our own runtime opens it.
                "session_options": {"graph_optimization_level": "ORT_ENABLE_BASIC", "provider_options": []},
                "filename": filename,
                "head_size": decoder.head_dim,
                "hidden_size": attention.heads * decoder.head_dim,
                "num_attention_heads": attention.heads,
                "num_hidden_layers": len(decoder.layers),
                "num_key_value_heads": decoder.kv_heads,
                "inputs": {"input_ids": _IDS, "attention_mask": _MASK, **names},
                "outputs": {"logits": _LOGITS, **presents},
            },
        },
        "search": {
            "do_sample": bool(tokens.get("do_sample", False)),
            "temperature": float(tokens.get("temperature") or 1.0),
            "top_k": int(tokens.get("top_k") or 50),
            "top_p": float(tokens.get("top_p") or 1.0),
            "repetition_penalty": float(tokens.get("repetition_penalty") or 1.0),
            "min_length": 0,
            "max_length": capacity,
            "num_beams": 1,
            "num_return_sequences": 1,
            "early_stopping": True,
            "past_present_share_buffer": True,
        },
    }
