"""HTML and SVG as text that is escaped unless it is markup already: names of files and classes are anybody's."""

import html

from distill_cli.data.images import printable


class Markup(str):
    """Markup that stands as it is; made by `element` and `joined` only."""

    __slots__ = ()


EMPTY = ("img", "meta", "line", "polyline", "rect", "circle", "path")
"""Elements without content."""


def element(name: str, /, *content: str, **attributes: object) -> Markup:
    """`<name attribute="value">content</name>`, escaped; `class_` is `class`, and `stroke_width` is `stroke-width`."""
    said = "".join(f' {key.strip("_").replace("_", "-")}="{escaped(value)}"' for key, value in attributes.items())
    if name in EMPTY:
        return Markup(f"<{name}{said}/>")
    return Markup(f"<{name}{said}>{joined(*content)}</{name}>")


def joined(*content: str) -> Markup:
    """Some content, each piece escaped unless it is markup."""
    return Markup("".join(piece if isinstance(piece, Markup) else escaped(piece) for piece in content))


def escaped(value: object) -> str:
    """Text that cannot be markup: on one line, control and direction characters spelt out."""
    return html.escape(printable(value))


def shortened(text: str, most: int) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
