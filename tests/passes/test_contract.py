"""What every pass promises, asked of each by its file's existence."""

import importlib
import inspect

import pydantic
import pytest
import torch

from llmopt.optimizer import loader
from llmopt.optimizer.contracts import GraphPass, PassContext, QuantPass, WeightPass
from llmopt.optimizer.model import QuantWeight
from llmopt.optimizer.options import options_of
from llmopt.optimizer.tokens import Tokens

EVERY = [(kind, name) for kind in ("passes", "passes.graph") for name in loader.names(kind)]
WEIGHT = list(loader.names("passes"))
QUANTIZERS = [name for name in WEIGHT if issubclass(loader.load("passes", name), QuantPass)]


REQUIRED = {
    "auto_bits": {
        "budget": {"bits": 6.5},
        "candidates": ["W8A16", {"scheme": "W4A16", "group_size": 32}],
        "method": "round_to_nearest",
    }
}


@pytest.fixture(scope="module", autouse=True)
def adapter(adapter_of, llama_of, tmp_path_factory):
    """An adapter for those that merge one."""
    folder = tmp_path_factory.mktemp("adapter")
    adapter_of(folder, llama_of(num_hidden_layers=1), target_modules=["q_proj"])
    REQUIRED["merge_lora"] = {"adapters": [{"path": str(folder)}]}


def options_for(name):
    """Options that every quantizer can be made with; of other passes those that are required."""
    return REQUIRED.get(name, {"scheme": "W8A16"} if name in QUANTIZERS else {})


def context():
    """With a text for those that look at one."""
    tokens = Tokens(name="it", ids=torch.arange(4 * 16).reshape(4, 16) % 50, digest="0")
    return PassContext(calibration=lambda: tokens)


def made(kind, name):
    return loader.load(kind, name)(**options_for(name))


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_its_file_says_in_one_line_what_it_is_for(kind, name):
    summary = loader.names(kind)[name]
    assert 10 < len(summary) <= 120
    assert summary.endswith(".")


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_it_has_one_public_name_which_is_the_files_in_camel_case(kind, name):
    (public,) = importlib.import_module(f"llmopt.{kind}.{name}").__all__
    assert public == "".join(word.capitalize() for word in name.split("_"))


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_it_follows_the_contract_of_its_folder(kind, name):
    found = loader.load(kind, name)
    assert issubclass(found, GraphPass if kind == "passes.graph" else WeightPass)
    assert not inspect.isabstract(found)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_the_class_and_what_it_adds_are_documented(kind, name):
    found = loader.load(kind, name)
    own = [member for key, member in vars(found).items() if inspect.isfunction(member) and not key.startswith("_")]
    assert all((member.__doc__ or "").strip() for member in [found, *own])


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_option_says_what_it_means(kind, name):
    options = options_of(loader.load(kind, name).model_json_schema())
    assert [option.name for option in options if not option.meaning.endswith(".")] == []


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_an_unknown_option_is_refused(kind, name):
    with pytest.raises(pydantic.ValidationError, match="no_such_option"):
        loader.load(kind, name)(**options_for(name), no_such_option=1)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_options_are_frozen_and_nothing_else_can_be_stored(kind, name):
    one = made(kind, name)
    with pytest.raises(pydantic.ValidationError):
        one.memory = 1
    for field in type(one).model_fields:
        with pytest.raises(pydantic.ValidationError):
            setattr(one, field, None)
    assert one == made(kind, name)
    assert hash(one) == hash(made(kind, name))


@pytest.mark.parametrize("name", WEIGHT)
def test_the_input_model_is_left_alone(float_model_of, name):
    model = float_model_of(num_hidden_layers=1)
    names, config = dict(model.weights), dict(model.config)
    before = {key: weight.dense().clone() for key, weight in model.weights.items()}
    one = made("passes", name)
    one.requires(model)
    one.run(model, context())
    assert dict(model.config) == config
    assert all(model.weights[key] is weight for key, weight in names.items())
    assert len(model.weights) == len(names)
    assert all(model.weights[key].dense().equal(value) for key, value in before.items())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantizer_says_which_schemes_it_may_apply(float_model_of, name):
    one = made("passes", name)
    model = float_model_of(num_hidden_layers=1)
    result = one.run(model, context())
    used = {weight.scheme.name for weight in result.weights.values() if isinstance(weight, QuantWeight)}
    assert used
    assert used <= {scheme.name for scheme in one.schemes().values()}
