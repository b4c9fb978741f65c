"""The page: what is known of a run, in the order in which a person asks."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill_cli import __version__
from distill_cli.data.images import printable
from distill_cli.errors import DamagedError
from distill_cli.metrics import Compared, calibration, expected_error
from distill_cli.pictures import data_uri
from distill_cli.recipe import flat
from distill_cli.reports.beside import Beside, Example
from distill_cli.reports.charts import Series, curves, reliability
from distill_cli.reports.classes import class_name, classes
from distill_cli.reports.markup import Markup, element, joined, shortened
from distill_cli.reports.parts import note, number, section, split, tables
from distill_cli.reports.run import Run
from distill_cli.store.reader import Store

STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Whatever a name could smuggle in: nothing runs, and nothing is fetched."""
SEEN = ("agreement", "mass")
"""Of a training line, as shares of 1; beside `KNOWN`."""
KNOWN = ("step", "epoch", "lr", "loss", "grad_norm", "images_per_s", "data_wait", "memory_mb", *SEEN)
"""Of a training line; what else stands there is a part of the loss."""
PARTS = 5
"""Parts of the loss that are drawn at most."""


def page(run: Run, beside: Beside) -> str:
    """The whole file, the same for the same run."""
    name = run.path.resolve().name
    sections = (
        _head(run, name),
        _tiles(run, beside),
        _curves(run),
        classes(run, beside),
        _calibration(run, beside),
        _examples(run, beside),
        _inputs(run),
        _recipe(run),
        _lineage(run, beside),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{shortened(name, 80)} · distill"),
        element("style", Markup(STYLE.read_text())),
    )
    return f"<!doctype html>\n{element('html', head, element('body', *sections), lang='en')}\n"


def _head(run: Run, name: str) -> Markup:
    recipe = run.recipe
    state = "finished" if run.finished else f"under way, at step {run.step:,}"
    teacher = run.card.teacher if run.card else None
    learnt = f"learnt from {teacher}" if teacher else "learnt from labels" if run.card else ""
    objective = recipe.objective.name if recipe.objective else None
    said = [recipe.student.name, learnt, objective and f"objective {objective}", recipe.data.path, state]
    return joined(
        element("h1", shortened(name, 120)),
        element("p", " · ".join(shortened(str(part), 120) for part in said if part), class_="sub"),
    )


def _tiles(run: Run, beside: Beside) -> Markup:
    reached, result, rows = run.reached, run.result or {}, beside.rows
    speed = result.get("images_per_s") or (run.train[-1].get("images_per_s") if run.train else None)
    tiles = {
        "top-1": _with(reached.get("top1"), ".2f", " %"),
        "top-5": _with(reached.get("top5"), ".2f", " %"),
        "NLL": _with(reached.get("nll"), ".4f", ""),
        "calibration error": _with(reached.get("ece"), ".4f", ""),
        "agreement": rows and f"{100 * rows.agreed.mean():.2f} %",
        "KL to the teacher": rows and not _sampled(beside) and f"{rows.kl.mean():.4f}",
        "steps": f"{run.step:,}",
        "epochs": _with((run.train or run.val or [{}])[-1].get("epoch"), ".1f", ""),
        "parameters": _with(result.get("parameters_m"), ".4g", " M"),
        "images/s": _with(speed, ",.0f", ""),
        "wall time": _hours(result.get("wall_s")),
    }
    shown = [element("div", element("dt", name), element("dd", value)) for name, value in tiles.items() if value]
    return element("dl", *shown, class_="tiles")


def _curves(run: Run) -> Markup:
    def of(name: str, lines: Sequence[Mapping[str, Any]] = run.train, factor: float = 1) -> Series:
        points = [(line["step"], factor * line[name]) for line in lines if isinstance(line.get(name), int | float)]
        return Series(name, points)

    names = dict.fromkeys(name for line in run.train for name in line if name not in KNOWN)
    parts = [of(name) for name in list(names)[:PARTS]]
    measured = dict.fromkeys(name for line in run.val for name in line)
    drawn = [
        curves("Loss", [of("loss"), *(parts if len(names) > 1 else [])]),
        curves("Validation, %", [of(name, run.val) for name in measured if name.endswith(("top1", "top5"))]),
        curves("Validation NLL", [of(name, run.val) for name in measured if name.endswith("nll")]),
        curves("Beside the teacher, % of a batch", [of(name, factor=100) for name in SEEN]),
        curves("Gradient norm", [of("grad_norm")], log=True),
        curves("Learning rate", [of("lr")]),
        curves("Images/s", [of("images_per_s")]),
        curves("Waiting for the loader, %", [of("data_wait", factor=100)]),
        curves("Memory, MiB", [of("memory_mb")]),
    ]
    if not any(drawn):
        return section("Curves", note("No line of metrics has been written yet."))
    return section("Curves", element("div", *drawn, class_="charts"))


def _calibration(run: Run, beside: Beside) -> Markup:
    drawn, rows = [], beside.rows
    if run.validation and run.validation.accuracy.calibration:
        bins = run.validation.accuracy.calibration
        drawn.append(reliability("Validation", [(f"student, ECE {_ece(bins)}", bins)]))
    if rows is not None and (rows.labels >= 0).all():
        models = [("student", rows.student, rows.student_prob)]
        if not _sampled(beside):
            models.append(("teacher", rows.teacher, rows.teacher_prob))
        both = [(name, calibration(prob[:, 0], best[:, 0] == rows.labels)) for name, best, prob in models]
        told = [(f"{name}, ECE {_ece(bins)}", bins) for name, bins in both]
        drawn.append(reliability(f"{split(beside).capitalize()} images, view 0", told))
    if not drawn:
        return Markup("")
    about = "How often a model is right when it is so sure; below the line it is surer than right."
    return section("Reliability", element("p", about, class_="about"), element("div", *drawn, class_="charts"))


def _examples(run: Run, beside: Beside) -> Markup:
    rows = beside.rows
    if rows is None:
        return section("Largest disagreements", note(beside.note))
    what = "KL and the entropy that sampled rows lack" if _sampled(beside) else "KL(teacher ‖ student) in nats"
    about = (
        f"Of {len(rows.kl):,} {split(beside)} images with rows in the store, by {what}. "
        "Left the image, right what the student saw: view 0, the teacher's own crop and augmentation."
    )
    measure = "KL + entropy" if _sampled(beside) else "KL"
    shown = [_example(run, rows, example, measure) for example in beside.examples]
    return section(
        "Largest disagreements", element("p", about, class_="about"), element("div", *shown, class_="examples")
    )


def _example(run: Run, rows: Compared, example: Example, measure: str) -> Markup:
    row, label = example.row, int(rows.labels[example.row])
    pair = [
        element("img", src=uri, alt=alt, class_="small" if "image/png" in uri else "")
        for uri, alt in ((example.image, "the image"), (example.seen, "as the student saw it"))
    ]
    lines = [element("tr", element("th", "teacher"), element("th", ""), element("th", "student"), element("th", ""))]
    teacher, student = (
        _best(rows.teacher[row], rows.teacher_prob[row]),
        _best(rows.student[row], rows.student_prob[row]),
    )
    for place in range(max(len(teacher), len(student))):
        cells = []
        for best in (teacher, student):
            chosen, prob = best[place] if place < len(best) else (None, None)
            mark = "right" if chosen is not None and chosen == label else ""
            cells.append(element("td", "" if chosen is None else class_name(run, chosen), class_=mark))
            cells.append(number(None if prob is None else 100 * prob, blank=""))
        lines.append(element("tr", *cells))
    truth = f"label {class_name(run, label)}, " if label >= 0 else ""
    return element(
        "figure",
        element("div", *pair, class_="pair"),
        element(
            "figcaption",
            element("span", shortened(printable(example.key), 60), class_="mono"),
            element("div", f"{truth}{measure} {rows.kl[row]:.3f}", class_="faint"),
        ),
        element("table", *lines),
    )


def _inputs(run: Run) -> Markup:
    if run.inputs is None:
        return Markup("")
    try:
        with Image.open(run.inputs) as image:
            uri = data_uri(image.convert("RGB"), 1024)
    except Exception as error:  # What a parser meets in other people's bytes has no list.
        raise DamagedError(f"{run.inputs}: cannot be decoded; delete it") from error
    picture = element("img", src=uri, alt="the first inputs", class_=f"sheet{' small' if 'image/png' in uri else ''}")
    about = "The first inputs of the first step, as the student saw them."
    return section("Inputs", element("p", about, class_="about"), picture)


def _recipe(run: Run) -> Markup:
    found: dict[str, dict[str, Any]] = {}
    for path, value in flat(run.recipe).items():
        table, _, key = path.partition(".")
        if value is not None:
            found.setdefault(table, {})[key] = value
    about = "As it was resolved; recipe.toml in the run's directory says the same."
    return section("Recipe", element("p", about, class_="about"), tables(found))


def _lineage(run: Run, beside: Beside) -> Markup:
    found: dict[str, dict[str, Any]] = {}
    if run.card:
        card = run.card
        names = (
            *("student", "num_classes", "objective", "teacher", "store", "averaging", "init_from", "ema_decay"),
            *("data_fingerprint", "recipe_sha256"),
        )
        found["student.safetensors"] = {name: getattr(card, name) for name in names} | {
            f"input {name}": value for name, value in card.input.items()
        }
        found["software of the run"] = dict(card.software or {})
    for place, store in enumerate(beside.store.stores if beside.store else (), 1):
        name = "store" if place == 1 else f"store {place}"
        found[name] = _of_store(store)
        found[f"software of the {name}"] = dict(store.plan.software)
    found["this page"] = {"distill": __version__}
    return section("Lineage", tables(found))


def _of_store(store: Store) -> dict[str, Any]:
    plan = store.plan
    return {
        "id": store.id,
        "path": str(store),
        "teacher": plan.teacher.get("name"),
        "teacher's weights": plan.teacher.get("weights_sha256"),
        "samples": plan.samples,
        "views": store.views,
        "top_k": plan.top_k,
        "codec": plan.codec,
        "seed": plan.seed,
        "teacher's top-1": store.manifests[0].top1,
    }


def _best(classes: np.ndarray, probs: np.ndarray) -> list[tuple[int, float]]:
    return [(int(i), float(prob)) for i, prob in zip(classes, probs, strict=True) if prob > 0]


def _ece(bins: Sequence[tuple[int, float, float]]) -> str:
    return _with(expected_error(bins), ".4f", "") or "–"


def _sampled(beside: Beside) -> bool:
    return beside.store is not None and any(store.sampled for store in beside.store.stores)


def _with(value: object, form: str, unit: str) -> str | None:
    return f"{value:{form}}{unit}" if isinstance(value, int | float) else None


def _hours(seconds: object) -> str | None:
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return None
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
