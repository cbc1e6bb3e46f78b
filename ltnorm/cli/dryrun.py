"""`ltnorm train --dry-run`: what would be run, on how many images, and where."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ltnorm.console import Output


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run that would be made."""

    directory: str
    state: str
    norm: str
    seed: int
    fingerprint: str
    parameters: int


def show(
    recipes: Sequence[Any], root: Path, data_dir: Path, out: Path, force: bool, output: Output
) -> None:
    """Print the resolved recipe, the counts, and the directory of each run; write nothing."""
    from ltnorm.data.prepare import preview
    from ltnorm.training import build

    recipes = [build.concrete(recipe)[0] for recipe in recipes]
    first = recipes[0]
    known = preview(first.dataset, root, data_dir)
    counts, image_size = known or ([1] * 10, 32)
    if known:
        for recipe in recipes:
            build.check(recipe, counts, ["train", "test", *(["val"] if first.dataset.val else [])])
    runs = _runs(recipes, counts, image_size, out, force)
    output.product(_recipe_text(recipes))
    output.product(_counts_text(first, counts if known else None))
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
    recipes: Sequence[Any], counts: list[int], image_size: int, out: Path, force: bool
) -> list[Planned]:
    from ltnorm.reporting import schema
    from ltnorm.training import build

    parameters: dict[str, int] = {}
    runs = []
    for recipe in recipes:
        fingerprint = recipe.fingerprint()
        if fingerprint not in parameters:
            model = build.build_model(recipe, counts, image_size)
            parameters[fingerprint] = sum(p.numel() for p in model.parameters())
        directory = schema.run_directory(recipe, out, claim=False)
        state = "new"
        if schema.finished(directory):
            state = "finished, would be repeated" if force else "finished, would be skipped"
        runs.append(
            Planned(
                str(directory),
                state,
                recipe.norm.name,
                recipe.seed,
                fingerprint,
                parameters[fingerprint],
            )
        )
    return runs


def _recipe_text(recipes: Sequence[Any]) -> str:
    """The first recipe whole, and of the other norms what differs."""
    of_norm: dict[str, Any] = {}
    for recipe in recipes:
        of_norm.setdefault(recipe.norm.name, recipe)
    first, *others = of_norm.values()
    parts = [first.to_yaml()]
    for recipe in others:
        section = yaml.safe_dump({"norm": recipe.model_dump(mode="json")["norm"]}, sort_keys=False)
        parts.append(f"# {recipe.norm.name} in its place\n{section}")
    return "\n".join(parts)


def _counts_text(recipe: Any, counts: list[int] | None) -> str:
    from ltnorm.data import report_groups

    if counts is None:
        return f"counts: known once {recipe.dataset.name} is there (`ltnorm prepare`)\n"
    scheme, groups = report_groups(counts, recipe.eval.groups)
    sizes = ", ".join(f"{g} {groups.count(g)}" for g in ("head", "medium", "tail"))
    most = 20
    shown = " ".join(map(str, counts[:most])) + (" ..." if len(counts) > most else "")
    return (
        f"{sum(counts):,} training images of {len(counts)} classes: {shown}\n"
        f"classes by {scheme}: {sizes}\n"
    )


def _line(run: Planned) -> str:
    return f"{run.directory}  {run.parameters:,} parameters, {run.state}"
