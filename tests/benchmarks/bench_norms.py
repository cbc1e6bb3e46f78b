"""A whole training step with each norm, against batch normalization.

uv run python tests/benchmarks/bench_norms.py [MODEL [BATCH [ROUNDS]]]
"""

import sys

import torch
import torch.nn.functional as F
from timing import medians, table

from ltnorm import models
from ltnorm.norms import norm_layer, route
from ltnorm.training.dual import DualPath
from ltnorm.training.objective import RoutedPath, SinglePath

VARIANTS = {
    "bn": ("bn", {}, SinglePath, {}),
    "gn": ("gn", {}, SinglePath, {}),
    "split": ("split", {}, RoutedPath, {}),
    "compound image": ("compound", {}, DualPath, {"dual_path": False}),
    "compound position": ("compound", {"assign": "position"}, DualPath, {"dual_path": False}),
    "compound dual": ("compound", {}, DualPath, {}),
    "compound dual full": ("compound", {}, DualPath, {"aux_gradient": "full"}),
}


class Loss(torch.nn.Module):
    """Cross-entropy."""

    def forward(self, logits, labels):
        """Mean over the batch."""
        return F.cross_entropy(logits, labels)


def main(model: str = "resnet8", batch: str = "128", rounds: str = "15") -> None:
    """Print milliseconds a step and the ratio to BN, for training and for evaluation."""
    torch.manual_seed(0)
    images = torch.randn(int(batch), 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (int(batch),))
    group = torch.tensor([0] * 5 + [1] * 5)
    training, evaluating = {}, {}
    for name, (norm, options, objective, more) in VARIANTS.items():
        net = models.build(model, 10, norm_layer(norm, **options))
        path = objective(net.to(memory_format=torch.channels_last), Loss(), group, **more)
        optimizer = torch.optim.SGD(path.parameters(), 0.01, momentum=0.9)

        def step(path=path, optimizer=optimizer):
            optimizer.zero_grad()
            path(images, labels).backward()
            optimizer.step()

        training[name] = step
        if "dual" not in name:
            with route(net, group[labels]):
                net(images)
            evaluating[name] = lambda net=net: _evaluate(net, images)
    print(table(f"{model}, batch {batch}: training step", medians(training, int(rounds)), "bn"))
    print(table("evaluation", medians(evaluating, int(rounds)), "bn"))


@torch.inference_mode()
def _evaluate(net: torch.nn.Module, images: torch.Tensor) -> None:
    net.eval()(images)
    net.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
