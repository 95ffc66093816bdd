"""The report of a hand-made manifest."""

import json
from html.parser import HTMLParser

import pytest

from llmopt.evaluation.report import summary, write_report
from llmopt.optimizer.manifest import (
    GateResult,
    Layer,
    Manifest,
    Measurement,
    PassRecord,
    SourceEntry,
    Verdict,
)


@pytest.fixture
def manifest():
    return Manifest(
        llmopt="0.1",
        versions={},
        source=SourceEntry(spec="./models/<b>bold</b>", digest="ab" * 32, files={}),
        recipe={},
        architecture="llama",
        layers=[
            Layer(name="up", shape=[8, 4], scheme="W8A8", bytes=32, error=0.0123),
            Layer(name="down", shape=[4, 8], scheme="W4A16 g32", bytes=16, error=0.1),
            Layer(name="gate", shape=[8, 4], scheme="W8A8", bytes=32, error=None),
        ],
        passes=[
            PassRecord(name="round_to_nearest", changed=True, notes=["one & only"], fallbacks=["less <than> asked"])
        ],
        engines=[],
        measurements=[
            Measurement(metric="kl", value=0.01234, data="sampled", data_digest="d", tokens=4096),
            Measurement(metric="perplexity", value=20.6, source=20.0, data="a.txt", data_digest="d", tokens=99),
        ],
        verdict=Verdict(
            status="rejected", gates=[GateResult(gate={"metric": "kl", "max": 0.01}, value=0.01234, passed=False)]
        ),
    )


class Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.words = []

    def handle_data(self, data):
        self.words += data.split()


def test_sizes_are_summed_by_scheme(manifest):
    assert summary(manifest)["schemes"] == [
        {"scheme": "W8A8", "layers": 2, "bytes": 64, "share": 0.8},
        {"scheme": "W4A16 g32", "layers": 1, "bytes": 16, "share": 0.2},
    ]
    assert summary(manifest)["total_bytes"] == 80


def test_both_files_hold_the_same_facts(manifest, tmp_path):
    write_report(manifest, tmp_path)
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts == summary(manifest)
    page = Text()
    page.feed((tmp_path / "report.html").read_text())
    text = " ".join(page.words)
    for words in ("Verdict: rejected", "0.01234", "+3.00 %", "metric: kl, max: 0.01", "missed", "W4A16 g32", "1.23 %"):
        assert words in text


def test_what_users_named_is_escaped(manifest, tmp_path):
    write_report(manifest, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;bold" in html
    assert "one &amp; only" in html
    assert "less &lt;than&gt; asked" in html


def test_the_page_loads_nothing(manifest, tmp_path):
    write_report(manifest, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert not any(word in html for word in ("http:", "https:", "src=", "href=", "@import", "<script"))


def test_the_report_is_the_same_every_time(manifest, tmp_path):
    write_report(manifest, tmp_path)
    first = [(tmp_path / name).read_bytes() for name in ("report.html", "report.json")]
    write_report(manifest, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("report.html", "report.json")] == first


def test_a_build_that_was_not_measured_has_a_report_too(manifest, tmp_path):
    bare = manifest.model_copy(
        update={"measurements": [], "passes": [], "layers": [], "verdict": Verdict(status="unjudged")}
    )
    write_report(bare, tmp_path)
    assert "unjudged" in (tmp_path / "report.html").read_text()
