"""Options that several commands share, and how they become recipe values."""

from pathlib import Path
from typing import Annotated, Any

import typer

from distill_cli.errors import UsageError
from distill_cli.shipped import recipes
from distill_cli.students.aliases import ALIASES


def _complete_recipe(incomplete: str) -> list[str]:
    return [name for name in recipes() if name.startswith(incomplete)]


def _complete_model(incomplete: str) -> list[str]:
    return [name for name in ALIASES if name.startswith(incomplete)]


RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", metavar="NAME|PATH", help="A shipped recipe or a TOML file.", autocompletion=_complete_recipe
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set any recipe value; repeatable, after the recipe."),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="A folder, list, HDF5 or IDX of images; `wds:TARS`, `hf:DIR`, `timm:NAME`, or `sample`.",
    ),
]
Cache = Annotated[
    str | None,
    typer.Option("--cache", metavar="DIR", help="Keep decoded images there, for data that is read many times."),
]
Student = Annotated[
    str | None,
    typer.Option("--student", metavar="NAME", help="An alias or any timm name.", autocompletion=_complete_model),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher", metavar="RUN|NAME", help="A finished run, or a timm name.", autocompletion=_complete_model
    ),
]
TeacherWeights = Annotated[
    str | None, typer.Option("--teacher-weights", metavar="FILE", help="safetensors or torch checkpoint.")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Take timm's own weights.")]
Shards = Annotated[
    str | None, typer.Option("--shards", metavar="A:B", help="Write only these, counted from 0 through all views.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME", help="Instead of a run: an alias or timm name.", autocompletion=_complete_model
    ),
]
StorePaths = Annotated[
    list[str] | None,
    typer.Option("--store", metavar="STORE", help="A store of teacher logits: a directory or a URL; repeatable."),
]
Trust = Annotated[bool, typer.Option("--trust", help="Read the store without looking at its checksums.")]
StoreOut = Annotated[Path, typer.Option("--out", metavar="STORE", help="The store's directory.", show_default=False)]
ImageSize = Annotated[int | None, typer.Option("--image-size", metavar="PX", help="Side of the model's input.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", metavar="N", help="Images, over all ranks.")]
ViewsPerRead = Annotated[
    int | None, typer.Option("--views-per-read", metavar="N", help="Views of an image each time it is decoded.")
]
Decode = Annotated[
    str | None,
    typer.Option("--decode", metavar="full|reduced|torch|cuda", help="How images are decoded for their views."),
]
Workers = Annotated[int | None, typer.Option("--workers", metavar="N", help="Loader processes; 0 for none.")]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
Gpus = Annotated[
    int | None, typer.Option("--gpus", metavar="N", help="Run as N ranks on this machine; torchrun works as well.")
]
Precision = Annotated[str | None, typer.Option("--precision", metavar="fp32|bf16", help="Of the forward pass.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Of all that is drawn.")]
SkipUnreadable = Annotated[bool, typer.Option("--skip-unreadable", help="Go on without images that do not decode.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Resolve, open, measure a little, print; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


def flags(*given: tuple[str, str, Any]) -> dict[str, tuple[str, Any]]:
    """(flag, recipe path, value) of the flags that were given, as `recipe.load` takes them."""
    # What typer gives where there is none: None, False, or of a repeatable one an empty list.
    return {path: (flag, value) for flag, path, value in given if not (value is None or value is False or value == [])}


def part(shards: str | None) -> tuple[int, int] | None:
    """`--shards A:B` as two numbers.

    Raises:
        UsageError: it is not of this form.
    """
    if shards is None:
        return None
    start, colon, stop = shards.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        raise UsageError(f"--shards {shards}: not of the form A:B, as in 0:10")
    return int(start), int(stop)
