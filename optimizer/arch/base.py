"""What a model family is to the compiler: the names of its parts, in the order data flows through them."""

from dataclasses import dataclass

__all__ = ["Arch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """Names only; sizes and flags come from the checkpoint's config.

    Attributes:
        name: The family, as in ``config.json``'s ``model_type``.
        hf_names: The ``architectures`` entries this description covers.
        attention: The query, key, value and output linears, below a layer.
        mlp: The gate, up and down linears, below a layer.
        norms: The norm before attention and the norm before the MLP, below a layer.
        layer: A decoder layer's module name.
        embedding, final_norm, head: Module names outside the layers.
        gguf: The architecture's name in a GGUF file; None when that format has none.
        gguf_interleaves: Whether that format stores the rows of query and key with the two halves of each head
            interleaved, for llama.cpp's older rotary embedding.
    """

    name: str
    hf_names: tuple[str, ...]
    attention: tuple[str, str, str, str]
    mlp: tuple[str, str, str]
    norms: tuple[str, str]
    layer: str = "model.layers.{i}"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    gguf: str | None = None
    gguf_interleaves: bool = False

    def layer_linears(self, num_layers: int) -> list[str]:
        """Module names of the linears of every layer, in data order."""
        below = (*self.attention, *self.mlp)
        return [f"{self.layer.format(i=i)}.{name}" for i in range(num_layers) for name in below]

    def norm_pairs(self, layer: int) -> list[tuple[str, tuple[str, ...]]]:
        """Each norm of a layer with the linears that read its output: module names."""
        prefix = self.layer.format(i=layer)
        pairs = ((self.norms[0], self.attention[:3]), (self.norms[1], self.mlp[:2]))
        return [(f"{prefix}.{norm}", tuple(f"{prefix}.{name}" for name in readers)) for norm, readers in pairs]
