"""Between a checkpoint's weights and the parameters of transformers' module, which some families spell otherwise.

The checkpoint's names are ours, and our linear weights are ``[out, in]``. transformers' module may name a part
otherwise, hold all experts of a layer in one tensor, and keep a linear transposed (GPT-2's Conv1D).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmopt.optimizer.arch.base import Arch
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.model import DenseWeight, QuantWeight, Weight

__all__ = ["Parameter", "expected_parameters", "in_our_names", "module_parameters", "their_name", "weight_shapes"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of transformers' module.

    Attributes:
        shape: Its shape there.
        weights: Our names of what it consists of: one weight, or all matrices of a layer's experts from top to bottom.
        transposed: Whether it is ``[in, out]``, there and in the checkpoint.
    """

    shape: Shape
    weights: tuple[str, ...]
    transposed: bool = False

    @property
    def is_stacked(self) -> bool:
        """Whether it holds a layer's experts."""
        return len(self.weights) > 1

    @property
    def weight_shape(self) -> Shape:
        """The shape of each of ``weights``."""
        if self.transposed:
            return self.shape[::-1]
        if not self.is_stacked:
            return self.shape
        experts, rows, columns = self.shape
        return (experts * rows // len(self.weights), columns)

    def join(self, values: Iterable[Tensor]) -> Tensor:
        """The parameter made of its weights' values, in their dtype; they are asked for one after the other."""
        if not self.is_stacked:
            (value,) = values
            return value.T if self.transposed else value
        joined: Tensor | None = None
        for number, value in enumerate(values):
            if joined is None:
                joined = torch.empty(len(self.weights), *self.weight_shape, dtype=value.dtype)
            joined[number] = value
        assert joined is not None
        return joined.reshape(self.shape)

    def split(self, stored: DenseWeight) -> dict[str, DenseWeight]:
        """Its weights, each read from ``stored``, which has the parameter's shape, when it is asked for."""
        if not self.is_stacked:
            (name,) = self.weights
            return {name: _transposed(stored) if self.transposed else stored}
        shape = self.weight_shape
        return {
            name: DenseWeight(shape, stored.dtype, partial(_matrix, stored, shape, number))
            for number, name in enumerate(self.weights)
        }


def expected_parameters(config: Mapping[str, Any], arch: Arch, where: object) -> dict[str, Parameter]:
    """Every parameter of a model with this config, the head's included even when tied, by transformers' names.

    They are read off transformers' own module, made without memory on the meta device.

    Raises:
        InputError: transformers cannot make such a model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {name: value for name, value in config.items() if name != "model_type"}
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    except (ValueError, TypeError, KeyError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise InputError(f"{where}: config.json describes no model: {error}", hint="correct config.json") from error
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters(remove_duplicate=False)}
    return module_parameters(shapes, arch)


def their_name(arch: Arch, name: str) -> str:
    """The name that transformers' module has for a module or parameter of ours."""
    return ".".join(arch.module_names.get(part, part) for part in name.split("."))


def module_parameters(shapes: Mapping[str, Shape], arch: Arch) -> dict[str, Parameter]:
    """Every parameter of transformers' module, by its name there.

    Args:
        shapes: Name -> shape of the module's parameters.
        arch: The family.
    """
    ours = {theirs: mine for mine, theirs in arch.module_names.items()}
    below_layer = re.compile(f"({re.escape(arch.layer).replace(re.escape('{i}'), '[0-9]+')})[.](.+)")
    parameters = {}
    for name, shape in shapes.items():
        match = below_layer.fullmatch(name)
        layer, place = match.groups() if match else ("", name)
        stacked = _expert_weights(arch, place, shape[0])
        if stacked:
            parameters[name] = Parameter(shape, tuple(f"{layer}.{weight}" for weight in stacked))
            continue
        mine = ".".join(ours.get(part, part) for part in name.split("."))
        transposed = match is not None and place.removesuffix(".weight") in arch.transposed
        parameters[name] = Parameter(shape, (mine,), transposed)
    return parameters


def weight_shapes(parameters: Mapping[str, Parameter]) -> dict[str, Shape]:
    """Our names and shapes of all weights that ``parameters`` consist of."""
    return {name: parameter.weight_shape for parameter in parameters.values() for name in parameter.weights}


def _expert_weights(arch: Arch, place: str, count: int) -> list[str]:
    """What the parameter ``place`` below a layer stacks, in the order of its rows; nothing if it is no such one."""
    experts = arch.experts
    if experts is None:
        return []
    matrices = {experts.stacked_gate_up: (experts.gate, experts.up), experts.stacked_down: (experts.down,)}
    return [f"{matrix.format(e=e)}.weight" for e in range(count) for matrix in matrices.get(place, ())]


def in_our_names(
    stored: Mapping[str, Weight], parameters: Mapping[str, Parameter], arch: Arch, where: object
) -> dict[str, Weight]:
    """A checkpoint's weights under our names and in our shapes.

    Besides the names that transformers writes today, those of its module are known (experts in one tensor, a head that
    is called ``lm_head``), and both without the base model's prefix, as the first GPT-2 files have them. A name that is
    none of these is left as it is.

    Args:
        stored: What the checkpoint holds.
        parameters: Of transformers' module.
        arch: The family.
        where: The checkpoint, for messages.

    Raises:
        InputError: A weight is there twice under different names, or stacked experts have an unexpected shape.
    """
    whole = {**parameters, **{p.weights[0]: p for p in parameters.values() if not p.is_stacked}}
    experts = {name for p in parameters.values() if p.is_stacked for name in p.weights}
    prefix = arch.layer.partition(".")[0]
    weights: dict[str, Weight] = {}
    origin: dict[str, str] = {}
    for name, weight in stored.items():
        spelled = next((known for known in (name, f"{prefix}.{name}") if known in whole or known in experts), name)
        pieces = _pieces(name, weight, whole[spelled], where) if spelled in whole else {spelled: weight}
        for piece, value in pieces.items():
            if piece in weights:
                raise InputError(
                    f"{where} holds {piece} twice: as {origin[piece]} and as {name}", hint="remove one of them"
                )
            weights[piece], origin[piece] = value, name
    return weights


def _pieces(name: str, weight: Weight, parameter: Parameter, where: object) -> Mapping[str, Weight]:
    if isinstance(weight, QuantWeight):  # is one linear, ``[out, in]`` in every format
        return {parameter.weights[0] if not parameter.is_stacked else name: weight}
    if parameter.is_stacked and weight.shape != parameter.shape:
        raise InputError(
            f"{where}: {name} is {list(weight.shape)}, but config.json asks for {list(parameter.shape)}",
            hint="config.json belongs to another model",
        )
    return parameter.split(weight)


def _transposed(stored: DenseWeight) -> DenseWeight:
    return DenseWeight(stored.shape[::-1], stored.dtype, lambda: stored.load().T.contiguous())


def _matrix(stored: DenseWeight, shape: Shape, number: int) -> Tensor:
    """The ``number``-th matrix of stacked experts; only its expert is read."""
    of_each = stored.shape[1] // shape[0]
    expert = number // of_each
    return stored.rows(expert, expert + 1).reshape(of_each, *shape)[number % of_each]
