"""`distill report`: a run as one HTML file that needs nothing else, from what the run has written and its store.

run        what lies in a run's directory
beside     the student beside its teacher, on rows of the store
markup     HTML whose text is always escaped
charts     SVG of curves and of calibration
page       the page
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_cli.distributed import World
from distill_cli.errors import UsageError
from distill_cli.files import write_atomic
from distill_cli.report import Report
from distill_cli.reports.beside import SAMPLES, look
from distill_cli.reports.page import page
from distill_cli.reports.run import read_run

__all__ = ["REPORT", "SAMPLES", "Summary", "write_report"]

REPORT = "report.html"


@dataclass(frozen=True)
class Summary:
    status: str
    """`done`."""
    report: str
    bytes: int
    rows: int
    """Of the store, on which student and teacher were compared; 0 where they could not be."""


def write_report(
    run: Path,
    world: World,
    out: Path | None = None,
    data: str | None = None,
    stores: Sequence[str] = (),
    samples: int = SAMPLES,
    report: Report | None = None,
) -> Summary:
    """Write what there is to see of a run, finished or under way, into one file; the same run gives the same bytes.

    Args:
        world: one process.
        out: by default `report.html` in the run's directory.
        data, stores: where they lie now, if not where the run's recipe says.
        samples: rows of the store on which student and teacher are compared.

    Raises:
        UsageError: there is no run, or `out` cannot be a file.
        UsageError, MismatchError, DamagedError: `data` or `stores` were given and do not fit the run; those of the
            recipe are left out of the page instead, which says why.
    """
    report = report or Report()
    found = read_run(run)
    out = out or run / REPORT
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out}: is a folder, or lies in none; name a file in a folder that exists")
    beside = look(found, world, report, data, stores, samples)
    content = page(found, beside).encode()
    write_atomic(out, content)
    return Summary("done", str(out), len(content), len(beside.rows.kl) if beside.rows else 0)
