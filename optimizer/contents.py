"""What a manifest says of a built model's weights: its linear layers, and its bytes by part and scheme."""

from collections.abc import Sequence

from llmopt.optimizer.decoder import Decoder, Experts
from llmopt.optimizer.encoder import Encoder
from llmopt.optimizer.manifest import Layer, PassRecord
from llmopt.optimizer.model import Model, QuantWeight, Weight

__all__ = ["layers_of", "sizes_of"]


def layers_of(model: Model, passes: Sequence[PassRecord]) -> list[Layer]:
    """Every linear layer in data order, with the error that a pass recorded for it."""
    errors = {name: error for record in passes for name, error in record.details.get("errors", {}).items()}
    layers = []
    for module in model.linears():
        weight = model.weights[model.weight_of(module)]
        layers.append(
            Layer(
                name=module,
                shape=list(weight.shape),
                scheme=_scheme(weight),
                bytes=weight.nbytes,
                error=errors.get(module),
            )
        )
    return layers


def sizes_of(model: Model) -> dict[str, dict[str, int]]:
    """Part of the model -> scheme, or dtype, -> bytes, as the passes left them: an engine stores floats as float32.

    The parts are embedding, attention, mlp, experts, head and other: norms, biases of norms, routers, positions. The
    table of a tied model is one part, ``embedding and head``.
    """
    parts = _encoder_parts(model.encoder) if model.is_encoder else _parts(model.decoder, is_tied=model.is_tied)
    sizes: dict[str, dict[str, int]] = {part: {} for part in dict.fromkeys([*parts.values(), "other"])}
    for name, weight in model.weights.items():
        found = sizes[parts.get(name.rpartition(".")[0], "other")]
        found[_scheme(weight)] = found.get(_scheme(weight), 0) + weight.nbytes
    return {part: found for part, found in sizes.items() if found}


def _parts(decoder: Decoder, *, is_tied: bool) -> dict[str, str]:
    """Module -> its part, in data order."""
    parts = {decoder.embedding: "embedding and head" if is_tied else "embedding"}
    for layer in decoder.layers:
        parts |= dict.fromkeys(layer.attention.linears, "attention")
        parts |= dict.fromkeys(layer.mlp.linears, "experts" if isinstance(layer.mlp, Experts) else "mlp")
    if not is_tied:
        parts[decoder.head] = "head"
    return parts


def _encoder_parts(encoder: Encoder) -> dict[str, str]:
    parts = {encoder.embedding: "embedding"}
    for layer in encoder.layers:
        parts |= dict.fromkeys(layer.attention, "attention") | dict.fromkeys(layer.mlp, "mlp")
    return parts


def _scheme(weight: Weight) -> str:
    return weight.scheme.name if isinstance(weight, QuantWeight) else str(weight.dtype).removeprefix("torch.")
