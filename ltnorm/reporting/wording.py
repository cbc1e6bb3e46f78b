"""A block in words: its outcome in one sentence, legend, footnotes, and what it lacks."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from ltnorm.reporting import labels
from ltnorm.reporting.bootstrap import RESAMPLES
from ltnorm.reporting.compare import TESTED, Block, Delta, Row
from ltnorm.reporting.schema import Run
from ltnorm.reporting.statistics import MIN_SEEDS, MOST_SEEDS

NAMED = 3  # rows that a sentence names; the others are counted
HEADINGS = {
    "gmean": "G-mean",
    "macro_f1": "macro F1",
    "worst_class": "worst class",
    "nll": "NLL",
    "ece": "ECE",
}


def heading(metric: str) -> str:
    """What a metric is called above its column."""
    return HEADINGS.get(metric, metric)


def points(value: float, metric: str = TESTED) -> str:
    """A difference with its sign."""
    digits = 3 if metric == "nll" else 1
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # never -0.0


def interval(bounds: tuple[float | None, float | None] | None, metric: str = TESTED) -> str:
    """An interval in brackets; nothing where there is none."""
    if bounds is None or bounds[0] is None or bounds[1] is None:
        return ""
    return f"[{points(bounds[0], metric)}, {points(bounds[1], metric)}]"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`, or `a, b, c and 4 more`."""
    if len(names) > NAMED + 1:
        names = [*names[:NAMED], f"{len(names) - NAMED} more"]
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def outcome(block: Block) -> str:
    """What the seeds say of the tail, in one sentence."""
    base = block.reference
    if base is None:
        return "There is no baseline here, so no row is judged."
    if not block.others:
        return f"There is nothing here to compare {base.label} with."
    deltas = [(row, row.deltas[TESTED]) for row in block.others if TESTED in row.deltas]
    if not deltas:
        return "There is no tail class here, so no row is judged."
    if block.selection:
        instead = ""
        if block.chosen_by and block.first.eval_split == "val":
            instead = "; run what was chosen on the test set"
        elif block.chosen_by:
            instead = "; choose on validation images (--eval-split val)"
        return f"No row is judged, since {block.selection}{instead}."
    judged = [(row, delta) for row, delta in deltas if delta.adjusted_p is not None]
    few = [row for row, delta in deltas if delta.adjusted_p is None]
    parts = [*_verdicts(judged, base), *_not_judged(few, base)]
    if without := [row.label for row in block.others if TESTED not in row.deltas]:
        parts.append(f"{listed(without)} {_is(without)} without a tail")
    return f"Tail accuracy against {base.label}: {'; '.join(parts)}."


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _not_judged(rows: Sequence[Row], base: Row) -> list[str]:
    """The rows that are not tested, by the reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        n = min(row.n, base.n)
        reason = f"{n} seeds are fewer than {MIN_SEEDS}" if n < MIN_SEEDS else "no spread"
        reasons.setdefault("1 seed has no spread" if n == 1 else reason, []).append(row.label)
    return [f"{listed(v)} {_is(v)} not judged ({reason})" for reason, v in reasons.items()]


def _verdicts(judged: Sequence[tuple[Row, Delta]], base: Row) -> list[str]:
    parts = []
    for word, sign in (("higher", 1), ("lower", -1)):
        found = [(r, d) for r, d in judged if d.marked and sign * d.estimate.delta > 0]
        if found:
            told = listed([f"{row.label} ({_told(delta)})" for row, delta in found])
            parts.append(f"{word} with {told}")
    if undecided := [(row, delta) for row, delta in judged if not delta.marked]:
        parts.append(_undecided(undecided, base))
    return parts


def _told(delta: Delta) -> str:
    estimate = delta.estimate
    return f"{points(estimate.delta)} points, {interval((estimate.low, estimate.high))}"


def _undecided(rows: Sequence[tuple[Row, Delta]], base: Row) -> str:
    seeds = sorted({min(row.n, base.n) for row, _ in rows})
    shown = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    text = f"no difference that {shown} seeds can show with {listed([r.label for r, _ in rows])}"
    spread = [delta for _, delta in rows if delta.estimate.sd]
    if not spread:  # there is nothing to compute from how many it would take
        return text
    needed = sorted(delta.seeds_needed for delta in spread if delta.seeds_needed)
    if not needed:
        return f"{text}, and one of 1 point would take more than {MOST_SEEDS:,} seeds"
    low, high = needed[0], needed[-1]
    which = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    more = " and more" if len(needed) < len(spread) else ""
    return f"{text}; one of 1 point would take about {which} seeds{more}"


def facts(block: Block) -> str:
    """What holds for all numbers of a block: the images, the groups, what is compared with what."""
    parts = [f"{block.first.eval_split.capitalize()} set", _groups(block)]
    if block.reference and block.others:
        parts.append(f"Δ against {block.baseline}")
    if block.chosen_by:
        parts.append(f"of each name the row with the best mean {heading(block.chosen_by)}")
    return "; ".join(parts) + "."


def _groups(block: Block) -> str:
    found = {
        (r.first.group_scheme, r.first.head_classes, r.first.medium_classes, r.first.tail_classes)
        for r in block.rows
    }
    if len(found) > 1:
        return "head / medium / tail: the mean of a group's classes, which differ between rows"
    [(scheme, head, medium, tail)] = found
    return f"head / medium / tail: the mean of {head} / {medium} / {tail} classes ({scheme})"


def legend(blocks: Sequence[Block], crossed: bool = False) -> str:
    """What the numbers of tables mean, every rule of their statistics included.

    Of `crossed` tables, which have differences without intervals and no cost, only what they show.
    """
    shown = {metric for block in blocks for metric in (*block.shown, *block.deltas)}
    rows = [row for block in blocks for row in block.rows]
    spread = "mean ± sample standard deviation over n seeds"
    if any(row.n == 1 for row in rows):
        spread += " (1 seed: no spread)"
    parts = [f"In %{', NLL in nats' if 'nll' in shown else ''}; {spread}; last epoch."]
    parts.append(_differences(blocks, crossed))
    if not crossed:
        parts.append("images: training images through the network; time: training of one run.")
        if any(block.published for block in blocks):
            parts.append("Published rows: as their sources report them, in no statistic.")
    return " ".join(filter(None, parts))


def _differences(blocks: Sequence[Block], crossed: bool) -> str:
    shown = {metric for block in blocks for metric in block.deltas}
    deltas = [
        d for block in blocks for row in block.rows for m, d in row.deltas.items() if m in shown
    ]
    if not deltas:
        return ""
    parts = [("in brackets" if crossed else "Δ") + ": difference to the baseline in points"]
    kinds = {delta.paired for delta in deltas if delta.estimate.low is not None}
    if kinds and not crossed:
        ways = [
            way
            for way, kind in (("paired t where the seeds are the same", True), ("Welch", False))
            if kind in kinds
        ]
        parts[0] += f" [95 % interval over seeds, unadjusted: {', otherwise '.join(ways)}]"
    if any(delta.adjusted_p is not None for delta in deltas):
        which = "of its column" if crossed else "of its table"
        parts.append(
            f"* Δ {TESTED} differs from 0 at 5 % after Holm over the rows {which} "
            f"with at least {MIN_SEEDS} seeds"
        )
    if any(delta.images for delta in deltas) and not crossed:
        parts.append(
            f"over images: 95 % interval of the same difference over test images for these "
            f"trained models, percentiles of {RESAMPLES:,} bootstrap draws, by class and paired by "
            "image"
        )
    if TESTED in shown and any(delta.seeds_needed for delta in deltas):
        parts.append("seeds that a difference takes: two-sided at 5 %, found in 80 % of cases")
    return "; ".join(parts) + "."


def footnotes(block: Block) -> list[str]:
    """Where rows differ in what should not matter: seeds, device, version of torch."""
    notes = []
    for what in ("device", "torch"):
        found = {row.label: {getattr(run.result, what) for run in row.runs} for row in block.rows}
        if len(set().union(*found.values())) > 1:
            told = {label: " and ".join(sorted(values)) for label, values in found.items()}
            notes.append(f"{what.capitalize()}: {_by_value(told)}.")
    seeds = {row.label: _seeds(row.seeds) for row in block.rows}
    if len(set(seeds.values())) > 1:
        notes.append(f"Seeds: {_by_value(seeds)}.")
    notes += [f"No interval over images: {row.problem}." for row in block.rows if row.problem]
    return notes


def _by_value(found: dict[str, str]) -> str:
    values = dict.fromkeys(found.values())
    return "; ".join(
        f"{value} ({listed([label for label, v in found.items() if v == value])})"
        for value in values
    )


def _seeds(seeds: Sequence[int]) -> str:
    """`0-4, 7`."""
    runs = [
        [seed for _, seed in part]
        for _, part in groupby(enumerate(seeds), lambda place: place[1] - place[0])
    ]
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def missing_seeds(blocks: Sequence[Block], runs: Iterable[Run]) -> Iterator[str]:
    """A line for each block in which a row lacks seeds that other rows have; tables show their n.

    Args:
        blocks: of the comparison.
        runs: all that there are; what of them was not selected is not missing.
    """
    there = {(labels.row_key(run.result), run.result.seed) for run in runs}
    for block in blocks:
        wanted = sorted({seed for row in block.rows for seed in row.seeds})
        lacking = []
        for row in block.rows:
            key = labels.row_key(row.first)
            if seeds := [s for s in wanted if s not in row.seeds and (key, s) not in there]:
                lacking.append((row, seeds))
        if not lacking:
            continue
        row, seeds = lacking[0]
        told = "lack seeds that others have"
        if len(lacking) == 1:
            told = f"lacks seed{'s' if len(seeds) > 1 else ''} {_seeds(seeds)}"
        first = f"{row.runs[0].directory.parent}/seed{seeds[0]}"
        more = ", …" if len(lacking) > 1 or len(seeds) > 1 else ""
        yield f"{listed([row.label for row, _ in lacking])} {told}, of {block.title}: {first}{more}"
