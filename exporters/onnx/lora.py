"""Which linears of an engine take adapters, and where their factors lie in memory."""

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from llmopt.optimizer.basis import Basis, Shifted
from llmopt.optimizer.decoder import Decoder, Experts
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.manifest import LoraModule, LoraSlots
from llmopt.optimizer.model import Model, QuantWeight

__all__ = ["LoraOptions", "lora_slots"]


class LoraOptions(BaseModel):
    """Adapters that are added to a build later."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_rank: int = Field(32, ge=1, le=1024, description="The largest rank of an adapter.")
    slots: int = Field(8, ge=1, le=1024, description="Adapters that are in memory, and in a batch, at the same time.")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="Of factors in memory. bfloat16 rounds them, and halves what a step reads of them. Omitted: "
        "bfloat16 where all their linears are quantized, else float32.",
    )
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="The linears of the layers that take adapters, by the ends of their names: [q_proj, v_proj]; "
        "omitted: all but a mixture's experts.",
    )


def lora_slots(model: Model, decoder: Decoder, options: LoraOptions) -> LoraSlots:
    """Where the factors of the linears that ``options`` name lie.

    Args:
        model: Has the shapes, and what passes did to the linears.
        decoder: Whose linears they are.
        options: See there.

    Raises:
        InputError: A target is no linear of the model, or one whose outputs the engine has in another order.
    """
    possible = list(_possible(decoder))
    chosen = [name for name in possible if options.targets is None or _is_named(name, options.targets)]
    for target in options.targets or ():
        if not any(_is_named(name, [target]) for name in possible):
            names = sorted({name.rpartition(".")[2] for name in possible})
            raise InputError(
                f"lora: {target} is no linear of {model.source.spec} that takes adapters",
                hint=f"these are: {', '.join(names)}" if names else "none of its linears is",
            )
    if not chosen:
        raise InputError(f"lora: {model.source.spec} has no linears that take adapters", hint="leave lora out")
    modules, at = [], 0
    for name in chosen:
        outputs, inputs = model.weights[f"{name}.weight"].shape
        biased = any(isinstance(change, Shifted) for change in model.bases.get(name, Basis()).columns)
        up = at + options.max_rank * inputs
        modules.append(LoraModule(name=name, inputs=inputs, outputs=outputs, down=at, up=up, biased=biased))
        at = up + (options.max_rank + biased) * outputs
    return LoraSlots(
        max_rank=options.max_rank, dtype=_dtype(model, chosen, options), slots=options.slots, modules=modules
    )


def _dtype(model: Model, modules: Sequence[str], options: LoraOptions) -> Literal["float32", "bfloat16"]:
    if options.dtype is not None:
        return options.dtype
    quantized = all(isinstance(model.weights[f"{name}.weight"], QuantWeight) for name in modules)
    return "bfloat16" if quantized else "float32"


def _possible(decoder: Decoder) -> Iterator[str]:
    """In data order; a packed linear whose outputs are stored group by group is turned around in the engine."""
    for layer in decoder.layers:
        turned = layer.attention.packed if layer.attention.packing == "groups" else None
        yield from (name for name in layer.attention.linears if name != turned)
        yield from (layer.mlp.router,) if isinstance(layer.mlp, Experts) else layer.mlp.linears


def _is_named(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)
