"""The second stage: another classifier on the features of a finished run.

Every method ends in the same network with another classifier of the same kind, so that the result
is loaded, evaluated and inspected as any other run. The methods are those of Kang et al. 2020,
"Decoupling Representation and Classifier for Long-Tailed Recognition" (arXiv 1910.09217).
"""

from pathlib import Path

import torch
from torch import nn

from ltnorm.console import Output
from ltnorm.data.prepare import PreparedSet
from ltnorm.errors import LtnormError
from ltnorm.evaluation import posthoc
from ltnorm.models import classifier
from ltnorm.recipe import Recipe, Train
from ltnorm.reporting import schema
from ltnorm.training.build import build_loader, build_loss, build_objective
from ltnorm.training.loop import fit
from ltnorm.training.objective import SinglePath
from ltnorm.training.run import (
    Cost,
    TrainedRun,
    Training,
    claim,
    cost_of,
    explained,
    finish,
    label,
    norm_parameters,
)


def first_stage(recipe: Recipe) -> Recipe:
    """The recipe of the run that a second stage starts from."""
    return recipe.model_copy(update={"retrain": None})


def first_result(directory: Path) -> schema.Result:
    """The result row of a first stage, whose cost is part of the second's.

    Raises:
        LtnormError: the run is not finished, or its row is damaged.
    """
    if not schema.finished(directory):
        raise LtnormError(
            f"{directory} has no {schema.RESULT}: it is not a finished run",
            "finish it first: `ltnorm train` with the same flags",
        )
    return schema.read_result(directory / schema.RESULT)


def run(
    recipe: Recipe, trained: TrainedRun, before: schema.Result, out: Path, output: Output
) -> schema.Result:
    """Take the second stage of a recipe and write its directory under `out`.

    Args:
        recipe: `concrete`, with a `retrain` section.
        trained: the first stage; its model is changed.
        before: the result row of the first stage.
        out, output: where results are written, and what is told meanwhile.

    Raises:
        LtnormError: the run failed: the loss diverged, or its files could not be written.
    """
    assert recipe.retrain
    with explained(recipe, out):
        directory = claim(recipe, out)
        if recipe.retrain.trains:
            done = _retrained(recipe, trained.model, trained.data, trained.device, output)
        else:
            done = _computed(recipe, trained.model, trained.data, trained.device)
        whole = Cost(
            before.epochs,
            before.steps,
            before.images_processed,
            before.images_backpropagated,
            before.train_seconds,
        )
        done = Training(done.model, done.epochs, whole + done.cost, done.tau)
        return finish(directory, recipe, trained.data, done, trained.device)


def _computed(
    recipe: Recipe, model: nn.Module, data: PreparedSet, device: torch.device
) -> Training:
    """tau-norm and ncm: other weights of the classifier, and no bias."""
    assert recipe.retrain
    layer, tau = classifier(model), None
    if recipe.retrain.method == "ncm":
        seen = posthoc.outputs(model, data, "train", device)
        weight = posthoc.class_means(seen.features, seen.labels, len(data.counts))
    else:
        tau = recipe.retrain.tau
        if tau == "auto":
            tau = tune_tau_norm(model, data, device)
        weight = posthoc.tau_normalized(layer.weight.detach(), tau)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.zero_()
    return Training(model, [], Cost(), tau)


def tune_tau_norm(model: nn.Module, data: PreparedSet, device: torch.device) -> float:
    """The tau of tau-norm that is best on the validation images."""
    held = posthoc.outputs(model, data, "val", device)
    weight = classifier(model).weight.detach().cpu()
    return posthoc.tune(lambda t: held.features @ posthoc.tau_normalized(weight, t).T, held.labels)


def _retrained(
    recipe: Recipe, model: nn.Module, data: PreparedSet, device: torch.device, output: Output
) -> Training:
    """crt and lws: the classifier trained with the sampler and the loss of the second stage."""
    assert recipe.retrain
    train = settings(recipe)
    stage = recipe.model_copy(update={"train": train, "loss": recipe.retrain.loss})
    images, labels = data.load("train")
    loader = build_loader(stage, data, images, labels, device, recipe.retrain.sampler)
    objective = _objective(stage, model, data.counts)
    scale = _open(objective, recipe)
    objective.to(device=device, memory_format=loader.memory_format)
    with output.training(label(recipe), train.epochs) as progress:
        undecayed = norm_parameters(model, recipe.norm.name)
        epochs = fit(objective, loader, train, progress, undecayed=undecayed)
    if scale is not None:
        scale.fold()
    return Training(model, epochs, cost_of(epochs, loader.images_per_epoch, train, objective.cost))


def settings(recipe: Recipe) -> Train:
    """The first stage's settings with the second's budget: cosine from its rate, no warm-up."""
    assert recipe.retrain
    changed = {
        "epochs": recipe.retrain.epochs,
        "steps": None,
        "seconds": None,
        "lr": recipe.retrain.lr,
        "schedule": "cosine",
        "warmup_epochs": 0,
    }
    return recipe.train.model_copy(update=changed)


def _objective(stage: Recipe, model: nn.Module, counts: list[int]) -> SinglePath:
    """The norm's own objective where its layers train; one path through frozen ones."""
    assert stage.retrain
    if stage.retrain.norm != "frozen":
        return build_objective(stage, model, counts)
    loss = build_loss(stage.loss, counts)
    objective = SinglePath(model, loss, torch.zeros(len(counts), dtype=torch.int64))
    objective.in_evaluation = [model]
    return objective


def _open(objective: SinglePath, recipe: Recipe) -> "ClassScale | None":
    """Fix all weights but those that the second stage trains."""
    assert recipe.retrain
    model = objective.model
    for parameter in objective.parameters():
        parameter.requires_grad_(False)
    if recipe.retrain.norm == "adapting":
        for parameter in norm_parameters(model, recipe.norm.name):
            parameter.requires_grad_(True)
    layer = classifier(model)
    if recipe.retrain.method == "lws":
        objective.class_scale = ClassScale(layer)
        return objective.class_scale
    torch.manual_seed(recipe.seed)
    layer.reset_parameters()
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
