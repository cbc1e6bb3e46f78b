"""The comparison as plain data: blocks of rows, computed with pandas, shown elsewhere.

A row is one setting (one fingerprint on the same images); only its seeds are averaged. A block
holds the rows that share everything outside `norm.*`.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ltnorm.errors import LtnormError, NothingFound, UsageError, did_you_mean
from ltnorm.recipe import BUDGETS, TRAINING_METHODS, Recipe, Retrain
from ltnorm.registry import NORMS
from ltnorm.reporting import schema

LOWER_IS_BETTER = ("nll", "ece")
DEFAULT_METRICS = ("all", "head", "medium", "tail")
DELTAS = ("all", "tail")


@dataclass(frozen=True)
class Row:
    """One setting: its seeds averaged. A missing value is None (an empty group, one seed)."""

    label: str
    norm: str
    fingerprint: str
    seeds: list[int]
    mean: dict[str, float | None]
    std: dict[str, float | None]
    delta: dict[str, float | None]
    parameters: int
    epochs: float
    images_processed: float
    train_seconds: float
    relative_time: float | None
    is_baseline: bool

    @property
    def n(self) -> int:
        """Seeds."""
        return len(self.seeds)


@dataclass(frozen=True)
class Block:
    """Rows that can be compared: they share all but the norm."""

    title: str
    group_scheme: str
    group_classes: tuple[int, int, int]
    eval_split: str
    baseline: str | None
    metrics: tuple[str, ...]
    devices: list[str]
    rows: list[Row]

    @property
    def paired(self) -> bool:
        """Whether all rows have the same seeds."""
        return len({tuple(row.seeds) for row in self.rows}) == 1


def load(paths: Sequence[Path]) -> tuple[list[schema.Result], list[str]]:
    """All results below `paths`, and warnings: files left out, and runs that contradict.

    The same run found twice counts once.

    Raises:
        NothingFound: no result at all.
        LtnormError: results were found, but none can be read.
    """
    files = schema.find_results(paths)
    named = " ".join(map(str, paths))
    if not files:
        raise NothingFound(
            f"no results in {named}", "run `ltnorm train --norm bn --norm compound` first"
        )
    results: dict[tuple[str, str, int], tuple[Path, schema.Result]] = {}
    problems: list[LtnormError] = []
    warnings: list[str] = []
    for file in files:
        try:
            result = schema.read_result(file)
        except LtnormError as error:
            problems.append(error)
            continue
        key = (result.fingerprint, schema.block_key(result), result.seed)
        first, kept = results.setdefault(key, (file, result))
        if any(getattr(kept, m) != getattr(result, m) for m in schema.METRICS):
            warnings.append(f"{file} repeats {first} with other numbers: only {first} is used")
    if not results:
        more = f" ({len(problems)} such files)" if len(problems) > 1 else ""
        raise LtnormError(problems[0].message + more, problems[0].hint)
    warnings = [f"left out: {problem.message}" for problem in problems] + warnings
    return [result for _, result in results.values()], warnings


def compare(
    results: Iterable[schema.Result],
    *,
    baseline: str = "bn",
    metrics: Sequence[str] = DEFAULT_METRICS,
    sort: str | None = None,
) -> list[Block]:
    """Group results into blocks and rows.

    Args:
        results: finished runs.
        baseline: the norm, or the label of a row, that deltas and times refer to.
        metrics: columns to average, of `schema.METRICS`.
        sort: a metric, the best first; None is the order of the registry.

    Raises:
        UsageError: no such metric.
    """
    for name in [*metrics, *([sort] if sort else [])]:
        if name not in schema.METRICS:
            raise UsageError(f"unknown metric '{name}'", did_you_mean(name, schema.METRICS))
    frame = pd.DataFrame([dataclasses.asdict(r) | {"block": schema.block_key(r)} for r in results])
    wanted = tuple(dict.fromkeys([*metrics, *DELTAS, *([sort] if sort else [])]))
    groups = [group for _, group in frame.groupby("block", sort=False)]
    titles = _titles(groups)
    blocks = [
        _block(group, title, baseline, tuple(dict.fromkeys(metrics)), wanted, sort)
        for group, title in zip(groups, titles, strict=True)
    ]
    return sorted(blocks, key=lambda block: block.title)


def _block(
    frame: pd.DataFrame,
    title: str,
    baseline: str,
    metrics: tuple[str, ...],
    wanted: tuple[str, ...],
    sort: str | None,
) -> Block:
    labels = _labels(frame)
    base = _baseline(labels, baseline)
    # No two fingerprints share a label, so rows below can be told by it.
    frame = frame.assign(label=frame["fingerprint"].map(labels))
    reference = frame[frame["label"] == base] if base else None
    rows = [
        _row(group, str(label), wanted, reference, is_baseline=label == base)
        for label, group in frame.groupby("label", sort=False)
    ]
    first = frame.iloc[0]
    return Block(
        title=title,
        group_scheme=first["group_scheme"],
        group_classes=tuple(int(first[f"{g}_classes"]) for g in ("head", "medium", "tail")),
        eval_split=first["eval_split"],
        baseline=base,
        metrics=metrics,
        devices=sorted(set(frame["device"])),
        rows=_sorted(rows, sort),
    )


def _row(
    runs: pd.DataFrame,
    label: str,
    metrics: Sequence[str],
    reference: pd.DataFrame | None,
    is_baseline: bool,
) -> Row:
    def mean(frame: pd.DataFrame, column: str) -> float | None:
        return _number(frame[column].astype(float).mean())

    delta: dict[str, float | None] = {}
    relative = None
    if reference is not None:
        for metric in metrics:
            ours, theirs = mean(runs, metric), mean(reference, metric)
            delta[metric] = None if ours is None or theirs is None else ours - theirs
        # Times of different machines have no ratio.
        if set(runs["device"]) == set(reference["device"]) and runs["device"].nunique() == 1:
            relative = runs["train_seconds"].mean() / reference["train_seconds"].mean()
    first = runs.iloc[0]
    return Row(
        label=label,
        norm=first["norm"],
        fingerprint=first["fingerprint"],
        seeds=sorted(int(s) for s in runs["seed"]),
        mean={m: mean(runs, m) for m in metrics},
        std={m: _number(runs[m].astype(float).std(ddof=1)) for m in metrics},
        delta=delta,
        parameters=int(first["parameters"]),
        epochs=float(runs["epochs"].mean()),
        images_processed=float(runs["images_processed"].mean()),
        train_seconds=float(runs["train_seconds"].mean()),
        relative_time=relative,
        is_baseline=is_baseline,
    )


def _number(value: float) -> float | None:
    return None if pd.isna(value) else float(value)


def _labels(frame: pd.DataFrame) -> dict[str, str]:
    """A label for each fingerprint: the norm and its options that are not the defaults.

    Where defaults have changed between versions two settings can look alike; then the start of
    the fingerprint tells them apart.
    """
    labels = {
        row.fingerprint: f"{row.norm} ({row.norm_options})" if row.norm_options else row.norm
        for row in frame.drop_duplicates("fingerprint").itertuples()
    }
    twice = {label for label, count in Counter(labels.values()).items() if count > 1}
    return {
        fingerprint: f"{label} [{fingerprint[:6]}]" if label in twice else label
        for fingerprint, label in labels.items()
    }


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _baseline(labels: dict[str, str], wanted: str) -> str | None:
    """The label that `wanted` names: a label itself, or a norm that only one row has."""
    if wanted in labels.values():
        return wanted
    of_norm = [label for label in labels.values() if label.split(" ")[0] == wanted]
    return of_norm[0] if len(of_norm) == 1 else None


def _sorted(rows: list[Row], sort: str | None) -> list[Row]:
    if sort is None:
        order = {name: i for i, name in enumerate(NORMS)}
        return sorted(rows, key=lambda r: (order.get(r.norm, len(order)), r.label))
    sign = 1 if sort in LOWER_IS_BETTER else -1

    def key(row: Row) -> tuple[bool, float]:
        value = row.mean[sort]
        return value is None, sign * (value or 0.0)

    return sorted(rows, key=key)


def _titles(groups: Sequence[pd.DataFrame]) -> list[str]:
    """What each block's rows share; where that reads alike, the settings that tell blocks apart."""
    flat = [_flatten(json.loads(group.iloc[0]["settings"])) for group in groups]
    names = [_name(group.iloc[0], f) for group, f in zip(groups, flat, strict=True)]
    # Settings hold what is not the default.
    whole = Recipe(retrain=Retrain(method="crt"))
    defaults = _flatten(whole.model_dump(mode="json"))
    titles = []
    for name, settings in zip(names, flat, strict=True):
        alike = [other for other, n in zip(flat, names, strict=True) if n == name]
        differing = [
            key
            for key in dict.fromkeys(k for other in alike for k in other)
            if not key.startswith("norm.")
            and len({json.dumps(other.get(key)) for other in alike}) > 1
        ]
        values = {k: _plain(settings.get(k, defaults.get(k, "default"))) for k in differing}
        told = (f"{k} {v[:8] if k == 'model.pretrained' else v}" for k, v in values.items())
        titles.append(" · ".join([name, *told]))
    return titles


def _name(run: pd.Series, settings: Mapping[str, Any]) -> str:
    loss = run["loss"]
    parts = [run["set_id"], run["model"]]
    parts += [f"{loss} ({run['loss_options']})" if run["loss_options"] else loss]
    parts += [f"sampler {run['sampler']}"] if run["sampler"] != "instance" else []
    device = f" on {run['device']}" if "train.seconds" in settings else ""
    parts += [_budget(settings) + device]
    if isinstance(run["retrain"], str):
        trains = run["retrain"] in TRAINING_METHODS
        mode = settings.get("retrain.norm", Retrain.model_fields["norm"].default)
        parts += [f"then {run['retrain']}" + (f", norms {mode}" if trains else "")]
    return " · ".join(parts + ([f"tag {run['tag']}"] if isinstance(run["tag"], str) else []))


def _budget(settings: Mapping[str, Any]) -> str:
    """The budget of the first stage in words: `200 epochs`, `500 steps`, `60 seconds`."""
    [unit] = [unit for unit in BUDGETS if f"train.{unit}" in settings]
    amount = settings[f"train.{unit}"]
    return f"{amount:g} {unit if amount != 1 else unit.removesuffix('s')}"


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{k}": v for k, v in _flatten(value).items()}
        else:
            flat[key] = value
    return flat
