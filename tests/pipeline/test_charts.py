"""Charts are small, labelled and deterministic."""

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest

from pipeline.charts import Bar, Series, forest, labels, lines, swatch, ticks


@pytest.mark.parametrize(("lo", "hi"), [(0, 1), (1.3, 4.2), (-0.02, 0.03), (0, 1e5), (2.4, 2.41)])
def test_ticks_are_round_few_and_inside(lo: float, hi: float) -> None:
    found = ticks(lo, hi)
    assert 2 <= len(found) <= 6
    assert all(lo - 1e-9 <= v <= hi + 1e-9 for v in found)
    steps = {round(b - a, 9) for a, b in itertools.pairwise(found)}
    assert len(steps) == 1
    mantissa = steps.pop() / 10 ** math.floor(math.log10(found[1] - found[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-6


def test_ticks_of_one_axis_have_equal_decimals() -> None:
    assert labels([0.7, 0.725, 0.75]) == ["0.700", "0.725", "0.750"]
    assert labels([-5.0, 0.0]) == ["−5", "0"]


def test_line_chart_holds_every_point_and_whisker() -> None:
    series = [Series("kl <b>", 0, [(1, 1.5), (2, 2.0)], [(1.4, 1.6), (math.nan, math.nan)])]
    root = ET.fromstring(lines("T = 1", series, x="γ", y="τ", whole_x=True))
    assert root.get("role") == "img"
    assert "kl <b>" in str(root.get("aria-label"))
    assert len(root.findall(".//circle")) == 2
    assert len([e for e in root.iter("path") if e.get("class") == "thin"]) == 1
    points = " ".join(str(e.get("points")) for e in root.iter("polyline"))
    numbers = [float(v) for v in re.findall(r"[\d.]+", points)]
    assert min(numbers) >= 0
    assert max(numbers) <= 280


def test_forest_draws_both_intervals_and_zero() -> None:
    bars = [
        Bar("lm · tv", 3, 3.8, (3.4, 4.2), (2.0, 5.6)),
        Bar("lm_wide · tv", 3, 1.0, (-1, 3), None),
    ]
    root = ET.fromstring(forest("T = 1", bars, x="%"))
    kinds = [e.get("class") for e in root.iter("path")]
    assert kinds.count("thick") == 2
    assert kinds.count("thin") == 1
    assert kinds.count("axis") == 1
    assert "lm · tv +3.80, from +2.00 to +5.60" in str(root.get("aria-label"))


def test_nothing_to_draw_is_no_chart() -> None:
    assert lines("t", [], x="x", y="y") == ""
    assert forest("t", [], x="x") == ""


def test_every_style_has_its_own_marker() -> None:
    shapes = [re.sub(r's\d"', "", swatch(k)) for k in range(8)]
    assert len(set(shapes)) == 8
