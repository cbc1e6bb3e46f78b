"""`--dry-run` of training: what would be run, on how many images, and where."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ltnorm.console import Output


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run that would be made."""

    directory: str
    state: str
    norm: str
    retrain: str | None
    seed: int
    fingerprint: str
    parameters: int


def show(
    planned: Sequence[tuple[Any, Path]],
    root: Path,
    data_dir: Path,
    force: bool,
    output: Output,
    pretrained: Path | None = None,
    firsts: Sequence[Path] | None = None,
) -> None:
    """Print the resolved recipe, the counts, and the directory of each run; write nothing.

    `planned` are recipes, each with the tree that its results would go to; `firsts` are the
    finished runs that their second stages start from, where these are not of that tree.
    """
    from ltnorm.data.prepare import preview
    from ltnorm.training import build, twostage

    planned = [(build.concrete(recipe)[0], out) for recipe, out in planned]
    known = preview(planned[0][0].dataset, root, data_dir)
    size = planned[0][0].dataset.options.get("image_size", 32)
    counts, image_size = (known.counts, known.image_size) if known else ([1] * 10, size)
    if known:
        planned = [(r.model_copy(update={"dataset": known.spec}), out) for r, out in planned]
    recipes = [recipe for recipe, _ in planned]
    first = recipes[0]
    for recipe in recipes:
        twostage.check(recipe)
        if known:
            build.check(recipe, counts, known.splits, files=not known.decoded)
    build_model = partial(
        build.build_model, counts=counts, image_size=image_size, pretrained=pretrained
    )
    runs = list(_runs(planned, build_model, force, firsts))
    output.product(_recipe_text(recipes))
    output.product(_counts_text(first, counts) if known else _unknown_text(first))
    for run in runs:
        output.product(_line(run))
    output.document(
        {
            "recipes": [recipe.model_dump(mode="json") for recipe in recipes],
            "counts": counts if known else None,
            "runs": [dataclasses.asdict(run) for run in runs],
        }
    )


def _runs(
    planned: Sequence[tuple[Any, Path]],
    build_model: Callable[[Any], Any],
    force: bool,
    firsts: Sequence[Path] | None,
) -> Iterator[Planned]:
    """All runs in their order, the first of two stages before the second unless it is given."""
    from ltnorm.reporting import schema
    from ltnorm.training.twostage import first_stage

    parameters: dict[str, int] = {}
    for i, (recipe, out) in enumerate(planned):
        stages, first = [recipe], firsts[i] if firsts else None
        if recipe.retrain and not first:
            stages.insert(0, first_stage(recipe))
            first = schema.run_directory(stages[0], out, claim=False)
        for stage in stages:
            fingerprint = stage.fingerprint()
            if fingerprint not in parameters:
                weights = build_model(stage).parameters()
                parameters[fingerprint] = sum(p.numel() for p in weights)
            directory = schema.run_directory(stage, out, claim=False)
            yield Planned(
                str(directory),
                _state(directory, first if stage.retrain else None, force),
                stage.norm.name,
                stage.retrain.method if stage.retrain else None,
                stage.seed,
                fingerprint,
                parameters[fingerprint],
            )


def _state(directory: Path, first: Path | None, force: bool) -> str:
    from ltnorm.reporting import schema
    from ltnorm.training.twostage import is_stale

    if not schema.finished(directory):
        return "new"
    result = schema.read_result(directory / schema.RESULT)  # a damaged one would fail the run
    if force:
        return "finished, would be repeated"
    if first and is_stale(result, first):
        return "of another first stage, would be repeated"
    return "finished, would be skipped"


def _recipe_text(recipes: Sequence[Any]) -> str:
    """The first recipe whole, and of the other norms what differs."""
    import yaml

    of_norm: dict[str, Any] = {}
    for recipe in recipes:
        of_norm.setdefault(recipe.norm.name, recipe)
    first, *others = of_norm.values()
    parts = [first.to_yaml()]
    for recipe in others:
        section = yaml.safe_dump({"norm": recipe.model_dump(mode="json")["norm"]}, sort_keys=False)
        parts.append(f"# {recipe.norm.name} in its place\n{section}")
    return "\n".join(parts)


def _unknown_text(recipe: Any) -> str:
    return f"images a class: known once {recipe.dataset.name} is there (`ltnorm prepare`)\n"


def _counts_text(recipe: Any, counts: list[int]) -> str:
    """Images a class, how classes are grouped, and their weights in the loss."""
    from ltnorm.data import report_groups
    from ltnorm.losses import class_weights

    scheme, groups = report_groups(counts, recipe.eval.groups)
    sizes = ", ".join(f"{g} {groups.count(g)}" for g in ("head", "medium", "tail"))
    lines = [
        f"{sum(counts):,} training images of {len(counts)} classes: {_few(counts)}",
        f"classes by {scheme}: {sizes}",
    ]
    loss = recipe.loss
    if loss.class_weights != "none":
        weights = class_weights(counts, loss.class_weights, loss.beta).tolist()
        start = f" after {loss.drw_start:.0%} of the training" if loss.schedule == "drw" else ""
        values = _few([f"{weight:.3g}" for weight in weights])
        lines.append(f"class weights, {loss.class_weights}{start}: {values}")
    return "\n".join([*lines, ""])


def _few(values: Sequence[Any], most: int = 20) -> str:
    return " ".join(map(str, values[:most])) + (" ..." if len(values) > most else "")


def _line(run: Planned) -> str:
    return f"{run.directory}  {run.parameters:,} parameters, {run.state}"
