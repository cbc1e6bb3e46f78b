"""Which runs a sweep is made of: whole recipes, checked, each with its directory and state."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltnorm.errors import LtnormError, UsageError
from ltnorm.recipe import Recipe
from ltnorm.reporting import schema, state
from ltnorm.sweep.grid import Cell

if TYPE_CHECKING:
    from ltnorm.data.making import Making
    from ltnorm.data.prepare import Preview
    from ltnorm.data.prepared import PreparedSet

LOG = "log.txt"
# What leads each attempt in a log.
ATTEMPT = "--- attempt "
# Device and precision as asked -> the precision there.
Precision = Callable[[str, str], str]


@dataclass(frozen=True, eq=False)
class Job:
    """One run to be made.

    Attributes:
        recipe: whole: of known images, in a known precision.
        values: of the axes of the grid.
        directory: of the run; its log lies there, too.
        first: the directory of the first stage, if it is a second one.
        data: what its images are; None where that is not known before they are prepared.
    """

    recipe: Recipe
    values: Mapping[str, Any]
    directory: Path
    first: Path | None
    data: "PreparedSet | Preview | None" = field(repr=False)

    @property
    def log(self) -> Path:
        """What its processes have said on stderr, all attempts."""
        return self.directory / LOG

    def result(self) -> schema.Result | None:
        """The result, if it is there and of this very run."""
        try:
            if not schema.finished(self.directory):
                return None
            result = schema.read_result(self.directory / schema.RESULT)
        except LtnormError:  # training tells of a damaged one
            return None
        index = getattr(self.data, "index_sha256", result.index_sha256)
        if (result.fingerprint, result.index_sha256) != (self.recipe.fingerprint(), index):
            return None
        if self.first:
            from ltnorm.training.twostage import is_stale

            return None if is_stale(result, self.first) else result
        return result

    def status(self) -> state.Status | None:
        """What the run says of itself, or of two stages the first one while it is made."""
        for directory in filter(None, (self.directory, self.first)):
            try:
                if told := state.read_status(directory):
                    return told
            except LtnormError:
                return None
        return None

    def state(self) -> state.RunState:
        """What has become of the run, by its directory; see `state.read`."""
        found = (schema.RESULT, state.STATUS)
        names = frozenset(name for name in found if (self.directory / name).is_file())
        told = state.read(schema.RunFolder(self.directory, names, None))
        if told.state is state.State.finished and not self.result():
            return state.RunState(self.directory, state.State.unfinished)
        return told

    def is_running(self) -> bool:
        """Whether some process makes the run, or its first stage."""
        for directory in filter(None, (self.directory, self.first)):
            if (directory / state.STATUS).is_file():
                run = schema.RunFolder(directory, frozenset({state.STATUS}), None)
                if state.read(run).state is state.State.running:
                    return True
        return False


def plan(
    cells: Sequence[Cell],
    root: Path,
    data_dir: Path,
    out: Path,
    precision: Precision,
    *,
    making: "Making | None",
    pretrained: Path | None = None,
) -> list[Job]:
    """The runs of a grid, checked as far as they can be before they start.

    Args:
        cells: of the grid.
        root, data_dir, out: where raw and prepared data and results lie.
        precision: what `auto` is where the runs are made.
        making: how data sets are prepared; None writes nothing, neither these nor directories.
        pretrained: the file of weights that all start from.

    Raises:
        UsageError: with all that is wrong.
        LtnormError: a data set cannot be prepared.
    """
    known: dict[str, PreparedSet | Preview | None] = {}
    runs: list[tuple[Cell, Recipe, PreparedSet | Preview | None]] = []
    for cell in cells:
        recipe = _concrete(cell.recipe, precision)
        key = recipe.dataset.model_dump_json()
        if key not in known:
            known[key] = _data(recipe, root, data_dir, making)
        data = known[key]
        if data:
            recipe = recipe.model_copy(update={"dataset": data.spec})
        runs.append((cell, recipe, data))
    _check([(recipe, data) for _, recipe, data in runs], pretrained)
    different: dict[tuple[str, int], tuple[Cell, Recipe, PreparedSet | Preview | None]] = {}
    for run in runs:  # what was `auto` can be what others name
        different.setdefault((run[1].fingerprint(), run[1].seed), run)
    taken: dict[Path, str] = {}
    jobs = []
    for cell, recipe, data in different.values():
        first = None
        if recipe.retrain:
            first = _directory(recipe.model_copy(update={"retrain": None}), out, making, taken)
        directory = _directory(recipe, out, making, taken)
        jobs.append(Job(recipe, cell.values, directory, first, data))
    return jobs


def part(jobs: Sequence[Job], text: str) -> list[Job]:
    """Each N-th of the runs, by `I/N`, I from 1: parts are disjoint, and together all.

    Raises:
        UsageError: not such a part.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    i, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise UsageError(f"--part {text}: not I/N with I from 1 to N", "for example --part 2/8")
    return list(jobs[i - 1 :: n])


def _concrete(recipe: Recipe, precision: Precision) -> Recipe:
    found = precision(recipe.device, recipe.train.precision)
    train = recipe.train.model_copy(update={"precision": found})
    return recipe.model_copy(update={"train": train})


def _data(
    recipe: Recipe, root: Path, data_dir: Path, making: "Making | None"
) -> "PreparedSet | Preview | None":
    from ltnorm.data.prepare import prepare, preview

    if making is None:
        return preview(recipe.dataset, root, data_dir)
    return prepare(recipe.dataset, root, data_dir, making)


def _directory(recipe: Recipe, out: Path, making: "Making | None", taken: dict[Path, str]) -> Path:
    """Where a run lies; without claims, where it would after those before it, in `taken`."""
    directory = schema.run_directory(recipe, out, claim=making is not None)
    setting, fingerprint = directory.parent, recipe.fingerprint()
    if taken.setdefault(setting, fingerprint) != fingerprint:
        setting = setting.with_name(f"{setting.name}-{fingerprint[:6]}")
    return setting / directory.name


def _check(
    runs: Sequence[tuple[Recipe, "PreparedSet | Preview | None"]], pretrained: Path | None
) -> None:
    """Check all runs, each distinct model once.

    Raises:
        UsageError: with all that is wrong.
    """
    from ltnorm.training import build, twostage

    errors: dict[str, LtnormError] = {}
    built: set[str] = set()
    for recipe, data in runs:
        sections = (recipe.model, recipe.norm, recipe.loss, recipe.dataset)
        key = json.dumps([section.model_dump(mode="json") for section in sections])
        try:
            if data:
                build.check(recipe, data.counts, data.splits, files=not data.decoded)
                if key not in built:
                    build.build_model(recipe, data.counts, data.image_size, pretrained)
            twostage.check(recipe)
        except LtnormError as error:
            errors.setdefault(error.message, error)
        built.add(key)
    if errors:
        more = f"{len(errors)} mistakes in the sweep: " if len(errors) > 1 else ""
        hints = dict.fromkeys(error.hint for error in errors.values())
        raise UsageError(more + "; ".join(errors), "; ".join(hints))


def doubts(jobs: Sequence[Job]) -> Iterator[str]:
    """What can be meant, and mostly is not."""
    from ltnorm.training.build import doubts as of_run

    yield from dict.fromkeys(doubt for job in jobs for doubt in of_run(job.recipe.train))
