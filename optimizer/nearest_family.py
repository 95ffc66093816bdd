"""What an architecture without a description has that the nearest one with a description has not, for the refusal."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from llmopt.optimizer.arch import known_encoders
from llmopt.optimizer.arch.base import Arch, AttentionPart, ExpertsPart, LayerNorms, MlpPart
from llmopt.optimizer.errors import UnsupportedError

__all__ = ["refusal"]

_SHOWN = 4
_CONFIG_TO_IGNORE = ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache")


@dataclass(frozen=True, slots=True)
class _Family:
    """One variant of a description: the modules it needs, and those it may have besides, with {i} for a layer."""

    arch: Arch
    needed: frozenset[str]
    possible: frozenset[str]

    def likeness(self, modules: Collection[str]) -> float:
        """The share of names that are on both sides."""
        theirs = set(modules)
        return len(theirs & self.possible) / len(theirs | self.needed)


def refusal(config: Mapping[str, Any], parameters: Collection[str], known: Sequence[Arch]) -> UnsupportedError:
    """The error that says why a checkpoint cannot be compiled.

    Args:
        config: Its config.json.
        parameters: Names of its weights; empty where they cannot be read.
        known: The families there are.
    """
    given = config.get("architectures")
    wanted = str(given[0] if isinstance(given, list) and given else config.get("model_type") or "")
    if not wanted:
        return UnsupportedError(
            "config.json names neither architectures nor model_type", hint="they say which model it belongs to"
        )
    what = f"{'architecture' if given else 'model type'} {wanted} is not supported"
    names = sorted({name for arch in known for name in arch.models})
    encoders: dict[str, str] = {name: kind for arch in known_encoders() for name, kind in arch.models.items()}
    supported = f"supported: {', '.join(names)}; encoders: {', '.join(sorted(encoders))}; see docs/families.md"
    encoder = next((name for name, kind in encoders.items() if kind == config.get("model_type")), None)
    if encoder is not None:
        return UnsupportedError(
            f"{what}; of {config.get('model_type')} models llmopt compiles the encoder and the pooling behind it",
            hint=f"save the encoder alone, as {encoder}",
        )
    inside = config.get("text_config")
    if isinstance(inside, Mapping):
        alone = [name for arch in known for name, kind in arch.models.items() if kind == inside.get("model_type")]
        return UnsupportedError(
            f"{what}; it is more than a text decoder",
            hint=f"llmopt compiles text decoders only: save its own alone{f', as {alone[0]}' if alone else ''}",
        )
    modules = {_module(name) for name in parameters}
    family = max((family for arch in known for family in _variants(arch)), key=lambda one: one.likeness(modules))
    if modules and family.likeness(modules):
        nearest = _close(wanted, list(family.arch.models)) or next(iter(family.arch.models))
        differences = _differences(modules, family) or _config_differences(config, family.arch.models[nearest])
    else:
        nearest = _close(wanted, names)
        kinds = {name: kind for arch in known for name, kind in arch.models.items()}
        differences = _config_differences(config, kinds[nearest]) if nearest else ""
    if not nearest:
        return UnsupportedError(what, hint=supported)
    if not differences and not modules:
        return UnsupportedError(f"{what}; the nearest that is: {nearest}", hint=supported)
    if not differences:
        differences = "its weights have the same names, and there is no description of what it computes"
    return UnsupportedError(f"{what}; unlike {nearest}, the nearest that is, {differences}", hint=supported)


def _close(wanted: str, names: list[str]) -> str:
    """The one of ``names`` that is spelled most like ``wanted``, or nothing."""
    stems = {re.sub("(ForCausalLM|LMHeadModel)$", "", name): name for name in names}
    stem = re.sub("(For[A-Z].*|LMHeadModel|Model)$", "", wanted)
    near = difflib.get_close_matches(stem, list(stems), n=1, cutoff=0.7)
    return stems[near[0]] if near else ""


def _module(parameter: str) -> str:
    """A parameter's module with {i} for the layer's number and {e} for an expert's."""
    name = re.sub(r"\.[0-9]+\.", ".{i}.", re.sub(r"\.(weight|bias)$", "", parameter), count=1)
    return re.sub(r"\.[0-9]+(?=\.|$)", ".{e}", name)


def _variants(arch: Arch) -> list[_Family]:
    return [_family(variant) for variant in (arch, *(variant for _, variant in arch.variants))]


def _family(arch: Arch) -> _Family:
    layer = [_below(arch, part) for part in (arch.attention, arch.norms, arch.experts or arch.mlp)]
    around = {arch.embedding, arch.final_norm} | ({arch.positions} if arch.positions else set())
    needed = frozenset(around.union(*layer))
    optional = {name for name in (arch.head, arch.project_in, arch.project_out) if name}
    return _Family(arch, needed, needed | optional | _below(arch, arch.mlp))


def _below(arch: Arch, part: AttentionPart | MlpPart | ExpertsPart | LayerNorms) -> set[str]:
    """The modules of a part of the layer."""
    role = {"query", "key", "value", "packed", "output", "query_norm", "key_norm", "gate", "up", "down", "router"}
    role |= {field.name for field in fields(LayerNorms)}
    names = [getattr(part, field.name) for field in fields(part) if field.name in role]
    return {f"{arch.layer}.{name}" for name in names if name is not None}


def _differences(modules: set[str], family: _Family) -> str:
    extra = sorted({_topmost(name, family.possible) for name in modules - family.possible})
    lacking = sorted(family.needed - modules)
    has = [f"it has {_some(extra)}"] if extra else []
    lacks = [f"it lacks {_some(lacking)}"] if lacking else []
    return " and ".join(has + lacks).replace(" and it lacks", " and lacks")


def _topmost(name: str, known: Collection[str]) -> str:
    """``name``, or the highest module above it with nothing of ``known`` below, as ``that.*``."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        above = ".".join(parts[:length])
        if parts[length - 1] != "{i}" and not any(other.startswith(f"{above}.") or other == above for other in known):
            return f"{above}.*"
    return name


def _config_differences(config: Mapping[str, Any], model_type: str) -> str:
    """Entries that the nearest family's config does not have."""
    from transformers import CONFIG_MAPPING

    theirs = CONFIG_MAPPING[model_type]().to_dict()
    extra = sorted(name for name in config if name not in theirs and name not in _CONFIG_TO_IGNORE and name[0] != "_")
    return f"its config.json has {_some(extra)}" if extra else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
