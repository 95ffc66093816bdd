"""A build's report for people, ``report.html``, and the same facts for programs, ``report.json``."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from llmopt.optimizer.manifest import Layer, Manifest

__all__ = ["summary", "write_report"]

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2329 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } th, td { padding: .2rem .8rem .2rem 0; text-align: left }
th { border-bottom: 1px solid #8a949e } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.accepted { color: #17692f } .rejected { color: #a4161a } .bar { background: #4a7fb5; height: .8rem }
</style>
<h1>{{ title }}</h1>
<p>Verdict: <strong class="{{ status }}">{{ status }}</strong>. Weights: {{ "%.1f" % (total_bytes / 1e6) }} MB in linear
layers. Source: <code>{{ source.spec }}</code>, sha256 <code>{{ source.digest[:16] }}</code>. llmopt {{ llmopt }}.</p>

{% if measurements %}<h2>Engine against source model</h2>
<table><tr><th>metric<th class="n">engine<th class="n">source<th class="n">change<th>text<th class="n">tokens</tr>
{% for m in measurements %}<tr><td>{{ m.metric }}<td class="n">{{ "%.5g" % m.value }}
<td class="n">{% if m.source is not none %}{{ "%.5g" % m.source }}{% endif %}
<td class="n">{% if m.source is not none %}{{ "%+.2f" % ((m.value / m.source - 1) * 100) }} %{% endif %}
<td>{{ m.data }}<td class="n">{{ m.tokens }}</tr>
{% endfor %}</table>{% endif %}

{% if gates %}<h2>Gates</h2>
<table><tr><th>gate<th class="n">measured<th></tr>
{% for g in gates %}<tr><td>{% for name, value in g.gate.items() %}{{ name }}: {{ value }}{{ ", " if not loop.last }}
{% endfor %}<td class="n">{{ "%.5g" % g.value }}<td class="{{ "accepted" if g.passed else "rejected" }}">
{{ "passed" if g.passed else "missed" }}</tr>
{% endfor %}</table>{% endif %}

<h2>Size by scheme</h2>
<table><tr><th>scheme<th class="n">layers<th class="n">MB<th></tr>
{% for s in schemes %}<tr><td>{{ s.scheme }}<td class="n">{{ s.layers }}<td class="n">{{ "%.1f" % (s.bytes / 1e6) }}
<td style="width: 20rem"><div class="bar" style="width: {{ "%.1f" % (100 * s.share) }}%"></div></tr>
{% endfor %}</table>

{% if passes %}<h2>Passes</h2>
<ol>{% for p in passes %}<li><code>{{ p.name }}</code>{% if not p.changed %} (changed nothing){% endif %}
{% for text in p.notes %}<br>{{ text }}{% endfor %}
{% for text in p.fallbacks %}<br>fallback: {{ text }}{% endfor %}</li>
{% endfor %}</ol>{% endif %}

<h2>Layers</h2>
<table><tr><th>layer<th>shape<th>scheme<th class="n">KB<th class="n">error</tr>
{% for l in layers %}<tr><td>{{ l.name }}<td>{{ l.shape | join(" x ") }}<td>{{ l.scheme }}
<td class="n">{{ "%.0f" % (l.bytes / 1e3) }}
<td class="n">{% if l.error is not none %}{{ "%.2f" % (l.error * 100) }} %{% endif %}</tr>
{% endfor %}</table>
<p>Error: relative Frobenius norm of the weight's change.</p>
</html>
"""


def write_report(manifest: Manifest, directory: Path) -> None:
    """Write ``report.json`` and ``report.html`` into a build.

    Both follow from the manifest alone, so they are as deterministic as it is. Written before the build's files are
    listed, they are listed with them.

    Args:
        manifest: Its ``files`` may still be empty.
        directory: The build.
    """
    facts = summary(manifest)
    text = json.dumps(facts, indent=1, sort_keys=True)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)
    (directory / "report.html").write_text(page.render(facts), encoding="utf-8")


def summary(manifest: Manifest) -> dict[str, Any]:
    """What the report shows, as plain data."""
    plain = manifest.model_dump(mode="json")
    kept = ("llmopt", "source", "architecture", "layers", "passes", "measurements")
    return {
        **{name: plain[name] for name in kept},
        "title": f"{manifest.architecture} model from {manifest.source.spec}",
        "status": manifest.verdict.status,
        "gates": plain["verdict"]["gates"],
        "schemes": _by_scheme(manifest.layers),
        "total_bytes": sum(layer.bytes for layer in manifest.layers),
    }


def _by_scheme(layers: list[Layer]) -> list[dict[str, Any]]:
    """Number and size of the layers of each scheme, the largest first; ``share`` is of all bytes."""
    total = sum(layer.bytes for layer in layers) or 1
    found: dict[str, list[int]] = {}
    for layer in layers:
        found.setdefault(layer.scheme, []).append(layer.bytes)
    rows = [
        {"scheme": scheme, "layers": len(sizes), "bytes": sum(sizes), "share": sum(sizes) / total}
        for scheme, sizes in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["bytes"], row["scheme"]))
