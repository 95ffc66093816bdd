"""Resolves a family's description with a checkpoint's config into the ``Decoder`` that is compiled."""

from collections.abc import Collection, Mapping
from typing import Any

from llmopt.optimizer.arch.base import Arch, ExpertsPart, Key
from llmopt.optimizer.decoder import Activation, Attention, Decoder, Experts, Layer, Mlp, Norm, Rope
from llmopt.optimizer.errors import InputError, UnsupportedError

__all__ = ["describe"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def describe(arch: Arch, config: Mapping[str, Any], parameters: Collection[str]) -> Decoder:
    """Resolve ``arch`` with a checkpoint's config.

    Args:
        arch: The family.
        config: Completed, as ``hf_config.complete`` returns it.
        parameters: The checkpoint's parameter names: parts that some checkpoints of a family lack are there or not.

    Raises:
        UnsupportedError: The config asks for an attention, a rope or an activation that has no description.
        InputError: It contradicts itself.
    """
    return _Resolver(arch.for_config(config), config, parameters).decoder()


class _Resolver:
    """Reads numbers of one config into one description."""

    def __init__(self, arch: Arch, config: Mapping[str, Any], parameters: Collection[str]) -> None:
        self.arch = arch
        self.config = config
        self.parameters = parameters

    def decoder(self) -> Decoder:
        arch = self.arch
        self._refuse()
        count = self._integer(Key("num_hidden_layers"))
        layers = tuple(self._layer(i) for i in range(count))
        return Decoder(
            name=arch.name,
            layers=layers,
            vocab_size=self._integer(Key("vocab_size")),
            hidden_size=self._integer(Key("hidden_size")),
            kv_heads=layers[0].attention.kv_heads,
            head_dim=layers[0].attention.head_dim,
            max_positions=self._integer(Key("max_position_embeddings")),
            embedding=arch.embedding,
            embedding_scale=self._factor(arch.embedding_scale),
            positions=arch.positions,
            positions_offset=arch.positions_offset,
            project_in=self._present(arch.project_in),
            project_out=self._present(arch.project_out),
            final_norm=self._norm(self._present(arch.final_norm)),
            head=arch.head,
            logit_scale=self._factor(arch.logit_scale),
            logit_softcap=None if arch.logit_softcap is None else self._number(arch.logit_softcap),
        )

    def _refuse(self) -> None:
        for name, value in self.arch.refused.items():
            if self.config.get(name) == value:
                raise UnsupportedError(
                    f"{name}: {str(value).lower()} in config.json is not supported for {self.arch.name} models",
                    hint="llmopt has no description of that computation, and does not export it wrong",
                )

    def _layer(self, i: int) -> Layer:
        arch = self.arch
        name = arch.layer.format(i=i)
        norms = {
            place: self._norm(None if below is None else f"{name}.{below}")
            for place in ("attention_in", "attention_out", "attention_after", "mlp_in", "mlp_out", "mlp_after")
            for below in [getattr(arch.norms, place)]
        }
        parallel = arch.parallel if isinstance(arch.parallel, bool) else bool(self.config[arch.parallel])
        scale = self._factor(arch.residual_scale)
        attention = self._attention(i, name)
        return Layer(
            name=name, attention=attention, mlp=self._mlp(name), parallel=parallel, residual_scale=scale, **norms
        )

    def _attention(self, i: int, layer: str) -> Attention:
        part = self.arch.attention
        heads = self._integer(part.heads)
        kv_heads = part.kv_heads if isinstance(part.kv_heads, int) else self._integer(part.kv_heads)
        if kv_heads < 1 or heads % kv_heads:
            raise InputError(
                f"config.json has {heads} attention heads, not a multiple of its {kv_heads} KV heads",
                hint="correct config.json",
            )
        hidden = self._integer(Key("hidden_size"))
        head_dim = self.config.get("head_dim") or hidden // heads
        if not self.config.get("head_dim") and hidden % heads:
            raise InputError(
                f"config.json has a hidden size of {hidden}, which {heads} attention heads do not divide",
                hint="correct config.json",
            )
        scale = None if part.scale is None else self._number(part.scale)
        names = {
            role: None if below is None else f"{layer}.{below}"
            for role in ("query", "key", "value", "packed", "output", "query_norm", "key_norm")
            for below in [getattr(part, role)]
        }
        sliding = self._kind(i) == "sliding_attention"
        window = self.config.get("sliding_window") if sliding else None
        return Attention(
            query=names["query"],
            key=names["key"],
            value=names["value"],
            packed=names["packed"],
            packing=part.packing,
            output=f"{layer}.{part.output}",
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=float(head_dim) ** -0.5 if scale is None else scale,
            softcap=None if part.softcap is None else self._number(part.softcap),
            window=None if window is None else int(window),
            rope=self._rope(i, head_dim) if part.rope else None,
            query_norm=self._norm(names["query_norm"]),
            key_norm=self._norm(names["key_norm"]),
            norm_span=part.norm_span,
        )

    def _kind(self, i: int) -> str:
        """Of layer ``i``'s attention; without ``layer_types`` all layers use the window, where there is one."""
        kinds = self.config.get("layer_types")
        kind = str(kinds[i]) if kinds else "sliding_attention"
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(
                f"layer_types.{i} in config.json is {kind!r}", hint="supported: full_attention, sliding_attention"
            )
        return kind

    def _rope(self, i: int, head_dim: int) -> Rope | None:
        without = self.config.get("no_rope_layers")
        if without and not without[i]:
            return None
        parameters = dict(self.config["rope_parameters"])
        if "rope_theta" not in parameters:
            parameters = dict(parameters[self._kind(i)])
        older = parameters.pop("type", None)
        kind = parameters.pop("rope_type", older or "default")
        if older not in (None, kind):
            raise InputError(
                f"config.json's rope has rope_type {kind!r} and type {older!r}", hint="they mean the same: keep one"
            )
        parts = (parameters.pop("partial_rotary_factor", None), self.config.get("partial_rotary_factor"), 1.0)
        part = next(part for part in parts if part is not None)
        return Rope(
            kind=kind,
            theta=float(parameters.pop("rope_theta")),
            dim=int(head_dim * part),
            max_positions=self._integer(Key("max_position_embeddings")),
            parameters=parameters,
        )

    def _mlp(self, layer: str) -> Mlp | Experts:
        experts = self.arch.experts
        if experts is not None and f"{layer}.{experts.router}.weight" in self.parameters:
            return self._experts(layer, experts)
        part = self.arch.mlp
        gate, up, packed = (
            None if below is None else f"{layer}.{below}" for below in (part.gate, part.up, part.packed)
        )
        return Mlp(
            gate=gate, up=up, packed=packed, down=f"{layer}.{part.down}", activation=self._activation(part.activation)
        )

    def _experts(self, layer: str, part: ExpertsPart) -> Experts:
        return Experts(
            router=f"{layer}.{part.router}",
            experts=tuple(
                (
                    f"{layer}.{part.gate.format(e=e)}",
                    f"{layer}.{part.up.format(e=e)}",
                    f"{layer}.{part.down.format(e=e)}",
                )
                for e in range(self._integer(part.count))
            ),
            top_k=self._integer(part.top_k),
            normalize=part.normalize is True or bool(self._number(part.normalize)),
            activation=self._activation(part.activation),
        )

    def _activation(self, entry: str) -> Activation:
        name = str(self.config.get(entry))
        if name not in _ACTIVATIONS:
            raise UnsupportedError(
                f"the activation {name!r} ({entry} in config.json) is not supported",
                hint=f"supported: {', '.join(sorted(_ACTIVATIONS))}",
            )
        return _ACTIVATIONS[name]

    def _norm(self, name: str | None) -> Norm | None:
        if name is None:
            return None
        arch = self.arch
        epsilon = self._number(arch.norm_epsilon)
        assert epsilon is not None
        return Norm(name=name, kind=arch.norm, epsilon=epsilon, offset=arch.norm_offset)

    def _present(self, module: str | None) -> str | None:
        return module if f"{module}.weight" in self.parameters else None

    def _factor(self, key: Key) -> float:
        value = self._number(key)
        return 1.0 if value is None else value

    def _number(self, key: Key) -> float | None:
        value = self.config.get(key.name)
        value = key.default if value is None else value
        return None if value is None else float(value) ** key.power

    def _integer(self, key: Key) -> int:
        value = self.config.get(key.name)
        if not isinstance(value, int):
            raise InputError(f"config.json has no number {key.name}, but {value!r}", hint="correct config.json")
        return value
