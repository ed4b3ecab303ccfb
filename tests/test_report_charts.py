"""Charts of the report."""

from __future__ import annotations

import math
import re

from hypothesis import given
from hypothesis import strategies as st

from underdrawing.report.charts import HEIGHT, WIDTH, Series, bars, line_chart


def test_nothing_to_draw_draws_nothing() -> None:
    assert line_chart([Series("x", [0, 1], [None, math.nan])]) == ""


def test_a_higher_value_stands_higher() -> None:
    svg = line_chart([Series("x", [0, 1], [0.0, 1.0])])
    (first, second) = re.findall(r"[ML]([\d.]+) ([\d.]+)", svg)
    assert float(first[1]) > float(second[1])  # SVG's y runs downwards
    assert float(first[0]) < float(second[0])


def test_bars_are_as_long_as_their_values() -> None:
    svg = bars({"colors": 0.5}, {"colors": 1.0})
    full = WIDTH - 178
    assert f'width="{full / 2:.1f}" height="9" class="before"' in svg
    assert f'width="{full:.1f}" height="9" class="after"' in svg


VALUES = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True, width=32))


@given(st.lists(VALUES, min_size=1, max_size=40))
def test_every_point_stays_on_the_chart(values: list[float | None]) -> None:
    svg = line_chart([Series("x", list(range(len(values))), values)])
    for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", svg):
        assert -1 <= float(x) <= WIDTH + 1
        assert -1 <= float(y) <= HEIGHT + 1
