"""BERT: post-norm layers, learned positions, and types of tokens."""

from llmopt.optimizer.encoder import EncoderArch

ARCH = EncoderArch(
    name="bert",
    models={"BertModel": "bert", "BertForMaskedLM": "bert", "BertForPreTraining": "bert"},
    attention=("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    mlp=("intermediate.dense", "output.dense"),
    prefixes=("bert.",),
    token_types="type_vocab_size",
    accepted={"position_embedding_type": ("absolute",), "is_decoder": (False,), "add_cross_attention": (False,)},
)
