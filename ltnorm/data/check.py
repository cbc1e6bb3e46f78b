"""The files of a data set, looked at in parallel: what is there, whole, below the root, unchanged.

Paths are relative to a root, `os.fsencode`d, fixed-width bytes [N], as in `source.Files`. Work is
handed to processes in chunks, so that memory does not grow with the set; few files are done here.
"""

import ctypes
import hashlib
import multiprocessing
import os
import signal
import stat as status_of
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from ltnorm.cores import cores
from ltnorm.data import decode
from ltnorm.data.decode import BadImage
from ltnorm.data.source import printable
from ltnorm.errors import LtnormError

T = TypeVar("T")
Tell = Callable[[int], None]

_CHUNK = 256
_CHUNK_BYTES = 16 << 20  # of decoded images
_FEW = 2 * _CHUNK  # starting processes takes longer than these
_PR_SET_PDEATHSIG = 1
_stop = ctypes.c_byte(0)  # of a worker: set by the parent, in memory that they share
LEAVES = "leaves the root"
MISSING = "is missing"
_CHANGED = "has changed"
_FILE = np.dtype(
    [
        ("size", np.int64),
        ("mtime_ns", np.int64),
        ("width", np.int32),
        ("height", np.int32),
        ("digest", np.uint8, 32),
    ]
)


@dataclass(frozen=True)
class Checked:
    """What `check` found of N files; of a file that cannot be read, -1 and zeros.

    Attributes:
        size: bytes, int64 [N].
        mtime_ns: the time of the last change, int64 [N].
        width, height: in pixels, of the upright image, int32 [N].
        digest: sha256 of the file's bytes, uint8 [N, 32].
        errors: index -> what is wrong, to be read after the path.
    """

    size: np.ndarray
    mtime_ns: np.ndarray
    width: np.ndarray
    height: np.ndarray
    digest: np.ndarray
    errors: dict[int, str]


def _silent(done: int) -> None:
    """Tells nobody."""


def check(
    root: Path,
    paths: np.ndarray,
    workers: int | None = None,
    tell: Tell = _silent,
    out: np.ndarray | None = None,
    resize: bool = False,
) -> Checked:
    """Read, hash and decode every file once.

    Args:
        root: no file may lie outside, also not through a link.
        paths: bytes [N].
        workers: processes; None is one a core.
        tell: called with the number of files that are done.
        out: uint8 [N, S, S, 3], where images are kept: those of that size alone, unless `resize`
            makes it theirs, as `decode.square` does.
        resize: whether it does.

    Raises:
        LtnormError: a worker process was killed.
    """
    files, errors = [np.empty(0, _FILE)], {}
    _real_folder.cache_clear()
    size = None if out is None else out.shape[1]
    work = partial(_check_chunk, os.path.realpath(os.fsencode(root)), size, resize)
    for start, (found, bad, images) in _spread(work, paths, workers, tell, size):
        files.append(found)
        errors |= {start + i: reason for i, reason in bad.items()}
        if out is not None:
            out[start : start + len(found)] = images
    table = np.concatenate(files)
    columns = {name: np.ascontiguousarray(table[name]) for name in _FILE.names}
    return Checked(**columns, errors=errors)


def pixels(
    root: Path,
    paths: np.ndarray,
    size: int | None,
    out: np.ndarray,
    workers: int | None = None,
    tell: Tell = _silent,
) -> None:
    """Decode every file into `out`, as `decode.square` does.

    Workers hand their images over. Writing into a memory map by themselves saves a tenth of the
    time, measured at 64 pixels, but would serve memory maps alone.

    Args:
        root, paths, workers, tell: as for `check`.
        size: S; None where every image is a square of `out`'s size already, and must be.
        out: uint8 [N, S, S, 3], in memory or a memory map.

    Raises:
        LtnormError: a file that is bad, or not of the size that it must have; a worker was killed.
    """
    work = partial(_decode_chunk, os.fsencode(root), out.shape[1], size is not None)
    for start, (images, reason) in _spread(work, paths, workers, tell, out.shape[1]):
        out[start : start + len(images)] = images
        if reason:
            path = shown(os.path.join(os.fsencode(root), paths[start + len(images)]))
            raise LtnormError(f"{path} {reason}", "`ltnorm prepare` checks all files anew")


def stat(root: Path, paths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Size in bytes and time of the last change in ns of every file, int64 [N] each; -1: missing.

    In one thread: measured on a warm disk, more of them only wait for each other.
    """
    found = np.full((2, len(paths)), -1, np.int64)
    folder = os.fsencode(root)
    for i, path in enumerate(paths.tolist()):
        try:
            status = os.stat(os.path.join(folder, path))
        except OSError:
            continue
        if status_of.S_ISREG(status.st_mode):
            found[:, i] = status.st_size, status.st_mtime_ns
    return found[0], found[1]


def changed(
    root: Path,
    paths: np.ndarray,
    size: np.ndarray,
    mtime_ns: np.ndarray,
    digest: np.ndarray,
    workers: int | None = None,
) -> dict[int, str]:
    """The files that are not what `check` found: index -> what is wrong, to be read after the path.

    Where only the time differs the digest decides, so that a copy of the same bytes is no change.

    Raises:
        LtnormError: a worker process was killed.
    """
    now, when = stat(root, paths)
    wrong = {int(i): MISSING for i in np.flatnonzero(now < 0)}
    wrong |= {int(i): _CHANGED for i in np.flatnonzero((now >= 0) & (now != size))}
    touched = np.flatnonzero((now == size) & (when != mtime_ns))
    work = partial(_hash_chunk, os.fsencode(root))
    for start, found in _spread(work, paths[touched], workers, _silent):
        which = touched[start : start + len(found)]
        wrong |= {int(i): _CHANGED for i in which[(found != digest[which]).any(axis=1)]}
    return dict(sorted(wrong.items()))


def shown(path: bytes) -> str:
    """A path as text for the screen: of one line, whatever bytes it has."""
    return printable(os.fsdecode(path))


def _check_chunk(
    root: bytes, size: int | None, resize: bool, paths: np.ndarray
) -> tuple[np.ndarray, dict[int, str], np.ndarray | None]:
    """The `_FILE`s of a chunk, what is wrong by index, and the images if they have a `size`.

    `root` is a real path.
    """
    files = np.zeros(len(paths), _FILE)
    files["size"] = files["mtime_ns"] = -1
    images = None if size is None else np.zeros((len(paths), size, size, 3), np.uint8)
    errors = {}
    for i, path in enumerate(_until_stopped(paths)):
        try:
            content = _read_file(os.path.join(root, path), root, files[i])
            if images is None:
                shape = decode.displayed_size(content)
            else:
                shape = _keep(decode.decode_bytes(content), images[i], resize)
            files[i]["width"], files[i]["height"] = shape
        except BadImage as error:
            errors[i] = str(error)
    return files, errors, images


def _read_file(path: bytes, root: bytes, found: np.void) -> bytes:
    """The bytes of a file; fills in what is found of it, as far as it gets."""
    if not _inside(root, path):
        raise BadImage(LEAVES)
    content, status = decode.read(path)
    found["size"], found["mtime_ns"] = len(content), status.st_mtime_ns
    found["digest"] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
    return content


def _keep(image: Image.Image, out: np.ndarray, resize: bool) -> tuple[int, int]:
    """Put an image into `out` if it has its size, or `resize` gives it. Returns its own size."""
    if resize or image.size == out.shape[1::-1]:
        out[:] = decode.square(image, len(out))
    return image.size


def _decode_chunk(
    root: bytes, size: int, resize: bool, paths: np.ndarray
) -> tuple[np.ndarray, str | None]:
    """The images of a chunk up to the first bad one, and what is wrong with that."""
    images = np.empty((len(paths), size, size, 3), np.uint8)
    for i, path in enumerate(_until_stopped(paths)):
        try:
            image = decode.decode(os.path.join(root, path))
        except BadImage as error:
            return images[:i], str(error)
        if not resize and image.size != (size, size):
            return images[:i], f"has {image.width}x{image.height} pixels, not {size}x{size}"
        images[i] = decode.square(image, size)
    return images, None


def _hash_chunk(root: bytes, paths: np.ndarray) -> np.ndarray:
    """sha256 of the files of a chunk, uint8 [n, 32]; zeros where a file cannot be read."""
    digests = np.zeros((len(paths), 32), np.uint8)
    for i, path in enumerate(_until_stopped(paths)):
        try:
            digests[i] = _sha256(decode.read(os.path.join(root, path))[0])
        except BadImage:
            continue
    return digests


def _sha256(content: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)


@cache
def _real_folder(folder: bytes) -> bytes:
    return os.path.realpath(folder)


def _inside(root: bytes, path: bytes) -> bool:
    """Whether the real `path` lies below the real `root`. A folder is resolved once."""
    folder, name = os.path.split(path)
    real = os.path.join(_real_folder(folder), name)
    if name in (b"", b".", b"..") or os.path.islink(real):
        real = os.path.realpath(real)
    return real.startswith(root.rstrip(b"/") + b"/")


def _spread(
    work: Callable[[np.ndarray], T],
    paths: np.ndarray,
    workers: int | None,
    tell: Tell,
    size: int | None = None,
) -> Iterator[tuple[int, T]]:
    """(start, work(chunk)) of all chunks of `paths`, in order, by worker processes if many.

    `size` is that of the images that each chunk gives back, if it gives any.
    """
    count = max(1, min(_CHUNK, _CHUNK_BYTES // (3 * size**2))) if size else _CHUNK
    chunks = ((start, paths[start : start + count]) for start in range(0, len(paths), count))
    workers = min(workers or cores(), -(-len(paths) // count))
    if workers < 2 or len(paths) <= _FEW:
        results = ((start, work(chunk)) for start, chunk in chunks)
    else:
        results = _in_processes(work, chunks, workers)
    with closing(results):  # whatever happens at the yield, the workers end now
        for start, result in results:
            yield start, result
            tell(min(start + count, len(paths)))


def _in_processes(
    work: Callable[[np.ndarray], T], chunks: Iterator[tuple[int, np.ndarray]], workers: int
) -> Iterator[tuple[int, T]]:
    # Forked workers start at once and import nothing; elsewhere than on Linux a fork is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    stop = context.RawValue("b", 0)
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(stop, os.getpid()))
    waiting: deque[tuple[int, Future[T]]] = deque()

    def hand_out(count: int) -> None:
        waiting.extend((start, pool.submit(work, chunk)) for start, chunk in islice(chunks, count))

    try:
        with _interrupts_held():
            hand_out(2 * workers)  # no more at a time, so that results do not pile up
        while waiting:
            start, future = waiting.popleft()
            yield start, future.result()
            hand_out(1)
    except BrokenProcessPool:
        raise LtnormError(
            "a worker process was killed while it read images",
            "most often memory is short: free some, and give the command again",
        ) from None
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes that are started here never see Ctrl-C, which is for their parent alone."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(stop: ctypes.c_byte, parent: int) -> None:
    """In a worker: where the parent says that it should end, and no handlers of the parent's.

    It ends with its parent, however that ends; else it would wait for it for ever.
    """
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def _until_stopped(paths: np.ndarray) -> Iterator[bytes]:
    for path in paths.tolist():
        if _stop.value:
            return
        yield path
