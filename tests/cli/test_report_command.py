"""`distill report`, on a run whose classes, files and folders have names that would be markup."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, browser
from command_line import DISTIL, TRAIN, Cli, Made, Refused, capture
from PIL import Image

from distill_cli.data.idx import open_sample

CLASSES = ("<img src=x onerror=window.hurt=1>", "<script>window.hurt=1<", "coat\u202e")
FILE = '"><img src=x onerror=window.hurt=1>{number:02d}.png'
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def told(distill: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its store and data, all below one folder; not to be written to."""
    root = tmp_path_factory.mktemp("told")
    data = root / "<b onclick=window.hurt=1>"
    for split, count in (("train", 8), ("val", 4)):
        source = open_sample(split)
        assert source.labels is not None
        for label, name in enumerate(CLASSES):
            (data / split / name).mkdir(parents=True)
            for number, index in enumerate(np.flatnonzero(source.labels == label)[:count]):
                source.read(int(index)).save(data / split / name / FILE.format(number=number))
    commands = (
        ("train", *TRAIN, "--data", data, "--out", root / "teacher"),
        capture(root / "teacher", data, root / "store"),
        ("train", *DISTIL, "--seed", "1", "--store", root / "store", "--data", data, "--out", root / "<i>run"),
    )
    for command in commands:
        result = distill(*command, "--quiet")
        assert result.code == 0, result
    return root / "<i>run"


@pytest.fixture(scope="module")
def written(told: Path, distill: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its page."""
    out = tmp_path_factory.mktemp("written") / "page.html"
    result = distill("report", told, "--out", out, "--workers", "0", "--json")
    assert result.code == 0, result
    assert result.json == {"status": "done", "report": str(out), "bytes": out.stat().st_size, "rows": 24}
    return out


def test_names_are_text_and_the_page_asks_for_nothing(written: Path) -> None:
    text = written.read_text()
    assert "&lt;img src=x onerror=window.hurt=1&gt;" in text
    assert "&lt;script&gt;window.hurt=1&lt;" in text
    assert r"coat\u202e" in text
    assert not re.search(r"<script|<b onclick|<i>run|src=x[^&]*>", text)
    addresses = re.findall(r'(?:src|href|action|data)="([^"]*)"', text)
    assert len(addresses) >= 2
    assert all(address.startswith("data:image/") for address in addresses)
    assert "url(" not in text
    assert "@import" not in text


def test_it_has_what_was_measured(written: Path, told: Path) -> None:
    text = written.read_text()
    result = json.loads((told / "result.json").read_text())
    assert f"<dd>{result['top1']:.2f} %</dd>" in text
    for title in ("Curves", "Classes", "Reliability", "Largest disagreements", "Inputs", "Recipe", "Lineage"):
        assert f"<h2>{title}</h2>" in text
    assert "24 training images with rows in the store" in text
    store_id = json.loads((told.parent / "store" / "manifest.json").read_text())
    assert store_id["plan_sha256"] in text


def test_the_largest_disagreements_come_first(written: Path) -> None:
    found = [float(value) for value in re.findall(r"KL (\d+\.\d+)</div>", written.read_text())]
    assert len(found) == 24
    assert found == sorted(found, reverse=True)
    assert found[0] > 0


def test_the_same_run_gives_the_same_bytes_in_place_of_the_last(told: Path, written: Path, distill: Cli) -> None:
    before, leftover = written.read_bytes(), [path.name for path in written.parent.iterdir()]
    assert distill("report", told, "--out", written, "--workers", "0", "--quiet").code == 0
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == leftover


def test_the_page_lies_in_the_run_unless_told_otherwise(run: Made, tmp_path: Path, distill: Cli) -> None:
    copy = Path(shutil.copytree(run.path, tmp_path / "run"))
    result = distill("report", copy, "--workers", "0")
    assert result.code == 0
    assert "was trained without a store" in (copy / "report.html").read_text()
    assert result.out.split()[:4] == ["status", "done", "report", str(copy / "report.html")]


def test_a_run_under_way_has_a_page_of_what_there_is(told: Path, tmp_path: Path, distill: Cli) -> None:
    copy = Path(shutil.copytree(told, tmp_path / "run"))
    for name in ("result.json", "student.safetensors", "validation.json"):
        (copy / name).unlink()
    assert distill("report", copy, "--workers", "0", "--quiet").code == 0
    text = (copy / "report.html").read_text()
    assert "under way, at step 2" in text
    assert "compared when it is finished" in text
    assert "Learning rate" in text


def test_data_that_was_moved_is_a_note_and_can_be_given(told: Path, tmp_path: Path, distill: Cli) -> None:
    moved = Path(shutil.copytree(told.parent, tmp_path / "moved"))
    copy, data = moved / told.name, moved / "<b onclick=window.hurt=1>"
    recipe = copy / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(told.parent), str(tmp_path / "nowhere")))
    result = distill("report", copy, "--workers", "0", "--json")
    assert (result.code, result.json["rows"]) == (0, 0)
    assert "warning: student and teacher are not compared: " in result.err
    assert "could not be compared" in (copy / "report.html").read_text()
    given = ("--data", data, "--store", moved / "store")
    assert distill("report", copy, *given, "--workers", "0", "--json").json["rows"] == 24


def test_fewer_rows_can_be_compared(told: Path, tmp_path: Path, distill: Cli) -> None:
    out = ("--out", tmp_path / "page.html", "--workers", "0", "--json")
    assert distill("report", told, "--samples", "5", *out).json["rows"] == 5


def test_what_is_no_run_is_refused(tmp_path: Path, run: Made, refused: Refused) -> None:
    missing = tmp_path / "missing"
    assert refused(2, "report", missing) == f"{missing}: no such run directory; give one that distill train writes"
    line = f"{tmp_path}: is not a run, as it has no recipe.toml; give a directory that distill train writes"
    assert refused(2, "report", tmp_path) == line
    line = f"--out {tmp_path}: is a folder, or lies in none; name a file in a folder that exists"
    assert refused(2, "report", run.path, "--out", tmp_path) == line
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_given_and_does_not_fit_is_refused(
    told: Path, folder: Path, tmp_path: Path, refused: Refused
) -> None:
    out = ("--out", tmp_path / "page.html", "--workers", "0")
    assert "class 0 is" in refused(3, "report", told, "--data", folder, *out)
    assert "no such folder or file" in refused(2, "report", told, "--data", tmp_path / "nowhere", *out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["result.json", "validation.json", "metrics.jsonl"])
def test_a_damaged_file_of_the_run_is_named(name: str, run: Made, tmp_path: Path, refused: Refused) -> None:
    copy = Path(shutil.copytree(run.path, tmp_path / "run"))
    (copy / name).write_text("[NaN, {]\n")
    assert refused(4, "report", copy).startswith(f"{copy / name}: ")
    assert not (copy / "report.html").exists()


@needs_browser
def test_a_browser_shows_it_without_network_complaint_or_harm(written: Path, tmp_path: Path) -> None:
    shots: dict[tuple[int, bool], Image.Image] = {}
    with browser(tmp_path / "profile") as tab:
        for width, dark in ((1200, False), (1200, True), (400, False)):
            tab.open(written, width, dark=dark)
            shots[width, dark] = tab.screenshot()
            assert tab.value("document.documentElement.scrollWidth") <= width
            assert tab.value("typeof window.hurt") == "undefined"
            assert tab.value("[...document.images].every(image => image.naturalWidth > 0)")
            assert tab.value("document.images.length") == 49
            assert tab.value("document.title") == r"<i>run · distill"
        assert tab.complaints == []
        assert set(tab.asked_for) == {written.resolve().as_uri()}
    for (width, dark), shot in shots.items():
        assert shot.width == width
        assert shot.height > 2000
        colours = shot.getcolors(maxcolors=2**24)
        assert colours is not None
        assert len(colours) > 100
        most, paper = max(colours)
        assert most < 0.95 * shot.width * shot.height
        assert (sum(paper) < 3 * 64) == dark


@needs_browser
def test_the_browser_would_have_told_of_a_page_that_does_harm(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img src="http://example.invalid/a.png"><script>window.hurt=1; console.error("no")</script>')
    with browser(tmp_path / "profile") as tab:
        tab.open(page, 400)
        assert tab.value("window.hurt") == 1
        assert tab.complaints
        assert "http://example.invalid/a.png" in tab.asked_for
