"""Other views of a comparison: crossed with a second key of the recipe, and class by class."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ltnorm.errors import LtnormError
from ltnorm.reporting import labels, statistics
from ltnorm.reporting.compare import Block, Row
from ltnorm.reporting.schema import PER_CLASS, ClassRow, read_per_class


@dataclass(frozen=True)
class Pivot:
    """Blocks that differ in one key alone, side by side.

    Attributes:
        title: what all of them share.
        corner: what goes down and what goes across.
        values: of the key, one a block.
        blocks: in the order of the values; there is at least one.
    """

    title: str
    corner: str
    values: list[str]
    blocks: list[Block]

    @property
    def labels(self) -> list[str]:
        """The labels of all rows, each once, in the order of the blocks."""
        return list(dict.fromkeys(row.label for block in self.blocks for row in block.rows))

    @property
    def parts(self) -> list[tuple[str, Block]]:
        """Each value with its block."""
        return list(zip(self.values, self.blocks, strict=True))

    @staticmethod
    def row(label: str, block: Block) -> Row | None:
        """The row of that label in a block, if it has one."""
        return next((row for row in block.rows if row.label == label), None)


def pivot(blocks: Sequence[Block], key: str) -> list[Pivot]:
    """Put blocks side by side that differ in `key` alone, a dotted key of the recipe."""
    groups: dict[str, list[Block]] = {}
    for block in blocks:
        groups.setdefault(labels.shared(block.first, (*block.by, key)), []).append(block)
    titles = labels.titles([g[0].first for g in groups.values()], (*blocks[0].by, key))
    found = []
    for title, group in zip(titles, groups.values(), strict=True):
        valued = [(labels.called(block.first, key), block) for block in group]
        twice = {v for v, count in Counter(v for v, _ in valued).items() if count > 1}
        valued = [
            (f"{v} [{b.first.index_sha256[:6]} {b.first.group_scheme}]" if v in twice else v, b)
            for v, b in valued
        ]
        valued.sort(key=lambda pair: labels.natural(pair[0]))
        short = key.rpartition(".")[2]
        down = " × ".join(part.rpartition(".")[2] for part in group[0].by)
        found.append(
            Pivot(
                title=title,
                corner=f"{down} \\ {short}",
                values=[value for value, _ in valued],
                blocks=[block for _, block in valued],
            )
        )
    return sorted(found, key=lambda one: labels.natural(one.title))


@dataclass(frozen=True)
class ClassAccuracy:
    """The accuracy of one class over seeds, in percent; None without images."""

    mean: float | None
    std: float | None


@dataclass(frozen=True)
class ClassTable:
    """A block class by class.

    Attributes:
        block: whose rows they are.
        classes: of the block, in the order of their labels.
        accuracy: by the label of a row, one a class.
        seeds: what it is averaged from, by the label of a row and its seeds.
    """

    block: Block
    classes: list[ClassRow]
    accuracy: dict[str, list[ClassAccuracy]]
    seeds: dict[str, dict[int, list[ClassRow]]] = field(default_factory=dict)

    @property
    def has_baseline(self) -> bool:
        """Whether there is something to tell the rows from."""
        return self.block.baseline in self.accuracy

    def delta(self, label: str, place: int) -> float | None:
        """How a row's class differs from the baseline's, in points."""
        ours, theirs = self.accuracy[label][place], self.accuracy[str(self.block.baseline)][place]
        if ours.mean is None or theirs.mean is None:
            return None
        return ours.mean - theirs.mean


def per_class(block: Block) -> tuple[ClassTable | None, list[str]]:
    """A block class by class, and warnings: runs whose per_class.csv is missing or does not fit."""
    warnings: list[str] = []
    classes: list[ClassRow] | None = None
    accuracy: dict[str, list[ClassAccuracy]] = {}
    tables: dict[str, dict[int, list[ClassRow]]] = {}
    for row in block.rows:
        seeds: dict[int, list[ClassRow]] = {}
        for run in row.runs:
            try:
                found = read_per_class(run.directory / PER_CLASS)
            except LtnormError as error:
                warnings.append(f"left out: {error.message}")
                continue
            first = run.result
            if len(found) != first.head_classes + first.medium_classes + first.tail_classes:
                warnings.append(f"left out: {run.directory / PER_CLASS} lacks classes")
                continue
            classes = classes or found
            if [one.name for one in found] != [one.name for one in classes]:
                warnings.append(f"left out: {run.directory} has other classes")
                continue
            seeds[run.result.seed] = found
        if seeds:
            tables[row.label] = seeds
            accuracy[row.label] = [
                _over_seeds([one.accuracy for one in one_class])
                for one_class in zip(*seeds.values(), strict=True)
            ]
    if classes is None:
        return None, warnings
    return ClassTable(block, classes, accuracy, tables), warnings


def _over_seeds(values: Sequence[float | None]) -> ClassAccuracy:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ClassAccuracy(None, None)
    return ClassAccuracy(statistics.mean(known), statistics.sample_std(known))
