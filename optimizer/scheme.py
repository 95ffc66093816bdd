"""Quantization schemes: what numbers a layer's weights and activations become.

The vocabulary is compressed-tensors' own, so a scheme in a recipe, in the manifest and in an exported
checkpoint reads the same.
"""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

__all__ = ["PRESETS", "QuantSpec", "Scheme", "SchemeOption", "preset"]


class QuantSpec(BaseModel):
    """How one tensor is quantized: ``real = (q - zero) * scale``, ``q`` signed, of ``num_bits`` bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bits: Literal[2, 3, 4, 8] = Field(description="Bits per value.")
    type: Literal["int", "float"] = Field("int", description="Integers, or floating point (FP8 E4M3).")
    symmetric: bool = Field(True, description="Whether the zero point is always 0.")
    strategy: Literal["tensor", "channel", "group", "block", "token"] = Field(
        description="What shares one scale: the tensor, an output channel, a group of input columns, a token."
    )
    group_size: PositiveInt | None = Field(None, description="Input columns per scale, for strategy: group.")
    dynamic: bool = Field(False, description="Whether the scale is computed while the engine runs.")

    @model_validator(mode="after")
    def _group_size_belongs_to_groups(self) -> "QuantSpec":
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with strategy: group, and only with it")
        return self

    @property
    def quant_min(self) -> int:
        """The smallest integer a symmetric scheme uses; asymmetric schemes use the full range too."""
        return -(1 << (self.num_bits - 1))

    @property
    def quant_max(self) -> int:
        """The largest integer."""
        return (1 << (self.num_bits - 1)) - 1


class Scheme(BaseModel):
    """A layer's scheme: its weights, and its input activations when those are quantized too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: QuantSpec = Field(description="How the weights are quantized.")
    input_activations: QuantSpec | None = Field(None, description="How the inputs are; omitted: kept in float.")

    @property
    def name(self) -> str:
        """The preset's name, with ``g32`` appended when the group size is not the preset's; else a short form."""
        for name, scheme in PRESETS.items():
            if scheme == self:
                return name
            size = self.weights.group_size
            if size is not None and scheme.weights.strategy == "group" and scheme.with_group_size(size) == self:
                return f"{name} g{size}"
        spec = self.weights
        group = f" g{spec.group_size}" if spec.group_size else f" {spec.strategy}"
        activations = self.input_activations.num_bits if self.input_activations else 16
        return f"W{spec.num_bits}A{activations}{'' if spec.symmetric else '_ASYM'}{group}"

    def with_group_size(self, group_size: int) -> "Scheme":
        """The same scheme with this many input columns per scale; -1 means one scale per output channel."""
        if group_size == -1:
            update: dict[str, Any] = {"strategy": "channel", "group_size": None}
        else:
            update = {"strategy": "group", "group_size": group_size}
        return Scheme(
            weights=QuantSpec(**{**self.weights.model_dump(), **update}), input_activations=self.input_activations
        )


_TOKEN_INT8 = QuantSpec(num_bits=8, strategy="token", dynamic=True)

PRESETS: dict[str, Scheme] = {
    "W8A8": Scheme(weights=QuantSpec(num_bits=8, strategy="channel"), input_activations=_TOKEN_INT8),
    "W8A16": Scheme(weights=QuantSpec(num_bits=8, strategy="channel")),
    "W4A16": Scheme(weights=QuantSpec(num_bits=4, strategy="group", group_size=128)),
    "W4A16_ASYM": Scheme(weights=QuantSpec(num_bits=4, strategy="group", group_size=128, symmetric=False)),
}


def preset(name: str) -> Scheme:
    """The scheme called ``name``.

    Raises:
        ValueError: No preset has that name; the message gives the nearest one and the list.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name.upper(), PRESETS, n=1, cutoff=0.6)
    guess = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown scheme {name!r}; {guess}schemes: {', '.join(PRESETS)}")


def _from_name(value: object) -> object:
    return preset(value) if isinstance(value, str) else value


SchemeOption = Annotated[
    Scheme,
    BeforeValidator(_from_name, json_schema_input_type=Literal[tuple(PRESETS)] | Scheme),
]
"""A pass option that takes a preset's name or the long form."""
