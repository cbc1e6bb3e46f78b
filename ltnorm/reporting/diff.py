"""Two runs side by side: what differs in their recipes, metrics, cost and environment."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.text import Text

from ltnorm.console import grid
from ltnorm.errors import LtnormError, NothingFound, UsageError
from ltnorm.reporting import schema, state
from ltnorm.reporting.labels import flatten

# Keys of a recipe that are no part of the setting; see `Recipe.settings`.
APART = ("seed", "device", "workers", "eval.every")
COST = (
    "epochs",
    "steps",
    "parameters",
    "images_processed",
    "images_backpropagated",
    "train_seconds",
    "images_per_second",
)
ENVIRONMENT = ("set_id", "index_sha256", "group_scheme", "first_stage", "device", "torch", "ltnorm")
HASHES = ("index_sha256", "first_stage", "model.pretrained")
ABSENT = object()


@dataclass(frozen=True)
class Side:
    """One of two runs: its recipe by dotted keys, its result, and what has become of it."""

    directory: Path
    recipe: Mapping[str, Any]
    result: schema.Result | None
    state: state.RunState


@dataclass(frozen=True)
class Difference:
    """A key with a value on each side, ABSENT where a side does not have the key."""

    key: str
    a: Any
    b: Any

    def record(self) -> dict[str, Any]:
        """For JSON: an absent value is left out."""
        values = {"key": self.key, "a": self.a, "b": self.b}
        return {key: value for key, value in values.items() if value is not ABSENT}


@dataclass(frozen=True)
class Measure:
    """A number of both runs; None where a run does not have it."""

    name: str
    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        """B - A."""
        return None if self.a is None or self.b is None else self.b - self.a

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "a": self.a, "b": self.b, "difference": self.difference}


@dataclass(frozen=True)
class Diff:
    """What differs between two runs.

    Attributes:
        a, b: the runs.
        recipe: keys of the setting that differ.
        apart: keys that differ and are no part of the setting, the seed say.
        metrics, cost: of both; empty unless both are finished.
        environment: what of that differs, as far as both are finished.
    """

    a: Side
    b: Side
    recipe: list[Difference]
    apart: list[Difference]
    metrics: list[Measure]
    cost: list[Measure]
    environment: list[Difference]

    @property
    def unfinished(self) -> list[state.RunState]:
        """The runs without a result."""
        return [side.state for side in (self.a, self.b) if side.result is None]

    @property
    def same_setting(self) -> bool:
        """Whether the runs are of one setting: by fingerprint if both have one."""
        if self.a.result and self.b.result:
            return self.a.result.fingerprint == self.b.result.fingerprint
        return not self.recipe

    @property
    def same_images(self) -> bool | None:
        """Whether they were trained on the same images; None is not known."""
        if not (self.a.result and self.b.result):
            return None
        return self.a.result.index_sha256 == self.b.result.index_sha256


def diff(a: Side, b: Side) -> Diff:
    """Compare two runs.

    Raises:
        UsageError: they are one.
    """
    if a.directory.resolve() == b.directory.resolve():
        raise UsageError(f"both are the run {a.directory}", "name two runs")
    recipe = _differences(a.recipe, b.recipe)
    metrics, cost, environment = [], [], []
    if a.result and b.result:
        metrics, cost = (
            [Measure(n, getattr(a.result, n), getattr(b.result, n)) for n in names]
            for names in (schema.METRICS, COST)
        )
        ours, theirs = ({n: getattr(r, n) for n in ENVIRONMENT} for r in (a.result, b.result))
        environment = _differences(ours, theirs)
    return Diff(
        a,
        b,
        recipe=[d for d in recipe if d.key not in APART],
        apart=[d for d in recipe if d.key in APART],
        metrics=metrics,
        cost=cost,
        environment=environment,
    )


def load(path: Path) -> Side:
    """Load a run by its directory or a file in it.

    Raises:
        NothingFound: there is no run.
        LtnormError: its files are damaged.
    """
    directory = path.parent if path.is_file() else path
    if not (directory / schema.RECIPE).is_file():
        hint = "name a run's directory, as `ltnorm runs` lists it"
        below = sorted(path.glob(f"**/{schema.RECIPE}")) if path.is_dir() else []
        if below:
            hint = f"name a run's directory, as {below[0].parent}"
        why = f"it has no {schema.RECIPE}" if path.exists() else "there is nothing"
        raise NothingFound(f"no run at {path}: {why}", hint)
    [run] = [r for r in schema.find_runs([directory]) if r.directory == directory]
    result = schema.read_result(run.result) if run.result else None
    return Side(directory, _recipe(directory / schema.RECIPE), result, state.read(run))


def _recipe(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it holds no keys")
        return flatten(content)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        hint = "train the run again: `ltnorm train --force`"
        raise LtnormError(f"{file} is damaged: {reason}", hint) from error


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Keys whose values differ, in the order of `a`, then of `b`."""
    keys = [key for key in dict.fromkeys([*a, *b]) if not _is_no_section(key, a, b)]
    pairs = [Difference(key, a.get(key, ABSENT), b.get(key, ABSENT)) for key in keys]
    return [pair for pair in pairs if pair.a is ABSENT or pair.b is ABSENT or pair.a != pair.b]


def _is_no_section(key: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether a key stands for a section that one side lacks: the keys below it tell that."""
    return any(k.startswith(f"{key}.") for k in (*a, *b))


def document(found: Diff) -> dict[str, Any]:
    """For JSON."""
    return {
        "a": str(found.a.directory),
        "b": str(found.b.directory),
        "states": [found.a.state.state, found.b.state.state],
        "same_setting": found.same_setting,
        "same_images": found.same_images,
        "recipe": [d.record() for d in found.recipe],
        "apart": [d.record() for d in found.apart],
        "metrics": [m.record() for m in found.metrics],
        "cost": [m.record() for m in found.cost],
        "environment": [d.record() for d in found.environment],
    }


def shown(found: Diff) -> RenderableType:
    """For people: what differs, in tables and words."""
    parts: list[Any] = [Text(f"A  {found.a.directory}"), Text(f"B  {found.b.directory}")]
    parts += [Text(), _setting(found)]
    parts += [_differing("recipe", found.recipe)] if found.recipe else []
    if found.apart:
        parts += [Text(), _differing("not part of the setting", found.apart)]
    for run in found.unfinished:
        parts += [Text(), Text(f"{run}; so only recipes are compared")]
    if found.metrics:
        parts += [Text(), _measured("metric", found.metrics)]
        parts += [Text(), _measured("cost", found.cost), Text(), _surroundings(found)]
        parts += [_differing("environment", found.environment)] if found.environment else []
        parts += [Text("metrics in %, nll in nats; B - A in points", style="dim")]
    return Group(*parts)


def _setting(found: Diff) -> Text:
    if not found.recipe:
        if found.same_setting:
            return Text("the same setting: the recipes differ in nothing that matters to it")
        return Text("the recipes are alike, but not the fingerprints: of other versions of ltnorm")
    number = f"{len(found.recipe)} key" + ("s" if len(found.recipe) > 1 else "")
    if found.same_setting:
        return Text(
            f"the same fingerprint, but {number} of the recipes differ: of two versions of ltnorm, "
            "or a recipe.yaml was changed"
        )
    return Text(f"two settings: {number} of the recipes differ")


def _surroundings(found: Diff) -> Text:
    """Which of images and environment the runs share, in words."""
    images = "the same images" if found.same_images else "other images"
    differing = {d.key for d in found.environment}
    shared = [key for key in ("device", "torch", "ltnorm") if key not in differing]
    also = f"; the same {', '.join(shared)}" if shared else ""
    return Text(f"trained on {images}{also}")


def _differing(heading: str, pairs: Sequence[Difference]) -> RenderableType:
    columns = [
        [heading, *(pair.key for pair in pairs)],
        ["A", *(_plain(pair.key, pair.a) for pair in pairs)],
        ["B", *(_plain(pair.key, pair.b) for pair in pairs)],
    ]
    return grid(columns, left=(0, 1, 2))


def _plain(key: str, value: Any) -> str:
    if value is ABSENT:
        return "–"
    if isinstance(value, str):
        return value[:12] if key in HASHES else value
    return json.dumps(value, default=str)


def _measured(heading: str, measures: Iterable[Measure]) -> RenderableType:
    rows = [
        (m.name, _number(m.name, m.a), _number(m.name, m.b), _number(m.name, m.difference, "+"))
        for m in measures
    ]
    headings = (heading, "A", "B", "B - A")
    return grid([list(column) for column in zip(headings, *rows, strict=True)])


def _number(name: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:{sign},}"
    return f"{value:{sign},.{3 if name == 'nll' else 1}f}"
