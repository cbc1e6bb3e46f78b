import pytest
import torch
from torch import nn

from ltnorm import bench, floor
from ltnorm.peer import CifarResNet

CPU = torch.device("cpu")


def test_flops_of_resnet32_from_its_architecture():
    first = 3 * 16 * 9 * 32**2
    # Ten convolutions a stage; the first of a later one has half the input channels.
    stages = sum((10 - later / 2) * c * c * 9 * s**2 for c, s, later in STAGES)
    forward = first + stages + 64 * 10
    assert forward == 68_862_592  # multiply-adds
    work = floor.count(CifarResNet(32, 10), 32)
    assert work.forward_flops == 2 * forward
    assert work.backward_flops == 2 * (2 * forward - first)
    assert work.parameters == 464_154


STAGES = [(16, 32, 0), (32, 16, 1), (64, 8, 1)]


def test_work_of_a_small_network_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),  # 3x8x8 -> 4x4x4
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, groups=2),  # -> 6x4x4
        nn.Flatten(),
        nn.Linear(96, 5),
    ).train()
    a, b, c = 64 * 27, 96 * 2, 96 * 5
    with torch.no_grad():
        work = floor.count(model, 8)
    assert model.training
    assert model[1].num_batches_tracked == 0
    assert work.forward_flops == 2 * (a + b + c)
    assert work.backward_flops == 2 * (a + 2 * b + 2 * c)
    assert work.forward_values == (192 + 64) + (64 + 96) + (96 + 5)
    assert work.backward_values == (192 + 64) + (64 + 96 + 64) + (96 + 5 + 96)
    assert work.parameters == 4 * 27 + 8 + (6 * 2 + 6) + (96 * 5 + 5)


def test_what_a_stride_leaves_out_need_not_be_read():
    work = floor.count(nn.Sequential(nn.Conv2d(3, 5, 1, stride=2, bias=False)), 8)
    assert work.forward_values == 3 * 4 * 4 + 5 * 4 * 4


def test_the_floor_is_the_longer_of_arithmetic_and_memory():
    work = floor.Work(100, 200, 10, 20, 5)
    fast = floor.Rates(flops=1000.0, by="", bytes=10.0)
    least = floor.floor(work, fast, 4, (1, 1), "fp32")
    assert least.arithmetic == 4 * 300 / 1000
    assert least.memory == (4 * 30 * 4 + 5 * 8 * 4) / 10
    assert least.seconds == least.memory
    half = floor.floor(work, fast, 4, (2, 1), "bf16")
    assert half.arithmetic == 4 * (2 * 100 + 200) / 1000
    assert half.memory == (4 * 40 * 2 + 5 * 8 * 4) / 10
    slow = floor.Rates(flops=1.0, by="", bytes=10.0)
    assert floor.floor(work, slow, 4, (1, 1), "fp32").seconds == 1200


@pytest.mark.parametrize(("product", "by"), [(9.0, "matrix product"), (2.0, "convolution 32x")])
def test_the_fastest_of_products_and_convolutions_is_the_rate(monkeypatch, product, by):
    speeds = {16: 1.0, 32: 3.0, 64: 2.0}
    monkeypatch.setattr(floor, "_product", lambda *_: product)
    monkeypatch.setattr(floor, "_convolution", lambda layer, *_: speeds[layer.input[0]])
    monkeypatch.setattr(floor, "_stream", lambda *_: 7.0)
    rates = floor.measured_rates(CifarResNet(32, 10), bench.Batch(), CPU, "fp32")
    assert rates.flops == max(product, 3.0)
    assert rates.by.startswith(by)
    assert rates.bytes == 7


def test_rates_are_work_over_the_shortest_time(monkeypatch):
    """A clock that ticks as told: 8 s, which warm up, then 2, 1 and 4."""
    ticks = iter([0, 8, 10, 12, 20, 21, 30, 34] * 3)
    monkeypatch.setattr(floor.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(floor, "REPEATS", 3)
    monkeypatch.setitem(floor.PRODUCT, "cpu", 16)
    monkeypatch.setitem(floor.STREAM, "cpu", 4096)
    assert floor._product(CPU, torch.float32) == 2 * 16**3
    assert floor._stream(CPU) == 3 * 4096
