"""Two gloo processes on half batches against one process on the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from ltnorm.norms import norm_layer, route

CASES = {
    "bn": ("bn", {}),
    "one component": ("compound", {"components": 1}),
    "compound by image": ("compound", {"components": 3}),
    "compound by position": ("compound", {"components": 3, "assign": "position"}),
    "split": ("split", {"components": 3}),
    "balanced": ("balanced", {"components": 3}),
    "brn": ("brn", {"warmup": 0, "ramp": 2}),
    "nbn": ("nbn", {}),
    "mode": ("mode", {}),
    "mixture": ("mixture", {}),
    "mixture by image": ("mixture", {"assign": "image"}),
}
STEPS = 3


def layer(case):
    torch.manual_seed(0)
    name, options = CASES[case]
    made = norm_layer(name, **options)(4).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p))
    return made


def batches(case):
    """Images far from zero and unlike each other, with class groups (or -1) for the first case."""
    torch.manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(8, 4, 3, 3) + 3 * torch.randn(8, 4, 1, 1) + 20
        low = 0 if case in ("split", "balanced") else -1
        yield x.double(), torch.randn(8, 4, 3, 3).double(), torch.randint(low, 3, (8,))


def train(made, case, part):
    """Outputs and input gradients of the steps, parameter gradients, running state."""
    components = getattr(made, "components", 1)
    outputs = []
    for x, grad, groups in batches(case):
        x = x[part].clone().requires_grad_()
        with route(made, groups[part] if components > 1 else groups[part].clamp_max(0)):
            y = made(x)
        (y * grad[part]).sum().backward()  # (with gradients given, torch would import sympy)
        outputs += [y.detach(), x.grad]
    parameters = [p.grad for p in made.parameters()]
    return outputs, parameters, [b for b in made.buffers() if b.is_floating_point()]


def worker(rank):
    dist.init_process_group("gloo")
    part = slice(0, 4) if rank == 0 else slice(4, 8)
    cases = {case: train(layer(case), case, part) for case in CASES}
    local = norm_layer("compound", sync=False)(4)
    before = copy.deepcopy(local)
    x = torch.randn(4, 4, 2, 2) + rank
    local(x)
    dist.barrier()
    dist.destroy_process_group()
    return cases, (local.running_mean.clone(), x, before)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    codes, given, printed = on_ranks(worker, tmp_path_factory.mktemp("ranks"))
    assert codes == [0, 0], printed
    return given


@pytest.mark.parametrize("case", list(CASES))
def test_half_batches_on_two_ranks_are_the_whole_batch(ranks, case):
    near = {"rtol": 1e-9, "atol": 1e-10}
    outputs, parameters, state = train(layer(case), case, slice(0, 8))
    (first, first_grads, first_state), (second, second_grads, second_state) = (
        ranks[rank][0][case] for rank in (0, 1)
    )
    for whole, a, b in zip(outputs, first, second, strict=True):
        torch.testing.assert_close(torch.cat([a, b]), whole, **near)
    for whole, a, b in zip(parameters, first_grads, second_grads, strict=True):
        torch.testing.assert_close(a + b, whole, **near)  # gradients of parameters stay local
    for whole, a, b in zip(state, first_state, second_state, strict=True):
        torch.testing.assert_close(a, whole, **near)
        torch.testing.assert_close(b, whole, **near)


def test_synchronization_can_be_turned_off(ranks):
    for _, (running_mean, x, fresh) in ranks:
        fresh(x)
        torch.testing.assert_close(running_mean, fresh.running_mean)
    (_, (first, *_)), (_, (second, *_)) = ranks
    assert not torch.equal(first, second)
