"""A PEFT adapter in the layout of a build's engine: read, checked, and changed as the passes changed the base."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmopt.optimizer.checkpoint import some
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.lora.adapter import Adapter, read_adapter
from llmopt.optimizer.lora.adapter_file import ModuleFactors
from llmopt.optimizer.lora.base_file import read_base
from llmopt.optimizer.lora.changes import LowRank
from llmopt.optimizer.lora.factors import LoraFactors, factors_of
from llmopt.optimizer.manifest import LoraSlots, Manifest

__all__ = ["Fitted", "fit_adapter", "slots_of"]


@dataclass(frozen=True, slots=True)
class Fitted:
    """An adapter for a build.

    Attributes:
        factors: By linear.
        trained_on: The base that it names.
        other_base: The same, where that is called otherwise than the build's model.
    """

    factors: Mapping[str, ModuleFactors]
    trained_on: str | None
    other_base: str | None


def slots_of(build: Path, manifest: Manifest) -> LoraSlots:
    """Which adapters a build takes.

    Raises:
        InputError: None.
    """
    found = next((engine.lora for engine in manifest.engines if engine.lora is not None), None)
    if found is None:
        raise InputError(f"{build} takes no adapters", hint="build it with export: [{onnx: {lora: {}}}]")
    return found


def fit_adapter(folder: Path, build: Path, lora: LoraSlots) -> Fitted:
    """The adapter in ``folder`` for the engine of ``build`` that takes what ``lora`` says.

    Raises:
        InputError: It is missing or damaged, is for another base, changes what takes no adapters here, or its rank is
            too large.
        UnsupportedError: It is of another kind, or more than low-rank products.
    """
    base = read_base(build)
    adapter = read_adapter(folder, base)
    _check_targets(adapter, lora)
    factors = factors_of(adapter, base)
    for name, found in factors.items():
        if len(found.down) > lora.max_rank:
            raise InputError(
                f"{folder} has rank {len(found.down)} in {name}, and {build} takes up to {lora.max_rank}",
                hint=f"build it with lora: {{max_rank: {len(found.down)}}}",
            )
    trained_on = adapter.config.base_model_name_or_path
    arrays = {name: _arrays(found) for name, found in sorted(factors.items())}
    return Fitted(arrays, trained_on, adapter.other_base(base.source.spec))


def _check_targets(adapter: Adapter, lora: LoraSlots) -> None:
    known = {module.name for module in lora.modules}
    changed = [name.removesuffix(".weight") for name, change in adapter.changes.items() if isinstance(change, LowRank)]
    if outside := [name for name in changed if name not in known]:
        names = sorted({name.rpartition(".")[2] for name in known})
        raise InputError(
            f"{adapter.folder} changes {some(outside)}, where the engine takes no adapters",
            hint=f"it takes them in {', '.join(names)}: build it with other lora: targets, or merge with merge_lora",
        )


def _arrays(found: LoraFactors) -> ModuleFactors:
    bias = None if found.bias is None else found.bias.numpy()
    return ModuleFactors(found.down.contiguous().numpy(), found.up.T.contiguous().numpy(), bias)
