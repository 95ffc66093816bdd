"""Every way of pooling against one text after the other in plain numpy."""

import numpy as np
import pytest
import torch

from llmopt.optimizer.encoder_module import encoder_module, pooled
from llmopt.optimizer.pooling import Pooling

NAIVE = {
    "mean": lambda rows: rows.mean(0),
    "cls": lambda rows: rows[0],
    "max": lambda rows: rows.max(0),
    "mean_sqrt_len_tokens": lambda rows: rows.sum(0) / np.sqrt(len(rows)),
    "lasttoken": lambda rows: rows[-1],
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", NAIVE)
def test_pooling_is_that_of_each_text_alone(mode, normalize):
    hidden = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0)) - 1.0
    lengths = [7, 4, 1, 6]
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).to(torch.int64)
    expected = np.stack([NAIVE[mode](hidden[i, :n].numpy()) for i, n in enumerate(lengths)])
    if normalize:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    found = pooled(hidden, mask, Pooling(mode=mode, normalize=normalize)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_vector_of_zeros_has_no_direction():
    found = pooled(torch.zeros(1, 3, 4), torch.ones(1, 3, dtype=torch.int64), Pooling(normalize=True))
    assert torch.equal(found, torch.zeros(1, 4))


def test_the_module_has_nothing_behind_the_encoder():
    config = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}
    network = encoder_module(config, device="meta")
    assert not [name for name, _ in network.named_parameters() if "pooler" in name]
    assert all(parameter.is_meta for parameter in network.parameters())
