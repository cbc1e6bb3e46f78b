"""Flags that mean the same in every command, and the recipes that they make."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ltnorm.errors import UsageError

Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Data set; see `ltnorm list datasets`.")
]
Ratio = Annotated[float | None, typer.Option("--ratio", help="Largest class over smallest.")]
Profile = Annotated[
    str | None, typer.Option("--profile", help="Shape of the tail: exp, step or pareto.")
]
NMax = Annotated[int | None, typer.Option("--n-max", help="Images of the largest class (all).")]
Val = Annotated[int | None, typer.Option("--val", help="Hold out N images a class for validation.")]
ClassOrder = Annotated[
    str | None,
    typer.Option("--class-order", help="Which class is the head: label, reversed, seeded."),
]
DataSeed = Annotated[int | None, typer.Option("--data-seed", help="Seed of which images are kept.")]
Groups = Annotated[
    str | None,
    typer.Option("--groups", help="How classes are reported: auto, shots or thirds."),
]
Root = Annotated[Path, typer.Option("--root", help="Where the raw data lies or is downloaded to.")]
DataDir = Annotated[Path, typer.Option("--data-dir", help="Where prepared sets lie.")]
Out = Annotated[Path, typer.Option("--out", help="Where results are written.")]
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", help="A recipe, by name or path; see `ltnorm list recipes`."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any key of the recipe: `--set norm.components=3`."),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again if it is done.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the result.")]

ROOT, DATA_DIR, OUT = Path("data/raw"), Path("data"), Path("results")


def parse_seeds(text: str) -> list[int]:
    """`0-4`, `1,3,5` or `0-2,7` as a list of seeds.

    Raises:
        UsageError: anything else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        try:
            first, last = int(low), int(high) if dash else int(low)
        except ValueError:
            first, last = 1, 0
        if first > last or last - first > 9999:
            raise UsageError(f"--seeds '{text}' is not a list of seeds", "like 0-4, or 1,3,5")
        seeds += range(first, last + 1)
    return seeds


def data_flags(
    dataset: str | None,
    ratio: float | None,
    profile: str | None,
    n_max: int | None,
    val: int | None,
    class_order: str | None,
    data_seed: int | None,
    groups: str | None,
) -> dict[str, Any]:
    """The flags that say which images, and in which groups, by their path in the recipe."""
    return given(
        {
            "dataset.name": dataset,
            "dataset.ratio": ratio,
            "dataset.profile": profile,
            "dataset.n_max": n_max,
            "dataset.val": val,
            "dataset.class_order": class_order,
            "dataset.data_seed": data_seed,
            "eval.groups": groups,
        }
    )


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given."""
    return {key: value for key, value in flags.items() if value is not None}


def default_recipe(dataset: str | None) -> str:
    """The recipe that training starts from when none is named."""
    from ltnorm import registry

    return registry.lookup("dataset", dataset or "synthetic").recipe
