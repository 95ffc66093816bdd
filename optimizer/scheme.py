"""Quantization schemes: what numbers a layer's weights and activations become.

The vocabulary is compressed-tensors' own, so a scheme in a recipe, in the manifest and in an exported
checkpoint reads the same.
"""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

__all__ = ["PRESETS", "QuantSpec", "Scheme", "SchemeOption", "name_of", "preset"]


_E4M3_MAX = 448


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class QuantSpec(BaseModel):
    """How one tensor is quantized: ``real = (q - zero) * scale``, ``q`` of ``num_bits`` bits, signed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bits: Literal[2, 3, 4, 8] = Field(description="Bits per value.")
    type: Literal["int", "float"] = Field("int", description="Integers, or floating point (FP8 E4M3).")
    symmetric: bool = Field(True, description="Whether the zero point is always 0.")
    strategy: Literal["tensor", "channel", "group", "block", "token"] = Field(
        description="What shares one scale: the tensor, an output channel, a group of input columns, a block of "
        "rows and columns, a token."
    )
    group_size: PositiveInt | None = Field(None, description="Input columns per scale, for strategy: group.")
    # Behind SchemeOption's validator a list is no longer JSON's, of which a strict check would make a tuple by itself.
    block_structure: Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_as_tuple)] | None = Field(
        None, description="Rows and input columns per scale, for strategy: block."
    )
    dynamic: bool = Field(False, description="Whether the scale is computed while the engine runs.")

    @model_validator(mode="after")
    def _group_size_belongs_to_groups(self) -> "QuantSpec":
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with strategy: group, and only with it")
        if (self.strategy == "block") != (self.block_structure is not None):
            raise ValueError("block_structure goes with strategy: block, and only with it")
        return self

    @model_validator(mode="after")
    def _floats_are_e4m3(self) -> "QuantSpec":
        if self.type == "float" and (self.num_bits != 8 or not self.symmetric):
            raise ValueError("type: float is FP8 E4M3: it goes with num_bits: 8 and symmetric: true")
        return self

    @property
    def quant_min(self) -> int:
        """The smallest number a symmetric scheme uses; asymmetric schemes use the full range too."""
        return -_E4M3_MAX if self.type == "float" else -(1 << (self.num_bits - 1))

    @property
    def quant_max(self) -> int:
        """The largest number."""
        return _E4M3_MAX if self.type == "float" else (1 << (self.num_bits - 1)) - 1

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the scales of a weight ``[rows, columns]``."""
        if self.block_structure is not None:
            height, width = self.block_structure
            return -(-rows // height), -(-columns // width)
        return 1 if self.strategy == "tensor" else rows, columns // (self.group_size or columns)


class Scheme(BaseModel):
    """A layer's scheme: its weights, and its input activations when those are quantized too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: QuantSpec = Field(description="How the weights are quantized.")
    input_activations: QuantSpec | None = Field(None, description="How the inputs are; omitted: kept in float.")

    @property
    def needs_input_scale(self) -> bool:
        """Whether inputs are rounded on a scale that is chosen from calibration text and stored."""
        return self.input_activations is not None and not self.input_activations.dynamic

    @property
    def name(self) -> str:
        """The preset's name, with ``g32`` appended when the group size is not the preset's; else a short form."""
        for name, scheme in PRESETS.items():
            if scheme == self:
                return name
            size = self.weights.group_size
            if size is not None and scheme.weights.strategy == "group" and scheme.with_group_size(size) == self:
                return f"{name} g{size}"
        spec, inputs = self.weights, self.input_activations
        if inputs is None:
            kind = f"W{spec.num_bits}A16" if spec.type == "int" else "FP8 weights"
            return f"{kind}{'' if spec.symmetric else '_ASYM'} {_sharing(spec)}"
        kind = f"W{spec.num_bits}A{inputs.num_bits}" if spec.type == inputs.type == "int" else "FP8"
        mixed = "" if spec.type == inputs.type else f"{inputs.type} "
        when = "dynamic" if inputs.dynamic else "static"
        asymmetric = "" if spec.symmetric else "_ASYM"
        return f"{kind}{asymmetric} {_sharing(spec)}, {mixed}inputs {_sharing(inputs)} {when}"

    def with_group_size(self, group_size: int) -> "Scheme":
        """The same scheme with this many input columns per scale; -1 means one scale per output channel."""
        if group_size == -1:
            update: dict[str, Any] = {"strategy": "channel", "group_size": None, "block_structure": None}
        else:
            update = {"strategy": "group", "group_size": group_size, "block_structure": None}
        return Scheme(
            weights=QuantSpec(**{**self.weights.model_dump(), **update}), input_activations=self.input_activations
        )


def _sharing(spec: QuantSpec) -> str:
    """What shares a scale, in a word: ``channel``, ``g32``, ``128x128``."""
    if spec.block_structure is not None:
        return "x".join(map(str, spec.block_structure))
    return f"g{spec.group_size}" if spec.group_size else spec.strategy


def _fp8(**options: Any) -> QuantSpec:
    return QuantSpec(num_bits=8, type="float", **options)


PRESETS: dict[str, Scheme] = {
    "W8A8": Scheme(
        weights=QuantSpec(num_bits=8, strategy="channel"),
        input_activations=QuantSpec(num_bits=8, strategy="token", dynamic=True),
    ),
    "W8A8_STATIC": Scheme(
        weights=QuantSpec(num_bits=8, strategy="channel"),
        input_activations=QuantSpec(num_bits=8, strategy="tensor"),
    ),
    "W8A16": Scheme(weights=QuantSpec(num_bits=8, strategy="channel")),
    "W4A16": Scheme(weights=QuantSpec(num_bits=4, strategy="group", group_size=128)),
    "W4A16_ASYM": Scheme(weights=QuantSpec(num_bits=4, strategy="group", group_size=128, symmetric=False)),
    "W3A16": Scheme(weights=QuantSpec(num_bits=3, strategy="group", group_size=128)),
    "W2A16": Scheme(weights=QuantSpec(num_bits=2, strategy="group", group_size=128)),
    "FP8": Scheme(weights=_fp8(strategy="tensor"), input_activations=_fp8(strategy="tensor")),
    "FP8_DYNAMIC": Scheme(weights=_fp8(strategy="channel"), input_activations=_fp8(strategy="token", dynamic=True)),
    "FP8_BLOCK": Scheme(
        weights=_fp8(strategy="block", block_structure=(128, 128)),
        input_activations=_fp8(strategy="group", group_size=128, dynamic=True),
    ),
}
"""compressed-tensors' presets of these names; it has none for 2 and 3 bits, nor for int8 inputs on static scales."""


def name_of(scheme: Scheme | None) -> str:
    """The scheme's name; none where there is no scheme, and a module stays in floating point."""
    return "none" if scheme is None else scheme.name


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
