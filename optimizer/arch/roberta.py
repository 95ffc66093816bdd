"""RoBERTa and XLM-RoBERTa: BERT with positions that begin behind the padding token's number."""

from dataclasses import replace

from llmopt.optimizer.arch.bert import ARCH as _BERT

ARCH = replace(
    _BERT,
    name="roberta",
    models={
        "RobertaModel": "roberta",
        "RobertaForMaskedLM": "roberta",
        "XLMRobertaModel": "xlm-roberta",
        "XLMRobertaForMaskedLM": "xlm-roberta",
    },
    prefixes=("roberta.",),
    padded_positions=True,
)
