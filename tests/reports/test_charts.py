import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_cli.reports.charts import HEIGHT, POINTS, WIDTH, Series, curves, decades, gauge, reliability, short, steps

finite = st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-9)


def places(markup: str) -> list[tuple[float, float]]:
    """Of the points of all curves."""
    found = re.findall(r'points="([^"]*)"', markup)
    return [(float(x), float(y)) for points in found for x, y in (pair.split(",") for pair in points.split())]


@given(st.lists(st.tuples(st.integers(0, 10**7), finite), min_size=2, max_size=50), st.booleans())
def test_every_point_lies_in_the_picture(points: list[tuple[float, float]], log: bool) -> None:
    found = places(curves("Loss", [Series("loss", sorted(points))], log=log))
    assert found
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in found)


def test_a_larger_value_is_higher_and_a_later_step_further_right() -> None:
    (x0, y0), (x1, y1), (x2, y2) = places(curves("Loss", [Series("loss", [(1, 5.0), (2, 9.0), (3, 7.0)])]))
    assert x0 < x1 < x2
    assert y1 < y2 < y0


def test_a_long_curve_has_the_means_of_its_neighbours() -> None:
    found = places(curves("Loss", [Series("loss", [(step, step % 2) for step in range(100 * POINTS)])]))
    assert POINTS / 2 <= len(found) <= POINTS
    assert len({y for _, y in found}) == 1


def test_what_is_not_finite_is_left_out() -> None:
    points = [(1, math.nan), (2, math.inf), (3, 1.0), (4, 2.0)]
    assert len(places(curves("Loss", [Series("loss", points)]))) == 2


def test_without_points_there_is_no_chart() -> None:
    assert curves("Loss", [Series("loss", [(1, math.nan)]), Series("label", [])]) == ""


def test_one_point_is_a_dot() -> None:
    assert "<circle" in curves("Loss", [Series("loss", [(1, 2.0)])])


def test_steps_are_whole_numbers() -> None:
    markup = curves("Loss", [Series("loss", [(40, 2.0), (41, 1.0)])])
    assert re.findall(r'class="middle"[^>]*>([^<]*)<', markup) == ["40"]


def test_the_key_has_the_last_values() -> None:
    assert "<b> 1.25</b>" in curves("Loss", [Series("loss", [(1, 2.0), (2, 1.25)])])


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0.13, 9.7, [2.5, 5, 7.5]),
        (-3, 3, [-2, 0, 2]),
        (800, 897, [800, 825, 850, 875]),
    ],
)
def test_ticks_are_round(low: float, high: float, found: list[float]) -> None:
    assert steps(low, high) == pytest.approx(found)


def test_ticks_of_a_logarithm_are_powers_or_simple_multiples() -> None:
    assert decades(0.5, 2000) == [1, 10, 100, 1000]
    assert decades(1.5, 7) == [2, 5]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.00025, "2.5e-4"), (-1e-5, "-1e-5"), (0.25, "0.25"), (12345, "12.3k"), (3.2e6, "3.2M")],
)
def test_numbers_are_short(value: float, said: str) -> None:
    assert short(value) == said


def test_calibration_is_on_the_line_where_a_model_is_right_as_often_as_it_is_sure() -> None:
    bins = [(100, 0.25, 0.25), (0, 0.0, 0.0), (400, 0.75, 0.75)]
    markup = reliability("Validation", [("student", bins)])
    radii = [float(r) for r in re.findall(r' r="([^"]*)"', markup)]
    (x0, y0), (x1, y1) = places(markup)
    assert (x1 - x0) == pytest.approx(y0 - y1, abs=0.2)
    assert radii == [4.5, 7.0]
    assert "400 images: confidence 0.750, accuracy 0.750" in markup


def test_no_line_leads_to_a_bin_of_few_images() -> None:
    markup = reliability("Validation", [("student", [(100, 0.3, 0.2), (1, 1.0, 0.5)])])
    assert len(places(markup)) == 1
    assert markup.count("<circle") == 2


def test_a_gauge_keeps_to_its_ends() -> None:
    assert re.findall(r'cx="([^"]*)"', gauge([-5.0, 50.0, 110.0])) == ["5.0", "75.0", "145.0"]
