"""A model on a whole split: logits, and all metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltnorm.data.files import worker_count, workers_watched
from ltnorm.data.loader import batches, normalize
from ltnorm.data.longtail import GROUP_NAMES, GroupScheme, report_groups
from ltnorm.data.prepared import PreparedSet
from ltnorm.data.source import Images, Split
from ltnorm.errors import LtnormError
from ltnorm.evaluation import metrics

# Images a batch, and what their pixels may be: large images are fewer.
BATCH, BATCH_PIXELS = 500, 64 * 224 * 224


@torch.inference_mode()
@workers_watched()
def predict(
    model: nn.Module,
    images: Images,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    workers: int | None = None,
) -> Tensor:
    """Logits float32 [N, C] on the CPU, in the order of the images.

    Always in float32 (TF32 convolutions off), whatever the precision of training, so that a
    checkpoint has one accuracy. `workers` decode files; None is as many as `worker_count` has.

    Raises:
        LtnormError: logits that are not finite, or a file that does not decode.
    """
    model.eval()
    size = max(1, min(BATCH, BATCH_PIXELS // images.image_size**2))
    with torch.backends.cudnn.flags(allow_tf32=False):
        logits = torch.cat(
            [
                model(normalize(part.to(device), mean, std)).cpu()
                for part in batches(images, size, worker_count(workers, device))
            ]
        )
    if not logits.isfinite().all():
        raise LtnormError(
            "the model's outputs are not finite: its weights have diverged",
            "lower the learning rate (--lr), or raise train.warmup_epochs",
        )
    return logits


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a split: metrics, the report group of each class, and the logits."""

    metrics: metrics.Metrics
    scheme: str
    groups: list[str]
    logits: Tensor
    labels: Tensor

    def columns(self) -> dict[str, Any]:
        """The metrics by the names that they have in result.csv."""
        metrics, groups = self.metrics, self.groups
        return {
            "group_scheme": self.scheme,
            **{f"{name}_classes": groups.count(name) for name in GROUP_NAMES},
            "all": metrics.accuracy,
            **metrics.groups,
            "macro_f1": metrics.macro_f1,
            "gmean": metrics.gmean,
            "worst_class": metrics.worst_class,
            "nll": metrics.nll,
            "ece": metrics.ece,
        }


def evaluate_split(
    model: nn.Module,
    data: PreparedSet,
    split: Split,
    scheme: GroupScheme,
    device: torch.device,
    workers: int | None = None,
) -> Evaluation:
    """Evaluate a model on one split of a prepared set; the other splits are not opened."""
    images = data.open(split)
    logits = predict(model, images, mean=data.mean, std=data.std, device=device, workers=workers)
    return of_logits(logits, torch.from_numpy(images.labels), data, scheme)


def of_logits(logits: Tensor, labels: Tensor, data: PreparedSet, scheme: GroupScheme) -> Evaluation:
    """Evaluate logits [N, C] of images of a prepared set, with labels int64 [N]."""
    used, groups = report_groups(data.counts, scheme)
    return Evaluation(metrics.evaluate(logits, labels, groups), used, groups, logits, labels)
