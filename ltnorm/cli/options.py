"""Flags that mean the same in every command, and the recipes that they make."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ltnorm.errors import UsageError
from ltnorm.registry import DEFAULT_ROOT, lookup

Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Data set; see `ltnorm list datasets`.")
]
Ratio = Annotated[float | None, typer.Option("--ratio", help="Largest class over smallest.")]
Profile = Annotated[
    str | None, typer.Option("--profile", help="Shape of the tail: exp, step, pareto or natural.")
]
NMax = Annotated[int | None, typer.Option("--n-max", help="Images of the largest class (all).")]
Val = Annotated[int | None, typer.Option("--val", help="Hold out N images a class for validation.")]
ClassOrder = Annotated[
    str | None,
    typer.Option("--class-order", help="The head: by label, reversed, seeded or frequency."),
]
DataSeed = Annotated[int | None, typer.Option("--data-seed", help="Seed of which images are kept.")]
Groups = Annotated[
    str | None,
    typer.Option("--groups", help="How classes are reported: auto, shots or thirds."),
]
Name = Annotated[str | None, typer.Option("--name", help="What a folder is called (its own name).")]
CacheSize = Annotated[
    int | None,
    typer.Option("--cache-size", help="Decode files once, to squares of so many pixels."),
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
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        max=1024,
        help="Processes that decode image files (all cores; half of them where the CPU trains).",
    ),
]
Model = Annotated[str | None, typer.Option("--model", help="Backbone; see `ltnorm list models`.")]
Loss = Annotated[str | None, typer.Option("--loss", help="Loss; see `ltnorm list losses`.")]
Sampler = Annotated[
    str | None, typer.Option("--sampler", help="Sampler; see `ltnorm list samplers`.")
]
Precision = Annotated[str | None, typer.Option("--precision", help="auto, fp32 or bf16.")]
Tag = Annotated[str | None, typer.Option("--tag", help="A word that tells this experiment apart.")]
Log = Annotated[
    str | None,
    typer.Option("--log", help="tensorboard: also write each epoch into the run's directory."),
]
CheckpointSteps = Annotated[
    int | None,
    typer.Option(
        "--checkpoint-steps",
        min=1,
        help="Keep the state after so many steps, too (after each epoch).",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what would be run and where, and do nothing."),
]
Force = Annotated[bool, typer.Option("--force", help="Do it again if it is done.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the result.")]

# A command's parameter -> the key of the recipe that it sets.
RECIPE_FLAGS = {
    "dataset": "dataset.name",
    "ratio": "dataset.ratio",
    "profile": "dataset.profile",
    "n_max": "dataset.n_max",
    "val": "dataset.val",
    "class_order": "dataset.class_order",
    "data_seed": "dataset.data_seed",
    "name": "dataset.title",
    "cache_size": "dataset.cache_size",
    "groups": "eval.groups",
    "eval_split": "eval.split",
    "model": "model.name",
    "loss": "loss.name",
    "sampler": "sampler.name",
    "epochs": "train.epochs",
    "steps": "train.steps",
    "seconds": "train.seconds",
    "optimizer": "train.optimizer",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "precision": "train.precision",
    "stack_seeds": "train.stack",
    "tag": "tag",
    "device": "device",
    "workers": "workers",
}
ROOT, DATA_DIR, OUT = DEFAULT_ROOT, Path("data"), Path("results")


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


def recipe_flags(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a command that were given, by their dotted path in the recipe."""
    return {
        path: parameters[name]
        for name, path in RECIPE_FLAGS.items()
        if parameters.get(name) is not None
    }


def default_recipe(dataset: str | None, sets: Sequence[str]) -> str:
    """The recipe that training starts from when none is named: that of the data set."""
    named = [item.partition("=")[2] for item in sets if item.startswith("dataset.name=")]
    dataset = named[-1] if named else dataset
    return lookup("dataset", dataset or "synthetic").recipe
