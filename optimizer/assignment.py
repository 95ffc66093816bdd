"""Which linear of a model gets which scheme: the options every quantizing pass shares."""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from llmopt.optimizer.contracts import QuantPass
from llmopt.optimizer.decoder import Experts
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.scheme import PRESETS, Scheme, SchemeOption, name_of

__all__ = ["Override", "SchemeQuantPass"]

Kept = Literal["none"]
"""Written instead of a scheme: the module stays in floating point."""


def _positive_or_channel(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("a group size is a positive number of columns, or -1 for one scale per output channel")
    return value


GroupSize = Annotated[int, AfterValidator(_positive_or_channel)]


class Override(BaseModel):
    """Another scheme for the modules whose name matches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: str = Field(description="A module name, or re: and a regular expression matched from its start.")
    scheme: SchemeOption | Kept = Field(description="The scheme for these modules; none keeps them in float.")

    @field_validator("match")
    @classmethod
    def _expression_compiles(cls, value: str) -> str:
        if value.startswith("re:"):
            try:
                re.compile(value[3:])
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression: {error}") from error
        return value

    def matches(self, module: str) -> bool:
        """Whether this override speaks of ``module``."""
        if self.match.startswith("re:"):
            return re.match(self.match[3:], module) is not None
        return module == self.match


class SchemeQuantPass(QuantPass):
    """A quantizer whose schemes are chosen by module name.

    Attributes:
        chooses_input_scales: Of which linears it knows static scales of inputs; it refuses such schemes for others.
    """

    chooses_input_scales: ClassVar[Literal["none", "layers", "all"]] = "none"

    scheme: SchemeOption = Field(description="A preset's name, or weights and input_activations spelled out.")
    group_size: GroupSize | None = Field(
        None, description="Input columns per scale, overriding the scheme's own; -1 for one scale per output channel."
    )
    head: SchemeOption | Kept | None = Field(
        None,
        description="The output head's scheme; none keeps it in float. Omitted: none under FP8 and static scales of "
        "inputs, W8A8 when the scheme rounds activations to integers with scales found per token, else W8A16 with the "
        "scheme's group size. A tied embedding shares the head's table.",
    )
    embedding: SchemeOption | Kept = Field(
        "none",
        description="The scheme of an embedding with a table of its own, such as W8A16; none keeps it in float. A tied "
        "embedding shares the head's table, and with it the head's scheme.",
    )
    experts: SchemeOption | Kept | None = Field(
        None,
        description="The scheme of the experts in mixtures of experts; none keeps them in float. Omitted: the scheme, "
        "or W8A16 when that quantizes activations. The routers always stay in float.",
    )
    overrides: tuple[Override, ...] = Field((), description="Other schemes for some modules; the first match wins.")

    @model_validator(mode="after")
    def _group_size_fits_scheme(self) -> "SchemeQuantPass":
        if self.group_size not in (None, -1) and self.scheme.input_activations is not None:
            raise ValueError(
                "group_size does not go with quantized activations, whose weights have one scale a channel"
            )
        return self

    @field_validator("embedding")
    @classmethod
    def _embedding_has_no_inputs(cls, value: Scheme | Kept) -> Scheme | Kept:
        if isinstance(value, Scheme) and value.input_activations is not None:
            raise ValueError("an embedding looks rows up, it has no inputs to quantize; W8A16 quantizes its table")
        return value

    def schemes(self) -> dict[str, Scheme]:
        """See ``QuantPass.schemes``."""
        found = {
            "scheme": self._sized(),
            "head": self._head(),
            "embedding": self.embedding,
            "experts": self._experts(),
        }
        found |= {f"overrides.{i}.scheme": override.scheme for i, override in enumerate(self.overrides)}
        return {path: scheme for path, scheme in found.items() if isinstance(scheme, Scheme)}

    def assign(self, model: Model) -> dict[str, Scheme]:
        """The scheme of every module to quantize; modules kept in float are left out.

        First the embedding, where it has a scheme, then linears in data order.
        """
        schemes, deciding = self.schemes(), {model.network.embedding: "embedding"} | self.deciding(model)
        return {module: schemes[option] for module, option in deciding.items() if option in schemes}

    def deciding(self, model: Model) -> dict[str, str]:
        """See ``QuantPass.deciding``."""
        others = {model.network.head: "head"} | dict.fromkeys(model.network.expert_linears, "experts")
        return {
            module: next(
                (f"overrides.{i}.scheme" for i, override in enumerate(self.overrides) if override.matches(module)),
                others.get(module, "scheme"),
            )
            for module in model.linears()
        }

    def fits(self, model: Model) -> None:
        """See ``WeightPass.fits``: overrides match, group sizes divide, experts agree, input scales are known."""
        _unmatched(self.overrides, model.linears())
        for module, option in self.deciding(model).items():
            scheme = self.schemes().get(option)
            if scheme is not None and scheme.needs_input_scale and not self._knows_inputs(model, module):
                raise PassError(
                    f"{option} is {scheme.name}, and this pass chooses no static scale of what enters {module}",
                    hint="use a scheme with dynamic ones, or round_to_nearest",
                )
        if self.head is not None and model.network.head is None:
            raise PassError("head is given, but an encoder has none", hint="remove it")
        if self.experts is not None and not model.network.expert_linears:
            raise PassError("experts is given, but this model has no mixtures of experts", hint="remove it")
        assigned = self.assign(model)
        for layer in model.network.layers:
            if isinstance(layer.mlp, Experts):
                _agree(layer.name, layer.mlp, assigned)
        for module, scheme in assigned.items():
            _fits(module, model.weights[model.weight_of(module)].shape[1], scheme)

    def requires(self, model: Model) -> None:
        """See ``WeightPass.requires``."""
        super().requires(model)
        if self.embedding != "none" and model.is_tied:
            raise PassError(
                "embedding is given, but this model's embedding and head share a table",
                hint="remove it: the option head decides about both",
            )
        for module in self.assign(model):
            weight = model.weights[model.weight_of(module)]
            if isinstance(weight, QuantWeight):
                raise PassError(
                    f"{module} is already quantized to {weight.scheme.name}",
                    hint="one quantizing pass per module: use overrides to give modules different schemes",
                )

    def _knows_inputs(self, model: Model, module: str) -> bool:
        if self.chooses_input_scales == "layers":
            return module != model.network.head
        return self.chooses_input_scales == "all"

    def _sized(self) -> Scheme:
        return self.scheme if self.group_size is None else self.scheme.with_group_size(self.group_size)

    def _head(self) -> Scheme | Kept:
        if self.head is not None:
            return self.head
        if self.scheme.weights.type == "float" or self.scheme.needs_input_scale:
            return "none"
        if self.scheme.input_activations is not None:
            return PRESETS["W8A8"]
        size = self._sized().weights.group_size
        return PRESETS["W8A16"] if size is None else PRESETS["W8A16"].with_group_size(size)

    def _experts(self) -> Scheme | Kept:
        if self.experts is not None:
            return self.experts
        return self._sized() if self.scheme.input_activations is None else PRESETS["W8A16"]


def _agree(layer: str, mlp: Experts, assigned: Mapping[str, Scheme]) -> None:
    """All experts of a layer are one tensor: their gates and ups have one scheme, and their downs have one."""
    parts = {"gate and up": mlp.inputs, "down": tuple(expert[2] for expert in mlp.experts)}
    for part, modules in parts.items():
        names = {name_of(assigned.get(module)) for module in modules}
        if len(names) > 1:
            raise PassError(
                f"{layer}: {part} of its experts get different schemes: {', '.join(sorted(names))}",
                hint="an override of one expert has to match that part of all experts of the layer, as in re:.*experts",
            )


def _fits(module: str, columns: int, scheme: Scheme) -> None:
    size = scheme.weights.group_size
    if size is not None and columns % size:
        fitting = [g for g in (16, 32, 64, 96, 128, 192, 256) if columns % g == 0]
        raise PassError(
            f"{module} has {columns} input columns, not a multiple of group_size={size}",
            hint=f"group sizes that fit it: {', '.join(map(str, fitting)) or 'none; use -1'}",
        )


def _unmatched(overrides: Iterable[Override], modules: Iterable[str]) -> None:
    names = list(modules)
    for i, override in enumerate(overrides):
        if not any(override.matches(name) for name in names):
            raise PassError(
                f"overrides.{i}.match {override.match!r} matches no linear of this model",
                hint=f"names look like {names[0]}; regular expressions start with re:",
            )
