"""What sections of the page are made of."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distill_cli.reports.beside import Beside
from distill_cli.reports.markup import Markup, element, joined, shortened


def section(title: str, *content: str) -> Markup:
    return joined(element("h2", title), *content)


def note(text: str | None) -> Markup:
    return element("p", shortened(text, 600), class_="note") if text else Markup("")


def table(head: Iterable[str], lines: Sequence[Markup]) -> Markup:
    numbers = ("validation", "images", "student", "teacher", "gap")
    cells = [element("th", name, class_="number" if name in numbers else "") for name in head]
    table = element("table", element("thead", element("tr", *cells)), element("tbody", *lines))
    return element("div", table, class_="scroll")


def tables(tables: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Names and values, section by section."""
    shown = []
    for title, values in tables.items():
        lines = [
            element("tr", element("td", name), element("td", shortened(text(value), 300), class_="mono"))
            for name, value in values.items()
            if value is not None
        ]
        shown.append(element("section", element("h3", title), element("table", *lines)))
    return element("div", *shown, class_="values")


def number(value: float | None, form: str = ".1f", blank: str = "–") -> Markup:
    return element("td", blank if value is None else format(value, form), class_="number")


def split(beside: Beside) -> str:
    return {"train": "training", "val": "validation"}.get(beside.split, "")


def text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)
