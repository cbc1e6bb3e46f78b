"""Where to compute and in which precision, and why."""

import os
import platform

import torch

from ltnorm.errors import UsageError
from ltnorm.launch import Place, place
from ltnorm.parallel import world_size
from ltnorm.recipe import Train


def resolve_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.

    Of the processes that torchrun started each has a GPU of its own.

    Raises:
        UsageError: the device is not there.
    """
    if here := place():
        return _device_of(here, name)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    there = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there[device.type]:
        raise UsageError(f"device '{name}' is not there", "use --device auto or --device cpu")
    return device


def _device_of(here: Place, name: str) -> torch.device:
    gpus = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UsageError(
            f"device '{name}' is one, and torchrun started {here.world_size} processes",
            "leave --device out, or take cuda (each process its own GPU) or cpu",
        )
    if here.local_world_size > gpus:
        raise UsageError(
            f"{here.local_world_size} processes on this machine, and {gpus} GPUs",
            f"torchrun --nproc-per-node {gpus}" if gpus else "take --device cpu",
        )
    return torch.device("cuda", here.local_rank)


def resolve_precision(name: str, device: torch.device) -> tuple[str, str]:
    """The precision for `auto`, `fp32` or `bf16`, and the reason in words.

    bf16 pays where the hardware multiplies it: on such CPUs about twice as fast as fp32, on
    others it is emulated and several times slower.
    """
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return "bf16", "the GPU multiplies bf16"
        return "fp32", "this GPU does not multiply bf16"
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return "bf16", "the CPU multiplies bf16 (AVX512-BF16 or AMX)"
    return "fp32", f"this {device.type} has no fast bf16"


def _cpu_multiplies_bf16() -> bool:
    # Private in torch, so that a version without them means "no".
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def check_computing(train: Train, device: torch.device) -> None:
    """Raises UsageError for a way of computing that this device, or this training, cannot have."""
    if train.graph and device.type != "cuda":
        raise UsageError(
            f"train.graph: a step is replayed on NVIDIA's GPUs alone, and this run is on {device}",
            "leave it out, or choose --device cuda",
        )
    if train.graph and (train.mixup or train.cutmix):
        raise UsageError(
            "train.graph: the share of mixed images changes from step to step, a graph does not",
            "leave out train.graph, or train.mixup and train.cutmix",
        )
    if place() is None:
        return
    for name in ("compile", "graph", "stack"):
        if getattr(train, name):
            raise UsageError(
                f"train.{name}: is for one process, and torchrun started several",
                f"leave train.{name} out, or torchrun",
            )


def set_computing(train: Train, device: torch.device) -> None:
    """Set how and where this process computes from now on, as each run does when it starts."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose streams, graphs and generator are meant
    if train.deterministic:  # cuBLAS wants to be told before it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # (To set it imports torch's compiler, which takes two seconds.)
    if torch.are_deterministic_algorithms_enabled() != train.deterministic:
        torch.use_deterministic_algorithms(train.deterministic)


def memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """channels_last where convolutions are faster with it: on CPUs and in bf16."""
    fast = device.type == "cpu" or precision == "bf16"
    return torch.channels_last if fast else torch.contiguous_format


def describe(device: torch.device) -> str:
    """The device in words for the result row, and how many of them there are."""
    count = f"{world_size()} x " if world_size() > 1 else ""
    if device.type == "cuda":
        return count + torch.cuda.get_device_name(device)
    return f"{count}{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
