"""Files of torch's, which are pickles: read without running the code that a pickle can name."""

import contextlib
import io
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

# What a file of tensors names is from these modules.
TENSORS = {"torch", "torch._utils", "torch._tensor", "torch.storage", "collections"}


class Refused(Exception):
    """A file that is not read. Its text says why: "is damaged ...", or "would run code ..."."""

    def __init__(self, why: str, code: str | None) -> None:
        super().__init__(why)
        self.code = code


def read(path: Path, allowed: Sequence[type] = ()) -> Any:
    """Tensors and plain values of a file that `torch.save` has written, on the CPU.

    Args:
        path: the file.
        allowed: classes whose objects may be in it besides.

    Raises:
        Refused: it is damaged, none of torch's, or names code, which is not run.
    """
    import torch

    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch does not write itself
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        names = code(path)
        if names:
            raise Refused(f"would run code: it names {names[0]}", names[0]) from error
        raise Refused(f"is damaged, or none of torch's ({type(error).__name__})", None) from error


def code(path: Path) -> list[str]:
    """What a file would import, and could call, beyond what tensors need; nothing is run.

    Only for telling: whether a file is read is decided by torch.
    """
    found: dict[str, None] = {}
    with contextlib.suppress(Exception):  # damaged from here on, or no pickle
        for name in _globals(path):
            if name.rpartition(".")[0] not in TENSORS:
                found[name] = None
    return list(found)


def _globals(path: Path) -> Iterator[str]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    yield from _named(io.BytesIO(archive.read(name)))
        return
    with path.open("rb") as file:
        yield from _named(file)


def _named(file: BinaryIO) -> Iterator[str]:
    """The globals of pickles that follow each other, up to what is none."""
    strings: list[str] = []
    while True:
        try:
            for opcode, value, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    yield value.replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                elif "UNICODE" in opcode.name:
                    strings.append(value)
        except ValueError:
            return
