"""`ltnorm train`."""

import dataclasses
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from ltnorm.cli import options
from ltnorm.console import Output
from ltnorm.errors import LtnormError


class Interrupted(LtnormError):
    """The user or the system stopped the command."""

    def __init__(self, exit_code: int, done: int, planned: int, force: bool) -> None:
        again = "type the same command again: finished runs are kept and skipped"
        if force:
            again = (
                "with --force the same command repeats all; without it, earlier results are kept"
            )
        super().__init__(f"interrupted, {done} of {planned} runs finished", again)
        self.exit_code = exit_code


class _Terminated(Exception):
    """SIGTERM arrived."""


def command(
    context: typer.Context,
    norm: Annotated[
        list[str] | None,
        typer.Option("--norm", help="Norm, may be repeated; see `ltnorm list norms`."),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="Seed of init and order, may be repeated.")
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Several seeds: 0-4 or 1,3.")] = None,
    recipe: options.Recipe = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Backbone; see `ltnorm list models`.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", help="Loss; see `ltnorm list losses`.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Images a step.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="auto, fp32 or bf16.")
    ] = None,
    device: options.Device = None,
    set_: options.Set = None,
    eval_split: Annotated[
        str | None,
        typer.Option("--eval-split", help="test, or val: then the test set is never opened."),
    ] = None,
    tag: Annotated[
        str | None, typer.Option("--tag", help="A word that tells this experiment apart.")
    ] = None,
    dataset: options.Dataset = None,
    ratio: options.Ratio = None,
    profile: options.Profile = None,
    n_max: options.NMax = None,
    val: options.Val = None,
    class_order: options.ClassOrder = None,
    data_seed: options.DataSeed = None,
    groups: options.Groups = None,
    root: options.Root = options.ROOT,
    data_dir: options.DataDir = options.DATA_DIR,
    out: options.Out = options.OUT,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train norms and seeds under the same budget.

    Without --dataset it runs on embedded synthetic data. A finished run is skipped, unless
    --force. Each run ends with the evaluation of its last epoch.

    `ltnorm train --norm bn --norm compound --ratio 100 --seeds 0-2`
    """
    from ltnorm import recipe as recipes
    from ltnorm.reporting import schema

    output = Output(quiet=quiet, json=json)
    base = recipes.read(recipe or options.default_recipe(dataset, set_ or ()))
    overrides = recipes.Overrides(
        flags=options.recipe_flags(context.params),
        sets=set_ or (),
        norms=norm or (),
        seeds=[*(seed or []), *(options.parse_seeds(seeds) if seeds is not None else [])],
    )
    done: dict[Path, Any] = {}
    planned: list[Any] = []
    before = signal.signal(signal.SIGTERM, _on_terminate)
    try:
        planned += recipes.resolve(base, overrides)
        schema.check_out(out)
        _run_all(planned, done, root, data_dir, out, force, output)
    except (KeyboardInterrupt, _Terminated) as stop:
        code = 143 if isinstance(stop, _Terminated) else 130
        raise Interrupted(code, len(done), len(planned), force) from stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_all(
    planned: list[Any],
    done: dict[Path, Any],
    root: Path,
    data_dir: Path,
    out: Path,
    force: bool,
    output: Output,
) -> None:
    """Run what is not finished, go on after a failed run, and print all that is finished."""
    from ltnorm.data.prepare import prepare
    from ltnorm.reporting import schema
    from ltnorm.training import run as running

    resolved = [running.concrete(recipe) for recipe in planned]
    output.note(f"precision {resolved[0][0].train.precision}: {resolved[0][1]}")
    data = prepare(planned[0].dataset, root, data_dir)
    for recipe, _ in resolved:
        running.check(recipe, data)
    failures: list[LtnormError] = []
    for recipe, _ in resolved:
        try:
            directory = schema.run_directory(recipe, out)
            if not force and (result := _finished(directory, recipe, data, output)):
                done[directory] = result
            else:
                done[directory] = running.run(recipe, data, out, output)
        except LtnormError as error:
            failures.append(error)
            output.warn(f"{recipe.norm.name} seed {recipe.seed} failed: {error.message}")
    _show(done, output)
    if failures:
        more = f" ({len(failures)} of {len(resolved)} runs failed)" if len(resolved) > 1 else ""
        raise LtnormError(failures[0].message + more, failures[0].hint)


def _finished(directory: Path, recipe: Any, data: Any, output: Output) -> Any | None:
    """The result of a run that need not be repeated: of this very recipe, on these images."""
    from ltnorm.reporting import schema

    if not schema.finished(directory):
        return None
    result = schema.read_result(directory / schema.RESULT)
    if result.fingerprint != recipe.fingerprint() or result.index_sha256 != data.index_sha256:
        output.warn(f"{directory} holds the result of other images or settings: repeating it")
        return None
    output.note(f"{directory} is finished; --force repeats it")
    return result


def _on_terminate(*_: Any) -> None:
    raise _Terminated


def _show(done: dict[Path, Any], output: Output) -> None:
    from ltnorm.reporting.compare import compare
    from ltnorm.reporting.tables import table

    if done:
        output.product(table(compare(done.values()), output.out.width))
        for directory in done:
            output.product(str(directory))
    rows = [{"directory": str(d)} | dataclasses.asdict(result) for d, result in done.items()]
    output.document({"runs": rows})
