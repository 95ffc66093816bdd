"""``llmopt passes``: a line for each pass, and the options of one."""

import pytest

from llmopt.optimizer import loader
from llmopt.optimizer.cli.main import main


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["passes", *args])
    return ended.value.code


def test_every_pass_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for kind in ("passes", "passes.graph"):
        for name, summary in loader.names(kind).items():
            assert any(line.split()[:1] == [name] and line.endswith(summary) for line in lines)
    assert lines.index("Weight passes") < lines.index("Graph passes")


def test_the_options_of_a_pass_are_shown_with_type_default_and_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run("round_to_nearest") == 0
    shown = capsys.readouterr().out
    (scheme,) = [line for line in shown.splitlines() if line.split()[:1] == ["scheme"] and "required" in line][:1]
    assert "W8A8, W8A8_STATIC, W8A16, W4A16" in scheme
    (size,) = [line for line in shown.splitlines() if line.split()[:1] == ["group_size"] and "overriding" in line]
    assert "integer" in size
    assert "not set" in size
    assert "Override options" in shown


def test_every_pass_and_graph_pass_can_be_described(capsys: pytest.CaptureFixture[str]) -> None:
    for name in [*loader.names("passes"), *loader.names("passes.graph")]:
        assert run(name) == 0
        assert capsys.readouterr().out.startswith(name)


def test_an_unknown_pass_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fuse_qk") == 2
    assert capsys.readouterr().err == "error: no pass named 'fuse_qk'\nhint: did you mean 'fuse_qkv'?\n"
