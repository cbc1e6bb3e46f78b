"""The comparison as plain data: blocks of rows, computed here, shown elsewhere.

A row is one setting (one fingerprint on the same images); only its seeds are averaged. A block
holds the rows that share everything but the norm, or what `by` says. How a row differs from the
baseline of its block is a `Delta`: the rules are in `ltnorm.reporting.statistics` and stand in the
legend of every table.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ltnorm.errors import UsageError, did_you_mean
from ltnorm.registry import LOSSES, NORMS
from ltnorm.reporting import images, labels, statistics
from ltnorm.reporting.labels import By
from ltnorm.reporting.published import Published, matching
from ltnorm.reporting.schema import METRICS, Result, Run
from ltnorm.reporting.statistics import MIN_SEEDS, Estimate

LOWER_IS_BETTER = ("nll", "ece")
DEFAULT_METRICS = ("all", "head", "medium", "tail")
# Differences that are shown where no metric is asked for, and the metric that is tested.
DELTAS = ("all", "tail")
TESTED = "tail"
LEVEL = 0.05
# What a row is compared with where nothing else is asked for, by what rows differ in.
BASELINES = {"norm": "bn", "loss": "ce"}
BY: By = ("norm",)
GROUPS = ("head", "medium", "tail")


@dataclass(frozen=True)
class Delta:
    """How a row differs from the baseline in one metric, in points.

    Attributes:
        estimate: the difference with its 95 % interval: paired t where both rows have the same
            seeds, otherwise Welch's.
        paired: which of them.
        welch: the same by Welch, whatever the seeds.
        correlation: of the two rows over their common seeds.
        images: the interval over test images, for these trained models; None without predictions.
        adjusted_p: Holm's, over the rows of the block; only of the tested metric.
        marked: whether adjusted_p is below 5 %.
        seeds_needed: with how many seeds a difference of one point would be found in 4 of 5 cases;
            of the tested metric, where there is a spread to compute it from.
    """

    estimate: Estimate
    paired: bool
    welch: Estimate
    correlation: float | None
    images: tuple[float, float] | None = None
    adjusted_p: float | None = None
    marked: bool = False
    seeds_needed: int | None = None


@dataclass(frozen=True)
class Row:
    """One setting: its seeds averaged. A missing value is None (an empty group, one seed)."""

    label: str
    name: str
    runs: tuple[Run, ...]  # by seed
    mean: dict[str, float | None]
    std: dict[str, float | None]
    parameters: int
    epochs: float
    images_processed: float
    train_seconds: float
    is_baseline: bool = False
    relative_time: float | None = None
    deltas: dict[str, Delta] = field(default_factory=dict)
    problem: str | None = None  # why there is no interval over test images, where that is a fault

    @property
    def first(self) -> Any:
        """The result of one of the runs, for what all share."""
        return self.runs[0].result

    @property
    def seeds(self) -> list[int]:
        """The seeds, in ascending order."""
        return [run.result.seed for run in self.runs]

    @property
    def n(self) -> int:
        """Seeds."""
        return len(self.runs)

    def values(self, metric: str) -> list[float] | None:
        """A metric of each seed; None where a seed has none."""
        found = [getattr(run.result, metric) for run in self.runs]
        return None if None in found else found

    def interval(self, metric: str) -> tuple[float, float] | None:
        """The 95 % t interval of the mean over seeds; None for one seed or an empty group."""
        values = self.values(metric)
        # It is that of the paired difference to nothing.
        found = statistics.paired(values, [0.0] * self.n) if values else None
        if found is None or found.low is None or found.high is None:
            return None
        return found.low, found.high


@dataclass(frozen=True)
class Block:
    """Rows that can be compared: they share all but what `by` says.

    Attributes:
        title, by: what the rows share, and what they differ in.
        baseline: the label of the row that differences refer to.
        shown, deltas: the metrics of the columns, and those whose differences are shown.
        rows, published: one's own, and those of the literature.
        chosen_by: the metric by which rows were chosen among others of their name.
        selected_by: the metrics by which runs were selected.
    """

    title: str
    by: By
    baseline: str | None
    shown: tuple[str, ...]
    deltas: tuple[str, ...]
    rows: tuple[Row, ...]
    published: tuple[Published, ...] = ()
    chosen_by: str | None = None
    selected_by: tuple[str, ...] = ()

    @property
    def first(self) -> Any:
        """The result of one of the runs, for what all share."""
        return self.rows[0].first

    @property
    def reference(self) -> Row | None:
        """The row that differences refer to."""
        return next((row for row in self.rows if row.is_baseline), None)

    @property
    def others(self) -> list[Row]:
        """All rows but the baseline."""
        return [row for row in self.rows if not row.is_baseline]

    @property
    def selection(self) -> str | None:
        """Why no row can be judged: what is shown was chosen by its own outcome."""
        if self.selected_by:
            return f"runs were selected by their {', '.join(self.selected_by)}"
        if self.chosen_by:
            return f"rows were chosen by their {self.chosen_by} on these very images"
        return None


@dataclass(frozen=True)
class Question:
    """What a comparison is asked for.

    Attributes:
        by: what the rows of a block differ in.
        baseline: the label or the name of a row; None is the usual one of `by`.
        metrics: columns, of `schema.METRICS`; None are all, head, medium and tail.
        sort: a metric, the best first; None is the order of the registry.
        best_only: of the rows of one name only the best is kept, by `sort`, or else by `all`.
        over_images: the metrics, of `images.METRICS`, that have an interval over test images too
            where predictions are there.
        gated: metrics that gates ask for.
        selected_by: metrics by which the runs were selected, so that no row can be judged.
    """

    by: By = BY
    baseline: str | None = None
    metrics: tuple[str, ...] | None = None
    sort: str | None = None
    best_only: bool = False
    over_images: tuple[str, ...] = images.METRICS
    gated: tuple[str, ...] = ()
    selected_by: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in [*(self.metrics or ()), *([self.sort] if self.sort else [])]:
            if name not in METRICS:
                raise UsageError(f"unknown metric '{name}'", did_you_mean(name, METRICS))

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics of the columns."""
        return tuple(dict.fromkeys(self.metrics or DEFAULT_METRICS))

    @property
    def deltas(self) -> tuple[str, ...]:
        """The metrics whose differences are shown."""
        return self.shown if self.metrics else DELTAS

    @property
    def told(self) -> tuple[str, ...]:
        """The metrics whose differences are computed: those that any table, plot or gate has."""
        return tuple(dict.fromkeys([*DEFAULT_METRICS, *self.shown, *self.gated]))


def compare(
    runs: Iterable[Run], question: Question | None = None, published: Sequence[Published] = ()
) -> list[Block]:
    """Group finished runs into blocks and rows, and tell each row from the baseline of its block.

    Args:
        runs: at least one.
        question: what is asked; None is the default.
        published: numbers of the literature, shown beside the blocks that they belong to.

    Raises:
        UsageError: no run has a key that `by` names.
    """
    runs, question = list(runs), question or Question()
    for key in question.by:
        labels.check_known(key, [run.result for run in runs])
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(labels.shared(run.result, question.by), []).append(run)
    titles = labels.titles([group[0].result for group in groups.values()], question.by)
    blocks = [
        _block(group, title, question, published)
        for group, title in zip(groups.values(), titles, strict=True)
    ]
    if question.over_images:
        blocks = _over_images(blocks, question.over_images)
    return sorted(blocks, key=lambda block: labels.natural(block.title))


def _block(
    runs: Sequence[Run], title: str, question: Question, published: Sequence[Published]
) -> Block:
    by = question.by
    called = labels.labels([run.result for run in runs], by)
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.result.seed):
        groups.setdefault(called[labels.row_key(run.result)], []).append(run)
    rows = [_row(label, group, by) for label, group in groups.items()]
    several = len(rows)
    if question.best_only:
        rows = _best(rows, question.sort or "all")
    base = _baseline(rows, question.baseline, by, question.best_only)
    rows = [_against(row, base, question.told) for row in rows]
    block = Block(
        title=title,
        by=by,
        baseline=base.label if base else None,
        shown=question.shown,
        deltas=question.deltas,
        rows=tuple(_sorted(rows, question.sort, by)),
        published=tuple(_beside(published, runs[0].result, by)),
        chosen_by=(question.sort or "all") if len(rows) < several else None,
        selected_by=question.selected_by,
    )
    return _marked(block)


def _beside(published: Sequence[Published], first: Result, by: By) -> Iterator[Published]:
    """What the literature has of a block, called as its rows are."""
    for one in matching(published, labels.settings(first), by):
        # Papers report groups by shots.
        comparable = first.group_scheme == "shots"
        values = {m: v for m, v in one.values.items() if comparable or m not in GROUPS}
        if values:
            called = labels.of_keys(one.keys, by)
            yield replace(one, label=" · ".join([*called, one.label]), values=values)


def _row(label: str, runs: Sequence[Run], by: By) -> Row:
    results = [run.result for run in runs]

    def average(column: str) -> float:
        return statistics.mean([getattr(result, column) for result in results])

    made = Row(
        label=label,
        name=labels.bare_name(results[0], by),
        runs=tuple(runs),
        mean={},
        std={},
        parameters=results[0].parameters,
        epochs=average("epochs"),
        images_processed=average("images_processed"),
        train_seconds=average("train_seconds"),
    )
    for metric in METRICS:
        values = made.values(metric)
        made.mean[metric] = statistics.mean(values) if values else None
        made.std[metric] = statistics.sample_std(values) if values else None
    return made


def _best(rows: Sequence[Row], metric: str) -> list[Row]:
    """Of the rows of one name the one with the best mean."""
    kept: dict[str, Row] = {}
    for row in _sorted(rows, metric, BY):
        kept.setdefault(row.name, row)
    return list(kept.values())


def _baseline(rows: Sequence[Row], asked: str | None, by: By, best_only: bool) -> Row | None:
    """The row that is asked for: by its label, by parts or by a name that only one row has.

    Parts are what a label consists of: `bn · epochs 40` is `bn · lr 0.4 · epochs 40` in one block
    and `bn · lr 0.8 · epochs 40` in another.
    """
    usual = [BASELINES.get(key) for key in (by[:1] if best_only else by)]  # then one row a name
    if asked is None and None in usual:
        return None
    wanted = " · ".join(map(str, usual)) if asked is None else asked
    parts = set(wanted.split(" · "))
    for called in (
        [row for row in rows if parts <= set(row.label.split(" · "))],
        [row for row in rows if row.name == wanted],
    ):
        if len(called) == 1:
            return called[0]
    return None


def _sorted(rows: Sequence[Row], sort: str | None, by: By) -> list[Row]:
    if sort is None:
        order = {name: i for i, name in enumerate([*NORMS, *LOSSES])}
        return sorted(rows, key=lambda r: (order.get(r.name, len(order)), labels.natural(r.label)))
    sign = 1 if sort in LOWER_IS_BETTER else -1

    def key(row: Row) -> tuple[bool, float]:
        value = row.mean[sort]
        return value is None, sign * (value or 0.0)

    return sorted(rows, key=key)


def _against(row: Row, base: Row | None, metrics: Sequence[str]) -> Row:
    """A row with what tells it from the baseline."""
    if base is None:
        return row
    # Times of different machines have no ratio.
    devices = {run.result.device for run in (*row.runs, *base.runs)}
    time = row.train_seconds / base.train_seconds if len(devices) == 1 else None
    if row is base:
        return replace(row, is_baseline=True, relative_time=time)
    deltas = {metric: delta for metric in metrics if (delta := _delta(row, base, metric))}
    return replace(row, relative_time=time, deltas=deltas)


def _over_images(blocks: Sequence[Block], metrics: Sequence[str]) -> list[Block]:
    """The blocks with intervals over test images, all computed at once."""
    told = [(row, block.reference) for block in blocks for row in block.rows if row.deltas]
    pairs = [(row.runs, base.runs) for row, base in told if base]
    found = dict(
        zip(
            (id(row) for row, _ in told),
            zip(*images.intervals(pairs, metrics), strict=True),
            strict=True,
        )
    )

    def imaged(row: Row) -> Row:
        intervals, problem = found.get(id(row), ({}, None))
        deltas = {
            metric: replace(delta, images=intervals.get(metric))
            for metric, delta in row.deltas.items()
        }
        return replace(row, deltas=deltas, problem=problem)

    return [replace(block, rows=tuple(map(imaged, block.rows))) for block in blocks]


def _delta(row: Row, base: Row, metric: str) -> Delta | None:
    ours, theirs = row.values(metric), base.values(metric)
    if ours is None or theirs is None:
        return None
    common = sorted({*row.seeds} & {*base.seeds})
    welch = statistics.welch(ours, theirs)
    pairs = [
        [dict(zip(r.seeds, v, strict=True))[seed] for seed in common]
        for r, v in ((row, ours), (base, theirs))
    ]
    paired = row.seeds == base.seeds
    estimate = statistics.paired(ours, theirs) if paired else welch
    needed = None
    enough = min(row.n, base.n) >= MIN_SEEDS
    if metric == TESTED and enough and estimate.sd and estimate.df_per_seed:
        needed = statistics.seeds_needed(estimate.sd, df_per_seed=estimate.df_per_seed)
    return Delta(
        estimate=estimate,
        paired=paired,
        welch=welch,
        correlation=statistics.correlation(*pairs),
        seeds_needed=needed,
    )


def _marked(block: Block) -> Block:
    """The block with the tests of its family: the tested metric of all rows with enough seeds.

    Rows that were chosen by their own outcome are not tested.
    """
    base = block.reference
    if base is None or base.n < MIN_SEEDS or block.selection:
        return block
    family = {
        row.label: delta.estimate.p
        for row in block.others
        if row.n >= MIN_SEEDS and (delta := row.deltas.get(TESTED)) and delta.estimate.p is not None
    }
    adjusted = dict(zip(family, statistics.holm(list(family.values())), strict=True))
    return replace(block, rows=tuple(_tested(row, adjusted.get(row.label)) for row in block.rows))


def _tested(row: Row, p: float | None) -> Row:
    if p is None:
        return row
    delta = replace(row.deltas[TESTED], adjusted_p=p, marked=p < LEVEL)
    return replace(row, deltas={**row.deltas, TESTED: delta})
