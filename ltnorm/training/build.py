"""What a recipe says, built: the model, the objective, the loader."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ltnorm import losses, models, parallel, registry
from ltnorm.data import class_groups, sampling
from ltnorm.data.loader import Loader
from ltnorm.data.prepared import PreparedSet
from ltnorm.data.source import Files, Images
from ltnorm.errors import UsageError
from ltnorm.norms import RoutedNorm, norm_layer
from ltnorm.recipe import Loss, Recipe, Sampler, Train
from ltnorm.training.device import (
    check_computing,
    memory_format,
    resolve_device,
    resolve_precision,
)
from ltnorm.training.objective import SinglePath


def concrete(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe with `auto` precision resolved for this machine, and why it was chosen so.

    Raises:
        UsageError: the device is not there, or cannot compute as the recipe says.
    """
    device = resolve_device(recipe.device)
    check_computing(recipe.train, device)
    precision, reason = resolve_precision(recipe.train.precision, device)
    train = recipe.train.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"train": train}), reason


def build_loss(section: Loss, counts: list[int]) -> losses.ClassLoss:
    """The loss of a section of the recipe, for classes with so many training images."""
    return losses.build(
        section.name,
        counts,
        weights=section.class_weights,
        beta=section.beta,
        drw_start=section.drw_start if section.schedule == "drw" else None,
        **section.options,
    )


def build_model(
    recipe: Recipe,
    counts: list[int],
    image_size: int,
    pretrained: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> nn.Module:
    """The recipe's model, initialised from its seed: the same weights whatever the norm.

    The loss has a say: it may be defined on a cosine classifier, or with an initial bias.
    Pretrained weights are loaded if their file is given; `tell` hears which are left out.
    """
    torch.manual_seed(recipe.seed)
    model = models.build(
        recipe.model.name,
        len(counts),
        norm_layer(recipe.norm.name, **recipe.norm.options),
        image_size=image_size,
        pretrained=pretrained,
        tell=tell,
        norm_layers=recipe.norm.layers,
        weight_standardization=recipe.model.weight_standardization,
        **recipe.model.options,
    )
    loss = build_loss(recipe.loss, counts)
    if loss.cosine_scale:
        layer = models.classifier(model)
        cosine = models.CosineLinear(layer.in_features, layer.out_features, loss.cosine_scale)
        models.replace_classifier(model, cosine)
    start_bias(model, loss)
    if pretrained and (loss.cosine_scale or loss.initial_bias is not None):
        tell(f"the classifier does not start as in {pretrained}: {recipe.loss.name} sets it")
    return model


def compiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A forward through torch.compile, its backward outside of autocast as that of any step.

    That is a setting of torch's compiler, made here for the whole process.
    """
    import torch._functorch.config

    torch._functorch.config.backward_pass_autocast = "off"
    return torch.compile(forward, dynamic=False)


def compile_training(model: nn.Module, batch_size: int) -> None:
    """Put the forward of whole training batches through torch.compile.

    A batch of another size, or evaluation, would be compiled anew, for longer than it takes. The
    forwards that are left have all the same shapes and the same autocast: nothing is compiled
    again.
    """
    plain = model.forward
    fast = compiled(plain)
    whole = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal whole
        if not whole and len(x) % batch_size == 0:  # twice as many: both paths are one forward
            whole = len(x)
        return fast(x) if model.training and len(x) == whole else plain(x)

    model.forward = forward


def start_bias(model: nn.Module, loss: losses.ClassLoss) -> None:
    """Set the bias of the classifier to where the loss is defined to start."""
    if loss.initial_bias is not None and (layer := models.classifier(model)).bias is not None:
        nn.init.constant_(layer.bias, loss.initial_bias)


def build_objective(recipe: Recipe, model: nn.Module, counts: list[int]) -> SinglePath:
    """The training objective that the recipe's norm asks for."""
    target = registry.lookup("norm", recipe.norm.name).objective
    layer = next((m for m in model.modules() if isinstance(m, RoutedNorm)), None)
    groups = class_groups(counts, layer.components, layer.groups) if layer else [0] * len(counts)
    return registry.load(target)(
        model,
        build_loss(recipe.loss, counts),
        torch.tensor(groups),
        **registry.own_options(target, recipe.norm.options),
    )


def build_loader(
    recipe: Recipe,
    data: PreparedSet,
    images: Images,
    device: torch.device,
    sampler: Sampler | None = None,
) -> Loader:
    """Batches of training images of a prepared set, as the recipe has them.

    `sampler` is another one than the recipe's.

    Raises:
        UsageError: a crop that these images cannot have.
    """
    check_crop(recipe.train, isinstance(images, Files))
    sampler = sampler or recipe.sampler
    return Loader(
        images,
        mean=data.mean,
        std=data.std,
        train=recipe.train,
        seed=recipe.seed,
        device=device,
        sampler=sampling.build(sampler.name, data.counts, **sampler.options),
        memory_format=memory_format(device, recipe.train.precision),
        workers=recipe.workers,
    )


def doubts(train: Train) -> Iterator[str]:
    """What can be meant, and mostly is not."""
    if train.epochs and train.epochs < train.warmup_epochs:
        rate = train.lr * train.epochs / train.warmup_epochs
        yield (
            f"the warm-up outlasts the training, the learning rate ends at {rate:g} of "
            f"{train.lr:g}: see train.warmup_epochs"
        )
    if train.optimizer == "adamw" and train.lr >= 0.02:
        yield f"a learning rate of {train.lr:g} is SGD's; AdamW mostly takes --lr 0.001"


def check(recipe: Recipe, counts: list[int], splits: Sequence[str], files: bool = False) -> None:
    """What can only be checked once the data is known.

    Args:
        recipe: the run.
        counts, splits: of the data: its training images a class, its splits.
        files: whether its images stay files.

    Raises:
        UsageError: a batch larger than the set, or with fewer images than processes, more
            components than classes, no such split, a crop that the images cannot have.
    """
    images = sum(counts)
    if recipe.train.batch_size > images:
        raise UsageError(
            f"batch size {recipe.train.batch_size} is larger than the set of {images} images",
            f"--batch-size can be at most {images} here",
        )
    parallel.check_batches(images, recipe.train.batch_size)
    if {"components", "groups"} <= recipe.norm.options.keys():
        class_groups(counts, recipe.norm.options["components"])
    if recipe.eval.split not in splits:
        raise UsageError(f"the data has no {recipe.eval.split} split", "--val N holds out images")
    check_crop(recipe.train, files)


def check_crop(train: Train, files: bool) -> None:
    """Raises UsageError for a crop that images, files or pixels, cannot have, or its options."""
    if files and train.crop == "padded":
        raise UsageError(
            "train.crop: padded is for images of one size, those of this set are files",
            "leave it out, or prepare the set with --cache-size",
        )
    crop = train.cropped(files)
    key = "crop_padding" if crop == "resized" else "crop_scale"
    if getattr(train, key) != Train.model_fields[key].default:
        what = "files are cropped" if files else "images of one size are cropped"
        raise UsageError(
            f"train.{key}: has no effect, {what} as train.crop={crop}", f"leave train.{key} out"
        )
