"""Progress: what each kind shows, with a clock that only moves when told to."""

import io
import json
import os
import pty
import sys

import pytest

from llmopt.optimizer.progress import Bars, JsonLines, Lines, Progress, Silent, choose


class Clock:
    """Seconds that pass by assignment."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def events(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_tell_start_progress_end_and_result(clock: Clock) -> None:
    stream = io.StringIO()
    progress = JsonLines(stream, clock)
    with progress.step("quantize", total=4) as tick:
        clock.now += 1
        tick(1)
        clock.now += 1
        tick(4)
    progress.note("a fallback")
    progress.result({"verdict": "accepted"})
    assert events(stream) == [
        {"event": "started", "step": "quantize", "total": 4},
        {"event": "progress", "step": "quantize", "done": 1, "total": 4, "seconds": 1.0, "left": 3.0},
        {"event": "progress", "step": "quantize", "done": 4, "total": 4, "seconds": 2.0, "left": 0.0},
        {"event": "finished", "step": "quantize", "seconds": 2.0},
        {"event": "note", "text": "a fallback"},
        {"event": "result", "result": {"verdict": "accepted"}},
    ]


def test_json_lines_show_at_most_one_progress_event_an_interval_and_always_the_last(clock: Clock) -> None:
    stream = io.StringIO()
    with JsonLines(stream, clock, interval=1.0).step("s", total=1000) as tick:
        for done in range(1, 1001):
            clock.now += 0.01
            tick(done)
    shown = [each["done"] for each in events(stream) if each["event"] == "progress"]
    assert len(shown) <= 11
    assert shown[-1] == 1000


def test_json_lines_do_not_guess_what_is_left_of_an_unknown_total(clock: Clock) -> None:
    stream = io.StringIO()
    with JsonLines(stream, clock, interval=0).step("s") as tick:
        tick(3)
        tick(0, 9)
    assert [each.get("left") for each in events(stream)] == [None, None, None, None]


def test_a_total_may_become_known_on_the_way(clock: Clock) -> None:
    stream = io.StringIO()
    with JsonLines(stream, clock, interval=0).step("s") as tick:
        clock.now += 2
        tick(1, 3)
    assert events(stream)[1]["left"] == 4.0


def test_steps_of_one_name_may_nest(clock: Clock) -> None:
    stream = io.StringIO()
    progress = JsonLines(stream, clock)
    with progress.step("s"), progress.step("s"):
        clock.now += 1
    assert [each["event"] for each in events(stream)] == ["started", "started", "finished", "finished"]


def test_lines_show_a_line_for_each_finished_step_and_none_for_ticks(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Lines(stream, clock)
    with progress.step("load"):
        clock.now += 0.25
    with progress.step("quantize", total=9) as tick:
        for done in range(9):
            tick(done + 1)
        progress.note("a fallback")
        clock.now += 12
    progress.result({"verdict": "accepted"})
    assert stream.getvalue() == "load: 0.2 s\na fallback\nquantize: 12.0 s\n"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", [Lines, JsonLines, Bars, lambda stream, clock: Silent(clock)])
def test_a_step_that_fails_says_so_and_lets_the_error_through(kind, error: type[BaseException], clock: Clock) -> None:
    stream = io.StringIO()
    progress: Progress = kind(stream, clock)

    def fail() -> None:
        with progress.step("s"):
            raise error

    with pytest.raises(error):
        fail()
    if not isinstance(progress, Silent):
        assert "failed" in stream.getvalue()


def test_bars_keep_a_line_for_each_finished_step_and_show_names_as_they_are(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Bars(stream, clock)
    with progress.step("[bold]outer", total=2) as tick:
        tick(1)
        with progress.step("inner"):
            clock.now += 1
        progress.note("[red] is no colour here")
    lines = [line.strip() for line in stream.getvalue().splitlines()]
    assert [line for line in lines if line] == ["inner: 1.0 s", "[red] is no colour here", "[bold]outer: 1.0 s"]


def test_bars_on_a_terminal_show_elapsed_time_and_time_left() -> None:
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        progress = Bars(terminal)
        with progress.step("quantize", total=30) as tick:
            tick(10)
    shown = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert "quantize" in shown
    assert "10/30" in shown or "0/30" in shown
    assert "left" in shown


def test_the_kind_fits_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose(as_json=True), JsonLines)
    assert isinstance(choose(quiet=True), Silent)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(choose(), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(choose(), Bars)


def test_a_step_takes_what_a_pass_context_calls() -> None:
    with Silent().step("s") as tick:
        tick(1, 2)
        tick(1)
