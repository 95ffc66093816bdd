"""What an encoder is to the compiler: a family's description, and what one checkpoint of it computes.

Every token of an encoder sees every other one, and there is no cache and no head: what it gives is a vector a token,
of which ``pooling`` makes one a text. Its graph is exported from transformers' module, so a description names the
parts that passes change, and leaves the computation to that module.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Encoder", "EncoderArch", "EncoderLayer", "describe_encoder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderArch:
    """One family of encoders.

    Attributes:
        name: The family: its file's name.
        models: Architecture in ``config.json`` -> ``model_type``. Of one with a head the encoder alone is compiled.
        layer: A layer's module name.
        attention, mlp: Linears below a layer, in data order.
        embedding: The module of the words' table.
        prefixes: What stands before the encoder's names in checkpoints of architectures with a head.
        left_out: Modules of checkpoints that pooled vectors do not depend on, as beginnings of names.
        token_types: The config entry that says how many types of tokens there are; None where the family has none.
        padded_positions: Whether the first rows of the position table, up to the padding token's number, stand for no
            position.
        accepted: Config entries that change the computation -> the values for which transformers' module computes it.
    """

    name: str
    models: Mapping[str, str]
    layer: str = "encoder.layer.{i}"
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    embedding: str = "embeddings.word_embeddings"
    prefixes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ("pooler.", "cls.", "lm_head.")
    token_types: str | None = None
    padded_positions: bool = False
    accepted: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLayer:
    """One layer.

    Attributes:
        name: Its module.
        attention, mlp: Its linears, in data order.
    """

    name: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """All of them."""
        return self.attention + self.mlp


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """A family's description resolved with a checkpoint's config.

    Attributes:
        name: The family.
        layers: In data order.
        vocab_size: Rows of the embedding.
        hidden_size: Columns of a token's vector.
        max_positions: Tokens of the longest text.
        embedding: The module of the words' table.
        has_token_types: Whether tokens have types, which the engine then takes as ``token_type_ids``.
        head: None: there is none.
    """

    name: str
    layers: tuple[EncoderLayer, ...]
    vocab_size: int
    hidden_size: int
    max_positions: int
    embedding: str
    has_token_types: bool
    head: None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear that may be quantized, in data order."""
        return tuple(name for layer in self.layers for name in layer.linears)

    @property
    def expert_linears(self) -> frozenset[str]:
        """None: there are no mixtures of experts."""
        return frozenset()


def describe_encoder(arch: EncoderArch, config: Mapping[str, Any], parameters: Collection[str]) -> Encoder:
    """Resolve ``arch`` with a checkpoint's config.

    Args:
        arch: The family.
        config: Completed, as ``hf_config.complete`` returns it.
        parameters: The checkpoint's parameter names: a linear that its layers lack is left out.
    """
    layers = tuple(_layer(arch, arch.layer.format(i=i), parameters) for i in range(config["num_hidden_layers"]))
    reserved = config["pad_token_id"] + 1 if arch.padded_positions else 0
    return Encoder(
        name=arch.name,
        layers=layers,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        max_positions=config["max_position_embeddings"] - reserved,
        embedding=arch.embedding,
        has_token_types=arch.token_types is not None and config[arch.token_types] > 1,
    )


def _layer(arch: EncoderArch, name: str, parameters: Collection[str]) -> EncoderLayer:
    attention, mlp = (tuple(f"{name}.{below}" for below in part) for part in (arch.attention, arch.mlp))
    present = {part for part in attention + mlp if f"{part}.weight" in parameters}
    return EncoderLayer(
        name=name,
        attention=tuple(part for part in attention if part in present),
        mlp=tuple(part for part in mlp if part in present),
    )
