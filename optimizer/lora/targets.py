"""From an adapter's tensors to changes of weights: which weight each belongs to, and in which shape."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from llmopt.optimizer.checkpoint import some
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.lora.changes import Added, Change, Dora, LowRank, Replaced, Stored
from llmopt.optimizer.lora.config import AdapterConfig
from llmopt.optimizer.model import Model
from llmopt.optimizer.parameters import Parameter, their_name, weight_shapes
from llmopt.optimizer.tensor_file import FileTensor

__all__ = ["Factors", "Targets"]

Factors = dict[str, tuple[str, FileTensor]]
"""The tensors of one pair of factors: PEFT's name of the part -> its name in the file, and where it lies."""

_LINEAR = ("lora_A.weight", "lora_B.weight")
_TABLE = ("lora_embedding_B", "lora_embedding_A")
_LENGTHS = "lora_magnitude_vector"


class Targets:
    """What of a model an adapter may change.

    Args:
        folder: The adapter's.
        config: Its configuration.
        parameters: The model's, by transformers' names.
        model: Its weights' names and shapes are ours.
    """

    def __init__(self, folder: Path, config: AdapterConfig, parameters: Mapping[str, Parameter], model: Model) -> None:
        self._folder = folder
        self._config = config
        self._parameters = parameters
        self._spec = model.source.spec
        self._head = their_name(model.arch, model.arch.head)
        self._shapes = weight_shapes(parameters)
        self._owned = model.weights.keys() | {f"{model.arch.head}.weight"}
        self.aimed_at = [name for name in parameters if config.targets_parameter(name)]

    def changes(self, factors: Mapping[tuple[str, int], Factors], whole: Mapping[str, FileTensor]) -> dict[str, Change]:
        """Every change by our parameter name.

        Args:
            factors: By module and depth of nesting.
            whole: By parameter.

        Raises:
            InputError: A tensor fits nothing in the model, or a factor lacks another.
        """
        changes: dict[str, Change] = {}
        tables: dict[str, Stored] = {}
        extra: list[str] = []
        for name, tensor in whole.items():
            plain = name.replace(".base_layer.", ".")
            parameter = self._parameters.get(plain)
            is_table = plain != name and plain.endswith(".weight")
            if parameter is None or not (is_table or self._may_be_whole(plain)):
                extra.append(name)
                continue
            self._check_shape(name, tensor.shape, parameter.shape)
            stored = _weights_of(name, tensor, parameter)
            if is_table:
                tables |= stored
            else:
                changes |= {weight: Replaced(value) for weight, value in stored.items()}
        for (module, depth), parts in factors.items():
            found = self._adapted(module, depth, parts, tables)
            extra += [] if found else [f"{module}.{next(iter(parts))}"]
            for weight, change in found.items():
                trained = changes.get(weight)
                if isinstance(change, Added) and isinstance(trained, Replaced):
                    change = replace(change, trained=trained.value)
                changes[weight] = change
        extra += [name for name in tables if name not in changes]
        if extra:
            raise InputError(
                f"{self._folder} has tensors that fit nothing in {self._spec}: {some(extra)}",
                hint=f"it was trained on {self._trained_on}",
            )
        return changes

    @property
    def _trained_on(self) -> str:
        return self._config.base_model_name_or_path or "a model that it does not name"

    def _may_be_whole(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        is_tied_along = self._config.ensure_weight_tying and module == self._head
        return self._config.saves_module(module) or is_tied_along or (leaf == "bias" and self._config.bias != "none")

    def _adapted(self, module: str, depth: int, parts: Factors, tables: Mapping[str, Stored]) -> dict[str, Change]:
        """What a pair of factors changes; nothing where the model has no such module."""
        parameter = self._parameters.get(f"{module}.weight")
        if depth == 0 and parameter is not None and len(parameter.shape) == 2:
            name = parameter.weights[0]
            key = f"{module}.weight" if self._is_aimed_at(module) else module
            return self._pair(module, key, name, parts, tables.get(name))
        if depth == 0 and f"{module}.weight" in self._shapes:  # one expert, as transformers 4 had them
            return self._pair(module, module, f"{module}.weight", parts, None)
        stacked = [name for name in self.aimed_at if name.rpartition(".")[0] == module]
        # PEFT wraps a module once for each of its parameters: the last is the outermost.
        return self._experts(stacked[-1 - depth], parts) if depth < len(stacked) else {}

    def _is_aimed_at(self, module: str) -> bool:
        return self._config.targets_parameter(f"{module}.weight") and not self._config.targets_module(module)

    def _pair(self, module: str, key: str, name: str, parts: Factors, table: Stored | None) -> dict[str, Change]:
        """The changes of one linear, or of a table, whose factors are those of its transposed."""
        is_table = _TABLE[0] in parts or _TABLE[1] in parts
        down, up = self._both(module, parts, _TABLE if is_table else _LINEAR)
        rows, columns = self._shapes[name]
        rank, scaling = self._config.rank_of(key), self._config.scaling_of(key)
        for stored, shape in ((down, (rank, columns)), (up, (rows, rank))):
            self._check_shape(stored.name, stored.tensor.shape, shape[::-1] if is_table else shape)
        if is_table:
            down, up = (Stored(each.name, each.tensor, _transposed) for each in (down, up))
        product = LowRank(down=down, up=up, scaling=scaling, table=table)
        changes: dict[str, Change] = {name: product}
        if self._config.use_dora or _LENGTHS in parts:
            lengths = self._part(module, parts, _LENGTHS)
            self._check_shape(lengths.name, lengths.tensor.shape, (columns if is_table else rows,))
            changes[name] = Dora(product=product, lengths=lengths, along="columns" if is_table else "rows")
        if "lora_B.bias" in parts:
            bias, bias_name = self._part(module, parts, "lora_B.bias"), f"{name.removesuffix('weight')}bias"
            if bias_name not in self._owned:
                raise InputError(
                    f"{self._folder} adds a bias to {module}, which has none in {self._spec}",
                    hint="it was trained with lora_bias: true; PEFT cannot merge it either",
                )
            self._check_shape(bias.name, bias.tensor.shape, (rows,))
            changes[bias_name] = Added(bias, scaling)
        return changes

    def _experts(self, key: str, parts: Factors) -> dict[str, Change]:
        """The changes of a layer's experts, in PEFT's one pair: A has expert under expert, B rank beside rank."""
        parameter = self._parameters[key]
        experts, rows, columns = parameter.shape
        rank, scaling = self._config.rank_of(key), self._config.scaling_of(key)
        down, up = self._both(key.rpartition(".")[0], parts, _LINEAR)
        self._check_shape(down.name, down.tensor.shape, (experts * rank, columns))
        self._check_shape(up.name, up.tensor.shape, (rows, rank * experts))
        of_each = len(parameter.weights) // experts
        changes: dict[str, Change] = {}
        for number, name in enumerate(parameter.weights):
            expert, place = divmod(number, of_each)
            first = place * rows // of_each
            span = slice(first, first + rows // of_each)
            changes[name] = LowRank(
                down=Stored(down.name, down.tensor, partial(_down_of, expert=expert, experts=experts)),
                up=Stored(up.name, up.tensor, partial(_up_of, expert=expert, experts=experts, rows=span)),
                scaling=scaling,
            )
        return changes

    def _both(self, module: str, parts: Factors, names: tuple[str, str]) -> tuple[Stored, Stored]:
        return self._part(module, parts, names[0]), self._part(module, parts, names[1])

    def _part(self, module: str, parts: Factors, part: str) -> Stored:
        if part not in parts:
            raise InputError(
                f"{self._folder} lacks {module}.{part}, and has {some(sorted(parts))}",
                hint="the file is incomplete: copy it again, or save the adapter again",
            )
        return Stored(*parts[part])

    def _check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise InputError(
                f"{self._folder}: {name} is {list(found)}, and {self._spec} needs {list(expected)}",
                hint=f"it is for another base, which it calls {self._trained_on}, or r is not its rank",
            )


def _weights_of(name: str, tensor: FileTensor, parameter: Parameter) -> dict[str, Stored]:
    """Our weights in a tensor that is a whole parameter."""
    if not parameter.is_stacked:
        return {parameter.weights[0]: Stored(name, tensor, _transposed if parameter.transposed else None)}
    shape = (len(parameter.weights), *parameter.weight_shape)
    return {
        weight: Stored(name, tensor, partial(_matrix_of, shape=shape, number=number))
        for number, weight in enumerate(parameter.weights)
    }


def _matrix_of(values: Tensor, *, shape: tuple[int, ...], number: int) -> Tensor:
    return values.reshape(shape)[number]


def _transposed(values: Tensor) -> Tensor:
    return values.T


def _down_of(values: Tensor, *, expert: int, experts: int) -> Tensor:
    """An expert's ``[rank, in]`` of ``[experts * rank, in]``."""
    return values.reshape(experts, -1, values.shape[1])[expert]


def _up_of(values: Tensor, *, expert: int, experts: int, rows: slice) -> Tensor:
    """An expert's ``[out, rank]`` of ``[out, rank * experts]``, and some of its rows."""
    part: Tensor = values.reshape(len(values), -1, experts)[rows, :, expert]
    return part
