"""The floor of a training step: what the machine needs at least for its arithmetic and its traffic.

Arithmetic: multiply-adds of the convolutions and linear layers, 2 FLOPs each, in the forward, in
the gradient of weights and in that of inputs (the first layer's input, the images, has none). All
else, norms and activations among it, counts nothing.

Traffic: as if norms, activations and additions cost none of their own, being done where a
convolution reads or writes. Of each convolution and linear layer the forward reads the input and
writes the output; the backward reads the input and the gradient of the output, once for both
gradients, and writes the gradient of the input (but the first layer's). Besides, 8 float32 numbers
a parameter and step: forward and backward read the weight, the gradient is written, the optimizer
reads weight, gradient and momentum, and writes weight and momentum. What a cache keeps from one
layer for the next is not considered: where it holds a whole layer's output, less is needed.

The rates are measured, not taken from a data sheet. The floor is the longer of the two times.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltnorm.bench import Batch, wait
from ltnorm.training.device import memory_format

# Length of the sides of a matrix product, and bytes of an array that no cache holds.
PRODUCT = {"cpu": 2048}
STREAM = {"cpu": 256 << 20}
PRODUCT_GPU, STREAM_GPU = 8192, 2 << 30
REPEATS = 5
PARAMETER_ACCESSES = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = 3  # convolutions that are timed


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer that was seen at work, on one image.

    Attributes:
        module: the layer.
        input, output: shapes, of one image.
        flops: of its forward.
        first: whether its input needs no gradient.
    """

    module: nn.Module
    input: torch.Size
    output: torch.Size
    flops: int
    first: bool


@dataclass(frozen=True)
class Work:
    """What an image costs: FLOPs, and numbers read or written, of a forward and of a backward.

    `parameters` are those of the whole model, once a step.
    """

    forward_flops: int
    backward_flops: int
    forward_values: int
    backward_values: int
    parameters: int


@dataclass(frozen=True)
class Rates:
    """What the machine reached a second: FLOPs, and by what, and bytes."""

    flops: float
    by: str
    bytes: float


@dataclass(frozen=True)
class Floor:
    """The least seconds of a step."""

    arithmetic: float
    memory: float

    @property
    def seconds(self) -> float:
        """The longer of the two: at best one hides behind the other."""
        return max(self.arithmetic, self.memory)


def layers(model: nn.Module, image_size: int) -> list[Layer]:
    """The convolutions and linear layers, in the order of use, by one evaluation of the model."""
    seen: list[Layer] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight, x = module.weight, inputs[0]
        # An output takes as many multiply-adds as a row of the weight has numbers.
        flops = 2 * output.numel() * weight[0].numel()
        seen.append(Layer(module, x.shape[1:], output.shape[1:], flops, not x.requires_grad))

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, kinds)]
    weight, training = next(model.parameters()), model.training
    try:
        with torch.enable_grad():  # which inputs have a gradient is asked
            model.eval()(weight.new_zeros(1, 3, image_size, image_size))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return seen


def _read(layer: Layer) -> int:
    """The numbers of its input that a layer needs: a stride can leave out some."""
    if isinstance(layer.module, nn.Linear):
        return layer.input.numel()
    touched = (
        min(size, out * kernel)
        for size, out, kernel in zip(
            layer.input[1:], layer.output[1:], layer.module.kernel_size, strict=True
        )
    )
    return layer.input[0] * math.prod(touched)


def count(model: nn.Module, image_size: int) -> Work:
    """What an image costs in `model`."""
    seen = layers(model, image_size)
    sizes = [(_read(layer), layer.input.numel(), layer.output.numel(), layer) for layer in seen]
    return Work(
        forward_flops=sum(layer.flops for layer in seen),
        backward_flops=sum(layer.flops * (1 if layer.first else 2) for layer in seen),
        forward_values=sum(read + out for read, _, out, _ in sizes),
        backward_values=sum(
            read + out + (0 if layer.first else whole) for read, whole, out, layer in sizes
        ),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def floor(work: Work, rates: Rates, images: int, passes: tuple[int, int], precision: str) -> Floor:
    """The floor of a step.

    Args:
        work: of an image.
        rates: of the machine, in this precision.
        images: a step.
        passes: how often each goes forward and backward (see `SinglePath.cost`).
        precision: of activations, 4 bytes in fp32, 2 in bf16.
    """
    forward, backward = (images * times for times in passes)
    flops = forward * work.forward_flops + backward * work.backward_flops
    values = forward * work.forward_values + backward * work.backward_values
    traffic = values * DTYPES[precision].itemsize + work.parameters * PARAMETER_ACCESSES * 4
    return Floor(flops / rates.flops, traffic / rates.bytes)


def measured_rates(model: nn.Module, batch: Batch, device: torch.device, precision: str) -> Rates:
    """The best rates that the machine shows, for floors that are not above what can be reached.

    FLOPs: of a large matrix product, and of forward and backward of those convolutions of the model
    that have the most, in the precision's memory layout; the fastest counts. Bytes: of x = x + y
    for arrays larger than any cache, two read and one written.
    """
    dtype, layout = DTYPES[precision], memory_format(device, precision)
    found = {"matrix product": _product(device, dtype)}
    for layer in _largest(layers(model, batch.image_size)):
        name = f"convolution {'x'.join(map(str, layer.input))} to {layer.output[0]}"
        found[name] = _convolution(layer, batch.images, device, dtype, layout)
    by = max(found, key=found.__getitem__)
    return Rates(found[by], by, _stream(device))


def _largest(seen: list[Layer]) -> list[Layer]:
    """Of the shapes of convolutions those with the most FLOPs, each once."""
    kinds = {
        (layer.input, layer.output, layer.module.kernel_size): layer
        for layer in seen
        if isinstance(layer.module, nn.Conv2d)
    }
    return sorted(kinds.values(), key=lambda layer: -layer.flops)[:SHAPES]


def _product(device: torch.device, dtype: torch.dtype) -> float:
    side = PRODUCT.get(device.type, PRODUCT_GPU)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device)


def _convolution(
    layer: Layer,
    images: int,
    device: torch.device,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> float:
    """The faster of forward and backward of a layer."""
    conv = layer.module
    shapes = (images, *layer.input), conv.weight.shape, (images, *layer.output)
    x, weight, grad = (
        torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
        for shape in shapes
    )
    settings = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward() -> Tensor:
        return F.conv2d(x, weight, None, *settings)

    def backward() -> object:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, *settings[:3], False, [0, 0], settings[3], [True, True, False]
        )

    with torch.no_grad():
        flops = images * layer.flops
        return max(flops / _best(forward, device), 2 * flops / _best(backward, device))


def _stream(device: torch.device) -> float:
    size = STREAM.get(device.type, STREAM_GPU)
    x, y = (torch.ones(size // 4, device=device) for _ in range(2))
    return 3 * size / _best(lambda: x.add_(y), device)


def _best(action: Callable[[], object], device: torch.device) -> float:
    """The least seconds of some repetitions, after one that is not counted."""
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        action()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
