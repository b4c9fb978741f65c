"""The recipe: a whole experiment in one TOML file, read by all three commands.

Precedence: default < recipe < `--set section.key=VALUE` < flag. Where `--set` or a flag names another teacher,
student or objective than the recipe, that section of the recipe is dropped: its values were meant for the other one.
"""

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tomli_w
from pydantic import TypeAdapter, ValidationError

from distill_cli.config import RuntimeConfig, section
from distill_cli.data.config import DataConfig
from distill_cli.errors import UsageError, nearest
from distill_cli.files import canonical_json, sha256
from distill_cli.metrics import EvalConfig
from distill_cli.objectives import ObjectiveConfig
from distill_cli.optim import TrainConfig
from distill_cli.shipped import find_recipe
from distill_cli.store.config import StoreConfig
from distill_cli.students.build import StudentConfig
from distill_cli.teachers import TeacherConfig

NAMED = ("teacher", "student", "objective")
"""Sections whose `name` decides what their other keys mean."""
NO_IDENTITY = (
    "runtime.",
    "eval.",
    "teacher.",
    "store.",
    "data.path",
    "data.val",
    "data.root",
    "data.cache",
    "data.input",
    "student.class_map",
    "train.init_from",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.trackers",
)
"""What may change between two attempts at one run: machines, places, how often it speaks and saves. The store, the
data and the weights it began from are compared by what they are, not by where they lie."""


@section
class Recipe:
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    objective: ObjectiveConfig | None = None
    """By default `tinyvit` where there is a store, else `supervised`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class Loaded:
    """A recipe, and where each value that is no default came from."""

    recipe: Recipe
    origins: Mapping[str, str]
    """Dotted path -> `recipe NAME`, `--set` or a flag."""


def load(
    name: str | None = None, sets: Sequence[str] = (), flags: Mapping[str, tuple[str, Any]] | None = None
) -> Loaded:
    """Read a recipe and lay `--set` values and flags over it.

    Args:
        name: a shipped recipe's name, or a path.
        sets: `section.key=VALUE`, VALUE in TOML or a bare string.
        flags: dotted path -> (flag, value).

    Raises:
        UsageError: a key is unknown or a value is wrong; where, what, and the nearest known keys.
    """
    base = flatten(_read(find_recipe(name))) if name else {}
    over: dict[str, Any] = {}
    origins = dict.fromkeys(base, f"recipe {name}")
    for text in sets:
        path, value = _parse_set(text)
        over[path], origins[path] = value, "--set"
    for path, (flag, value) in (flags or {}).items():
        over[path], origins[path] = value, flag
    for named in NAMED:
        there = base.get(f"{named}.name")
        if there is not None and over.get(f"{named}.name", there) != there:
            base = {path: value for path, value in base.items() if not path.startswith(f"{named}.")}
    values = {**base, **over}
    recipe = parse(values, origins)
    return Loaded(recipe, {path: origins[path] for path in values})


def parse(values: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Recipe:
    """A recipe from dotted paths and values, checked.

    Raises:
        UsageError: see `load`.
    """
    nested = _nest(values)
    if "terms" in nested.get("objective", ()):
        nested["objective"].setdefault("name", "terms")
    try:
        return TypeAdapter(Recipe).validate_python(nested)
    except ValidationError as error:
        # A value that may be of several kinds has an error for each; that it is a table is the least telling.
        found: dict[str, Any] = {}
        for each in sorted(error.errors(include_url=False), key=_is_of_another_kind):
            found.setdefault(_path(each["loc"], nested), each)
        first, *others = (
            (path, each) for path, each in found.items() if not any(other.startswith(f"{path}.") for other in found)
        )
        more = f" (and {len(others)} more)" if others else ""
        raise UsageError(_explain(*first, origins or {}) + more) from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted paths; the tables of arguments stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and not path.endswith((".kwargs", ".opt_kwargs")):
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every value of a recipe by its dotted path; what is left open is None."""
    return flatten(asdict(recipe))


def update(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with some values, by dotted path, replaced."""
    return parse({path: value for path, value in {**flat(recipe), **values}.items() if value is not None})


def to_toml(recipe: Recipe) -> str:
    """The recipe as a TOML file that `load` reads."""
    return tomli_w.dumps(_nest({path: value for path, value in flat(recipe).items() if value is not None}))


def identity(recipe: Recipe) -> dict[str, Any]:
    """What makes two runs the same experiment."""
    return {
        path: value for path, value in flat(recipe).items() if value is not None and not path.startswith(NO_IDENTITY)
    }


def fingerprint(recipe: Recipe) -> str:
    """The sha256 of a recipe's identity."""
    return sha256(canonical_json(identity(recipe)))


def differences(there: Recipe, asked: Recipe) -> list[str]:
    """`path: there, asked` for each value of their identities that differs."""
    ours, theirs = identity(there), identity(asked)
    return [
        f"{path}: {ours.get(path)}, {theirs.get(path)}"
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path) != theirs.get(path)
    ]


def known_paths() -> list[str]:
    """Every key that a recipe can have, dotted."""
    return sorted(set(_paths(Recipe, "")))


def _paths(cls: Any, prefix: str) -> Iterator[str]:
    for item in fields(cls):
        kinds = set(_kinds(item.type))
        path = f"{prefix}{item.name}.{'NAME.' if str in kinds else ''}"
        inner = [kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)]
        for kind in inner:
            yield from _paths(kind, path)
        if not inner or not kinds.isdisjoint((float, int)):
            yield f"{prefix}{item.name}"


def _kinds(annotation: Any) -> Iterator[Any]:
    """The classes inside a union or an Annotated."""
    arguments = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from _kinds(argument)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML ({error})") from error


def _parse_set(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or "." not in path:
        raise UsageError(f"--set {text}: not of the form section.key=VALUE")
    try:
        return path.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path.strip(), value.strip()


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in values.items():
        *tables, key = path.split(".")
        table = nested
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise UsageError(f"{path}: {name} is a value, not a table{nearest(path, known_paths())}")
        table[key] = value
    return nested


def _is_of_another_kind(error: Mapping[str, Any]) -> bool:
    return isinstance(error["input"], Mapping) and error["type"].endswith("_type")


def _path(place: Sequence[Any], values: Any) -> str:
    """The dotted path of one of pydantic's errors, without the names of the kinds that a value may be of.

    Such a name stands in the place without a key for it, as in ("objective", "deit", "alpha").
    """
    path: list[str] = []
    for number, key in enumerate(place, 1):
        table, at_end = isinstance(values, Mapping), number == len(place)
        known = key in values if table else isinstance(values, list) and isinstance(key, int) and key < len(values)
        if known:
            values = values[key]
        if known or (at_end and (table or isinstance(key, int))):
            path.append(str(key))
    return ".".join(path)


def _explain(path: str, error: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """One line for one of pydantic's errors."""
    if error["type"] == "settings":
        # Of several settings together, which stand in the table, not under the name of its kind.
        path = path.rpartition(".")[0]
    where = _origin(path, origins)
    named = "objective.divergence" if path.endswith(".divergence") else "objective"
    if error["type"] == "unexpected_keyword_argument":
        return f"{where}: {path}: unknown key{_nearest_path(path)}"
    if error["type"] == "union_tag_invalid":
        names = error["ctx"]["expected_tags"].replace("'", "")
        if error["ctx"]["discriminator"] == "'loss'":
            return f"{where}: {path}.loss: no such loss, {error['ctx']['tag']!r}; there are {names}"
        return f"{where}: {named}.name: no such {named.rpartition('.')[2]}, {error['ctx']['tag']!r}; there are {names}"
    if error["type"] == "union_tag_not_found":
        return f"{where}: {named}.name is missing; it decides what the other keys of [{named}] mean"
    if error["type"] == "unknown_name":
        return f"{where}: {path}: {error['msg']}"
    found = "" if isinstance(error["input"], Mapping) else f", not {error['input']!r}"
    return f"{where}: {path}: {error['msg'][0].lower()}{error['msg'][1:]}{found}"


def _origin(path: str, origins: Mapping[str, str]) -> str:
    """Where a value came from: itself, the table or list that it stands in, or the first value below it."""
    parts = path.split(".")
    above = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    below = (known for known in origins if known.startswith(f"{path}."))
    return next((origins[known] for known in itertools.chain(above, below) if known in origins), "recipe")


def _nearest_path(path: str) -> str:
    """The same key in another section, else what is spelt nearly so, else the keys of this section."""
    table, _, key = path.rpartition(".")
    paths = known_paths()
    general = re.sub(r"\.(terms|pairs)\.[^.]+", r".\1.NAME", path)
    if general in paths or general.replace(".terms.NAME", "") in paths:
        return f" of the {'loss' if '.pairs.' in path else 'objective'} that is chosen"
    elsewhere = [known for known in paths if known.rpartition(".")[2] == key]
    if elsewhere:
        return f"; did you mean {', '.join(elsewhere[:3])}?"
    sections = dict.fromkeys(known.partition(".")[0] for known in paths)
    return nearest(path, paths) or ("" if table else f"; the sections are {', '.join(sections)}")
