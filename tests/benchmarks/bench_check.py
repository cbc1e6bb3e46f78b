"""Listed files, checked, decoded and prepared, against a bare loop of Pillow's over some of them.

uv run python tests/benchmarks/bench_check.py
"""

import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from ltnorm.data.check import changed, check, cores, pixels, stat
from ltnorm.data.making import Making
from ltnorm.data.prepare import prepare
from ltnorm.validation import validate

FILES, CLASSES, CONTENTS = 62_500, 365, 300
SIZE = 64
SAMPLE = 2_000
ROUNDS = 3


def main() -> None:
    """Print seconds, and files a second in those of the bare loop in one process."""
    print(f"{FILES} JPEGs of 32 to 64 pixels in {CLASSES} folders, {cores()} cores")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = _make(root)
        for _ in range(ROUNDS):
            _round(root, paths)


def _round(root: Path, paths: np.ndarray) -> None:
    before = _bare(root, paths)
    checking, found = _timed(lambda: check(root, paths))
    assert not found.errors
    cache = np.lib.format.open_memmap(
        root / "cache.npy", "w+", np.uint8, (len(paths), SIZE, SIZE, 3)
    )
    decoding, _ = _timed(lambda: pixels(root, paths, SIZE, cache))
    looking, _ = _timed(lambda: stat(root, paths))
    touched = found.mtime_ns + 1
    hashing, wrong = _timed(lambda: changed(root, paths, found.size, touched, found.digest))
    assert not wrong
    preparing, _ = _timed(lambda: _prepare(root, paths))
    caching, _ = _timed(lambda: _prepare(root, paths, cache_size=SIZE))
    # The bare loop goes first and last, because other work on the machine comes and goes.
    bare = (before + _bare(root, paths)) / 2
    for name, seconds in (
        ("check", checking),
        (f"pixels at {SIZE}", decoding),
        ("stat", looking),
        ("hash again", hashing),
        ("prepare, files", preparing),
        (f"prepare, {SIZE} px", caching),
    ):
        rate = len(paths) / seconds
        print(f"  {name:16s} {seconds:7.2f} s   {rate * bare:7.2f} x bare Pillow")
    print(f"  {'bare Pillow':16s} {bare * len(paths):7.2f} s")


def _prepare(root: Path, paths: np.ndarray, **options: int) -> None:
    """`ltnorm prepare --dataset lists`, every sixth image for the test."""
    lists = {}
    for split, offset in (("train", range(1, 6)), ("test", range(1))):
        lists[split] = root / f"{split}.txt"
        chosen = [path.decode() for i, path in enumerate(paths) if i % 6 in offset]
        lists[split].write_text("".join(f"{path} {int(path[5:8])}\n" for path in chosen))
    spec = validate({"dataset": {"name": "lists", **options}}).dataset
    with tempfile.TemporaryDirectory() as data_dir:
        prepare(spec, root, Path(data_dir), Making(lists=lists))


def _timed(action: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def _bare(root: Path, paths: np.ndarray) -> float:
    """Seconds a file of open and convert, over an even sample."""
    sample = [root / path.decode() for path in paths[:: max(len(paths) // SAMPLE, 1)]]
    start = time.perf_counter()
    for path in sample:
        with Image.open(path) as image:
            image.convert("RGB")
    return (time.perf_counter() - start) / len(sample)


def _make(root: Path) -> np.ndarray:
    """Write the tree; its paths."""
    rng = np.random.default_rng(0)
    contents = []
    for size in rng.integers(32, 65, CONTENTS):
        noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1)).save(file, "JPEG", quality=90)
        contents.append(file.getvalue())
    for label in range(CLASSES):
        (root / f"class{label:03d}").mkdir()
    paths = sorted(f"class{i % CLASSES:03d}/{i:05d}.jpg" for i in range(FILES))
    for i, path in enumerate(paths):
        (root / path).write_bytes(contents[i % CONTENTS])
    return np.array([path.encode() for path in paths])


if __name__ == "__main__":
    main()
