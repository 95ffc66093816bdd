"""Which integer kernels are right on a CPU, told by what the system says of it."""

from pathlib import Path

import pytest

from llmopt.optimizer import instructions


@pytest.fixture(autouse=True)
def _asked_anew():
    instructions.host_instructions.cache_clear()
    yield
    instructions.host_instructions.cache_clear()


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "fpu sse avx avx2", "avx2"),
        ("x86_64", "avx2 avx512f avx512bw", "avx2"),
        ("x86_64", "avx2 avx512_vnni", "vnni"),
        ("x86_64", "avx2 avx_vnni", "avx2"),
        ("AMD64", "avx2 amx_int8", "vnni"),
        ("aarch64", "", "vnni"),
    ],
)
def test_a_cpu_is_known_by_its_flags(machine, flags, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions.platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor : 0\nflags\t\t: {flags}\nbugs : none\n")
    assert instructions.host_instructions() == expected


def test_a_cpu_that_does_not_tell_gets_what_is_right_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(instructions.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", unreadable)
    assert instructions.host_instructions() == "avx2"
