import hashlib
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ltnorm.data import datasets
from ltnorm.data.longtail import choose
from ltnorm.data.making import Making
from ltnorm.data.prepare import prepare
from ltnorm.data.prepared import find, set_id
from ltnorm.data.source import Raw
from ltnorm.data.synthetic import synthetic
from ltnorm.errors import LtnormError, UsageError
from ltnorm.validation import validate


def spec(**options):
    small = {"name": "synthetic", "image_size": 8, "train_per_class": 100, "test_per_class": 5}
    return validate({"dataset": small | options}).dataset


def test_a_prepared_set_holds_the_chosen_images(tmp_path):
    wanted = spec(ratio=10, train_per_class=50, val=5, data_seed=3)
    made = prepare(wanted, tmp_path, tmp_path / "data")
    source = synthetic(Raw(tmp_path), image_size=8, train_per_class=50, test_per_class=5)
    subset = choose(source.train.labels, 10, 10, val=5, data_seed=3)
    for split, images, labels in (
        ("train", source.train.images[subset.train], source.train.labels[subset.train]),
        ("val", source.train.images[subset.val], source.train.labels[subset.val]),
        ("test", source.test.images, source.test.labels),
    ):
        found = made.open(split)
        assert np.array_equal(found.images, images)
        assert np.array_equal(found.labels, labels)
    assert made.counts == subset.counts == np.bincount(made.open("train").labels).tolist()
    indices = np.concatenate([subset.train, subset.val])
    assert made.index_sha256 == hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
    assert [p.name for p in (tmp_path / "data").iterdir()] == [made.path.name]


def test_a_second_call_finds_it(tmp_path):
    first = prepare(spec(n_max=20, ratio=2), tmp_path, tmp_path)
    second = prepare(spec(n_max=20, ratio=2), tmp_path, tmp_path)
    assert (first.fresh, second.fresh) == (True, False)
    assert second.manifest == first.manifest


def test_what_changes_the_images_changes_the_name():
    names = [
        set_id(spec(**options))
        for options in (
            {},
            {"ratio": 10},
            {"profile": "step"},
            {"n_max": 100},
            {"val": 10},
            {"class_order": "reversed"},
            {"data_seed": 1},
            {"classes": 5},
            {"generator_seed": 1},
        )
    ]
    assert len(set(names)) == len(names)
    assert set_id(validate({}).dataset) == "synthetic-exp100"


@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damage_is_found_and_named(tmp_path, file, how):
    made = prepare(spec(n_max=20, ratio=2), tmp_path, tmp_path)
    path = made.path / file
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    else:
        content[-1] ^= 1
        path.write_bytes(content if how == "flip" else content[: len(content) // 2])
    with pytest.raises(LtnormError, match=file) as error:
        made.check()
    assert "--force" in error.value.hint
    assert prepare(spec(n_max=20, ratio=2), tmp_path, tmp_path, Making(force=True)).check() is None


def test_a_changed_manifest_is_refused(tmp_path):
    made = prepare(spec(n_max=20, ratio=2), tmp_path, tmp_path)
    manifest = made.path / "manifest.json"
    content = json.loads(manifest.read_text())
    content["counts"].reverse()
    manifest.write_text(json.dumps(content))
    with pytest.raises(LtnormError, match="changed"):
        find(spec(n_max=20, ratio=2), tmp_path)


def test_nearly_equal_ratios_are_two_sets(tmp_path):
    first, second = (prepare(spec(ratio=r), tmp_path, tmp_path) for r in (1.000001, 1))
    assert first.path != second.path
    assert sum(first.counts) < sum(second.counts) == 1000
    second.path.rename(tmp_path / "other")
    first.path.rename(second.path)
    with pytest.raises(LtnormError, match="other settings"):
        prepare(spec(ratio=1), tmp_path, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1}'])
def test_a_damaged_or_foreign_manifest_is_refused(tmp_path, content):
    made = prepare(spec(n_max=20, ratio=2), tmp_path, tmp_path)
    (made.path / "manifest.json").write_text(content)
    with pytest.raises(LtnormError):
        find(spec(n_max=20, ratio=2), tmp_path)


def test_only_the_split_asked_for_is_opened(tmp_path):
    made = prepare(spec(n_max=20, ratio=2, val=3), tmp_path, tmp_path)
    for file in made.path.glob("test_*"):
        file.unlink()
    made.open("train")
    made.open("val")
    with pytest.raises(LtnormError, match="test_"):
        made.open("test")


def test_two_may_make_the_same_set_at_once(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(prepare, spec(), tmp_path, tmp_path) for _ in range(2)]
    for made in both:
        made.result().check()
    assert [p.name for p in tmp_path.iterdir()] == [set_id(spec())]


def test_synthetic_is_seeded_balanced_and_ambiguous(tmp_path):
    first, again, other = (
        synthetic(Raw(tmp_path), train_per_class=20, generator_seed=seed) for seed in (0, 0, 1)
    )
    assert np.array_equal(first.train.images, again.train.images)
    assert not np.array_equal(first.train.images, other.train.images)
    assert first.train.images.shape == (200, 32, 32, 3)
    assert first.train.images.dtype == np.uint8
    assert np.bincount(first.test.labels).tolist() == [100] * 10
    # Nothing of a class shows in first moments: brightness and contrast do not tell classes apart.
    many = synthetic(Raw(tmp_path), train_per_class=400)
    means = many.train.images.reshape(10, 400, -1).mean(axis=(1, 2))
    spread = many.train.images.reshape(4000, -1).mean(axis=1).std()
    assert np.ptp(means) < 5 * spread / np.sqrt(400)


def test_missing_data_says_where_it_was_looked_for(tmp_path):
    for name in ("cifar10", "cifar100", "fashion-mnist"):
        wanted = validate({"dataset": {"name": name}}).dataset
        with pytest.raises(UsageError, match=str(tmp_path)) as error:
            prepare(wanted, tmp_path, tmp_path / "data")
        assert f"ltnorm prepare --dataset {name}" in error.value.hint


def test_checksums_are_torchvisions():
    from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

    source = Path(datasets.__file__).read_text()
    for dataset in (CIFAR10, CIFAR100):
        for name, md5 in (*dataset.train_list, *dataset.test_list):
            assert f'"{name}": "{md5}"' in source
        assert f'"{dataset.meta["filename"]}": "{dataset.meta["md5"]}"' in source
    for name, md5 in FashionMNIST.resources:
        assert f'"{name}": "{md5}"' in source


def test_pickles_with_code_are_refused(tmp_path):
    import io
    import pickle

    class Evil:
        def __reduce__(self):
            return (print, ("pwned",))

    with pytest.raises(pickle.UnpicklingError, match="not allowed"):
        datasets._PlainUnpickler(io.BytesIO(pickle.dumps(Evil()))).load()


def test_cifar10_is_read_as_torchvision_reads_it(real_data, tmp_path):
    from torchvision.datasets import CIFAR10

    ours = datasets.cifar10(Raw(real_data))
    for train, images, labels in (
        (True, ours.train.images, ours.train.labels),
        (False, ours.test.images, ours.test.labels),
    ):
        theirs = CIFAR10(str(real_data), train=train)
        assert np.array_equal(images, theirs.data)
        assert labels.tolist() == theirs.targets
        assert ours.classes == theirs.classes


def test_cifar10_lt_on_real_data(real_data, tmp_path):
    wanted = validate({"dataset": {"name": "cifar10"}}).dataset
    made = prepare(wanted, real_data, tmp_path)
    assert made.counts == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert len(made.open("test")) == 10000
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest["source_md5"]["test_batch"] == "40351d587109b95175f43aff81a1287e"


def test_damaged_source_files_are_named(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"not it")
    with pytest.raises(LtnormError, match=r"data_batch_1 is damaged: md5"):
        datasets.cifar10(Raw(tmp_path))


def test_preparing_needs_no_torch(tmp_path):
    import subprocess

    code = (
        "import sys; from ltnorm.cli import main; main(['prepare']); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert (tmp_path / "data").is_dir()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A local server of a tiny Fashion-MNIST, in place of torchvision's."""
    import gzip
    import http.server
    import struct

    from torchvision.datasets import FashionMNIST

    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for file, _ in FashionMNIST.resources:
        count = 60 if file.startswith("train") else 20
        labels = np.arange(count, dtype=np.uint8) % 10
        if "labels" in file:
            raw = struct.pack(">II", 0x801, count) + labels.tobytes()
        else:
            pixels = np.repeat(labels, 28 * 28)
            raw = struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes()
        content = gzip.compress(raw)
        (folder / file).write_bytes(content)
        resources.append((file, hashlib.md5(content).hexdigest()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    monkeypatch.setattr(datasets, "_read", lambda path, md5: path.read_bytes())
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_prepare_downloads_what_is_missing(tmp_path, mirror):
    wanted = validate({"dataset": {"name": "fashion-mnist", "ratio": 2}}).dataset
    made = prepare(wanted, tmp_path / "raw", tmp_path / "data", Making(download=True))
    train = made.open("train")
    assert made.counts[0] == 6
    assert train.images.shape == (sum(made.counts), 28, 28, 3)
    assert np.array_equal(train.images[:, 0, 0, 0], train.labels)
    # What is there is not downloaded again.
    for file in mirror.iterdir():
        file.unlink()
    prepare(wanted, tmp_path / "raw", tmp_path / "data", Making(download=True, force=True))


def test_a_failed_download_is_told(tmp_path, mirror):
    for file in mirror.iterdir():
        file.unlink()
    wanted = validate({"dataset": {"name": "fashion-mnist"}}).dataset
    with pytest.raises(LtnormError, match="could not be downloaded") as error:
        prepare(wanted, tmp_path / "raw", tmp_path / "data", Making(download=True))
    assert "network" in error.value.hint
    assert error.value.exit_code == 1


def test_prepare_says_what_it_downloads_and_where_to(ltnorm, mirror):
    answer = ltnorm("prepare --dataset fashion-mnist --ratio 2 --root raw")
    assert answer.code == 0, answer.err
    assert "downloading fashion-mnist into raw" in answer.err
    assert "downloading" not in ltnorm("prepare --dataset fashion-mnist --ratio 3 --root raw").err
