"""The only list of what can be chosen by name: norms, losses, models, datasets, samplers.

To add one, write a class or function and give it one line here. In all tables the
convention is the same: positional parameters are supplied by ltnorm, keyword-only parameters
are the user's options (`--set norm.components=3`), and their annotations validate them.

This module never imports torch; an entry's target is imported when it is first used.
"""

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ltnorm.errors import UsageError, did_you_mean

if typing.TYPE_CHECKING:
    from pydantic import BaseModel


# Where raw data lies, or is downloaded to, unless the user says where.
DEFAULT_ROOT = Path("data/raw")


@dataclass(frozen=True)
class Entry:
    """One choice: where its code is ("module:attribute"), what it is, and where it comes from.

    Attributes:
        cost: of a norm, about how long a training step takes in steps of bn (COST_MEASURED).
        objective: the training objective that a norm asks for.
        weights: the class weights that a loss is defined with: none, inverse or effective.
        cosine: whether a loss is defined on a cosine classifier.
        variant: of a model or data set, what the target makes, where one function makes a family.
        check: of a model, what refuses a variant that does not exist, where only a library knows.
        recipe: the recipe that `ltnorm train --dataset NAME` starts from.
        size: of a balanced data set, classes, training images a class and image height, where
            they are known before the data is there.
        needs: of a data set, what a user must have: the flags, and the images.
        natural: of a data set, whether its imbalance is kept unless a ratio is given.
    """

    target: str
    summary: str
    source: str
    cost: str = ""
    objective: str = "ltnorm.training.objective:SinglePath"
    weights: str = "none"
    cosine: bool = False
    variant: str = ""
    check: str = ""
    recipe: str = "cifar10-lt"
    size: tuple[int, int, int] | None = None
    needs: str = ""
    natural: bool = False


_BN = "Ioffe & Szegedy 2015, arXiv 1502.03167"
_CBN = "Cheng et al. 2022, arXiv 2212.01007 (from its abstract)"
_RESNET = "He et al. 2016, arXiv 1512.03385"
_KANG = "Kang et al. 2020, arXiv 1910.09217"
_RESNEXT = "Xie et al. 2017, arXiv 1611.05431"
_WIDE = "Zagoruyko & Komodakis 2016, arXiv 1605.07146"
_MOBILENET_V3 = "Howard et al. 2019, arXiv 1905.02244"
_LT = "Liu et al. 2019, arXiv 1904.05160"
_LISTS = "--root DIR --list-train FILE --list-test FILE [--list-val FILE]"
_ROUTED_PATH = "ltnorm.training.objective:RoutedPath"
_DUAL_PATH = "ltnorm.training.dual:DualPath"

COST_MEASURED = "a training step in steps of bn: ResNet-32, batch 128, fp32, one CPU core"

NORMS = {
    "bn": Entry(
        "ltnorm.norms.batch:BatchNorm",
        "batch normalization, the baseline",
        _BN,
        cost="1.0x",
    ),
    "gn": Entry(
        "ltnorm.norms.group:GroupNorm",
        "group normalization; no statistics shared between images",
        "Wu & He 2018, arXiv 1803.08494",
        cost="1.1x",
    ),
    "ln": Entry(
        "ltnorm.norms.group:LayerNorm",
        "layer normalization: one group of all channels of an image",
        "Ba et al. 2016, arXiv 1607.06450",
        cost="0.9x",
    ),
    "in": Entry(
        "ltnorm.norms.group:InstanceNorm",
        "instance normalization: each channel of an image by itself",
        "Ulyanov et al. 2016, arXiv 1607.08022",
        cost="1.5x",
    ),
    "frn": Entry(
        "ltnorm.norms.response:FilterResponseNorm",
        "filter response normalization: divided by the root mean square, no mean subtracted",
        "Singh & Krishnan 2020, arXiv 1911.09737",
        cost="1.2x",
    ),
    "brn": Entry(
        "ltnorm.norms.renorm:BatchRenorm",
        "batch renormalization: training corrects the batch towards the running moments",
        "Ioffe 2017, arXiv 1702.03275",
        cost="1.0x",
    ),
    "nbn": Entry(
        "ltnorm.norms.nbn:NormalizedBatchNorm",
        "batch normalization with weight and bias as unit vectors times learned scalars",
        "Bao et al. 2025, arXiv 2501.03122",
        cost="1.1x",
    ),
    "balanced": Entry(
        "ltnorm.norms.balanced:BalancedBatchNorm",
        "batch normalization to whose statistics class groups contribute equally",
        "after Su et al. 2024, arXiv 2309.14949",
        cost="1.1x",
        objective=_ROUTED_PATH,
    ),
    "split": Entry(
        "ltnorm.norms.split:SplitBatchNorm",
        "batch normalization with statistics of its own for each class group",
        _CBN,
        cost="1.1x",
        objective=_ROUTED_PATH,
    ),
    "mode": Entry(
        "ltnorm.norms.mode:ModeNorm",
        "mode normalization: a learned gate assigns images to modes",
        "Deecke et al. 2019, arXiv 1810.05466",
        cost="1.3x",
    ),
    "mixture": Entry(
        "ltnorm.norms.mixture:MixtureNorm",
        "mixture normalization: a Gaussian mixture fitted to each batch by EM",
        "Kalayeh & Shah 2019, arXiv 1806.02892",
        cost="1.5x",
    ),
    "compound": Entry(
        "ltnorm.norms.compound:CompoundBatchNorm",
        "normalization by a Gaussian mixture, fitted by moving-average EM, dual-path training",
        _CBN,
        cost="1.4x, both paths",
        objective=_DUAL_PATH,
    ),
    "none": Entry(
        "ltnorm.norms.identity:Identity",
        "no normalization, weight and bias alone",
        "-",
        cost="0.9x",
    ),
}

LOSSES = {
    "ce": Entry("ltnorm.image_losses:CrossEntropy", "cross-entropy, the baseline", "-"),
    "weighted-ce": Entry(
        "ltnorm.image_losses:CrossEntropy",
        "cross-entropy, images weighted by the inverse frequency of their class",
        "-",
        weights="inverse",
    ),
    "focal": Entry(
        "ltnorm.image_losses:Focal",
        "focal loss: confident answers count less; softmax or sigmoid",
        "Lin et al. 2017, arXiv 1708.02002",
    ),
    "cb": Entry(
        "ltnorm.image_losses:ClassBalanced",
        "class-balanced loss: focal, sigmoid or softmax, by effective number of images",
        "Cui et al. 2019, arXiv 1901.05555",
        weights="effective",
    ),
    "ldam": Entry(
        "ltnorm.image_losses:LDAM",
        "label-distribution-aware margins, with a cosine classifier",
        "Cao et al. 2019, arXiv 1906.07413",
        cosine=True,
    ),
    "balanced-softmax": Entry(
        "ltnorm.image_losses:BalancedSoftmax",
        "cross-entropy of the logits plus log class frequency",
        "Ren et al. 2020, arXiv 2007.10740",
    ),
    "logit-adjust": Entry(
        "ltnorm.image_losses:LogitAdjustment",
        "cross-entropy of the logits plus tau times log class frequency",
        "Menon et al. 2021, arXiv 2007.07314",
    ),
    "vs": Entry(
        "ltnorm.image_losses:VectorScaling",
        "vector scaling: logits multiplied and shifted by class frequency",
        "Kini et al. 2021, arXiv 2103.01550",
    ),
    "label-aware-smoothing": Entry(
        "ltnorm.image_losses:LabelAwareSmoothing",
        "cross-entropy with more label smoothing for the larger classes",
        "Zhong et al. 2021, arXiv 2104.00466",
    ),
    "seesaw": Entry(
        "ltnorm.image_losses:Seesaw",
        "frequent classes push rarer ones down less, unless the network errs",
        "Wang et al. 2021, arXiv 2008.10032",
    ),
}

MODELS = {
    **{
        f"resnet{depth}": Entry(
            "ltnorm.models:cifar_resnet",
            f"CIFAR ResNet-{depth}, option-A shortcuts",
            _RESNET,
            variant=str(depth),
        )
        for depth in (8, 14, 20, 32, 44, 56)
    },
    **{
        name: Entry(
            "ltnorm.models:torchvision_model",
            f"torchvision {title}, 3x3 stem for small images",
            source,
            variant=name,
        )
        for name, title, source in (
            ("resnet18", "ResNet-18", _RESNET),
            ("resnet34", "ResNet-34", _RESNET),
            ("resnet50", "ResNet-50", _RESNET),
            ("resnet101", "ResNet-101", _RESNET),
            ("resnet152", "ResNet-152", _RESNET),
            ("resnext50_32x4d", "ResNeXt-50 32x4d", _RESNEXT),
            ("resnext101_32x8d", "ResNeXt-101 32x8d", _RESNEXT),
            ("resnext101_64x4d", "ResNeXt-101 64x4d", _RESNEXT),
            ("wide_resnet50_2", "Wide ResNet-50-2", _WIDE),
            ("wide_resnet101_2", "Wide ResNet-101-2", _WIDE),
        )
    },
    **{
        name: Entry(
            "ltnorm.models:torchvision_model",
            f"torchvision {title}, stem without a stride for small images",
            source,
            variant=name,
        )
        for name, title, source in (
            ("mobilenet_v2", "MobileNetV2", "Sandler et al. 2018, arXiv 1801.04381"),
            ("mobilenet_v3_small", "MobileNetV3-Small", _MOBILENET_V3),
            ("mobilenet_v3_large", "MobileNetV3-Large", _MOBILENET_V3),
        )
    },
}

# Models that a library knows by name: `timm/resnet26` is the entry with that variant.
LIBRARIES = {
    "timm": Entry(
        "ltnorm.models:timm_model",
        "any model of timm with batch normalization (extra timm)",
        "Wightman 2019, github.com/huggingface/pytorch-image-models",
        check="ltnorm.models:check_timm",
    ),
}


def _array_set(variant: str, summary: str, source: str, **known: Any) -> Entry:
    """A set that torchvision's class `variant` keeps in memory."""
    target = "ltnorm.data.torchvision_sets:arrays"
    return Entry(target, summary, source, variant=variant, **known)


def _file_set(
    variant: str, summary: str, source: str, recipe: str = "folder", **known: Any
) -> Entry:
    """A set that torchvision's class `variant` keeps as files."""
    target = "ltnorm.data.torchvision_sets:files"
    return Entry(target, summary, source, variant=variant, recipe=recipe, **known)


DATASETS = {
    "synthetic": Entry(
        "ltnorm.data.synthetic:synthetic",
        "procedural 32x32 textures, made from a seed",
        "ltnorm",
        recipe="quick",
        needs="nothing, embedded",
    ),
    "cifar10": Entry(
        "ltnorm.data.datasets:cifar10",
        "10 classes, 32x32",
        "Krizhevsky 2009",
        size=(10, 5000, 32),
        needs="163 MiB download",
    ),
    "cifar100": Entry(
        "ltnorm.data.datasets:cifar100",
        "100 classes, 32x32",
        "Krizhevsky 2009",
        recipe="cifar100-lt",
        size=(100, 500, 32),
        needs="161 MiB download",
    ),
    "fashion-mnist": Entry(
        "ltnorm.data.datasets:fashion_mnist",
        "10 classes, 28x28 grey, repeated to three channels",
        "Xiao et al. 2017, arXiv 1708.07747",
        size=(10, 6000, 28),
        needs="29 MiB download",
    ),
    "svhn": _array_set(
        "SVHN",
        "10 digits of house numbers, 32x32, 4,659 to 13,861 images each",
        "Netzer et al. 2011",
        needs="235 MiB download",
    ),
    "mnist": _array_set(
        "MNIST",
        "10 written digits, 28x28 grey, nearly balanced",
        "LeCun et al. 1998",
        needs="11 MiB download",
    ),
    "kmnist": _array_set(
        "KMNIST",
        "10 written kana, 28x28 grey, balanced",
        "Clanuwat et al. 2018, arXiv 1812.01718",
        size=(10, 6000, 28),
        needs="20 MiB download",
    ),
    "emnist": _array_set(
        "EMNIST",
        "47 written digits and letters, 28x28 grey, balanced",
        "Cohen et al. 2017, arXiv 1702.05373",
        size=(47, 2400, 28),
        needs="536 MiB download",
    ),
    "stl10": _array_set(
        "STL10",
        "10 classes, 96x96, balanced, 500 images each",
        "Coates et al. 2011",
        size=(10, 500, 96),
        needs="2.5 GiB download",
    ),
    "gtsrb": _file_set(
        "GTSRB",
        "43 traffic signs, 15 to 250 pixels, 150 to 1,500 images each",
        "Stallkamp et al. 2012",
        recipe="gtsrb",
        natural=True,
        needs="264 MiB download",
    ),
    "caltech101": _file_set(
        "Caltech101",
        "101 objects, photos of about 300x200, 31 to 800 images each",
        "Fei-Fei et al. 2004",
        natural=True,
        needs="131 MiB download",
    ),
    "caltech256": _file_set(
        "Caltech256",
        "257 objects, photos, 80 to 827 images each",
        "Griffin et al. 2007",
        natural=True,
        needs="1.1 GiB download",
    ),
    "sun397": _file_set(
        "SUN397",
        "397 scenes, photos from 200x200, 100 to 2,361 images each",
        "Xiao et al. 2010",
        natural=True,
        needs="36 GiB download",
    ),
    "eurosat": _file_set(
        "EuroSAT",
        "10 land uses, 64x64 satellite images, 2,000 to 3,000 each",
        "Helber et al. 2019, arXiv 1709.00029",
        recipe="cifar10-lt",
        needs="90 MiB download",
    ),
    "food101": _file_set(
        "Food101",
        "101 dishes, photos to 512 pixels, balanced, 750 images each",
        "Bossard et al. 2014",
        size=(101, 750, 224),
        needs="4.7 GiB download",
    ),
    "dtd": _file_set(
        "DTD",
        "47 textures, photos of 300 to 640 pixels, balanced, 40 images each",
        "Cimpoi et al. 2014, arXiv 1311.3618",
        size=(47, 40, 224),
        needs="596 MiB download",
    ),
    "flowers102": _file_set(
        "Flowers102",
        "102 flowers, photos from 500 pixels, balanced, 10 images each",
        "Nilsback & Zisserman 2008",
        size=(102, 10, 224),
        needs="329 MiB download",
    ),
    "fgvc-aircraft": _file_set(
        "FGVCAircraft",
        "100 aircraft, photos of 1 to 2 megapixels, 33 or 34 images each",
        "Maji et al. 2013, arXiv 1306.5151",
        needs="2.6 GiB download",
    ),
    "oxford-pets": _file_set(
        "OxfordIIITPet",
        "37 breeds of cats and dogs, photos, about 100 images each",
        "Parkhi et al. 2012",
        needs="774 MiB download",
    ),
    "imagenette": _file_set(
        "Imagenette",
        "10 classes of ImageNet, photos, 858 to 993 images each",
        "Howard 2019, fastai/imagenette",
        needs="1.5 GiB download",
    ),
    "folder": Entry(
        "ltnorm.data.folder:folder",
        "images of your own: a folder a class, in train/, val/, test/ or in one tree",
        "-",
        recipe="folder",
        needs="--root DIR",
        natural=True,
    ),
    "lists": Entry(
        "ltnorm.data.lists:lists",
        "images of your own, by lists of lines `path label`",
        "-",
        variant="lists",
        recipe="folder",
        needs=_LISTS,
        natural=True,
    ),
    "imagenet-lt": Entry(
        "ltnorm.data.lists:lists",
        "1,000 classes of 1,280 to 5 images, by the published lists",
        _LT,
        variant="imagenet-lt",
        recipe="imagenet-lt",
        needs=f"{_LISTS}; the images of ILSVRC2012",
        natural=True,
    ),
    "places-lt": Entry(
        "ltnorm.data.lists:lists",
        "365 classes of 4,980 to 5 images, by the published lists",
        _LT,
        variant="places-lt",
        recipe="places-lt",
        needs=f"{_LISTS}; the small images of Places365-Standard",
        natural=True,
    ),
    "inat2018": Entry(
        "ltnorm.data.lists:lists",
        "iNaturalist 2018: 8,142 species, by the published lists",
        "Van Horn et al. 2018, arXiv 1707.06642",
        variant="inat2018",
        recipe="inat2018",
        needs="--root DIR --list-train FILE --list-val FILE; the images of train_val2018",
        natural=True,
    ),
}

SAMPLERS = {
    "instance": Entry(
        "ltnorm.data.sampling:instance", "the data as it is: every image once an epoch", "-"
    ),
    "balanced": Entry("ltnorm.data.sampling:balanced", "every class equally often", _KANG),
    "sqrt": Entry("ltnorm.data.sampling:sqrt", "classes by the square root of their images", _KANG),
    "progressive": Entry(
        "ltnorm.data.sampling:progressive",
        "from the data as it is, at the start, to balanced classes at the end of training",
        _KANG,
    ),
    "effective": Entry(
        "ltnorm.data.sampling:effective",
        "each image weighted by one over the effective number of its class",
        "Cui et al. 2019, arXiv 1901.05555",
    ),
}

TABLES: Mapping[str, Mapping[str, Entry]] = {
    "norm": NORMS,
    "loss": LOSSES,
    "model": MODELS,
    "dataset": DATASETS,
    "sampler": SAMPLERS,
}


def listed(kind: str) -> dict[str, Entry]:
    """All that can be chosen in table `kind`, as lists and hints show it."""
    libraries = {f"{name}/NAME": entry for name, entry in LIBRARIES.items()}
    return {**TABLES[kind], **(libraries if kind == "model" else {})}


def lookup(kind: str, name: str) -> Entry:
    """The entry `name` of table `kind`, a key of `TABLES`.

    Raises:
        UsageError: no such name; the hint lists the choices, led by the nearest.
    """
    library, slash, variant = name.partition("/")
    if kind == "model" and slash and library in LIBRARIES:
        return replace(LIBRARIES[library], variant=variant)
    if name not in TABLES[kind]:
        raise UsageError(f"unknown {kind} '{name}'", did_you_mean(name, listed(kind)))
    return TABLES[kind][name]


def load(target: str) -> Callable[..., Any]:
    """Import what a "module:attribute" target names."""
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)


def targets(kind: str, name: str) -> list[Callable[..., Any]]:
    """What takes the options of an entry: its target and, for a norm, the training objective.

    Raises:
        UsageError: no such name, also where only a library knows.
    """
    entry = lookup(kind, name)
    if entry.check:
        load(entry.check)(entry.variant)
    return [load(entry.target), *([load(entry.objective)] if kind == "norm" else [])]


@cache
def options_model(kind: str, name: str) -> "type[BaseModel]":
    """The options of an entry as a pydantic model: its keyword-only parameters, typed."""
    from pydantic import ConfigDict, create_model

    fields: dict[str, Any] = {}
    for function in targets(kind, name):
        if inspect.isclass(function):
            function = function.__init__
        hints = typing.get_type_hints(function, include_extras=True)
        fields |= {
            p.name: (hints[p.name], p.default)
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
    config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
    return create_model(f"{kind}.{name}", __config__=config, **fields)


def own_options(target: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that the target itself takes (a norm's, say, without its objective's)."""
    parameters = inspect.signature(load(target)).parameters
    return {k: v for k, v in options.items() if k in parameters}
