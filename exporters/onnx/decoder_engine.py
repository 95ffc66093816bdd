"""What engines of decoders have in common, whatever executes them: positions, the lowering, the manifest's words."""

from typing import Any

import onnx_ir as ir

from llmopt.exporters.onnx.adapter_inputs import GivenAdapters
from llmopt.exporters.onnx.engine_files import tensor_info
from llmopt.exporters.onnx.lora import LoraOptions
from llmopt.exporters.onnx.lowering import finished, stages
from llmopt.exporters.onnx.rope import check_rope, longest_with, rope_note
from llmopt.exporters.onnx.verify import verify_lowering
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.decoder import Decoder
from llmopt.optimizer.manifest import Engine, PassRecord
from llmopt.optimizer.model import Model
from llmopt.optimizer.target import Target

__all__ = ["describe_decoder", "longest_of", "lowered_decoder"]


def longest_of(decoder: Decoder) -> int:
    """The longest sequence in tokens that the model's positions allow.

    Raises:
        UnsupportedError, InputError: A rope cannot be exported.
    """
    for rope in decoder.ropes:
        check_rope(rope)
    return min((longest_with(rope) for rope in decoder.ropes), default=decoder.max_positions)


def lowered_decoder(
    model: Model,
    target: Target,
    verified: Target,
    context: PassContext,
    *,
    capacity: int,
    lora: LoraOptions | GivenAdapters | None = None,
) -> tuple[ir.Model, list[PassRecord]]:
    """The graph that ``target`` executes, with a record per graph pass and one of their verification.

    Args:
        model: The decoder.
        target: Executes it.
        verified: Whose graph passes are compared here: the same target, or what a CPU can run of it.
        context: See ``Exporter.export``. Gets a note where a rope is fixed for the capacity.
        capacity: Tokens of the longest sequence.
        lora: Which linears take adapters.

    Raises:
        VerificationError: The lowered graph does not compute what the standard graph does.
    """
    for rope in model.decoder.ropes:
        if note := rope_note(rope, capacity):
            context.note(note)
    differences = verify_lowering(model, verified, level=context.verify, seed=context.seed, lora=lora)
    graph, records = finished(stages(model, target, capacity=capacity, strict=context.strict, lora=lora))
    options = {"level": context.verify}
    records.append(PassRecord(name="verify_lowering", options=options, changed=False, details=differences))
    return graph, records


def describe_decoder(
    model: Model, target: Target, graph: ir.Model, capacity: int, *, exporter: str, path: str, **details: Any
) -> Engine:
    """What the manifest says of a decoder's engine.

    Args:
        model: The decoder.
        target: Executes it.
        graph: As it is executed.
        capacity: Tokens of the longest sequence.
        exporter: Wrote it.
        path: The graph's file, relative to the build directory.
        details: Other fields.
    """
    decoder = model.decoder
    inputs = [tensor_info(value) for value in graph.graph.inputs]
    return Engine(
        exporter=exporter,
        target=target.name,
        path=path,
        inputs=inputs,
        outputs=[tensor_info(value) for value in graph.graph.outputs],
        num_layers=len(decoder.layers),
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        kv_dtype=next(each.dtype for each in inputs if each.name.startswith("past.")),
        vocab_size=decoder.vocab_size,
        capacity=capacity,
        **details,
    )
