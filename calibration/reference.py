"""The one place that executes a ``Model``: every other engine is judged against what this computes.

transformers' own modules are built without memory (on the meta device) and hold the weights of one part at a time: the
embedding, a decoder layer, or the head. How a layer is called (masks, rotary tables) is taken from transformers' own
forward pass, by running it once with layers that only write down their arguments; so a family needs no code here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.scheme import QuantSpec

__all__ = ["Reference", "quantize_per_token"]

_BATCH_TOKENS = 2048


def quantize_per_token(x: Tensor) -> Tensor:
    """Round each row to 255 levels between its largest magnitudes, as the W8A8 kernels do while they run.

    Args:
        x: Floats ``[..., in]``; each row of the last dimension is one token.

    Returns:
        Floats ``[..., in]``: ``q * m / 127`` with m the row's largest magnitude and q an integer in -127..127, ties to
        even. No element moves by more than ``m / 254``. A row of zeros stays zero.
    """
    largest = x.abs().amax(dim=-1, keepdim=True)
    steps = x / torch.where(largest > 0, largest, torch.ones_like(largest)) / (1 / 127)
    return steps.round() * (largest / 127)


class Reference:
    """A model on the CPU, with quantized weights as the numbers they stand for.

    Linears whose scheme quantizes activations get them quantized per token. One part's weights are in memory at a
    time, so call ``embed``, ``layer`` and ``head`` for all data before going on to the next part.

    Args:
        model: What to run. Tied and untied heads, biases, dense and quantized weights.
        threads: PyTorch threads while it runs; None keeps the process's number.
        resident: Whether to load all weights once and keep them, as ``decode`` needs.
        dtype: What it computes in. Anything but float32 is for text, not for judging.

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
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.resident = resident
        self._threads = threads
        self._network: Any = _skeleton(model, dtype)
        self._base: Any = self._network.base_model
        self._layers: nn.ModuleList = self._base.layers
        self._filled: dict[str, nn.Module] = {}
        self._arguments: tuple[tuple[int, int], list[dict[str, Any]]] | None = None
        arch = model.arch
        self._load(arch.final_norm)
        self._filled.clear()  # the final norm is small: it stays
        for name in model.linears():
            weight = model.weights.get(model.weight_of(name))
            if isinstance(weight, QuantWeight) and weight.scheme.input_activations is not None:
                _quantize_inputs(self._network.get_submodule(name), weight.scheme.input_activations)
        if resident:
            for name in (arch.embedding, *map(self._layer_name, range(model.num_layers)), arch.head):
                self._load(name)

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

        def keep(index: int, hidden: Tensor, **_: Any) -> Tensor:
            if index == 0:
                entering.append(hidden)
            return hidden

        with self._running(self.model.arch.embedding), self._layers_as(keep):
            self._base(input_ids=ids, use_cache=False)
        return entering[0]

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """What leaves decoder layer ``index``: float32 ``[n, t, d]`` for ``hidden`` float32 ``[n, t, d]``.

        Each of the n sequences starts at position 0 and attends causally to itself.
        """
        arguments = self._call_arguments(hidden.shape[0], hidden.shape[1])[index]
        with self._running(self._layer_name(index)):
            result: Tensor = self._layers[index](hidden, **arguments)
        return result

    def head(self, hidden: Tensor) -> Tensor:
        """Logits: final norm and head, float32 ``[..., vocab]`` for ``hidden`` float32 ``[..., d]``.

        The caller bounds memory by passing few rows at a time.
        """
        rows = hidden.reshape(-1, 1, hidden.shape[-1])
        with self._running(self.model.arch.head), self._layers_as(lambda i, x, **_: rows):
            logits: Tensor = self._network(inputs_embeds=torch.zeros_like(rows), use_cache=False).logits
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

        The ids are added to ``cache``, which starts as an empty ``DynamicCache()``. Needs ``resident=True``.
        """
        assert self.resident, "decoding visits every layer for each token"
        with self._running(self.model.arch.head):
            result = self._network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = result.logits[:, -1]
        return logits

    def _layer_name(self, index: int) -> str:
        return self.model.arch.layer.format(i=index)

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
        module = self._network.get_submodule(part)
        values = {}
        for name, wanted in module.state_dict().items():
            source = self.model.weight_of(part) if f"{part}.{name}" == f"{part}.weight" else f"{part}.{name}"
            weight = self.model.weights.get(source)
            if weight is None:
                raise InputError(f"{self.model.source.spec} has no weight {source}, which its config.json asks for")
            if weight.shape != tuple(wanted.shape):
                raise InputError(
                    f"{source} has shape {list(weight.shape)}, config.json asks for {list(wanted.shape)}",
                    hint="the checkpoint's config.json and its weights do not belong together",
                )
            values[name] = weight.dense().to(self.dtype)
        module.load_state_dict(values, assign=True)
        module.requires_grad_(False)
        self._filled[part] = module

    @contextmanager
    def _layers_as(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Have each layer compute ``forward(index, hidden, **arguments)`` instead of its own function."""
        for index, layer in enumerate(self._layers):
            layer.forward = lambda hidden, index=index, **arguments: forward(index, hidden, **arguments)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    def _call_arguments(self, n: int, t: int) -> list[dict[str, Any]]:
        """How transformers calls each layer for n sequences of t tokens."""
        if self._arguments is None or self._arguments[0] != (n, t):
            calls: list[dict[str, Any]] = []

            def write_down(_: int, hidden: Tensor, **arguments: Any) -> Tensor:
                calls.append(arguments)
                return hidden

            hidden = torch.zeros(n, t, self.model.config["hidden_size"], dtype=self.dtype)
            with torch.no_grad(), self._layers_as(write_down):
                self._base(inputs_embeds=hidden, use_cache=False)
            self._arguments = ((n, t), calls)
        return self._arguments[1]


def _skeleton(model: Model, dtype: torch.dtype) -> Any:
    """The transformers module for the model's config: parameters on the meta device, rotary tables on the CPU."""
    kind = model.config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError(f"transformers has no model type {kind!r}", hint="a newer transformers may have it")
    config = CONFIG_MAPPING[kind].from_dict(dict(model.config))
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    network.eval()
    base = network.base_model
    if hasattr(base, "rotary_emb"):
        base.rotary_emb = type(base.rotary_emb)(config=base.config)
    left = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if left:
        raise UnsupportedError(f"{kind} keeps tables outside its checkpoint that cannot be rebuilt: {', '.join(left)}")
    return network


def _quantize_inputs(linear: nn.Module, spec: QuantSpec) -> None:
    """Round what enters ``linear`` as ``spec`` says, from now on."""
    if (spec.num_bits, spec.type, spec.strategy, spec.symmetric, spec.dynamic) != (8, "int", "token", True, True):
        raise UnsupportedError(f"activations can be quantized to dynamic symmetric int8 per token, not to {spec}")
    linear.register_forward_pre_hook(lambda module, inputs: (quantize_per_token(inputs[0]), *inputs[1:]))
