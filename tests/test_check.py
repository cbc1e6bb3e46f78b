import hashlib
import io
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from ltnorm.data import check as module
from ltnorm.data.check import changed, check, pixels, shown, stat
from ltnorm.data.decode import BadImage, decode, decode_bytes, displayed_size, square
from ltnorm.errors import LtnormError


def picture(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def listed(*names):
    return np.array([os.fsencode(name) for name in names])


@pytest.fixture
def tree(tmp_path):
    """A root with images of several kinds, and their names."""
    root = tmp_path / "root"
    names = ["a/1.png", "a/2.jpg", "b, 'c'/ü \" x.png", "top.jpg"]
    for i, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(20 + i, 30, seed=i).save(file)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(50, 40).save(root / "turned.jpg", exif=exif)
    return root, [*names, "turned.jpg"]


@pytest.fixture
def many(tmp_path):
    """A root with more files than are done in one process, and their names."""
    root = tmp_path / "many"
    contents = []
    for seed in range(7):
        file = io.BytesIO()
        picture(8, 8, seed).save(file, "PNG")
        contents.append(file.getvalue())
    names = [f"class{i % 3}/{i}.png" for i in range(700)]
    for label in range(3):
        (root / f"class{label}").mkdir(parents=True)
    for i, name in enumerate(names):
        (root / name).write_bytes(contents[i % 7])
    return root, names


def test_everything_is_found(tree):
    root, names = tree
    found = check(root, listed(*names))
    assert found.errors == {}
    assert list(zip(found.width, found.height, strict=True)) == [
        *((20 + i, 30) for i in range(4)),
        (40, 50),
    ]
    for i, name in enumerate(names):
        file = root / name
        assert found.size[i] == file.stat().st_size
        assert found.mtime_ns[i] == file.stat().st_mtime_ns
        assert found.digest[i].tobytes() == hashlib.sha256(file.read_bytes()).digest()
    assert (found.width.dtype, found.digest.shape) == (np.int32, (5, 32))
    size, mtime_ns = stat(root, listed(*names))
    assert np.array_equal(size, found.size)
    assert np.array_equal(mtime_ns, found.mtime_ns)


def test_processes_find_what_one_finds(many):
    root, names = many
    names[300], names[650] = "class0/none.png", "class1/none.png"
    paths, done = listed(*names), []
    (root / names[5]).write_bytes(b"no image")
    alone = check(root, paths, workers=1)
    together = check(root, paths, workers=2, tell=done.append)
    for field in ("size", "mtime_ns", "width", "height", "digest"):
        assert np.array_equal(getattr(alone, field), getattr(together, field)), field
    assert alone.errors == together.errors
    assert together.errors == {5: "is no image", 300: "is missing", 650: "is missing"}
    assert done[-1] == 700
    assert done == sorted(set(done))
    assert len(done) > 1
    assert together.size[[5, 300, 650]].tolist() == [8, -1, -1]
    assert (np.delete(together.width, [5, 300, 650]) == 8).all()


def test_nothing_is_nothing(tmp_path):
    found = check(tmp_path, np.empty(0, "S1"))
    assert (len(found.size), found.digest.shape, found.errors) == (0, (0, 32), {})
    pixels(tmp_path, np.empty(0, "S1"), 8, np.empty((0, 8, 8, 3), np.uint8))
    assert stat(tmp_path, np.empty(0, "S1"))[0].shape == (0,)


def test_bad_files_are_named_by_index(tree):
    root, names = tree
    whole = (root / "top.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[:-20])
    (root / "empty.jpg").touch()
    (root / "folder.jpg").mkdir()
    os.mkfifo(root / "pipe.jpg")
    bad = ["cut.jpg", "empty.jpg", "folder.jpg", "pipe.jpg", "none.jpg"]
    found = check(root, listed(*names, *bad))
    reasons = ["is truncated", "is empty", "is a folder", "is no regular file", "is missing"]
    assert found.errors == dict(enumerate(reasons, start=len(names)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tree):
    root, names = tree
    (root / names[0]).chmod(0)
    assert "cannot be read" in check(root, listed(*names)).errors[0]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(640, 480), (100, 75)])
def test_a_quick_look_at_a_jpeg_finds_every_truncation(size, progressive):
    file = io.BytesIO()
    picture(*size).save(file, "JPEG", progressive=progressive)
    content = file.getvalue()
    assert displayed_size(content) == size
    for kept in [*range(len(content) - 12, len(content)), *range(0, len(content), 7001)]:
        for look in (displayed_size, decode_bytes):
            with pytest.raises(BadImage):
                look(content[:kept])


def test_no_path_leaves_the_root(tree, tmp_path):
    root, _ = tree
    outside = tmp_path / "outside"
    outside.mkdir()
    picture(5, 5).save(outside / "x.png")
    picture(5, 5).save(tmp_path / "root-beside.png")
    (root / "link.png").symlink_to(outside / "x.png")
    (root / "twice.png").symlink_to("link.png")
    (root / "folder").symlink_to(outside)
    (root / "within.png").symlink_to("a/1.png")
    (root / "a" / "up.png").symlink_to("../top.jpg")
    (root / "loop.png").symlink_to("loop.png")
    leaving = [
        *("link.png", "twice.png", "folder/x.png", "../outside/x.png", str(outside / "x.png")),
        *("../root-beside.png", "..", ".", "a/.."),
    ]
    staying = ["within.png", "a/up.png", "a/../a/1.png", str(root / "top.jpg")]
    found = check(root, listed(*leaving, *staying, "loop.png"))
    expected = dict.fromkeys(range(len(leaving)), "leaves the root")
    loop = found.errors.pop(len(leaving) + len(staying))
    assert found.errors == expected
    assert "cannot be read" in loop
    assert (found.size[: len(leaving)] == -1).all()


def test_a_root_that_is_a_link_is_a_root(tree, tmp_path):
    root, names = tree
    (tmp_path / "link").symlink_to(root)
    assert check(tmp_path / "link", listed(*names)).errors == {}


def test_pixels_are_the_squares_of_the_images(tree, tmp_path):
    root, names = tree
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.uint8, (5, 16, 16, 3))
    pixels(root, listed(*names), 16, out)
    for name, image in zip(names, out, strict=True):
        assert np.array_equal(image, square(decode(root / name), 16))


def test_processes_give_the_pixels_of_one(many):
    root, names = many
    together, alone = (np.zeros((700, 8, 8, 3), np.uint8) for _ in range(2))
    pixels(root, listed(*names), None, together, workers=2)
    pixels(root, listed(*names), 8, alone, workers=1)
    assert np.array_equal(together, alone)
    for i in (0, 255, 256, 699):
        assert np.array_equal(alone[i], np.asarray(picture(8, 8, i % 7)))


@pytest.mark.parametrize("workers", [1, 2])
def test_pixels_of_a_bad_file_name_it(many, workers):
    root, names = many
    out = np.zeros((700, 8, 8, 3), np.uint8)
    picture(9, 8).save(root / names[600])
    with pytest.raises(LtnormError, match=rf"{names[600]} has 9x8 pixels, not 8x8"):
        pixels(root, listed(*names), None, out, workers)
    (root / names[400]).unlink()
    with pytest.raises(LtnormError, match=rf"{root}/{names[400]} is missing") as error:
        pixels(root, listed(*names), 8, out, workers)
    assert "prepare" in error.value.hint


def test_only_what_changed_is_told(many):
    root, names = many
    paths = listed(*names)
    before = check(root, paths)
    known = (paths, before.size, before.mtime_ns, before.digest)
    assert changed(root, *known) == {}

    for name in names:  # a copy: the same bytes at another time
        os.utime(root / name, ns=(1, 1))
    assert changed(root, *known, workers=2) == {}

    (root / names[3]).unlink()
    (root / names[4]).write_bytes(b"longer than before" + (root / names[4]).read_bytes())
    content = bytearray((root / names[650]).read_bytes())
    content[-1] ^= 1
    (root / names[650]).write_bytes(content)
    (root / names[7]).unlink()
    (root / names[7]).mkdir()
    expected = {3: "is missing", 4: "has changed", 7: "is missing", 650: "has changed"}
    for workers in (1, 2):
        assert changed(root, *known, workers=workers) == expected


def test_a_killed_worker_is_an_error_and_no_hang(many, monkeypatch):
    root, names = many
    monkeypatch.setattr(module, "_read_file", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(LtnormError, match="killed") as error:
        check(root, listed(*names), workers=2)
    assert "memory" in error.value.hint


# A chunk of files takes 25 s.
SLOW = """
    import os, sys, time
    from pathlib import Path
    import numpy as np
    from ltnorm.data import check as module

    def slow(*_):
        os.write(1, b"begun\\n")
        time.sleep(0.1)
        return b""

    module._read_file = slow
    paths = np.array([b"x"] * 5000)
    try:
        module.check(Path("."), paths, workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start_slow() -> subprocess.Popen:
    """A process with two workers, which have begun; in a group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline() == b"begun\n"
    return process


@pytest.mark.parametrize("send", [os.killpg, os.kill])
def test_an_interrupt_is_quick_and_quiet(send):
    process = start_slow()  # a terminal sends it to all processes at once
    send(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=5)
    assert (process.returncode, told) == (130, b"")


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's end"
)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_do_not_outlive_a_process_that_is_killed(how):
    process = start_slow()
    os.kill(process.pid, how)
    process.communicate(timeout=5)  # which waits until no process holds its pipes
    assert process.returncode == -how


def test_paths_are_shown_in_one_line():
    assert shown("a b/ü, 'x'.png".encode()) == "a b/ü, 'x'.png"
    assert shown(b"bad \xff\n.png") == "bad \ufffd\ufffd.png"


def test_no_torch():
    code = "import sys, ltnorm.data.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
