"""An inspection as text: tables for people, rows and documents for programs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from ltnorm.console import GAP, LABEL_WIDTH, grid

if TYPE_CHECKING:
    from ltnorm.evaluation.inspection import Inspection, LayerInspection

CSV_COLUMNS = (
    *("run", "norm", "seed", "split", "group_scheme"),
    *("layer", "channels", "group", "quantity", "component", "value"),
)
SHOWN = 3  # components in a cell; a file has all

LEGEND = (
    "shift: root mean square over channels of a group's mean of the normalized features, "
    "0 is no shift; var: mean of their variance. Groups by {scheme}, images of the {split} split."
)
COMPONENTS_LEGEND = (
    "In % a component: weights of the running mixture; share: mean responsibility in a group. "
    "entropy of the responsibilities: 0 decided, 1 undecided. contrast: how much of the shares "
    "differs between {ends}, 0 nothing, 1 all. gap between components in standard deviations."
)


@dataclass(frozen=True)
class Inspected:
    """A run and what was seen in it."""

    run: str
    set_id: str
    model: str
    norm: str
    norm_options: str
    tag: str | None
    seed: int
    inspection: "Inspection"

    @property
    def label(self) -> str:
        """The norm, what is not its default, the tag and the seed."""
        options = f" ({self.norm_options})" if self.norm_options else ""
        tag = f" · {self.tag}" if self.tag else ""
        return f"{self.norm}{options}{tag} · seed {self.seed}"

    @property
    def title(self) -> str:
        """What it is, in one line."""
        return f"{self.set_id} · {self.model} · {self.label} · {self.inspection.split}"

    @property
    def has_components(self) -> bool:
        """Whether there is anything to say of components."""
        return any(x.shares or x.weights or x.gap is not None for x in self.inspection.layers)


def csv_rows(runs: Sequence[Inspected]) -> Iterator[tuple[Any, ...]]:
    """One number a row, under `CSV_COLUMNS`."""
    for one in runs:
        found = one.inspection
        head = (one.run, one.norm, one.seed, found.split, found.scheme)
        yield from ((*head, *row) for layer in found.layers for row in layer.rows())


def document(runs: Sequence[Inspected]) -> dict[str, Any]:
    """Everything as one JSON document; null is what a norm does not have."""
    return {"runs": [_document(one) for one in runs]}


def _document(one: Inspected) -> dict[str, Any]:
    names = ("name", "channels", "shift", "variance", "shares", "entropy", "contrast", "weights")
    found = one.inspection
    return {
        "run": one.run,
        "norm": one.norm,
        "norm_options": one.norm_options,
        "tag": one.tag,
        "seed": one.seed,
        "split": found.split,
        "group_scheme": found.scheme,
        "groups": found.groups,
        "layers": [{n: getattr(x, n) for n in (*names, "gap")} for x in found.layers],
    }


def tables(runs: Sequence[Inspected], width: int) -> Group:
    """A table of layers a run, and one of runs if there are several, for `width` columns."""
    parts: list[Any] = []
    for one in runs:
        parts += [Text(one.title, style="bold"), *_layers(one, width)]
        parts += [Text(_legend(one), style="dim"), Text()]
    if len(runs) > 1:
        parts += [Text("mean over the layers of each run", style="bold"), *_summary(runs, width)]
        parts += [Text()]
    return Group(*parts[:-1])


def _legend(one: Inspected) -> str:
    found = one.inspection
    text = LEGEND.format(scheme=found.scheme, split=found.split)
    if one.has_components:
        ends = f"{found.groups[0]} and {found.groups[-1]}"
        text += " " + COMPONENTS_LEGEND.format(ends=ends)
    return text


def _layers(one: Inspected, width: int) -> list[Any]:
    layers, groups = one.inspection.layers, one.inspection.groups
    names = ["layer", *(x.name for x in layers)]
    features = [["C", *(str(x.channels) for x in layers)], *_features(layers, groups)]
    return _fit(names, features, _components(layers, groups) if one.has_components else [], width)


def _features(layers: Sequence["LayerInspection"], groups: Sequence[str]) -> list[list[str]]:
    return [
        *([f"shift\n{g}", *(number(x.shift[g]) for x in layers)] for g in groups),
        *([f"var\n{g}", *(number(x.variance[g]) for x in layers)] for g in groups),
    ]


def _components(layers: Sequence["LayerInspection"], groups: Sequence[str]) -> list[list[str]]:
    return [
        ["weights", *(_percents(x.weights) for x in layers)],
        *([f"share\n{g}", *(_percents((x.shares or {}).get(g)) for x in layers)] for g in groups),
        ["entropy", *(number((x.entropy or {}).get("all")) for x in layers)],
        ["contrast", *(number(x.contrast) for x in layers)],
        ["gap", *(number(x.gap) for x in layers)],
    ]


def _summary(runs: Sequence[Inspected], width: int) -> list[Any]:
    groups = list(dict.fromkeys(g for one in runs for g in one.inspection.groups))
    labels = [one.label for one in runs]
    if len(set(labels)) < len(labels):
        labels = [one.run for one in runs]
    layers = [one.inspection.layers for one in runs]

    def column(heading: str, quantity: str, group: str | None = None) -> list[str]:
        cells = []
        for found in layers:
            values = [getattr(x, quantity) for x in found]
            if group is not None:
                values = [(v or {}).get(group) for v in values]
            known = [v for v in values if v is not None]
            cells.append(number(fmean(known) if known else None))
        return [heading, *cells]

    features = [column(f"shift\n{g}", "shift", g) for g in groups]
    features += [column(f"var\n{g}", "variance", g) for g in groups]
    components = [column("entropy", "entropy", "all")]
    components += [column(name, name) for name in ("contrast", "gap")]
    with_components = components if any(one.has_components for one in runs) else []
    return _fit(["run", *labels], features, with_components, width)


def _fit(
    names: list[str], features: list[list[str]], components: list[list[str]], width: int
) -> list[Any]:
    """One table, or two where one is too wide: what is led by `names` stays together."""
    columns = [names, *features, *components]
    needed = sum(min(LABEL_WIDTH, _width(c)) + GAP for c in columns) - GAP
    if not components or needed <= width:
        return [grid(columns)]
    return [grid([names, *features]), Text(), grid([names, *components])]


def _width(column: Sequence[str]) -> int:
    return max(len(line) for cell in column for line in cell.split("\n"))


def number(value: float | None) -> str:
    """Two decimals, or three digits where that is too long; – for what does not exist."""
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) < 99.995 else f"{value:.3g}"


def _percents(values: Sequence[float] | None) -> str:
    if values is None:
        return "–"
    shown = "/".join(f"{100 * v:.0f}" for v in values[:SHOWN])
    return f"{shown}/…" if len(values) > SHOWN else shown
