"""``llmopt schema``: what it prints is JSON that a validator takes. What is in it: tests/optimizer/test_recipe.py."""

import json

import jsonschema
import pytest

from llmopt.optimizer.cli.main import main
from llmopt.optimizer.recipe import Recipe


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["schema"])
    assert ended.value.code == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema == Recipe.json_schema()
