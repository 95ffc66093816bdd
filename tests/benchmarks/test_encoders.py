"""What is made of the times and vectors of several programs."""

from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

from llmopt.benchmarks import encoders
from llmopt.benchmarks.encoders import Program, rows_of


def program(title, seconds, vectors):
    return Program(title, None, list(seconds), np.array(vectors, np.float32))


def test_ratios_are_those_within_a_round():
    first = program("float", (2.0, 8.0, 4.0), [[1, 0], [0, 1]])
    second = program("int8", (1.0, 2.0, 4.0), [[1, 0], [0.6, 0.8]])
    rows = rows_of([first, second], 8)
    assert rows[0] == ["float", "2", "1.00", "1.00 - 1.00", "1.00000", "1.00000"]
    assert rows[1] == ["int8", "4", "2.00", "1.00 - 4.00", "0.90000", "0.80000"]


def test_the_float_recipe_is_the_other_without_passes(tmp_path):
    recipe = Path(__file__).parents[2] / "recipes/all-minilm-l6-v2-int8.yaml"
    plain = YAML(typ="safe").load(encoders._float_recipe(tmp_path, recipe).read_text("utf-8"))
    rounded = YAML(typ="safe").load(recipe.read_text("utf-8"))
    assert plain["passes"] == []
    assert plain["model"] == rounded["model"]
    assert [gate["metric"] for gate in plain["accept"]] == [gate["metric"] for gate in rounded["accept"]]
