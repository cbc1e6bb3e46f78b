"""`ltnorm bench`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from ltnorm.cli import options
from ltnorm.console import Output, grid
from ltnorm.errors import UsageError, did_you_mean

BASELINE = "bn"
DEFAULT_MODEL = "resnet8"
DEFAULT_NORMS = ("bn", "gn", "split", "compound")


def command(
    context: typer.Context,
    norm: Annotated[
        list[str] | None,
        typer.Option(
            "--norm", help=f"Norm, may be repeated (the recipe's, or {', '.join(DEFAULT_NORMS)})."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help=f"The norm that ratios refer to ({BASELINE})."),
    ] = None,
    peer: Annotated[
        bool,
        typer.Option("--peer", help="Whole training, data included, against the published loop."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help=f"Backbone; see `ltnorm list models` ({DEFAULT_MODEL})."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Images a step (128).")
    ] = None,
    image_size: Annotated[
        int, typer.Option("--image-size", min=1, help="Height and width of the images.")
    ] = 32,
    classes: Annotated[int, typer.Option("--classes", min=2, help="Classes.")] = 10,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Timed steps, or turns, a norm.")
    ] = 20,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Add a row a norm for torch.compile.")
    ] = False,
    loss: options.Loss = None,
    precision: options.Precision = None,
    device: options.Device = None,
    recipe: options.Recipe = None,
    set_: options.Set = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what the norms cost: time and memory of a training step, time of an evaluation.

    The step is the one that `ltnorm train` makes (compound: both paths), on noise, without
    loading data. The norms take turns, so that ratios hold on a busy machine.

    With --peer: images a second of whole training, with loading data, of ltnorm and of the loop
    that papers publish (BN, fp32), and of the least time that this machine could need.

    `ltnorm bench --model resnet32 --norm bn --norm compound --set norm.dual_path=false`
    """
    from ltnorm import resolve as recipes

    output = Output(quiet=quiet, json=json)
    if peer and baseline:
        raise UsageError("--baseline is a norm, and --peer compares with the peer", "leave one out")
    against = None if peer else baseline or BASELINE
    base = recipes.read(recipe) if recipe else {"model": {"name": DEFAULT_MODEL}}
    overrides = recipes.Overrides(
        flags=options.recipe_flags(context.params),
        sets=set_ or (),
        norms=_norms(norm, base, against),
    )
    planned = recipes.resolve(base, overrides, kinds=("norm", "model", "loss"))

    from ltnorm import bench
    from ltnorm.training.build import concrete

    resolved = [concrete(planned_recipe) for planned_recipe in planned]
    first, reason = resolved[0]
    output.note(f"precision {first.train.precision}: {reason}")
    variants = _variants([r for r, _ in resolved], against, compile_)
    batch = bench.Batch(first.train.images_per_step, image_size, classes)
    if peer:
        _race(variants, batch, rounds, output)
        return
    rows = bench.measure(variants, batch, rounds, output.note)
    conditions = describe(first, batch, rounds)
    output.product(table(rows, conditions))
    output.document(conditions | {"rows": [dataclasses.asdict(row) for row in rows]})


def _race(variants: Sequence[Any], batch: Any, rounds: int, output: Output) -> None:
    """Against the peer."""
    from ltnorm import race

    recipe = variants[0].recipe
    if other := race.beyond_the_peer(recipe):
        raise UsageError(
            f"the peer has no {other[0]} like this", "leave it out, or leave out --peer"
        )
    result = race.measure(variants, batch, rounds, output.note)
    found = dataclasses.asdict(result)
    rows = found.pop("rows")
    conditions = describe(recipe, batch, rounds) | found
    output.product(race_table(result, conditions))
    output.document(conditions | {"rows": rows})


def _norms(asked: Sequence[str] | None, base: Mapping[str, Any], baseline: str | None) -> list[str]:
    """Those asked for, or the recipe's, or a few; led by the baseline where it is missing."""
    section = base.get("norm")
    named = section.get("name") if isinstance(section, Mapping) else None
    norms = list(asked or ([str(named)] if named else DEFAULT_NORMS))
    return norms if baseline is None or baseline in norms else [baseline, *norms]


def _variants(recipes: Sequence[Any], baseline: str | None, compiled: bool) -> list[Any]:
    """A variant a recipe, each followed by its compiled twin if that is wanted."""
    from ltnorm.bench import Variant

    labels = {}
    for recipe in recipes:
        changed = recipe.norm.changes()
        labels[recipe.norm.name] = recipe.norm.name + (f" ({changed})" if changed else "")
    if baseline and baseline not in labels:  # `--set norm.name=...` chose others
        raise UsageError(f"no row '{baseline}' to compare with", did_you_mean(baseline, labels))
    variants = []
    for recipe in {recipe.norm.name: recipe for recipe in recipes}.values():
        label = labels[recipe.norm.name]
        against = labels[baseline] if baseline else "peer"
        variants.append(Variant(label, recipe, against))
        if compiled:
            variants.append(Variant(f"{label} compiled", recipe, against, compile=True))
    return variants


def describe(recipe: Any, batch: Any, rounds: int) -> dict[str, Any]:
    """Under what conditions rows were measured: the head of the JSON document."""
    import torch

    from ltnorm import __version__
    from ltnorm.training import device

    where = device.resolve_device(recipe.device)
    layout = device.memory_format(where, recipe.train.precision)
    return {
        "model": recipe.model.name,
        "batch_size": batch.images,
        "image_size": batch.image_size,
        "classes": batch.classes,
        "loss": recipe.loss.name,
        "precision": recipe.train.precision,
        "memory_format": str(layout).removeprefix("torch."),
        "device": device.describe(where),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "torch": torch.__version__,
        "ltnorm": __version__,
    }


def table(rows: Sequence[Any], conditions: dict[str, Any]) -> Any:
    """The rows for people, with what was measured above and what it means below."""
    from rich.console import Group
    from rich.text import Text

    columns = [
        ["norm", *(row.label for row in rows)],
        ["train img/s", *(f"{row.train_images_per_second:,.0f}" for row in rows)],
        ["time", *(_ratio(row, "train") for row in rows)],
        ["eval img/s", *(f"{row.eval_images_per_second:,.0f}" for row in rows)],
        ["time", *(_ratio(row, "eval") for row in rows)],
        ["memory", *(_memory(row) for row in rows)],
    ]
    left = (0,)
    against = {row.against for row in rows}
    if len(against) > 1:
        columns.insert(1, ["against", *(row.against for row in rows)])
        left = (0, 1)
    c = conditions
    of = against.pop() if len(against) == 1 else "the row named"
    legend = (
        f"time: median over {c['rounds']} rounds against {of}, ± half the interquartile range of "
        "the ratio within a round. train: a step with backward and the optimizer; eval: a "
        "forward; memory: peak of a step beyond weights, momentum and batch. "
        f"{c['device']}, torch {c['torch']}."
    )
    title = Text(_title(conditions), style="bold")
    return Group(title, grid(columns, left), Text(legend, style="dim"))


def _title(c: Mapping[str, Any]) -> str:
    return (
        f"{c['model']} · batch {c['batch_size']} · {c['image_size']}x{c['image_size']} · "
        f"{c['classes']} classes · {c['precision']} · {c['memory_format']}"
    )


def race_table(race: Any, conditions: Mapping[str, Any]) -> Any:
    """The rows of a race for people, and below what they mean."""
    from rich.console import Group
    from rich.text import Text

    rows, c = race.rows, conditions
    columns = [
        ["loop", *(row.label for row in rows)],
        ["precision", *(row.precision for row in rows)],
        ["img/s", *(f"{row.images_per_second:,.0f}" for row in rows)],
        ["speed", *(_speed(row) for row in rows)],
        ["arithmetic", *(f"{row.arithmetic_ms:,.2f} ms" for row in rows)],
        ["memory", *(f"{row.memory_ms:,.2f} ms" for row in rows)],
        ["floor img/s", *(f"{row.floor_images_per_second:,.0f}" for row in rows)],
        ["reached", *(f"{row.floor_reached:.0%}" for row in rows)],
    ]
    rates = "; ".join(
        f"{precision} {rate.flops / 1e9:,.0f} GFLOP/s ({rate.by}), {rate.bytes / 1e9:,.1f} GB/s"
        for precision, rate in race.rates.items()
    )
    legend = (
        f"Whole training, loading data included. speed: in those of the peer, medians over "
        f"{c['rounds']} rounds of {race.steps} steps, ± half the interquartile range within a "
        f"round. peer: the published loop, bn, fp32, {race.workers} workers. arithmetic, memory: "
        f"what a step needs at least on this machine; the longer is the floor. Measured: {rates}. "
        f"{c['device']}, torch {c['torch']}."
    )
    title = Text(_title(conditions), style="bold")
    return Group(title, grid(columns, (0, 1)), Text(legend, style="dim"))


def _speed(row: Any) -> str:
    return f"{row.speed:.2f}x ± {(row.speed_high - row.speed_low) / 2:.2f}"


def _ratio(row: Any, what: str) -> str:
    low, high = getattr(row, f"{what}_ratio_low"), getattr(row, f"{what}_ratio_high")
    return f"{getattr(row, f'{what}_ratio'):.2f}x ± {(high - low) / 2:.2f}"


def _memory(row: Any) -> str:
    if row.memory_mib is None:
        return "–"
    return f"{row.memory_mib:,.1f} MiB ({row.memory_ratio:.2f}x)"
