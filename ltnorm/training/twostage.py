"""The second stage: another classifier on the features of a finished run.

Every method ends in the same network with another classifier of the same kind, so that the result
is loaded, evaluated and inspected as any other run. The methods are those of Kang et al. 2020,
"Decoupling Representation and Classifier for Long-Tailed Recognition" (arXiv 1910.09217).
"""

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

from ltnorm.console import Output
from ltnorm.data.prepared import PreparedSet
from ltnorm.errors import LtnormError, UsageError
from ltnorm.evaluation import posthoc
from ltnorm.models import classifier, replace_classifier
from ltnorm.norms import norm_layer, norm_layers
from ltnorm.norms.recalibrate import running_layers
from ltnorm.recipe import Recipe, Train
from ltnorm.reporting import schema
from ltnorm.training import checkpoint
from ltnorm.training.build import build_loader, build_loss, build_objective, start_bias
from ltnorm.training.device import set_computing
from ltnorm.training.finish import Cost, Training, cost_of
from ltnorm.training.log import Log, logged
from ltnorm.training.loop import Steps, fit
from ltnorm.training.objective import SinglePath
from ltnorm.training.resume import KEEPING, Keeper, Keeping
from ltnorm.training.run import (
    finish_on_first,
    first_making,
    keeper_of,
    label,
    made_since,
    measuring,
    norm_parameters,
)
from ltnorm.training.together import alone
from ltnorm.training.trained import TrainedRun, finished_result, load_run


def first_stage(recipe: Recipe) -> Recipe:
    """The recipe of the run that a second stage starts from."""
    return recipe.model_copy(update={"retrain": None})


@dataclass(frozen=True)
class FirstStage:
    """A finished run that a second stage starts from.

    Attributes:
        trained: its recipe, data and model.
        result: its result row, whose cost is part of the second's.
        sha256: of its checkpoint.
    """

    trained: TrainedRun
    result: schema.Result
    sha256: str


def load_first(path: Path, root: Path, data_dir: Path, device: str | None = None) -> FirstStage:
    """Load a finished run.

    Args:
        path, root, data_dir, device: as `load_run`.

    Raises:
        LtnormError: as `load_run`; or the run is not finished, or its row is of another run.
    """
    file = checkpoint.file_of(path)
    trained = load_run(path, root, data_dir, device)
    check_finished(file.parent)
    result = finished_result(file.parent, trained.recipe, trained.data)
    if result is None:
        raise LtnormError(
            f"{file.parent / schema.RESULT} is not of the run that {file.name} is of",
            "train the run again: `ltnorm train --force`",
        )
    return FirstStage(trained, result, checkpoint.sha256(file))


def check_finished(directory: Path) -> None:
    """Raises LtnormError where a run has no result: its cost would be unknown."""
    if not schema.finished(directory):
        raise LtnormError(
            f"{directory} has no {schema.RESULT}: it is not a finished run",
            "finish it first: `ltnorm train` with the same flags",
        )


def is_stale(result: schema.Result, first: Path) -> bool:
    """Whether the first stage, a run's directory or checkpoint, was made anew since then."""
    file = checkpoint.file_of(first)
    return file.is_file() and result.first_stage != checkpoint.sha256(file)


def check(recipe: Recipe) -> None:
    """Raises UsageError where the mode of the norm layers has no effect."""
    if not recipe.retrain or recipe.retrain.norm != "shifted" or recipe.norm.layers != "all":
        return
    if not running_layers(norm_layer(recipe.norm.name, **recipe.norm.options)(8)):
        raise UsageError(
            f"retrain.norm: {recipe.norm.name} has no running statistics to shift",
            "frozen does the same here",
        )


def run(
    recipe: Recipe,
    first: FirstStage,
    out: Path,
    output: Output,
    *,
    keeping: Keeping = KEEPING,
    wait: bool = False,
) -> schema.Result:
    """Take the second stage of a recipe and write its directory under `out`.

    Args:
        recipe: `concrete`, with a `retrain` section.
        first: the first stage; its model is changed.
        out, output, keeping, wait: as of a first stage, see `training.run.run`.

    Raises:
        UsageError: a mode of the norm layers without an effect.
        Busy: another process is making the run.
        LtnormError: the run failed: the loss diverged, or its files could not be written.
    """
    return alone(steps(recipe, first, out, output, keeping=keeping, wait=wait))


def steps(
    recipe: Recipe,
    first: FirstStage,
    out: Path,
    output: Output,
    *,
    keeping: Keeping = KEEPING,
    wait: bool = False,
) -> Steps[schema.Result]:
    """As `run`, for the steps of its training to be made elsewhere (see `training.together`)."""
    assert recipe.retrain
    trained, before = first.trained, first.result
    check(recipe)
    data, device = trained.data, trained.device
    with first_making(recipe, out, output, wait) as (directory, output):
        if made := made_since(directory, recipe, data, keeping, first.sha256):
            return made
        set_computing(recipe.train, device)
        with logged(directory, output) as log:
            if recipe.retrain.trains:
                keeper = keeper_of(directory, recipe, data, device, keeping, output, first.sha256)
                model = trained.model
                done = yield from _retrained(recipe, model, data, device, output, keeper, log)
            else:
                done = _computed(recipe, trained.model, data, device)
            cost = Cost(**{f.name: getattr(before, f.name) for f in fields(Cost)}) + done.cost
            machines = [(before.device, before.torch), *done.machines]
            whole = replace(done, cost=cost, first_stage=first.sha256, machines=machines)
            result = finish_on_first(directory, recipe, data, whole, device)
            log.result(result, len(done.epochs))
        return result


def _computed(
    recipe: Recipe, model: nn.Module, data: PreparedSet, device: torch.device
) -> Training:
    """tau-norm, logit-adjust and ncm: another weight or bias, without training.

    Each rank does it by itself.
    """
    assert recipe.retrain
    method, tau, start = recipe.retrain.method, recipe.retrain.tau, time.perf_counter()
    layer, images, counts = classifier(model), 0, data.counts
    if method == "ncm":
        seen = posthoc.outputs(model, data, "train", device, recipe.workers)
        images += len(seen.labels)
        layer = posthoc.nearest_class_mean(layer, seen)
    else:
        if tau is None:
            held = posthoc.outputs(model, data, "val", device, recipe.workers)
            images += len(held.labels)
            tau = posthoc.tune(
                lambda t: posthoc.corrected(layer, method, t, counts)(held.features), held.labels
            )
        layer = posthoc.corrected(layer, method, tau, counts)
    replace_classifier(model, layer.to(device))
    cost = Cost(images_processed=images, train_seconds=time.perf_counter() - start)
    return Training(model, [], cost, tau=tau)


def _retrained(
    recipe: Recipe,
    model: nn.Module,
    data: PreparedSet,
    device: torch.device,
    output: Output,
    keeper: Keeper,
    log: Log,
) -> Steps[Training]:
    """crt and lws: the classifier trained with the sampler and the loss of the second stage."""
    assert recipe.retrain
    train = settings(recipe)
    stage = recipe.model_copy(update={"train": train, "loss": recipe.retrain.loss})
    loader = build_loader(stage, data, data.open("train"), device, recipe.retrain.sampler)
    objective = _objective(stage, model, data.counts)
    scale = _open(objective, recipe)
    objective.to(device=device, memory_format=loader.memory_format)
    with output.training(label(recipe), train.epochs) as progress:
        epochs = yield from fit(
            objective,
            loader,
            train,
            progress,
            undecayed=norm_parameters(model, recipe.norm.name),
            measure=measuring(recipe, model, data, device),
            keeper=keeper,
            on_epoch=log.epoch,
        )
    if scale is not None:
        scale.fold()
    forward, backward = objective.cost
    # Gradients of the classifier alone do not go through the network.
    passes = forward, backward if recipe.retrain.norm == "adapting" else 0
    cost = cost_of(epochs, loader.images_per_epoch, train, passes)
    return Training(model, epochs, cost, machines=keeper.machines)


def settings(recipe: Recipe) -> Train:
    """How the second stage trains: by SGD, cosine from its rate, without warm-up.

    Batch size, momentum, weight decay, precision and the augmentation of single images, views
    included, are the first stage's. Images are not mixed, gradients not clipped, weights not
    averaged.
    """
    assert recipe.retrain
    first, defaults = recipe.train, Train()
    kept = ("batch_size", "weight_decay", "decay_norm", "precision", "graph", "deterministic")
    kept += ("crop", "crop_padding", "crop_scale", "flip", "color_jitter")
    kept += ("cutout", "auto_augment", "views")
    kept += ("momentum", "nesterov") if first.optimizer != "adamw" else ()
    changed = {key: getattr(first, key) for key in kept}
    changed |= {"epochs": recipe.retrain.epochs, "lr": recipe.retrain.lr}
    return defaults.model_copy(update=changed | {"schedule": "cosine", "warmup_epochs": 0})


def _objective(stage: Recipe, model: nn.Module, counts: list[int]) -> SinglePath:
    """The norm's own objective where its layers train; one path through frozen ones."""
    assert stage.retrain
    if stage.retrain.norm != "frozen":
        objective = build_objective(stage, model, counts)
        objective.projector = None  # its weights were not kept
        objective.in_training = list(norm_layers(model, stage.norm.name).values())
        return objective
    loss = build_loss(stage.loss, counts)
    objective = SinglePath(model, loss, torch.zeros(len(counts), dtype=torch.int64))
    objective.in_training = []
    return objective


def _open(objective: SinglePath, recipe: Recipe) -> "ClassScale | None":
    """Fix all weights but those that the second stage trains."""
    assert recipe.retrain
    model = objective.model
    adapting = []
    if recipe.retrain.norm == "adapting":
        adapting = [p for p in norm_parameters(model, recipe.norm.name) if p.requires_grad]
    for parameter in objective.parameters():
        parameter.requires_grad_(False)
    for parameter in adapting:
        parameter.requires_grad_(True)
    layer = classifier(model)
    if recipe.retrain.method == "lws":
        objective.class_scale = ClassScale(layer)  # a part of it, so that it is trained
        return objective.class_scale
    torch.manual_seed(recipe.seed)
    layer.reset_parameters()
    start_bias(model, objective.loss)
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    return None


class ClassScale(nn.Module):
    """Learnable weight scaling: logits z_c become s_c z_c, s trained from 1 (arXiv 1910.09217)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones_like(layer.weight[:, 0]))
        self._layer = [layer]  # not a part of this module
        self._hook = layer.register_forward_hook(lambda _, inputs, logits: logits * self.scale)

    @torch.no_grad()
    def fold(self) -> None:
        """Put the factors into the classifier's weights and bias."""
        self._hook.remove()
        [layer] = self._layer
        layer.weight.mul_(self.scale[:, None])
        if layer.bias is not None:
            layer.bias.mul_(self.scale)
