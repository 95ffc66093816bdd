"""ModernBERT: pre-norm layers with packed attention, gated MLP, rope, and layers that see a window only."""

from llmopt.optimizer.encoder import EncoderArch

ARCH = EncoderArch(
    name="modernbert",
    models={"ModernBertModel": "modernbert", "ModernBertForMaskedLM": "modernbert"},
    layer="layers.{i}",
    attention=("attn.Wqkv", "attn.Wo"),
    mlp=("mlp.Wi", "mlp.Wo"),
    embedding="embeddings.tok_embeddings",
    prefixes=("model.",),
    left_out=("head.", "decoder."),
)
