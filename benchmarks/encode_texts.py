"""Encodes texts again and again on demand: one program of ``encoders.py``, in a process of its own.

Each line on standard input is a command. ``run`` encodes all texts once and answers with the seconds that took,
``save PATH`` writes their vectors. Programs other than llmopt run this file in an environment that has no llmopt.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["KINDS"]

KINDS = ("llmopt", "engine", "torch", "onnx", "onnx-int8")
"""llmopt's runtime; sentence-transformers with a build's ``engine/``, and with a checkpoint: in torch, with its own
export, and with its own dynamic int8 of that."""

Encode = Callable[[list[str]], Any]


def _open(kind: str, path: str, threads: int, batch: int) -> Encode:
    if kind == "llmopt":
        encoder = importlib.import_module("llmopt.runtime.encoder").Encoder(path, threads=threads)
        return lambda texts: encoder.encode(texts, batch=batch)
    peer = importlib.import_module("sentence_transformers")
    if kind == "torch":
        importlib.import_module("torch").set_num_threads(threads)
        model = peer.SentenceTransformer(path, device="cpu")
    else:
        model = _with_onnx(peer, kind, path, threads)
    return lambda texts: model.encode(texts, batch_size=batch)


def _with_onnx(peer: Any, kind: str, path: str, threads: int) -> Any:
    options = importlib.import_module("onnxruntime").SessionOptions()
    options.intra_op_num_threads = threads
    settings: dict[str, Any] = {"provider": "CPUExecutionProvider", "session_options": options}
    if kind == "engine":
        return peer.SentenceTransformer(f"{path}/engine", backend="onnx", model_kwargs=settings)
    model = peer.SentenceTransformer(path, backend="onnx", model_kwargs=settings | {"export": True})
    if kind == "onnx":
        return model
    folder = Path(path).with_name("sentence-transformers-int8")
    model.save_pretrained(str(folder))
    peer.export_dynamic_quantized_onnx_model(model, "avx512_vnni", str(folder))
    settings["file_name"] = "onnx/model_qint8_avx512_vnni.onnx"
    return peer.SentenceTransformer(str(folder), backend="onnx", model_kwargs=settings)


def main() -> None:
    """Arguments as one JSON object: kind, path, texts, threads and batch."""
    arguments = json.loads(sys.argv[1])
    texts = Path(arguments["texts"]).read_text("utf-8").splitlines()
    encode = _open(arguments["kind"], arguments["path"], arguments["threads"], arguments["batch"])
    encode(texts)
    print("ready", flush=True)
    for line in sys.stdin:
        command, _, path = line.strip().partition(" ")
        started = time.perf_counter()
        vectors = np.asarray(encode(texts))
        seconds = time.perf_counter() - started
        if command == "save":
            np.save(path, vectors)
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
