"""An encoder's engine: its graph lowered, verified and written, in a folder that sentence-transformers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llmopt.exporters.onnx.encoder_graph import encoder_graph
from llmopt.exporters.onnx.encoder_verify import verify_encoder
from llmopt.exporters.onnx.engine_files import save_graph, tensor_info, vnni_feature
from llmopt.exporters.onnx.lowering import finished, passed
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.manifest import EncoderEngine, PassRecord
from llmopt.optimizer.model import Model
from llmopt.optimizer.target import Target
from llmopt.optimizer.tokenizer_config import read_object

__all__ = ["describe_encoder", "export_encoder", "lowered_encoder"]

_TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


_NEW_CLASS = "TokenizersBackend"
"""What transformers 5 calls any fast tokenizer; version 4, which sentence-transformers' ONNX backend needs, does not
know it. Both know the older name."""


def export_encoder(
    model: Model, target: Target, directory: Path, context: PassContext, *, capacity: int
) -> tuple[EncoderEngine, list[PassRecord]]:
    """Write ``engine/`` below ``directory``.

    Args:
        model: The encoder; its ``pooling`` is part of the graph.
        target: Executes it.
        directory: The build.
        context: See ``Exporter.export``.
        capacity: What longer texts are cut to, in tokens.

    Raises:
        VerificationError: The lowered graph does not compute what the standard graph does.
    """
    graph, records = lowered_encoder(model, target, target, context)
    save_graph(graph, directory / "engine", context)
    _write_folder(model, directory / "engine", capacity)
    features = vnni_feature(model) if target.name == "cpu" else []
    engine = describe_encoder(
        model, target, graph, capacity, exporter="onnx", path="engine/model.onnx", features=features
    )
    return engine, records


def lowered_encoder(
    model: Model, target: Target, verified: Target, context: PassContext
) -> tuple[ir.Model, list[PassRecord]]:
    """The graph that ``target`` executes, with a record per graph pass and one of their verification.

    Args:
        model: The encoder.
        target: Executes it.
        verified: Whose graph passes are compared here: the same target, or what a CPU can run of it.
        context: See ``Exporter.export``.

    Raises:
        VerificationError: The lowered graph does not compute what the standard graph does.
    """
    differences = verify_encoder(model, verified, level=context.verify, seed=context.seed)
    steps = passed(encoder_graph(model), target.encoder_passes, options=target.options, strict=context.strict)
    graph, records = finished(steps)
    options = {"level": context.verify}
    records.append(PassRecord(name="verify_lowering", options=options, changed=False, details=differences))
    return graph, records


def describe_encoder(
    model: Model, target: Target, graph: ir.Model, capacity: int, *, exporter: str, path: str, **details: Any
) -> EncoderEngine:
    """What the manifest says of an encoder's engine.

    Args:
        model: The encoder.
        target: Executes it.
        graph: As it is executed.
        capacity: Tokens of the longest text.
        exporter: Wrote it.
        path: The graph's file, relative to the build directory.
        details: Other fields.
    """
    encoder, pooling = model.encoder, model.pooling
    return EncoderEngine(
        exporter=exporter,
        target=target.name,
        path=path,
        inputs=[tensor_info(value) for value in graph.graph.inputs],
        outputs=[tensor_info(value) for value in graph.graph.outputs],
        num_layers=len(encoder.layers),
        hidden_size=encoder.hidden_size,
        vocab_size=encoder.vocab_size,
        capacity=capacity,
        pad_token=model.config.get("pad_token_id") or 0,
        pooling=pooling.mode,
        normalize=pooling.normalize,
        prompts=dict(pooling.prompts),
        default_prompt=pooling.default_prompt,
        **details,
    )


def _write_folder(model: Model, folder: Path, capacity: int) -> None:
    """What ``SentenceTransformer(folder, backend="onnx")`` reads beside the graph."""
    for name in _TOKENIZER_FILES:
        if (path := model.source.tokenizer_dir / name).is_file():
            shutil.copyfile(path, folder / name)
    settings = read_object(folder / "tokenizer_config.json")
    if settings.get("tokenizer_class") == _NEW_CLASS:
        _write(folder / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    pooling = model.pooling
    kinds = ["Transformer", "Pooling", *(["Normalize"] if pooling.normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    _write(folder / "modules.json", modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": capacity, "do_lower_case": False})
    prompts = {"prompts": dict(pooling.prompts), "default_prompt_name": pooling.default_prompt}
    _write(folder / "config_sentence_transformers.json", prompts)
    (folder / "1_Pooling").mkdir()
    _write(folder / "1_Pooling/config.json", _pooling_config(model))


def _pooling_config(model: Model) -> dict[str, Any]:
    """In the spelling that every version of sentence-transformers reads."""
    modes = {
        "cls": "cls_token",
        "mean": "mean_tokens",
        "max": "max_tokens",
        "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "lasttoken": "lasttoken",
    }
    flags = {f"pooling_mode_{name}": mode == model.pooling.mode for mode, name in modes.items()}
    return {"word_embedding_dimension": model.encoder.hidden_size, **flags}


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
