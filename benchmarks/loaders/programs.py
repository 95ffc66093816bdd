"""The programs that load what llmopt writes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llmopt.benchmarks.peer import TORCH, Peer
from llmopt.benchmarks.quantizers.peers import PEERS

__all__ = ["HERE", "LOADERS", "SENTENCE_TRANSFORMERS"]

_FOLDER = Path(__file__).parent

_NO_AMX = "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON"
"""llama.cpp crashes in its AMX kernels; without them it is compiled for any x86 CPU of the last ten years."""

HERE = ("transformers", "genai")
"""Those that run in this very environment."""

LOADERS: Mapping[str, Peer] = {
    "transformers": Peer("transformers", _FOLDER / "run_transformers.py", ()),
    "genai": Peer("onnxruntime-genai", _FOLDER / "run_genai.py", ()),
    "llama_cpp": Peer(
        "llama-cpp-python 0.3.36",
        _FOLDER / "run_llama_cpp.py",
        ("numpy==2.4.6", "llama-cpp-python==0.3.36"),
        environment={"CMAKE_ARGS": _NO_AMX, "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
    ),
    "gptqmodel": replace(PEERS["gptqmodel"], script=_FOLDER / "run_gptqmodel.py"),
}

SENTENCE_TRANSFORMERS = Peer(
    "sentence-transformers 5.7.0",
    _FOLDER / "run_sentence_transformers.py",
    (TORCH, "sentence-transformers==5.7.0", "optimum-onnx[onnxruntime]==0.1.0", "onnxruntime==1.32.0"),
)
"""Of encoders. Its ONNX backend needs a transformers before 4.58, so it has an environment of its own."""
