"""The report of a hand-made manifest."""

import json
import re
from html.parser import HTMLParser

import pytest

from llmopt.evaluation.report import page, summary, write_report
from llmopt.optimizer.manifest import (
    Engine,
    FileEntry,
    GateResult,
    Layer,
    Manifest,
    Measurement,
    PassRecord,
    SourceEntry,
    Verdict,
)

W8A8 = {
    "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True},
}


@pytest.fixture
def manifest():
    return Manifest(
        llmopt="0.1",
        versions={"torch": "9.8.7"},
        source=SourceEntry(spec="./models/<b>bold</b>", digest="ab" * 32, files={"model.gguf": "cd" * 32}),
        recipe={"passes": [{"round_to_nearest": {"scheme": W8A8}}]},
        architecture="llama",
        layers=[
            Layer(name="up", shape=[8, 4], scheme="W8A8", bytes=32, error=0.0123),
            Layer(name="down", shape=[4, 8], scheme="W4A16 g32", bytes=16, error=0.1),
            Layer(name="gate", shape=[8, 4], scheme="W8A8", bytes=32, error=None),
        ],
        sizes={"mlp": {"W8A8": 64, "W4A16 g32": 16}, "other": {"float32": 80}},
        passes=[
            PassRecord(
                name="round_to_nearest",
                options={"scheme": W8A8},
                changed=True,
                notes=["one & only"],
                fallbacks=["less <than> asked"],
            )
        ],
        engines=[
            Engine(
                exporter="onnx", target="cpu", path="engine/model.onnx", inputs=[], outputs=[], num_layers=2,
                kv_heads=2, head_dim=16, kv_dtype="float32", vocab_size=512, capacity=4096, max_chunk=512, min_chunk=2,
            )
        ],
        graph_passes={
            "engine/model.onnx": [
                PassRecord(
                    name="fuse_silu",
                    changed=True,
                    details={
                        "applied": 2,
                        "declined": ["no kernel for <half>", "no kernel for <half>"],
                        "operators": {
                            "before": {"Mul": 4, "Sigmoid": 2, "MatMul": 4},
                            "after": {"Mul": 2, "com.microsoft::QuickGelu": 2, "MatMul": 4},
                        },
                    },
                ),
                PassRecord(
                    name="verify_lowering",
                    changed=False,
                    details={
                        "layers.0": {"all": 2.5e-7, "fuse_silu": 0.0, "lower": 2.5e-7},
                        "layers.7": {"all": 3.6e-7, "fuse_silu": 0.0, "lower": 3.5e-7},
                    },
                ),
            ]
        },
        measurements=[
            Measurement(metric="kl", value=0.01234, data="sampled", data_digest="d", tokens=4096),
            Measurement(metric="perplexity", value=20.6, source=20.0, data="a.txt", data_digest="d", tokens=99),
        ],
        verdict=Verdict(
            status="rejected", gates=[GateResult(gate={"metric": "kl", "max": 0.01}, value=0.01234, passed=False)]
        ),
    )  # fmt: skip


class Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.words = []
        self.is_code = False

    def handle_starttag(self, tag, attributes):
        self.is_code = tag in ("style", "script")

    def handle_endtag(self, tag):
        self.is_code = False

    def handle_data(self, data):
        if not self.is_code:
            self.words += data.split()


def test_sizes_are_summed_by_scheme(manifest):
    assert summary(manifest)["schemes"] == [
        {"scheme": "W8A8", "layers": 2, "bytes": 64, "share": 0.8},
        {"scheme": "W4A16 g32", "layers": 1, "bytes": 16, "share": 0.2},
    ]
    assert summary(manifest)["total_bytes"] == 80


def words_of(html):
    """What a reader sees, and the titles of the bars."""
    page = Text()
    page.feed(html)
    return " ".join(page.words)


def test_both_files_hold_the_same_facts(manifest, tmp_path):
    write_report(manifest, tmp_path)
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts == summary(manifest)
    assert (tmp_path / "report.html").read_text() == page(manifest)


@pytest.mark.parametrize(
    "words",
    [
        "rejected",
        "kl 0.0123 sampled 4,096 at most 0.01 missed",
        "perplexity 20.600 20.000 +3.00% a.txt 99 none",
        "down 4 8 W4A16 g32 0 10.00%",
        "mlp 0.0 MB, 50.0%",
        "4,096 tokens at most",
        "4.0 operators per layer",
        "fuse_silu left near-matches alone: no kernel for <half> (2 times)",
        "fallback: less <than> asked one & only",
        "fuse_silu 2 0 layers.0: 0 layers.7: 0 lower 2 3.5e-07 layers.7 layers.0: 2.5e-07 layers.7: 3.5e-07",
        "all passes 2 3.6e-07 layers.7",
        "torch 9.8.7",
        "model.gguf source " + "cd" * 32,
    ],
)
def test_the_page_says_it(manifest, words):
    assert words in words_of(page(manifest))


def test_schemes_are_shown_by_name(manifest):
    shown = words_of(page(manifest))
    assert '{"scheme": "W8A8"}' in shown
    assert "num_bits" not in shown


def test_a_graph_pass_is_a_bar_of_what_its_operators_do_and_what_changed(manifest):
    html = page(manifest)
    standard, fused = re.findall(r"aria-label=\"operators by kind\">(.*?)</svg>", html)
    assert re.findall(r"<title>(.*?)</title>", standard) == ["matrix products: 4", "elementwise: 6"]
    assert re.findall(r"<title>(.*?)</title>", fused) == ["matrix products: 4", "elementwise: 4"]
    assert re.findall(r"width=\"([\d.]+)\"", standard) == ["400.0", "600.0"]
    assert re.findall(r"width=\"([\d.]+)\"", fused) == ["400.0", "400.0"]
    without_bars = re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)
    assert "fuse_silu 2 8 −2 Mul −2 Sigmoid +2 QuickGelu" in words_of(without_bars)


@pytest.mark.parametrize(
    ("gate", "value", "source", "used"),
    [
        ({"metric": "kl", "max": 0.08}, 0.02, None, "25.0"),
        ({"metric": "top1", "min": 0.9}, 0.95, None, "50.0"),
        ({"metric": "perplexity", "max_increase": 0.1, "data": "a.txt"}, 20.5, 20.0, "25.0"),
        ({"metric": "kl", "max": 0.01}, 0.02, None, "100.0"),
        ({"metric": "kl", "max": 0.0}, 0.0, None, "0.0"),
    ],
)
def test_the_meter_of_a_gate_is_the_share_of_the_allowed_loss(manifest, gate, value, source, used):
    found = Measurement(
        metric=gate["metric"], value=value, source=source, data=gate.get("data", "sampled"), data_digest="", tokens=9
    )
    verdict = Verdict(status="accepted", gates=[GateResult(gate=gate, value=value, passed=True)])
    html = page(manifest.model_copy(update={"measurements": [found], "verdict": verdict}))
    assert re.findall(r"<i class=\"good\" style=\"width: ([\d.]+)%", html) == [used]


def test_the_page_of_a_finished_build_adds_its_files_and_what_it_cost(manifest):
    built = manifest.model_copy(update={"files": {"engine/model.onnx": FileEntry(bytes=1_500_000, sha256="ef" * 32)}})
    record = {
        "date": "2026-01-02", "seconds": {"total": 61.4}, "peak_memory_bytes": 2_000_000_000,
        "host": {"cores": 3, "system": "Linux"},
    }  # fmt: skip
    shown = words_of(page(built, record))
    assert "engine/model.onnx 1,500,000 bytes " + "ef" * 32 in shown
    assert "1.5 MB engine" in shown
    assert "61 s to build, 2.00 GB of memory" in shown
    assert "Built 2026-01-02 on 3 cores, Linux" in shown


def test_what_users_named_is_escaped(manifest, tmp_path):
    write_report(manifest, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;bold" in html
    assert "one &amp; only" in html
    assert "less &lt;than&gt; asked" in html


def test_what_auto_bits_chose_among_is_plotted(manifest):
    table = [{"bits": 4.5, "kl": 0.25, "shares": {"W4A16 g32": 1.0}, "chosen": True}]
    record = PassRecord(name="auto_bits", options={}, changed=True, details={"pareto": table})
    text = page(manifest.model_copy(update={"passes": [record]}))
    assert "What auto_bits chose among" in text
    assert text.count("<circle") == 1
    assert "What auto_bits chose among" not in page(manifest)


def test_the_page_loads_nothing(manifest, tmp_path):
    write_report(manifest, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert not any(word in html for word in ("http:", "https:", "src=", "href=", "@import", "url(", "<script "))
    assert "default-src 'none'" in html


def test_the_report_is_the_same_every_time(manifest, tmp_path):
    write_report(manifest, tmp_path)
    first = [(tmp_path / name).read_bytes() for name in ("report.html", "report.json")]
    write_report(manifest, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("report.html", "report.json")] == first


def test_a_build_that_was_not_measured_has_a_report_too(manifest, tmp_path):
    bare = manifest.model_copy(
        update={
            "measurements": [],
            "passes": [],
            "layers": [],
            "sizes": {},
            "engines": [],
            "graph_passes": {},
            "versions": {},
            "verdict": Verdict(status="unjudged"),
        }
    )
    write_report(bare, tmp_path)
    assert "unjudged" in (tmp_path / "report.html").read_text()


def test_a_build_whose_graph_passes_counted_no_operators_has_a_report_too(manifest):
    record = PassRecord(name="fuse_silu", changed=True, details={"applied": 2, "declined": []})
    html = page(manifest.model_copy(update={"graph_passes": {"engine/model.onnx": [record]}}))
    assert "operators per layer" not in html


def test_a_build_from_before_each_pass_was_verified_has_a_row_for_all_of_them(manifest):
    record = PassRecord(name="verify_lowering", changed=False, details={"layers.0": 2e-7})
    shown = words_of(page(manifest.model_copy(update={"graph_passes": {"engine/model.onnx": [record]}})))
    assert "all passes 1 2.0e-07 layers.0" in shown
