"""`ltnorm prepare`."""

from typing import Annotated, Any

import typer

from ltnorm.cli import options
from ltnorm.console import Output, grid

# The bar of the largest class, and what stands beside it.
_BAR, _BESIDE = 32, 48


def command(
    context: typer.Context,
    dataset: options.Dataset = None,
    ratio: options.Ratio = None,
    profile: options.Profile = None,
    n_max: options.NMax = None,
    val: options.Val = None,
    class_order: options.ClassOrder = None,
    data_seed: options.DataSeed = None,
    groups: options.Groups = None,
    set_: options.Set = None,
    recipe: options.Recipe = None,
    root: options.Root = options.ROOT,
    data_dir: options.DataDir = options.DATA_DIR,
    download: Annotated[
        bool,
        typer.Option("--download/--no-download", help="Whether raw data may be downloaded."),
    ] = True,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Build a long-tailed image set and show its classes.

    The only command that may use the network. A second call finds the set and checks it.

    `ltnorm prepare --dataset cifar10 --ratio 100`
    """
    from ltnorm import resolve as recipes
    from ltnorm.data import prepare as preparing
    from ltnorm.data import report_groups
    from ltnorm.data.datasets import MissingData

    output = Output(quiet=quiet, json=json)
    base = recipes.read(recipe or options.default_recipe(dataset, set_ or ()))
    overrides = recipes.Overrides(options.recipe_flags(context.params), set_ or ())
    wanted = recipes.resolve(base, overrides, kinds=["dataset"])[0]
    spec = wanted.dataset
    try:
        prepared = preparing.prepare(spec, root, data_dir, force=force)
    except MissingData:
        if not download:
            raise
        output.note(f"downloading {spec.name} into {root}")
        prepared = preparing.prepare(spec, root, data_dir, download=True, force=force)
    if not prepared.fresh:
        prepared.check()
    scheme, members = report_groups(prepared.counts, wanted.eval.groups)
    output.product(_table(prepared, scheme, members, output.out.width))
    done = "written to" if prepared.fresh else "is up to date in"
    train, test = sum(prepared.counts), "and the whole test set"
    output.note(f"{prepared.set_id}: {train:,} training images {test}, {done} {prepared.path}")
    output.document(_document(prepared, scheme, members))


def _table(prepared: Any, scheme: str, groups: list[str], width: int) -> Any:
    from rich.console import Group
    from rich.text import Text

    most = max(prepared.counts)
    # At least one mark, so that a class of the tail does not look empty.
    longest = max(_BAR // 4, min(_BAR, width - _BESIDE))
    bars = ["█" * max(1, round(longest * count / most)) for count in prepared.counts]
    columns = [
        ["class", *map(str, range(len(bars)))],
        ["name", *prepared.classes],
        ["images", *(f"{count:,}" for count in prepared.counts)],
        ["group", *groups],
        ["", *bars],
    ]
    table = grid(columns, left=(1, 3, 4))
    sizes = ", ".join(f"{g} {groups.count(g)}" for g in ("head", "medium", "tail"))
    counts = prepared.counts
    total = f"{sum(counts):,} training images, {max(counts):,} to {min(counts):,} a class"
    title = Text(prepared.set_id, style="bold")
    return Group(title, table, Text(f"{total}; classes by {scheme}: {sizes}", style="dim"))


def _document(prepared: Any, scheme: str, groups: list[str]) -> dict[str, Any]:
    return {
        "set_id": prepared.set_id,
        "path": str(prepared.path),
        "fresh": prepared.fresh,
        "index_sha256": prepared.index_sha256,
        "classes": prepared.classes,
        "counts": prepared.counts,
        "group_scheme": scheme,
        "groups": groups,
    }
