"""The one place that executes a ``Model``: every other engine is judged against what this computes.

transformers' own modules are built without memory (on the meta device) and hold the weights of one part at a time: the
embedding, a decoder layer, or the head. Tables of positions, projections beside the embedding and the final norm are
small and stay; a large table of the embedding or the head is read a few rows at a time. How a layer is called (masks,
rotary tables) is taken from transformers' own forward pass, by running it once with layers that only write down their
arguments; so a family needs no code here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from llmopt.calibration.activations import quantize_activations
from llmopt.calibration.large_table import is_large, look_up_rows, multiply_by_blocks
from llmopt.calibration.skeleton import Tables, skeleton
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight, Weight
from llmopt.optimizer.parameters import Parameter, module_parameters, their_name

__all__ = ["KeysValues", "Reference", "fast_dtype"]

_BATCH_TOKENS = 2048

KeysValues = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""How transformers calls a layer: what it passes behind the hidden states, by position and by name."""


def fast_dtype() -> torch.dtype:
    """bfloat16 where the CPU computes with it: twice as fast, and exact enough for text and statistics over it."""
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


class Reference:
    """A model on the CPU, with quantized weights as the numbers they stand for.

    Linears whose scheme quantizes activations get them rounded (``activations.py``). One part's weights are in memory
    at a time, so call ``embed``, ``layer`` and ``head`` for all data before going on to the next part.

    Args:
        model: What to run. Tied and untied heads, biases, dense and quantized weights.
        threads: PyTorch threads while it runs; None keeps the process's number.
        resident: Whether to load all weights once and keep them, which pays when ``decode`` visits them for each token.
        dtype: What it computes in. Anything but float32 is for text, not for judging.
        keys_values: Called with a layer's index and its keys and values ``[n, kv_heads, t, head_dim]``, behind norms
            and rope, in Falcon each head repeated for its group of queries; returns what attention sees instead of
            them. By default they are rounded to int8 where the model has scales for its cache.

    Raises:
        InputError: The config asks for a weight that the checkpoint does not have, or has in another shape.
        UnsupportedError: transformers has no such architecture, or an activation scheme has no definition here.
    """

    def __init__(
        self,
        model: Model,
        *,
        threads: int | None = None,
        resident: bool = False,
        dtype: torch.dtype = torch.float32,
        keys_values: KeysValues | None = None,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.resident = resident
        if keys_values is None and model.cache_scales(0) is not None:
            keys_values = _int8_cache(model, dtype)
        self._keys_values = keys_values
        self._threads = threads
        self._network: Any = skeleton(model, dtype)
        self._tables = Tables(self._network)
        shapes = {name: tuple(p.shape) for name, p in self._network.named_parameters(remove_duplicate=False)}
        self._parameters = module_parameters(shapes, model.arch)
        self._layers: Any = self._module(model.arch.layer.rpartition(".")[0])
        self._filled: dict[str, nn.Module] = {}
        self._streamed = self._stream_large_tables()
        self._arguments: tuple[tuple[int, int], list[_Arguments]] | None = None
        decoder = model.decoder
        norm = None if decoder.final_norm is None else decoder.final_norm.name
        for part in (decoder.positions, decoder.project_in, norm, decoder.project_out):
            if part is not None:
                self._load(part)
        self._filled.clear()  # these stay
        self._in_tuples = self._layers_return_tuples()
        self._rotate_inputs()
        self._rounded: dict[str, RemovableHandle] = {}
        self._quantize_activations(self.model.linears())
        if resident:
            for part in (decoder.embedding, *(layer.name for layer in decoder.layers), decoder.head):
                self._load(part)

    @property
    def network(self) -> nn.Module:
        """The transformers module, for hooks on its submodules; weights not in use are on the meta device."""
        network: nn.Module = self._network
        return network

    def embed(self, ids: Tensor) -> Tensor:
        """What enters the first layer.

        Args:
            ids: int64 ``[n, t]``.

        Returns:
            Float32 ``[n, t, d]``.
        """
        entering: list[Tensor] = []

        def keep(index: int, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            if index == 0:
                entering.append(hidden)
            return hidden

        with self._running(self.model.decoder.embedding), self._layers_as(keep):
            self._network.base_model(input_ids=ids, use_cache=False)
        return entering[0]

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """What leaves decoder layer ``index``: float32 ``[n, t, d]`` for ``hidden`` float32 ``[n, t, d]``.

        Each of the n sequences starts at position 0 and attends causally to itself.
        """
        by_position, by_name = self._call_arguments(hidden.shape[0], hidden.shape[1])[index]
        with self._running(self.model.decoder.layers[index].name):
            result = self._layers[index](hidden, *by_position, **by_name)
        left: Tensor = result[0] if self._in_tuples else result
        return left

    def head(self, hidden: Tensor) -> Tensor:
        """Logits: final norm and head, float32 ``[..., vocab]`` for ``hidden`` float32 ``[..., d]``.

        The caller bounds memory by passing few rows at a time.
        """
        rows = hidden.reshape(-1, 1, hidden.shape[-1])
        with self._running(self.model.decoder.head), self._layers_as(lambda *_, **__: rows):
            logits: Tensor = self._network(inputs_embeds=self._nothing(len(rows), 1), use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], -1)

    def hidden_states(self, ids: Tensor, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
        """What leaves the last layer, before the final norm, for many windows with one layer in memory at a time.

        Args:
            ids: int64 ``[n, t]``.
            progress: Called with (finished, total) layers.

        Returns:
            Float32 ``[n, t, d]``.
        """
        batch = max(1, _BATCH_TOKENS // ids.shape[1])
        pieces = [self.embed(part) for part in torch.split(ids, batch)]
        for index in range(self.model.num_layers):
            for number, piece in enumerate(pieces):
                pieces[number] = self.layer(index, piece)
            progress(index + 1, self.model.num_layers)
        return torch.cat(pieces)

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 ``[n, t, vocab]`` for ids int64 ``[n, t]``: for inputs small enough to hold them all."""
        return self.head(self.hidden_states(ids))

    def decode(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """The next token's logits, float32 ``[n, vocab]``, for ids int64 ``[n, t]`` that follow what ``cache`` holds.

        The ids are added to ``cache``, which starts as an empty ``DynamicCache()``.

        Raises:
            UnsupportedError: Keys and values are changed on their way, which this cache does not do.
        """
        if self._keys_values is not None:
            raise UnsupportedError("text cannot be made by a model whose cache is quantized", hint="use its source")
        if cache.get_seq_length() == 0:
            self._tables.restore()
        layers = nullcontext() if self.resident else self._layers_as(self._loaded_layer)
        with self._running(self.model.decoder.embedding), layers:
            result = self._network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = result.logits[:, -1]
        return logits

    def update(self, weights: Mapping[str, Weight]) -> None:
        """Compute with other weights from now on, as a pass that quantizes layer by layer makes them.

        Args:
            weights: Parameter name -> weight of a decoder layer, of the shape it had.
        """
        self.model = self.model.with_weights(weights)
        for part, module in self._filled.items():
            prefix = their_name(self.model.arch, part)
            names = [name for name, _ in module.named_parameters() if f"{prefix}.{name}" not in self._streamed]
            parameters = {name: self._parameters[f"{prefix}.{name}"] for name in names}
            changed = {
                name: self._value(parameter)
                for name, parameter in parameters.items()
                if not weights.keys().isdisjoint(parameter.weights)
            }
            module.load_state_dict(changed, assign=True, strict=False)
            module.requires_grad_(False)
        linears = [module for module in self.model.linears() if self.model.weight_of(module) in weights]
        self._quantize_activations(linears)

    def module(self, name: str) -> nn.Module:
        """The module that transformers has for one of ours, for hooks."""
        found: nn.Module = self._module(name)
        return found

    def _loaded_layer(self, index: int, hidden: Tensor, *by_position: Any, **by_name: Any) -> Tensor:
        """A layer's own function, with its weights in memory; behind the last layer the head's are next."""
        layer, decoder = self._layers[index], self.model.decoder
        with self._running(decoder.layers[index].name):
            result = type(layer).forward(layer, hidden, *by_position, **by_name)
        if index == len(decoder.layers) - 1:
            with self._running(decoder.head):
                pass
        left: Tensor = result[0] if self._in_tuples else result
        return left

    def _module(self, name: str) -> Any:
        """The module that transformers has for one of ours."""
        return self._network.get_submodule(their_name(self.model.arch, name))

    @contextmanager
    def _running(self, part: str) -> Iterator[None]:
        """Have the weights of module ``part`` in memory, gradients off and the wanted number of threads."""
        if part not in self._filled:
            for module in self._filled.values():
                module.load_state_dict({k: v.to("meta") for k, v in module.state_dict().items()}, assign=True)
            self._filled.clear()
            self._load(part)
        before = torch.get_num_threads()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            with torch.no_grad():
                yield
        finally:
            torch.set_num_threads(before)

    def _load(self, part: str) -> None:
        module = self._module(part)
        prefix = their_name(self.model.arch, part)
        values = {
            name: value if f"{prefix}.{name}" in self._streamed else self._value(self._parameters[f"{prefix}.{name}"])
            for name, value in module.named_parameters()
        }
        module.load_state_dict(values, assign=True)
        module.requires_grad_(False)
        self._filled[part] = module

    def _value(self, parameter: Parameter) -> Tensor:
        """A parameter of transformers' module, made of the model's weights, one of them in memory beside it."""
        return parameter.join(self._dense(name, parameter.weight_shape) for name in parameter.weights)

    def _stream_large_tables(self) -> set[str]:
        """Have embedding and head read a large table by rows; returns the module's names of such tables."""
        streamed = set()
        for part, stream in (
            (self.model.decoder.embedding, look_up_rows),
            (self.model.decoder.head, multiply_by_blocks),
        ):
            theirs = f"{their_name(self.model.arch, part)}.weight"
            weight = self._weight(f"{part}.weight", self._parameters[theirs].weight_shape)
            if is_large(weight, self.dtype):
                stream(self._module(part), weight, self.dtype)
                streamed.add(theirs)
        return streamed

    def _dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        weight = self._weight(name, shape)
        values = weight.load() if isinstance(weight, DenseWeight) else weight.dense()
        return values.to(self.dtype)

    def _weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        name = self.model.weight_of(self.model.decoder.head) if name == f"{self.model.decoder.head}.weight" else name
        weight = self.model.weights.get(name)
        if weight is None:
            raise InputError(f"{self.model.source.spec} has no weight {name}, which its config.json asks for")
        if weight.shape != shape:
            raise InputError(
                f"{name} has shape {list(weight.shape)}, config.json asks for {list(shape)}",
                hint="the checkpoint's config.json and its weights do not belong together",
            )
        return weight

    def _rotate_inputs(self) -> None:
        """Multiply what enters linears with an online rotation by it, from now on; before it is rounded."""
        for module in self.model.linears():
            rotation = self.model.input_rotation(module)
            if rotation is not None:
                _rotate_inputs(self._module(module), rotation.dense().to(self.dtype))

    def _quantize_activations(self, linears: Iterable[str]) -> None:
        """Round what enters those of ``linears`` whose scheme says so, from now on."""
        stacked = {
            name for parameter in self._parameters.values() if parameter.is_stacked for name in parameter.weights
        }
        for module in linears:
            if module in self._rounded:
                self._rounded.pop(module).remove()
            name = self.model.weight_of(module)
            weight = self.model.weights.get(name)
            if not isinstance(weight, QuantWeight) or weight.scheme.input_activations is None:
                continue
            if name in stacked:
                raise UnsupportedError(
                    f"{module} is an expert with quantized inputs, which transformers' module cannot compute",
                    hint="quantize the weights of experts only, as W8A16 or W4A16 do",
                )
            self._rounded[module] = _quantize_inputs(self._module(module), weight)

    @contextmanager
    def _layers_as(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Have each layer compute ``forward(index, hidden, ...)`` instead of its own function."""

        def instead(index: int, hidden: Tensor, *by_position: Any, **by_name: Any) -> Tensor | tuple[Tensor]:
            result = forward(index, hidden, *by_position, **by_name)
            return (result,) if self._in_tuples else result

        for index, layer in enumerate(self._layers):
            layer.forward = partial(instead, index)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    def _layers_return_tuples(self) -> bool:
        """Whether transformers takes the first element of what a layer returns, as in Falcon.

        Of a tensor it would take the first sequence: then the last hidden state has a dimension less.
        """
        self._in_tuples = False
        hidden = torch.zeros(1, 1, self.model.decoder.hidden_size, dtype=self.dtype)
        with torch.no_grad(), self._layers_as(lambda *_, **__: hidden):
            last: Tensor = self._network.base_model(inputs_embeds=self._nothing(1, 1), use_cache=False)[0]
        return last.ndim < hidden.ndim

    def _call_arguments(self, n: int, t: int) -> list[_Arguments]:
        """How transformers calls each layer for n sequences of t tokens."""
        if self._arguments is None or self._arguments[0] != (n, t):
            calls: list[_Arguments] = []

            def write_down(_: int, hidden: Tensor, *by_position: Any, **by_name: Any) -> Tensor:
                calls.append((by_position, by_name))
                return hidden

            self._tables.restore()
            cache = None if self._keys_values is None else _PassingCache(self._keys_values)
            with torch.no_grad(), self._layers_as(write_down):
                self._network.base_model(
                    inputs_embeds=self._nothing(n, t), use_cache=cache is not None, past_key_values=cache
                )
            self._arguments = ((n, t), calls)
        return self._arguments[1]

    def _nothing(self, n: int, t: int) -> Tensor:
        """Embeddings of n sequences of t tokens, where only their shape counts."""
        width = self._module(self.model.decoder.embedding).weight.shape[1]
        return torch.zeros(n, t, width, dtype=self.dtype)


def _rotate_inputs(linear: nn.Module, rotation: Tensor) -> None:
    """Multiply what enters ``linear`` by ``rotation`` ``[b, b]``, each b columns by themselves, from now on."""

    def rotated(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return (x.reshape(*x.shape[:-1], -1, len(rotation)) @ rotation).reshape(x.shape), *inputs[1:]

    linear.register_forward_pre_hook(rotated)


class _PassingCache(DynamicCache):  # type: ignore[misc]
    """What transformers takes for an empty cache: it hands keys and values on and remembers nothing."""

    def __init__(self, change: KeysValues) -> None:
        super().__init__()
        self._change = change

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """See ``DynamicCache.update``."""
        return self._change(layer_idx, key_states, value_states)


def _int8_cache(model: Model, dtype: torch.dtype) -> KeysValues:
    """Rounds keys and values as an int8 cache does: ``clamp(round(x / scale), -128, 127) * scale``, ties to even."""

    def rounded(index: int, *pair: Tensor) -> tuple[Tensor, Tensor]:
        scales = model.cache_scales(index)
        assert scales is not None
        keys, values = (_rounded_heads(x, scale.dense()).to(dtype) for x, scale in zip(pair, scales, strict=True))
        return keys, values

    return rounded


def _rounded_heads(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` ``[n, kv_heads, t, head_dim]`` with a scale for each head's columns, or one for all.

    transformers' Falcon repeats each head for the queries of its group before it caches them.
    """
    heads, columns = x.shape[1], x.shape[3]
    each = scale
    if len(scale) > 1:
        by_head = scale.reshape(-1, columns)
        each = by_head.repeat_interleave(heads // len(by_head), 0).reshape(1, heads, 1, columns)
    return (x / each).round().clamp(-128, 127) * each


def _quantize_inputs(linear: nn.Module, weight: QuantWeight) -> RemovableHandle:
    """Round what enters ``linear`` as the scheme of its weight says, from now on."""
    spec = weight.scheme.input_activations
    assert spec is not None
    scale = weight.load().input_scale if weight.scheme.needs_input_scale else None
    quantize_activations(torch.zeros(1, weight.shape[1]), spec, scale)  # what has no definition is refused now

    def rounded(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantize_activations(inputs[0].float(), spec, scale).to(inputs[0].dtype), *inputs[1:])

    return linear.register_forward_pre_hook(rounded)
