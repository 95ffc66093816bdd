"""The vocabulary of schemes: presets, the long form, names, and what does not fit together."""

import pydantic
import pytest
import torch

from llmopt.optimizer.scheme import PRESETS, QuantSpec, Scheme, SchemeOption, name_of, preset

OPTION = pydantic.TypeAdapter(SchemeOption)


@pytest.mark.parametrize(("bits", "low", "high"), [(2, -2, 1), (3, -4, 3), (4, -8, 7), (8, -128, 127)])
def test_the_range_is_twos_complement(bits, low, high):
    spec = QuantSpec(num_bits=bits, strategy="channel")
    assert (spec.quant_min, spec.quant_max) == (low, high)


@pytest.mark.parametrize("bits", [0, 1, 5, 16, "4", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(pydantic.ValidationError):
        QuantSpec(num_bits=bits, strategy="channel")


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "group"},
        {"strategy": "channel", "group_size": 32},
        {"strategy": "tensor", "group_size": 32},
        {"strategy": "group", "group_size": 0},
        {"strategy": "group", "group_size": -1},
    ],
)
def test_a_group_size_goes_with_groups_only(options):
    with pytest.raises(pydantic.ValidationError, match="group_size"):
        QuantSpec(num_bits=4, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "block"},
        {"strategy": "channel", "block_structure": [128, 128]},
        {"strategy": "block", "block_structure": [128]},
        {"strategy": "block", "block_structure": [128, 0]},
    ],
)
def test_a_block_structure_goes_with_blocks_only(options):
    with pytest.raises(pydantic.ValidationError, match="block_structure"):
        QuantSpec(num_bits=8, **options)


@pytest.mark.parametrize("options", [{"num_bits": 4}, {"num_bits": 8, "symmetric": False}])
def test_floats_have_eight_bits_and_no_zero_point(options):
    with pytest.raises(pydantic.ValidationError, match="FP8 E4M3"):
        QuantSpec(type="float", strategy="channel", **options)


def test_floats_reach_from_minus_448_to_448():
    spec = PRESETS["FP8"].weights
    assert (spec.quant_min, spec.quant_max) == (-448, torch.finfo(torch.float8_e4m3fn).max)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("FP8", (1, 1)), ("FP8_DYNAMIC", (200, 1)), ("FP8_BLOCK", (2, 3)), ("W4A16", (200, 2)), ("W8A8", (200, 1))],
)
def test_scales_have_a_shape(name, shape):
    assert PRESETS[name].weights.scale_shape(200, 256 if name == "W4A16" else 300) == shape


@pytest.mark.parametrize("name", PRESETS)
def test_only_static_inputs_need_a_stored_scale(name):
    assert PRESETS[name].needs_input_scale == (name in ("FP8", "W8A8_STATIC"))


def test_what_stays_in_float_is_called_as_in_a_recipe():
    assert name_of(None) == "none"
    assert name_of(PRESETS["W4A16"].with_group_size(32)) == "W4A16 g32"


def test_unknown_keys_and_values_are_refused():
    with pytest.raises(pydantic.ValidationError, match="actorder"):
        QuantSpec(num_bits=4, strategy="channel", actorder="static")
    with pytest.raises(pydantic.ValidationError, match="strategy"):
        QuantSpec(num_bits=4, strategy="row")
    with pytest.raises(pydantic.ValidationError, match="weights"):
        Scheme(input_activations=QuantSpec(num_bits=8, strategy="token"))


def test_schemes_are_values():
    scheme = PRESETS["W4A16"]
    assert scheme == Scheme(weights=QuantSpec(num_bits=4, strategy="group", group_size=128))
    assert len({scheme, PRESETS["W4A16"], PRESETS["W8A16"]}) == 2
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        scheme.weights = PRESETS["W8A16"].weights


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_called_by_its_name(name):
    assert preset(name) == PRESETS[name]
    assert PRESETS[name].name == name
    assert OPTION.validate_python(name) == PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_the_long_form_of_a_preset_is_the_preset(name):
    assert OPTION.validate_python(PRESETS[name].model_dump()) == PRESETS[name]
    assert OPTION.validate_json(PRESETS[name].model_dump_json()).name == name


@pytest.mark.parametrize(("wrong", "near"), [("W4A17", "W4A16"), ("w8a8", "W8A8"), ("W4A16_ASIM", "W4A16_ASYM")])
def test_a_misspelled_preset_is_guessed(wrong, near):
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        preset(wrong)


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(ValueError, match=", ".join(PRESETS)) as caught:
        preset("gguf")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (PRESETS["W4A16"].with_group_size(32), "W4A16 g32"),
        (PRESETS["W4A16_ASYM"].with_group_size(64), "W4A16_ASYM g64"),
        (PRESETS["W4A16"].with_group_size(128), "W4A16"),
        (PRESETS["W4A16"].with_group_size(-1), "W4A16 channel"),
        (PRESETS["W4A16_ASYM"].with_group_size(-1), "W4A16_ASYM channel"),
        (PRESETS["W8A16"].with_group_size(32), "W8A16 g32"),
        (PRESETS["W8A16"].with_group_size(-1), "W8A16"),
        (PRESETS["W8A8"].with_group_size(-1), "W8A8"),
        (PRESETS["W3A16"].with_group_size(-1), "W3A16 channel"),
        (Scheme(weights=QuantSpec(num_bits=3, strategy="group", group_size=64, symmetric=False)), "W3A16_ASYM g64"),
        (Scheme(weights=PRESETS["FP8"].weights), "FP8 weights tensor"),
        (Scheme(weights=PRESETS["FP8_BLOCK"].weights), "FP8 weights 128x128"),
        (
            Scheme(weights=PRESETS["W8A8"].weights, input_activations=QuantSpec(num_bits=8, strategy="tensor")),
            "W8A8_STATIC",
        ),
        (
            Scheme(weights=PRESETS["FP8"].weights, input_activations=PRESETS["FP8_DYNAMIC"].input_activations),
            "FP8 tensor, inputs token dynamic",
        ),
        (
            Scheme(weights=PRESETS["FP8"].weights, input_activations=PRESETS["W8A8"].input_activations),
            "FP8 tensor, int inputs token dynamic",
        ),
        (Scheme(weights=QuantSpec(num_bits=8, strategy="tensor", symmetric=False)), "W8A16_ASYM tensor"),
    ],
)
def test_other_schemes_have_a_short_name(scheme, name):
    assert scheme.name == name


def test_a_group_size_keeps_everything_else():
    sized = PRESETS["W4A16_ASYM"].with_group_size(48)
    assert sized.weights.model_dump() == PRESETS["W4A16_ASYM"].weights.model_dump() | {"group_size": 48}
    assert PRESETS["W8A8"].with_group_size(-1).input_activations == PRESETS["W8A8"].input_activations


@pytest.mark.parametrize("size", [0, -2])
def test_a_group_size_that_is_none_is_refused(size):
    with pytest.raises(pydantic.ValidationError, match="greater than 0"):
        PRESETS["W4A16"].with_group_size(size)
