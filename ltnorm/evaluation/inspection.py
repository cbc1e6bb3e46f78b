"""What the norm layers of a trained model do to each class group, layer by layer.

One pass over a split of a prepared set, in evaluation mode and in float32. Hooks reduce what
reaches a layer to moments of each image, which are added up in float64: no activations are kept,
and the batch size does not matter.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltnorm.data.longtail import GROUP_NAMES, GroupScheme, report_groups
from ltnorm.data.prepared import PreparedSet
from ltnorm.data.source import Split
from ltnorm.errors import UsageError, did_you_mean
from ltnorm.evaluation.evaluate import predict
from ltnorm.norms import norm_layers
from ltnorm.norms.response import FilterResponseNorm

ALL = "all"  # the group of all images
COLUMNS = ("layer", "channels", "group", "quantity", "component", "value")
BINS, REACH = 80, 4.0  # of a density: over the mean +- 4 standard deviations


@dataclass(frozen=True)
class LayerInspection:
    """A norm layer on the images of each group. Dicts are by group, `all` last; None: has none.

    Attributes:
        name: the path of the module.
        channels: C.
        shift: sqrt(mean_c m_c^2), m_c the mean of normalized channel c over a group's images and
            their positions. In units of what the layer makes 1; 0 is no shift.
        variance: mean_c v_c, v_c the variance of normalized channel c, over the same.
        shares: the mean responsibility of each component [K].
        entropy: the mean over images (by position: positions) of -sum_k r_k log r_k / log K:
            0 where each belongs to one component, 1 where all are undecided.
        contrast: 1/2 sum_k |share of k in the first group - in the last|, head and tail if both
            have classes: 0 where they use the components alike, 1 where they share none.
        weights: the running mixture weights [K].
        gap: mean over pairs of components of sqrt(mean_c (mu_j - mu_k)^2 / ((v_j + v_k) / 2)),
            their running moments: how many standard deviations they lie apart.
        apart: m_c of the last group less that of the first, for each channel.
        input_mean, input_std: of the layer's input, for each channel, over all images.
    """

    name: str
    channels: int
    shift: dict[str, float]
    variance: dict[str, float]
    shares: dict[str, list[float]] | None
    entropy: dict[str, float] | None
    contrast: float | None
    weights: list[float] | None
    gap: float | None
    apart: list[float]
    input_mean: list[float]
    input_std: list[float]

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Tidy rows (see `COLUMNS`): a number each; no group or no component is None."""
        for quantity in ("shift", "variance", "entropy"):
            for group, value in (getattr(self, quantity) or {}).items():
                yield self.name, self.channels, group, quantity, None, value
        for group, shares in (self.shares or {}).items():
            for k, value in enumerate(shares):
                yield self.name, self.channels, group, "share", k, value
        for k, value in enumerate(self.weights or []):
            yield self.name, self.channels, None, "weight", k, value
        for quantity in ("contrast", "gap"):
            if (value := getattr(self, quantity)) is not None:
                yield self.name, self.channels, None, quantity, None, value


@dataclass(frozen=True)
class Inspection:
    """All norm layers of a model on a split; `groups` are those that have images, `all` left out.

    In a group every image counts the same. On a balanced split that is every class the same, too.
    """

    split: str
    scheme: str
    groups: list[str]
    layers: list[LayerInspection]


@dataclass(frozen=True)
class Density:
    """The input of one channel of a layer: a histogram a group, and the layer's own Gaussians.

    Attributes:
        layer, channel: which.
        edges: of the bins, ascending. What lies outside has no bin, but its share of the 1.
        heights: for each group, the density in each bin.
        components: (weight, mean, variance) of each running Gaussian; none for a layer without
            statistics. A layer that keeps no weights has its mean shares here.
    """

    layer: str
    channel: int
    edges: list[float]
    heights: dict[str, list[float]]
    components: list[tuple[float, float, float]]


@torch.no_grad()
def without_affine(layer: nn.Module) -> nn.Module:
    """A copy of a norm layer, in evaluation mode, whose weight is 1 and bias 0.

    Its output are the normalized features. Of a mixture, too: sum_k r_k (x - mu_k) / sqrt(v_k).
    A layer with `set_affine` sets itself to 1 and 0: unit vectors and their scalars for `nbn`,
    1 / sqrt(K) for `mixture`, whose own factors 1 / sqrt(lambda_k) stay. What a layer does
    after them (the threshold of `frn`) is left out.
    """
    plain = copy.deepcopy(layer).eval()
    given = {name: getattr(plain, name, None) for name in ("weight", "bias")}
    values = {"weight": 1.0, "bias": 0.0}
    if hasattr(plain, "set_affine"):
        plain.set_affine(**{k: torch.full_like(p, values[k]) for k, p in given.items()})
    else:
        for name, parameter in given.items():
            if parameter is not None:
                parameter.fill_(values[name])
    if isinstance(plain, FilterResponseNorm):
        plain.tau = None
    return plain


class _Probe:
    """Adds up what reaches one layer, for each group, in float64 on the CPU."""

    def __init__(self, layer: nn.Module, groups: int) -> None:
        self.layer, self.plain, self.groups = layer, without_affine(layer), groups
        self.sums: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, group: Tensor) -> None:
        x = x.flatten(2) if x.dim() > 2 else x[:, :, None]
        self._add("count", torch.ones(len(x)), group)
        for name, values in (("output", self.plain(x)), ("input", x)):
            # Of each image around its own mean, so that float32 is enough.
            var, mean = torch.var_mean(values, dim=2, correction=0)
            var, mean = var.cpu().double(), mean.cpu().double()
            self._add(f"{name} mean", mean, group)
            self._add(f"{name} square", var + mean.square(), group)
        r = self.layer.responsibilities(x) if hasattr(self.layer, "responsibilities") else None
        if r is not None:
            r = r.reshape(*r.shape[:2], -1)
            self._add("share", r.mean(2), group)
            self._add("entropy", torch.special.entr(r).sum(1).mean(1), group)

    def _add(self, name: str, values: Tensor, group: Tensor) -> None:
        values = values.cpu().double()
        if name not in self.sums:
            self.sums[name] = values.new_zeros(self.groups, *values.shape[1:])
        self.sums[name].index_add_(0, group, values)

    def means(self) -> dict[str, Tensor]:
        """The mean over the images of each group, and over all: [G + 1, ...]."""
        sums = {name: torch.cat([s, s.sum(0, keepdim=True)]) for name, s in self.sums.items()}
        count = sums.pop("count")
        return {name: s / count.view(-1, *[1] * (s.dim() - 1)) for name, s in sums.items()}


class Inspector:
    """Looks into the norm layers of a model on one split of a prepared set, without augmentation.

    Args:
        model: on `device`; nothing but its mode (evaluation) is changed.
        norm: the norm of the registry whose layers are looked at.
        data, split: the images; no other split is opened.
        scheme: how classes are grouped (see `report_groups`).
        device: where the model is.
        workers: processes that decode files.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str,
        data: PreparedSet,
        split: Split,
        scheme: GroupScheme,
        device: torch.device,
        workers: int | None = None,
    ) -> None:
        self.model, self.layers, self.device = model, norm_layers(model, norm), device
        self.data, self.split, self.workers = data, split, workers
        self.images = data.open(split)
        self.scheme, of_class = report_groups(data.counts, scheme)
        names = np.array(of_class)[self.images.labels]
        self.groups = [name for name in GROUP_NAMES if (names == name).any()]
        self.group = torch.tensor([self.groups.index(name) for name in names])

    def inspect(self) -> Inspection:
        """Measure all layers, in the order in which the model uses them.

        Raises:
            LtnormError: outputs that are not finite.
        """
        probes = {name: _Probe(layer, len(self.groups)) for name, layer in self.layers.items()}
        used = self._observe(probes)
        layers = [_measured(name, probes[name], self.groups) for name in used]
        return Inspection(self.split, self.scheme, self.groups, layers)

    def density(self, layer: LayerInspection, channel: int) -> Density:
        """What one channel of the input of an inspected layer looks like in each group."""
        mean, std = layer.input_mean[channel], layer.input_std[channel] or 1.0
        low, width = mean - REACH * std, 2 * REACH * std / BINS
        counts = torch.zeros(len(self.groups), BINS, dtype=torch.int64)
        totals = torch.zeros(len(self.groups), dtype=torch.int64)

        def count(x: Tensor, group: Tensor) -> None:
            values = x[:, channel].reshape(len(x), -1).cpu().double()
            bins = ((values - low) / width).floor().long()
            inside = (bins >= 0) & (bins < BINS)
            index = (bins + BINS * group[:, None])[inside]
            counts.add_(torch.bincount(index, minlength=counts.numel()).view_as(counts))
            totals.index_add_(0, group, torch.full_like(group, values.shape[1]))

        self._observe({layer.name: count})
        heights = counts / (totals[:, None] * width)
        return Density(
            layer.name,
            channel,
            [low + width * i for i in range(BINS + 1)],
            dict(zip(self.groups, heights.tolist(), strict=True)),
            _components(self.layers[layer.name], layer, channel),
        )

    def check_layer(self, name: str | None) -> None:
        """Raises UsageError where the model has no norm layer `name`."""
        _known(name, self.layers)

    def _observe(self, observers: Mapping[str, Callable[[Tensor, Tensor], None]]) -> list[str]:
        """Show each layer's observer its inputs, and the groups [N] of their images.

        Returns:
            The layers that were used, in order.
        """
        done, batch, used = 0, self.group[:0], []

        def next_batch(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            nonlocal done, batch
            batch = self.group[done : done + len(arguments[0])]
            done += len(batch)

        def show(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                used.append(name)
                observers[name](arguments[0], batch)

            return hook

        hooks = [self.model.register_forward_pre_hook(next_batch)]
        hooks += [self.layers[n].register_forward_pre_hook(show(n)) for n in observers]
        try:
            predict(
                self.model,
                self.images,
                mean=self.data.mean,
                std=self.data.std,
                device=self.device,
                workers=self.workers,
            )
        finally:
            for hook in hooks:
                hook.remove()
        return list(dict.fromkeys(used))


def choose(
    inspection: Inspection, layer: str | None = None, channel: int | None = None
) -> tuple[LayerInspection, int]:
    """The layer and channel to look at closely: the last layer, its channel of largest `apart`.

    Raises:
        UsageError: there is no such layer or channel.
    """
    layers = {found.name: found for found in inspection.layers}
    _known(layer, layers)
    found = layers[layer] if layer is not None else inspection.layers[-1]
    if channel is None:
        channel = max(range(found.channels), key=lambda c: abs(found.apart[c]))
    if not 0 <= channel < found.channels:
        raise UsageError(
            f"layer '{found.name}' has no channel {channel}",
            f"its {found.channels} channels count from 0 to {found.channels - 1}",
        )
    return found, channel


def _known(layer: str | None, layers: Mapping[str, Any]) -> None:
    if layer is not None and layer not in layers:
        raise UsageError(f"no norm layer '{layer}'", did_you_mean(layer, layers))


def _measured(name: str, probe: _Probe, groups: list[str]) -> LayerInspection:
    means, names = probe.means(), [*groups, ALL]
    mean, var = _mean_and_variance(means, "output")
    input_mean, input_var = _mean_and_variance(means, "input")
    share, entropy = means.get("share"), means.get("entropy")
    several = share is not None and share.shape[1] > 1
    weights = getattr(probe.layer, "mixing_weight", None)

    def by_group(values: Tensor) -> dict[str, Any]:
        return dict(zip(names, values.tolist(), strict=True))

    return LayerInspection(
        name=name,
        channels=mean.shape[1],
        shift=by_group(mean.square().mean(1).sqrt()),
        variance=by_group(var.mean(1)),
        shares=by_group(share) if several else None,
        entropy=by_group(entropy / math.log(share.shape[1])) if several else None,
        contrast=float((share[0] - share[-2]).abs().sum() / 2) if several else None,
        weights=weights.tolist() if weights is not None and len(weights) > 1 else None,
        gap=_gap(probe.layer),
        apart=(mean[-2] - mean[0]).tolist(),
        input_mean=input_mean[-1].tolist(),
        input_std=input_var[-1].sqrt().tolist(),
    )


def _mean_and_variance(means: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    mean = means[f"{name} mean"]
    return mean, (means[f"{name} square"] - mean.square()).clamp_min(0)


def _running(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Running means and variances [K, C], if there are any."""
    mean, var = (getattr(layer, name, None) for name in ("running_mean", "running_var"))
    if mean is None or var is None:
        return None
    return tuple(torch.atleast_2d(v.detach().cpu().double()) for v in (mean, var))


def _gap(layer: nn.Module) -> float | None:
    running = _running(layer)
    if running is None or len(running[0]) < 2:
        return None
    mean, var = running
    j, k = torch.triu_indices(len(mean), len(mean), offset=1)
    apart = (mean[j] - mean[k]).square() / ((var[j] + var[k]) / 2)
    return float(apart.mean(1).sqrt().mean())


def _components(
    layer: nn.Module, found: LayerInspection, channel: int
) -> list[tuple[float, float, float]]:
    running = _running(layer)
    if running is None:
        return []
    mean, var = (v[:, channel].tolist() for v in running)
    equal = [1 / len(mean)] * len(mean)
    weights = found.weights or (found.shares[ALL] if found.shares else equal)
    return list(zip(weights, mean, var, strict=True))
