"""Engines to run: one of a single layer to check by hand, and builds made by llmopt; and a tokenizer of bytes."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import tokenizers
from onnx import TensorProto, helper, numpy_helper

from llmopt.optimizer.cache import cache_root
from llmopt.optimizer.manifest import Engine, TensorInfo

HEADS, KV_HEADS, HEAD_DIM, VOCAB, CAPACITY = 4, 2, 16, 50, 96
WIDTH = HEADS * HEAD_DIM


@dataclass(frozen=True)
class TinyEngine:
    directory: Path
    engine: Engine
    weights: dict[str, npt.NDArray[np.float32]]

    def logits(self, ids: list[int]) -> npt.NDArray[np.float64]:
        """The same layer, written plainly, without a cache: float64 [tokens, vocab]."""
        w = {name: value.astype(np.float64) for name, value in self.weights.items()}
        hidden = w["embed"][ids]
        count = len(ids)
        query = _rotate(w, (hidden @ w["q"]).reshape(count, HEADS, HEAD_DIM))
        key = _rotate(w, (hidden @ w["k"]).reshape(count, KV_HEADS, HEAD_DIM))
        value = (hidden @ w["v"]).reshape(count, KV_HEADS, HEAD_DIM)
        out = np.zeros_like(query)
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = query[:, head] @ key[:, group].T / np.sqrt(HEAD_DIM)
            scores[np.triu_indices(count, 1)] = -np.inf
            shares = np.exp(scores - scores.max(1, keepdims=True))
            out[:, head] = shares / shares.sum(1, keepdims=True) @ value[:, group]
        return (hidden + out.reshape(count, WIDTH)) @ w["head"]


def _rotate(w, x):
    half = HEAD_DIM // 2
    cos, sin = (w[name][: len(x), None, :] for name in ("cos", "sin"))
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _weights() -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (VOCAB, WIDTH),
        "q": (WIDTH, WIDTH),
        "k": (WIDTH, KV_HEADS * HEAD_DIM),
        "v": (WIDTH, KV_HEADS * HEAD_DIM),
        "head": (WIDTH, VOCAB),
    }
    weights = {
        n: (rng.standard_normal(s) * (1 if n == "embed" else 0.15)).astype(np.float32) for n, s in shapes.items()
    }
    angles = np.arange(CAPACITY)[:, None] / 10000 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    return weights | {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def _graph(weights) -> onnx.ModelProto:
    node, info = helper.make_node, helper.make_tensor_value_info
    constants = {"one": np.array(1, np.int64), "flat": np.array([-1, WIDTH], np.int64), "axis": np.array([1], np.int64)}
    nodes = [
        node("Gather", ["embed", "input_ids"], ["hidden"]),
        *(node("MatMul", ["hidden", name], [name + ".out"]) for name in "qkv"),
        node("Shape", ["input_ids"], ["tokens"], start=1, end=2),
        node("Add", ["past_lengths", "tokens"], ["totals"]),
        node("Sub", ["totals", "one"], ["last"]),
        node("Cast", ["last"], ["seqlens"], to=TensorProto.INT32),
        node("ReduceMax", ["totals"], ["longest"], keepdims=0),
        node("Cast", ["longest"], ["total"], to=TensorProto.INT32),
        node(
            "GroupQueryAttention",
            ["q.out", "k.out", "v.out", "past.0.key", "past.0.value", "seqlens", "total", "cos", "sin"],
            ["attention", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        ),
        node("Add", ["hidden", "attention"], ["sum"]),
        node("Reshape", ["sum", "flat"], ["positions"]),
        node("Gather", ["positions", "logit_rows"], ["picked"]),
        node("MatMul", ["picked", "head"], ["logits"]),
    ]
    cache = ["batch", KV_HEADS, "capacity", HEAD_DIM]
    inputs = [
        info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
        info("past_lengths", TensorProto.INT64, ["batch"]),
        info("logit_rows", TensorProto.INT64, ["rows"]),
        *(info(f"past.0.{part}", TensorProto.FLOAT, cache) for part in ("key", "value")),
    ]
    outputs = [
        info("logits", TensorProto.FLOAT, ["rows", VOCAB]),
        *(info(f"present.0.{part}", TensorProto.FLOAT, cache) for part in ("key", "value")),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in (weights | constants).items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _infos(values) -> list[TensorInfo]:
    names = {TensorProto.INT64: "int64", TensorProto.FLOAT: "float32"}
    return [
        TensorInfo(
            name=v.name,
            dtype=names[v.type.tensor_type.elem_type],
            dims=[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        )
        for v in values
    ]


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    directory = tmp_path_factory.mktemp("tiny-engine")
    weights = _weights()
    model = _graph(weights)
    onnx.save(model, directory / "model.onnx")
    engine = Engine(
        exporter="onnx",
        target="cpu",
        path="model.onnx",
        inputs=_infos(model.graph.input),
        outputs=_infos(model.graph.output),
        num_layers=1,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        kv_dtype="float32",
        vocab_size=VOCAB,
        capacity=CAPACITY,
        max_chunk=32,
        min_chunk=2,
    )
    return TinyEngine(directory, engine, weights)


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer files with one token per byte, two special tokens and a chat template; 258 tokens."""
    directory = tmp_path_factory.mktemp("byte-tokenizer")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    write = {
        "tokenizer_config.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"},
        "generation_config.json": {"eos_token_id": [257]},
    }
    for name, content in write.items():
        (directory / name).write_text(json.dumps(content))
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ bos_token }}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return directory


@pytest.fixture(scope="session", params=["metaspace", "sequence"])
def spaced_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that, like SentencePiece's, drops the space a text begins with, and puts <s> before it."""
    decoders = tokenizers.decoders
    vocabulary = {"<s>": 0, "\u2581Hello": 1, "\u2581world": 2, "<0xE6>": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    stripped = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    steps = {
        "metaspace": [decoders.ByteFallback(), decoders.Metaspace()],
        "sequence": [decoders.Replace("\u2581", " "), *stripped],
    }
    made.decoder = decoders.Sequence(steps[request.param])
    made.add_special_tokens(["<s>"])
    directory = tmp_path_factory.mktemp("spaced-tokenizer")
    made.save(str(directory / "tokenizer.json"))
    return directory


W8A8 = "round_to_nearest: {scheme: W8A8}"


def built(model: str, passes: str, output: Path, cache: Path) -> Path:
    from llmopt.optimizer.build import build
    from llmopt.optimizer.progress import Silent
    from llmopt.optimizer.recipe import Recipe

    recipe = output.with_suffix(".yaml")
    # The gate passes always; it keeps the measuring, which is not what these tests are about, to a few tokens.
    recipe.write_text(
        f"version: 1\nmodel: {model}\npasses: [{passes}]\nexport: [onnx: {{target: cpu}}]\nverify: none\n"
        "accept: [{metric: kl, max: 100, windows: 1, tokens: 8}]\nresources: {threads: 2}\n"
    )
    build(Recipe.load(recipe), output, cache=cache, progress=Silent())
    return output


@pytest.fixture(scope="session")
def tiny_build(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-build")
    return built(str(tiny_llama), W8A8, folder / "build", folder / "cache")


@pytest.fixture(scope="session")
def tiny_float_build(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-float-build")
    return built(str(tiny_llama), "", folder / "build", folder / "cache")


@pytest.fixture(scope="session")
def tiny_int4_build(tiny_llama, tmp_path_factory):
    """Weights in 4 bits, keys and values in 8."""
    folder = tmp_path_factory.mktemp("tiny-int4-build")
    passes = "round_to_nearest: {scheme: W4A16, group_size: 32}, kv_cache: {}"
    return built(str(tiny_llama), passes, folder / "build", folder / "cache")


@pytest.fixture(scope="session")
def smollm2_build(smollm2_spec, tmp_path_factory):
    return built(smollm2_spec, W8A8, tmp_path_factory.mktemp("smollm2-build") / "build", cache_root())
