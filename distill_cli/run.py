"""A run's directory: whose it is, whether it is finished, and what was said in each attempt.

RUN/recipe.toml  metrics.jsonl  validation.json  images/  tb/  log/  checkpoints/  student.safetensors
    result.json   <- last: finished
"""

import json
from pathlib import Path
from typing import Any

from distill_cli.checkpoint import RECIPE, RESULT
from distill_cli.data import absolute
from distill_cli.errors import MismatchError
from distill_cli.experiment import Experiment
from distill_cli.files import canonical_json, write_atomic
from distill_cli.recipe import Recipe, differences, to_toml, update
from distill_cli.recipe import load as load_recipe

LOG = "log"
"""The folder of what was said, a file an attempt."""


def begin(out: Path, setup: Experiment) -> None:
    """Write the recipe, the first file of a run."""
    write_atomic(out / RECIPE, to_toml(_with_absolute_paths(setup.recipe)))


def finished(out: Path, setup: Experiment) -> dict[str, Any] | None:
    """What result.json says of a finished run; None where there is none, or it is under way.

    Raises:
        MismatchError: the directory holds a run of another recipe; the fields are named.
    """
    if not (out / RECIPE).exists():
        return None
    there = load_recipe(str(out / RECIPE)).recipe
    differing = differences(there, setup.recipe)
    if differing:
        shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise MismatchError(f"{out}: holds a run of another recipe ({shown}: there, asked); choose another --out")
    if not (out / RESULT).exists():
        return None
    result: dict[str, Any] = json.loads((out / RESULT).read_text())
    check_identity(out, result.pop("identity"), setup)
    return result


def check_identity(out: Path, there: dict[str, Any], setup: Experiment) -> None:
    for what, value in setup.identity.items():
        if there.get(what) != value:
            raise MismatchError(
                f"{out}: began with another {what} ({_short(there.get(what))} there, {_short(value)} asked); "
                "choose another --out"
            )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return value[:12] if isinstance(value, str) else canonical_json(value)[:60]


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """So that `eval RUN` finds the data from any folder."""
    data, store = recipe.data, recipe.store
    places = {f"data.{key}": getattr(data, key) for key in ("path", "val", "root", "cache")}
    settled: dict[str, Any] = {key: absolute(place) for key, place in places.items() if place}
    files = {"train.init_from": recipe.train.init_from, "student.class_map": recipe.student.class_map}
    settled |= {key: str(Path(place).resolve()) for key, place in files.items() if place}
    stores = () if store.path is None else (store.path,) if isinstance(store.path, str) else store.path
    settled["store.path"] = [path if "://" in path else str(Path(path).resolve()) for path in stores] or None
    settled["store.class_maps"] = [path and str(Path(path).resolve()) for path in store.class_maps or ()] or None
    return update(recipe, settled)
