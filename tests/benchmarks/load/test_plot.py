import math
from xml.etree import ElementTree as ET

from llmopt.benchmarks.load.plot import Line, Panel, plot

SVG = "{http://www.w3.org/2000/svg}"


def dots(text: str, radius: str = "4") -> list[tuple[float, float]]:
    """Those of medians, in the order they are drawn."""
    found = ET.fromstring(text).iter(f"{SVG}circle")
    return [(float(each.attrib["cx"]), float(each.attrib["cy"])) for each in found if each.attrib["r"] == radius]


def test_more_load_lies_to_the_right_and_longer_waiting_above():
    line = Line("ours <1>", (0.2, 0.8), (10.0, 400.0), (20.0, 4000.0))
    text = plot("Latency <of> servers", [Panel("first token", [line])])
    low, high = dots(text)
    assert low[0] < high[0]
    assert low[1] > high[1]
    assert dots(text, "3")[0][1] < low[1], "p99 lies above the median"


def test_panels_lie_beside_each_other():
    line = Line("one", (0.2, 0.8), (10.0, 20.0), (10.0, 20.0))
    found = dots(plot("title", [Panel("first token", [line]), Panel("next token", [line])]))
    assert max(x for x, _ in found[:2]) < min(x for x, _ in found[2:])


def test_there_is_no_dot_where_there_was_no_answer_in_time():
    line = Line("one", (0.2, 0.5, 0.8), (10.0, 20.0, math.inf), (math.inf,) * 3)
    text = plot("title", [Panel("first token", [line])])
    assert len(dots(text)) == 2
    assert dots(text, "3") == []
    assert "inf" not in text


def test_every_server_has_a_colour_of_its_own_in_the_legend():
    lines = [Line(f"server {number}", (0.2,), (10.0,), (10.0,)) for number in range(3)]
    legend = list(ET.fromstring(plot("title", [Panel("a", lines)])).iter(f"{SVG}circle"))
    assert len({each.attrib["fill"] for each in legend if each.attrib["r"] == "5"}) == 3


def test_a_comparison_in_which_nothing_was_measured_is_still_a_picture():
    ET.fromstring(plot("title", []))
    ET.fromstring(plot("title", [Panel("first token", [])]))
