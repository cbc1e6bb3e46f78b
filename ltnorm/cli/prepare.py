"""`ltnorm prepare`."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ltnorm.cli import options
from ltnorm.console import Output, grid
from ltnorm.errors import UsageError

# The bar of the largest class, and what stands beside it.
_BAR, _BESIDE = 32, 48
# Of more classes than this, the table shows the largest and the smallest ones.
_MOST_ROWS = 100


def _list(split: str) -> Any:
    return typer.Option(f"--list-{split}", help=f"File of `path label` lines: the {split} split.")


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
    name: options.Name = None,
    cache_size: options.CacheSize = None,
    list_train: Annotated[Path | None, _list("train")] = None,
    list_val: Annotated[Path | None, _list("val")] = None,
    list_test: Annotated[Path | None, _list("test")] = None,
    on_bad: Annotated[
        str, typer.Option("--on-bad", help="Images that do not decode: fail, or skip them.")
    ] = "fail",
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the long tail and sample images: .png, .pdf or .svg."),
    ] = None,
    set_: options.Set = None,
    recipe: options.Recipe = None,
    root: options.Root = options.ROOT,
    data_dir: options.DataDir = options.DATA_DIR,
    workers: options.Workers = None,
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
    `ltnorm prepare --dataset folder --root photos/`
    """
    from ltnorm import resolve as recipes
    from ltnorm.data import report_groups
    from ltnorm.data.making import Making

    output = Output(quiet=quiet, json=json)
    if on_bad not in ("fail", "skip"):
        raise UsageError(f"--on-bad {on_bad}: no such choice", "choose from fail, skip")
    if plot:
        from ltnorm.reporting import plots

        plots.check(plot)
    base = recipes.read(recipe or options.default_recipe(dataset, set_ or ()))
    overrides = recipes.Overrides(options.recipe_flags(context.params), set_ or ())
    wanted = recipes.resolve(base, overrides, kinds=["dataset"])[0]
    lists = {"train": list_train, "val": list_val, "test": list_test}
    making = Making(
        force=force,
        lists={split: file for split, file in lists.items() if file},
        on_bad=on_bad,
        workers=workers or None,
        tell=output.note,
        counting=output.counting,
    )
    prepared = _prepare(wanted.dataset, root, data_dir, making, download, output)
    scheme, members = report_groups(prepared.counts, wanted.eval.groups)
    output.product(_table(prepared, scheme, members, output.out.width))
    if plot:
        _plot(plot, prepared, members)
        output.note(f"figure written to {plot}")
    for note in prepared.manifest["notes"]:
        output.note(f"note: {note}")
    done = "written to" if prepared.fresh else "is up to date in"
    sizes = ", ".join(f"{n:,} {split}" for split, n in prepared.sizes.items())
    kind = f"decoded, {prepared.image_size} pixels" if prepared.decoded else "files"
    output.note(f"{prepared.set_id}: {sizes} images ({kind}), {done} {prepared.path}")
    output.document(_document(prepared, scheme, members))


def _prepare(
    spec: Any, root: Path, data_dir: Path, making: Any, download: bool, output: Output
) -> Any:
    """The prepared set, downloaded if it must be and may be; one that was found is checked."""
    from ltnorm.data import prepare as preparing
    from ltnorm.data.datasets import MissingData

    try:
        prepared = preparing.prepare(spec, root, data_dir, making)
    except MissingData:
        if not download:
            raise
        output.note(f"downloading {spec.name} into {root}")
        prepared = preparing.prepare(spec, root, data_dir, replace(making, download=True))
    if not prepared.fresh:
        prepared.check()
    return prepared


def _table(prepared: Any, scheme: str, groups: list[str], width: int) -> Any:
    from rich.console import Group
    from rich.text import Text

    from ltnorm.reporting import longtail

    counts = prepared.counts
    known = longtail.statistics(counts)
    sizes = ", ".join(f"{g} {groups.count(g)}" for g in ("head", "medium", "tail"))
    lines = [
        f"{known.images:,} training images of {known.classes:,} classes, {known.n_max:,} to "
        f"{known.n_min:,} a class: ratio {known.ratio:,.4g}, Gini {known.gini:.2f}",
        f"classes by {scheme}: {sizes}",
    ]
    parts = [Text(prepared.set_id, style="bold"), _class_table(prepared, groups, width)]
    if prepared.spec.profile == "natural":
        parts.append(longtail.chart(counts, groups, width))
    return Group(*parts, *(Text(line, style="dim") for line in lines))


def _class_table(prepared: Any, groups: list[str], width: int) -> Any:
    """A row a class; of many classes the largest and the smallest ones."""
    from ltnorm.reporting import longtail

    counts, classes = prepared.counts, prepared.classes
    rows: Sequence[int | None] = range(len(counts))
    if len(counts) > _MOST_ROWS:
        largest, smallest = longtail.ends(counts)
        rows = [*largest, None, *smallest]
    # At least one mark, so that a class of the tail does not look empty.
    longest = max(_BAR // 4, min(_BAR, width - _BESIDE))
    cells = [
        ("...", "", "", "", "")
        if i is None
        else (
            str(i),
            classes[i],
            f"{counts[i]:,}",
            groups[i],
            "█" * max(1, round(longest * counts[i] / max(counts))),
        )
        for i in rows
    ]
    headings = ("class", "name", "images", "group", "")
    return grid(
        [[h, *column] for h, column in zip(headings, zip(*cells, strict=True), strict=True)],
        left=(1, 3, 4),
    )


def _plot(path: Path, prepared: Any, groups: list[str]) -> None:
    from ltnorm.data.sample import sample
    from ltnorm.reporting import longtail

    images, counts, seed = prepared.open("train"), prepared.counts, prepared.spec.data_seed
    pictures = sample(images, longtail.choose(images.labels, counts, seed))
    title = prepared.set_id
    longtail.plot(path, title, prepared.classes, counts, groups, pictures, seed)


def _document(prepared: Any, scheme: str, groups: list[str]) -> dict[str, Any]:
    from ltnorm.reporting import longtail

    return {
        "set_id": prepared.set_id,
        "path": str(prepared.path),
        "fresh": prepared.fresh,
        "content": prepared.manifest.get("content"),
        "index_sha256": prepared.index_sha256,
        "decoded": prepared.decoded,
        "image_size": prepared.image_size,
        "images": prepared.sizes,
        **{k: v for k, v in asdict(longtail.statistics(prepared.counts)).items() if k != "images"},
        "notes": prepared.manifest["notes"],
        "classes": prepared.classes,
        "counts": prepared.counts,
        "group_scheme": scheme,
        "groups": groups,
    }
