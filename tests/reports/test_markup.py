from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from distill_cli.reports.markup import element, joined, shortened


class Tags(HTMLParser):
    """The tags, attributes and texts of some markup, as a browser would take it."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[str | None] = []
        self.texts: list[str] = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]).filter(str.isprintable)))
def test_any_text_is_text_and_no_markup(text: str) -> None:
    found = Tags(element("p", element("b", text), text, title=text))
    assert found.tags == ["p", "b"]
    assert found.values == [text]
    assert "".join(found.texts) == 2 * text


def test_markup_stands_as_it_is_and_text_beside_it_does_not() -> None:
    assert joined(element("i", "<"), "<") == "<i>&lt;</i>&lt;"


def test_attributes_are_spelt_as_in_html() -> None:
    assert element("line", class_="grid", stroke_width=2) == '<line class="grid" stroke-width="2"/>'


def test_what_no_terminal_shows_and_what_turns_text_around_is_spelt_out() -> None:
    assert element("b", "a\x1b\n\u202e\udcff") == r"<b>a\x1b\n\u202e\udcff</b>"


def test_long_texts_keep_their_ends() -> None:
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("abcdefghi", 4) == "ab … hi"
