"""The torch side that engines of encoders are measured against."""

import pytest
import torch
from transformers import AutoModel

from llmopt.calibration.activations import quantize_per_token
from llmopt.calibration.encoder_reference import EncoderReference
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.pooling import Pooling
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens
from llmopt.passes.round_to_nearest import RoundToNearest


@pytest.fixture
def model(encoder_of, tmp_path):
    return load_model(str(encoder_of("roberta")), cache=tmp_path)


@pytest.fixture
def texts():
    ids = torch.randint(3, 512, (70, 20), generator=torch.Generator().manual_seed(0))
    lengths = torch.arange(70) % 20 + 1
    return Tokens(name="texts", ids=ids, digest="0" * 64, lengths=lengths)


def test_vectors_are_those_of_each_text_alone_and_in_order(encoder_of, model, texts):
    seen = []
    found = EncoderReference(model).vectors(texts, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(32, 70), (64, 70), (70, 70)]
    network = AutoModel.from_pretrained(encoder_of("roberta"), attn_implementation="eager").eval()
    for row in (0, 19, 42, 69):
        ids = texts.ids[row : row + 1, : texts.lengths[row]]
        with torch.no_grad():
            expected = network(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)


def test_the_pooling_may_be_another_than_the_models(model, texts):
    found = EncoderReference(model, pooling=Pooling(mode="cls", normalize=True)).vectors(texts)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(70))


def test_rounded_weights_and_inputs_are_used(model):
    rounded = RoundToNearest(scheme="W8A8").run(model, PassContext())
    reference = EncoderReference(rounded)
    linear = reference._network.encoder.layer[0].intermediate.dense
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    weight = rounded.weights["encoder.layer.0.intermediate.dense.weight"].dense()
    bias = rounded.weights["encoder.layer.0.intermediate.dense.bias"].dense()
    torch.testing.assert_close(linear(x), quantize_per_token(x) @ weight.T + bias)


def test_the_number_of_threads_is_put_back(model, texts):
    before = torch.get_num_threads()
    EncoderReference(model, threads=1).vectors(texts)
    assert torch.get_num_threads() == before
