"""Charts as SVG: curves, and calibration. Colours and fonts are the page's (`page.css`)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from distill_cli.reports.markup import Markup, element, joined

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
"""Margins of the plot."""
POINTS = 300
"""Of a curve at most: more are means of neighbours."""
FEW = 10
"""Images of a bin below which its accuracy says little: no line leads there."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """From values to places."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False
    """Whether only whole numbers have ticks."""

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[float]:
        found = decades(self.low, self.high) if self.log else steps(self.low, self.high)
        return [value for value in found if value == round(value)] if self.whole else found


def curves(title: str, series: Sequence[Series], log: bool = False, unit: str = "", last: bool = True) -> Markup:
    """Curves over steps, their last values in the key; nothing where no series has a finite point.

    Args:
        log: a logarithmic axis, where all values are above 0.
        unit: stands behind the last values.
        last: whether they are said.
    """
    series = [Series(one.name, _thinned(_finite(one.points))) for one in series]
    series = [one for one in series if one.points]
    if not series:
        return Markup("")
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    log = log and min(ys) > 0 and max(ys) > 10 * min(ys)
    across = Axis(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT, whole=True)
    low, high = (min(ys), max(ys)) if log else _padded(min(ys), max(ys))
    up = Axis(low, high, HEIGHT - BOTTOM, TOP, log)
    lines = [_curve(number, one, across, up) for number, one in enumerate(series)]
    shown = [(one.name, f" {short(one.points[-1][1])}{unit}" if last else "") for one in series]
    return _figure(title, _key(shown), _frame(across, up), *lines)


def reliability(title: str, groups: Sequence[tuple[str, Sequence[tuple[int, float, float]]]]) -> Markup:
    """Accuracy over confidence by bins, the area of a point in proportion to the square root of its images.

    Args:
        groups: name, and of each bin images, accuracy and mean confidence.
    """
    side = WIDTH - LEFT - RIGHT
    across, up = Axis(0, 1, LEFT, WIDTH - RIGHT), Axis(0, 1, TOP + side, TOP)
    marks = [element("line", class_="even", x1=across(0), y1=up(0), x2=across(1), y2=up(1))]
    for number, (_, bins) in enumerate(groups):
        most = max((images for images, *_ in bins), default=0)
        full = [(images, right, sure) for images, right, sure in bins if images]
        path = " ".join(f"{across(sure)},{up(right)}" for images, right, sure in full if images >= FEW)
        marks.append(element("polyline", class_=f"curve s{number}", points=path))
        for images, right, sure in full:
            said = element("title", f"{images} images: confidence {sure:.3f}, accuracy {right:.3f}")
            radius = round(2 + 5 * math.sqrt(images / most), 1)
            dot = element("circle", class_=f"dot s{number}", cx=across(sure), cy=up(right), r=radius)
            marks.append(element("g", said, dot))
    names = [(name, "") for name, _ in groups]
    frame = _frame(across, up, "confidence", short)
    return _figure(title, _key(names), frame, *marks, height=TOP + side + BOTTOM)


def gauge(values: Sequence[float]) -> Markup:
    """Values between 0 and 100 on one line, the first in the first colour and so on, joined to show the gap."""
    across = Axis(0, 100, 5, 145)
    places = [across(min(max(value, 0), 100)) for value in values]
    marks = [element("line", class_="grid", x1=5, y1=8, x2=145, y2=8)]
    marks += [element("line", class_="gap", x1=a, y1=8, x2=b, y2=8) for a, b in pairwise(places)]
    marks += [element("circle", class_=f"dot s{n}", cx=place, cy=8, r=4) for n, place in enumerate(places)]
    return element("svg", *marks, viewBox="0 0 150 16", width=150, height=16, aria_hidden="true")


def steps(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers between two values, about as many as wanted."""
    rough = (high - low) / wanted
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten between two values, or their simple multiples where there are fewer than two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 5)
    tens = [10.0**power for power in powers[::every] if low <= 10.0**power <= high]
    if len(tens) >= 2:
        return tens
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [value for value in found if low <= value <= high] or [low, high]


def short(value: float) -> str:
    """A number in few characters."""
    if value and abs(value) < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    if abs(value) >= 1e4:
        scale, name = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k")
        return f"{value / scale:.3g}{name}"
    return f"{value:.4g}"


def _finite(points: Iterable[Point]) -> list[Point]:
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: list[Point]) -> list[Point]:
    size = math.ceil(len(points) / POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _padded(low: float, high: float) -> tuple[float, float]:
    """A range with room above and below, which does not cross 0."""
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < room else low - room), high + room


def _curve(number: int, series: Series, across: Axis, up: Axis) -> Markup:
    places = [(across(x), up(y)) for x, y in series.points]
    if len(places) == 1:
        return element("circle", class_=f"dot s{number}", cx=places[0][0], cy=places[0][1], r=3)
    return element("polyline", class_=f"curve s{number}", points=" ".join(f"{x},{y}" for x, y in places))


def _frame(across: Axis, up: Axis, under: str = "step", name: Callable[[float], str] = short) -> Markup:
    """Grid and numbers."""
    marks = []
    for value in up.ticks:
        marks.append(element("line", class_="grid", x1=across.start, x2=across.end, y1=up(value), y2=up(value)))
        marks.append(element("text", name(value), class_="end", x=across.start - 5, y=up(value) + 4))
    for value in across.ticks:
        if across(value) < across.end - 7 * len(under) - 10:
            marks.append(element("text", name(value), class_="middle", x=across(value), y=up.start + 16))
    marks.append(element("text", under, class_="end", x=across.end, y=up.start + 16))
    return joined(*marks)


def _key(names: Sequence[tuple[str, str]]) -> Markup:
    items = [
        element("span", element("i", class_=f"s{number}"), name, element("b", value))
        for number, (name, value) in enumerate(names)
    ]
    return element("span", *items, class_="key")


def _figure(title: str, key: Markup, *marks: Markup, height: int = HEIGHT) -> Markup:
    drawn = element("svg", *marks, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title)
    return element("figure", element("figcaption", element("strong", title), key), drawn)
