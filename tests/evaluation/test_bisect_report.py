"""A hand-made bisection as JSON and as a page."""

import json
import re

import pytest
import torch

from llmopt.evaluation.bisect import Bisection, Step
from llmopt.evaluation.bisect_report import bisection_facts, bisection_page, longest_bar, shares
from llmopt.optimizer.tokens import Tokens


@pytest.fixture
def bisection() -> Bisection:
    steps = (
        Step("source model", "source", True, None, 0.0, 1.0, 0.0, None, 2.0),
        Step("round_to_nearest", "weight pass", True, None, 0.03, 0.9, 0.03, 0.002, 3.25),
        Step("standard graph", "standard graph", True, None, 0.031, 0.9, 0.001, 0.002, 4.0),
        Step("fuse_<b>", "graph pass", True, 7, 0.04, 0.8, 0.009, 0.002, 4.0),
        Step("fuse_none", "graph pass", False, 0, 0.04, 0.8, 0.0, None, 0.1),
    )
    return Bisection("./models/<i>it</i>", Tokens("sampled", torch.zeros(3, 5, dtype=torch.int64), "ab" * 32), steps)


def test_the_facts_are_plain_and_complete(bisection: Bisection) -> None:
    facts = json.loads(json.dumps(bisection_facts(bisection)))
    assert facts["text"] == {"name": "sampled", "digest": "ab" * 32, "windows": 3, "tokens": 5}
    assert facts["worst"] == "round_to_nearest"
    assert [step["name"] for step in facts["steps"]][1:3] == ["round_to_nearest", "standard graph"]
    assert facts["steps"][3] == {
        "name": "fuse_<b>", "kind": "graph pass", "changed": True, "applied": 7, "kl": 0.04, "top1": 0.8,
        "change": 0.009, "error": 0.002, "seconds": 4.0, "is_noise": False,
    }  # fmt: skip


def test_bars_show_what_a_step_added_beyond_the_noise(bisection: Bisection) -> None:
    assert [shares(step) for step in bisection.steps] == [
        (0.0, 0.0),
        (0.0, 0.03),
        (0.031, 0.0),
        (pytest.approx(0.031), 0.009),
        (0.04, 0.0),
    ]
    bars = re.findall(r'aria-label="KL">(.*?)</svg>', bisection_page(bisection))
    widths = [re.findall(r'class="(c\d)" x="[\d.]+" width="([\d.]+)"', bar) for bar in bars]
    assert widths == [[], [("c2", "750.0")], [("c0", "775.0")], [("c0", "775.0"), ("c2", "225.0")], [("c0", "1000.0")]]


def test_a_bar_is_never_longer_than_its_kl() -> None:
    step = Step("it", "graph pass", True, 1, 0.01, 0.9, 0.02, 0.001, 1.0)
    assert shares(step) == (0.0, 0.01)


def test_rounding_is_not_drawn_as_a_loss(bisection: Bisection) -> None:
    step = Step("it", "graph pass", True, 1, 2e-9, 1.0, 2e-9, 1e-8, 1.0)
    html = bisection_page(Bisection("m", bisection.text, (bisection.steps[0], step)))
    assert re.findall(r'class="c0" x="0.0" width="([\d.]+)"', html) == ["2.0"]
    assert longest_bar(bisection) == 0.04


def test_the_page_says_what_was_found_and_loads_nothing(bisection: Bisection) -> None:
    html = bisection_page(bisection)
    assert "round_to_nearest costs most: 0.0300 ± 0.0020 nats per token of the 0.0400 after the last step." in html
    assert "3 windows of 5 tokens of text sampled from the model" in html
    assert "unchanged" in html
    assert 'class="n quiet">+0.0010' in html
    assert 'class="n">+0.0090' in html
    assert "fuse_&lt;b&gt;" in html
    assert "&lt;i&gt;it" in html
    assert not any(word in html for word in ("http:", "https:", "src=", "href=", "@import", "url(", "<script "))


def test_a_bisection_without_any_loss_has_a_page_too(bisection: Bisection) -> None:
    same = Bisection("m", bisection.text, bisection.steps[:1])
    assert "No pass costs more than the noise" in bisection_page(same)
