"""Flags that mean the same in every command, and the recipes that they make."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ltnorm.errors import UsageError

DATA, TRAINING, PLACES, PRINTING = "Data", "Training", "Places", "Printing"


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


Dataset = Annotated[
    str | None, _option("--dataset", help="Data set; see `ltnorm list datasets`.", panel=DATA)
]
Ratio = Annotated[float | None, _option("--ratio", help="Largest class over smallest.", panel=DATA)]
Profile = Annotated[
    str | None, _option("--profile", help="Shape of the tail: exp, step or pareto.", panel=DATA)
]
NMax = Annotated[
    int | None, _option("--n-max", help="Images of the largest class (all).", panel=DATA)
]
Val = Annotated[
    int | None, _option("--val", help="Hold out N images a class for validation.", panel=DATA)
]
ClassOrder = Annotated[
    str | None,
    _option("--class-order", help="Which class is the head: label, reversed, seeded.", panel=DATA),
]
DataSeed = Annotated[
    int | None, _option("--data-seed", help="Seed of which images are kept.", panel=DATA)
]
Groups = Annotated[
    str | None,
    _option("--groups", help="How classes are reported: auto, shots or thirds.", panel=DATA),
]
Root = Annotated[
    Path, _option("--root", help="Where the raw data lies or is downloaded to.", panel=PLACES)
]
DataDir = Annotated[Path, _option("--data-dir", help="Where prepared sets lie.", panel=PLACES)]
Out = Annotated[Path, _option("--out", help="Where results are written.", panel=PLACES)]
Recipe = Annotated[
    str | None,
    _option(
        "--recipe", help="A recipe, by name or path; see `ltnorm list recipes`.", panel=TRAINING
    ),
]
Set = Annotated[
    list[str] | None,
    _option("--set", help="Any key of the recipe: `--set norm.components=3`.", panel=TRAINING),
]
Device = Annotated[
    str | None, _option("--device", help="auto, cpu, cuda, cuda:1 or mps.", panel=TRAINING)
]
Force = Annotated[bool, _option("--force", help="Do it again if it is done.", panel=PRINTING)]
Json = Annotated[bool, _option("--json", help="One JSON document on stdout.", panel=PRINTING)]
Quiet = Annotated[bool, _option("--quiet", "-q", help="Nothing but the result.", panel=PRINTING)]

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
