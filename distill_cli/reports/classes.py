"""Top-1 by class: of the student on the validation images, of student and teacher on the same rows of the store."""

from collections.abc import Mapping

import numpy as np

from distill_cli.data.images import printable
from distill_cli.metrics import Compared
from distill_cli.reports.beside import Beside
from distill_cli.reports.charts import gauge
from distill_cli.reports.markup import Markup, element, shortened
from distill_cli.reports.parts import note, number, section, split, table
from distill_cli.reports.run import Run

CLASSES = 40
"""Classes that the table shows at most: the worst and the best."""
TITLE = "Classes"


def classes(run: Run, beside: Beside) -> Markup:
    """The section: a table, the class where the student is furthest behind its teacher first."""
    own = _own(run)
    both = {} if beside.rows is None else by_class(beside.rows)
    if not own and not both:
        return section(TITLE, note(beside.note or "There are no labelled images to tell classes by."))
    order = sorted({*own, *both}, key=lambda i: _gap(both, i) if both else own[i])
    left_out = len(order) - CLASSES
    if left_out > 0:
        order = [*order[: CLASSES // 2], *order[-CLASSES // 2 :]]
    head = ["class", *(["validation"] if own else []), *(["images", "student", "teacher", "gap"] if both else []), ""]
    lines = [element("tr", element("td", class_name(run, i), class_="name"), *_cells(own, both, i)) for i in order]
    about = element("p", _about(run, beside, own, both, left_out), class_="about")
    return section(TITLE, about, _key(bool(both)), table(head, lines))


def class_name(run: Run, class_id: int) -> str:
    """A class by its name, or by its number."""
    names = run.classes
    return shortened(printable(names[class_id]), 60) if names and 0 <= class_id < len(names) else str(class_id)


def by_class(rows: Compared) -> dict[int, tuple[int, float, float]]:
    """Of each class that has labelled rows: how many, and top-1 of student and teacher in percent."""
    found = {}
    for class_id in np.unique(rows.labels[rows.labels >= 0]).tolist():
        mine = rows.labels == class_id
        student, teacher = (100 * float((best[mine, 0] == class_id).mean()) for best in (rows.student, rows.teacher))
        found[class_id] = int(mine.sum()), student, teacher
    return found


def _own(run: Run) -> dict[int, float]:
    """Top-1 of the student on the validation images, in percent."""
    if run.validation is None:
        return {}
    return {i: value for i, value in enumerate(run.validation.accuracy.per_class) if value is not None}


def _gap(both: Mapping[int, tuple[int, float, float]], class_id: int) -> float:
    _, student, teacher = both.get(class_id, (0, 0.0, 0.0))
    return student - teacher


def _cells(own: Mapping[int, float], both: Mapping[int, tuple[int, float, float]], class_id: int) -> list[Markup]:
    cells = [number(own.get(class_id))] if own else []
    if not both:
        return [*cells, element("td", gauge([own[class_id]]))]
    if class_id not in both:
        return [*cells, *[number(None)] * 4, element("td")]
    images, student, teacher = both[class_id]
    cells += [number(images, "d"), number(student), number(teacher), number(student - teacher, "+.1f")]
    return [*cells, element("td", gauge([student, teacher]))]


def _about(
    run: Run,
    beside: Beside,
    own: Mapping[int, float],
    both: Mapping[int, tuple[int, float, float]],
    left_out: int,
) -> str:
    said = ["Top-1 in percent."]
    if own and run.validation:
        at = "" if run.finished else f" at step {run.validation.step:,}"
        said.append(f"Validation: the student on all {run.validation.accuracy.images:,} images{at}.")
    if both:
        images = sum(count for count, *_ in both.values())
        said.append(
            f"Student and teacher: {images:,} {split(beside)} images with rows in the store, both on view 0, as it was "
            "augmented for the teacher."
        )
    said.append("Sorted by student less teacher." if both else "Sorted by top-1.")
    said.append(f"{left_out} classes between are left out." if left_out > 0 else "")
    return " ".join(said)


def _key(teacher: bool) -> Markup:
    names = ["student", *(["teacher"] if teacher else [])]
    items = [element("span", element("i", class_=f"s{n}"), name) for n, name in enumerate(names)]
    return element("p", element("span", *items, class_="key"))
