"""MPNet: BERT with a bias on attention scores that depends on the distance of two tokens."""

from llmopt.optimizer.encoder import EncoderArch

ARCH = EncoderArch(
    name="mpnet",
    models={"MPNetModel": "mpnet", "MPNetForMaskedLM": "mpnet"},
    attention=("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
    mlp=("intermediate.dense", "output.dense"),
    prefixes=("mpnet.",),
    padded_positions=True,
    # transformers' module computes these numbers whatever the config says.
    accepted={"relative_attention_num_buckets": (32,), "pad_token_id": (1,)},
)
