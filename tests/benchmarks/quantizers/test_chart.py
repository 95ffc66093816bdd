from itertools import pairwise
from xml.etree import ElementTree as ET

from llmopt.benchmarks.quantizers.chart import Point, plot

SVG = "{http://www.w3.org/2000/svg}"


def circles(text: str) -> list[tuple[float, float]]:
    return [(float(each.attrib["cx"]), float(each.attrib["cy"])) for each in ET.fromstring(text).iter(f"{SVG}circle")]


def test_more_bits_lie_to_the_right_and_more_loss_above() -> None:
    points = [Point("a", "one", 4.5, 0.3), Point("b", "two", 8.5, 0.001)]
    (lossy, small) = circles(plot("KL <against> size", points))
    assert lossy[0] < small[0]
    assert lossy[1] < small[1]


def test_labels_of_points_in_one_place_do_not_lie_on_one_another() -> None:
    text = plot("title", [Point(f"row {number}", "one", 4.5, 0.1) for number in range(5)])
    labels = [each for each in ET.fromstring(text).iter(f"{SVG}text") if (each.text or "").startswith("row")]
    heights = sorted(float(each.attrib["y"]) for each in labels)
    assert len(heights) == 5
    assert min(b - a for a, b in pairwise(heights)) >= 15


def test_a_comparison_in_which_nothing_ran_is_still_a_picture() -> None:
    assert circles(plot("title", [])) == []
