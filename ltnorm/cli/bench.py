"""`ltnorm bench`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from ltnorm.cli import options
from ltnorm.console import Output, grid

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
        str, typer.Option("--baseline", help="The norm that ratios refer to.")
    ] = "bn",
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
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed steps a norm.")] = 20,
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

    `ltnorm bench --model resnet32 --norm bn --norm compound --set norm.dual_path=false`
    """
    from ltnorm import resolve as recipes

    output = Output(quiet=quiet, json=json)
    base = recipes.read(recipe) if recipe else {"model": {"name": DEFAULT_MODEL}}
    overrides = recipes.Overrides(
        flags=options.recipe_flags(context.params),
        sets=set_ or (),
        norms=_norms(norm, base, baseline),
    )
    planned = recipes.resolve(base, overrides, kinds=("norm", "model", "loss"))

    from ltnorm import bench
    from ltnorm.training.build import concrete

    resolved = [concrete(planned_recipe) for planned_recipe in planned]
    first, reason = resolved[0]
    output.note(f"precision {first.train.precision}: {reason}")
    variants = _variants([r for r, _ in resolved], baseline, compile_)
    batch = bench.Batch(first.train.batch_size, image_size, classes)
    rows = bench.measure(variants, batch, rounds, output.note)
    conditions = describe(first, batch, rounds)
    output.product(table(rows, conditions))
    output.document(conditions | {"rows": [dataclasses.asdict(row) for row in rows]})


def _norms(asked: Sequence[str] | None, base: Mapping[str, Any], baseline: str) -> list[str]:
    """Those asked for, or the recipe's, or a few; led by the baseline where it is missing."""
    section = base.get("norm")
    named = section.get("name") if isinstance(section, Mapping) else None
    norms = list(asked or ([str(named)] if named else DEFAULT_NORMS))
    return norms if baseline in norms else [baseline, *norms]


def _variants(recipes: Sequence[Any], baseline: str, compiled: bool) -> list[Any]:
    """A variant a recipe, each followed by its compiled twin if that is wanted."""
    from ltnorm.bench import Variant
    from ltnorm.errors import UsageError, did_you_mean

    labels = {}
    for recipe in recipes:
        changed = recipe.norm.changes()
        labels[recipe.norm.name] = recipe.norm.name + (f" ({changed})" if changed else "")
    if baseline not in labels:  # `--set norm.name=...` chose others
        raise UsageError(f"no row '{baseline}' to compare with", did_you_mean(baseline, labels))
    variants = []
    for recipe in {recipe.norm.name: recipe for recipe in recipes}.values():
        label, against = labels[recipe.norm.name], labels[baseline]
        variants.append(Variant(label, recipe, against))
        if compiled:
            variants.append(Variant(f"{label} compiled", recipe, against, compiled=True))
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
    title = (
        f"{c['model']} · batch {c['batch_size']} · {c['image_size']}x{c['image_size']} · "
        f"{c['classes']} classes · {c['precision']} · {c['memory_format']}"
    )
    of = against.pop() if len(against) == 1 else "the row named"
    legend = (
        f"time: median over {c['rounds']} rounds against {of}, ± half the interquartile range of "
        "the ratio within a round. train: a step with backward and the optimizer; eval: a "
        "forward; memory: peak of a step beyond weights, momentum and batch. "
        f"{c['device']}, torch {c['torch']}."
    )
    return Group(Text(title, style="bold"), grid(columns, left), Text(legend, style="dim"))


def _ratio(row: Any, what: str) -> str:
    low, high = getattr(row, f"{what}_ratio_low"), getattr(row, f"{what}_ratio_high")
    return f"{getattr(row, f'{what}_ratio'):.2f}x ± {(high - low) / 2:.2f}"


def _memory(row: Any) -> str:
    if row.memory_mib is None:
        return "–"
    return f"{row.memory_mib:,.1f} MiB ({row.memory_ratio:.2f}x)"
