import inspect
import json
import struct
import subprocess
import sys
from dataclasses import replace
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision.datasets
from PIL import Image

from ltnorm import registry
from ltnorm.data import torchvision_sets
from ltnorm.data.datasets import MissingData
from ltnorm.data.source import Raw
from ltnorm.data.torchvision_sets import ARRAYS, FILES, arrays, files
from ltnorm.errors import LtnormError

ENTRIES = {
    name: entry
    for name, entry in registry.DATASETS.items()
    if entry.target.startswith("ltnorm.data.torchvision_sets:")
}
RNG = np.random.default_rng(0)


def draw(path, size=(9, 7)):
    """An image like no other, in the format of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


# One function a class of torchvision: a tiny raw data set in its layout. Labels are not in the
# order of the paths where the layout allows it.


def gtsrb(root, monkeypatch):
    base = root / "gtsrb"
    for sign, count in ((0, 3), (1, 2)):
        for i in range(count):
            draw(base / f"GTSRB/Training/{sign:05d}/0000{i}_00000.ppm", (15 + i, 20))
    for i in range(3):
        draw(base / f"GTSRB/Final_Test/Images/0000{i}.ppm")
    rows = ("00000.ppm;1", "00001.ppm;0", "00002.ppm;1")
    write(base / "GT-final_test.csv", "Filename;ClassId", *rows)
    return {"train": 5, "test": 3}


def caltech101(root, monkeypatch):
    for name, count in (("ant", 2), ("BACKGROUND_Google", 1), ("Faces", 3)):
        for i in range(count):
            draw(root / f"caltech101/101_ObjectCategories/{name}/image_{i + 1:04d}.jpg")
    return {"train": 5}


def caltech256(root, monkeypatch):
    for label, (name, count) in enumerate((("ak47", 2), ("clutter", 3)), start=1):
        for i in range(count):
            place = root / f"caltech256/256_ObjectCategories/{label:03d}.{name}"
            draw(place / f"{label:03d}_{i + 1:04d}.jpg")
    (place / "RENAME2").mkdir()
    return {"train": 5}


def sun397(root, monkeypatch):
    write(root / "SUN397/ClassName.txt", "/b/bar", "/a/abbey", "/a/airport/entrance")
    for name, count in (("a/abbey", 3), ("a/airport/entrance", 1), ("b/bar", 2)):
        for i in range(count):
            draw(root / f"SUN397/{name}/sun_{9 - i}.jpg")
    return {"train": 6}


def eurosat(root, monkeypatch):
    for name, count in (("River", 2), ("Forest", 3)):
        for i in range(count):
            draw(root / f"eurosat/2750/{name}/{name}_{i}.jpg", (64, 64))
    return {"train": 5}


def food101(root, monkeypatch):
    base = root / "food-101"
    splits = {
        "train": {"waffles": [3, 1], "baklava": [7]},
        "test": {"waffles": [2], "baklava": [5]},
    }
    for split, classes in splits.items():
        listed = {name: [f"{name}/{i}" for i in ids] for name, ids in classes.items()}
        write(base / f"meta/{split}.json", json.dumps(listed))
        for paths in listed.values():
            for path in paths:
                draw(base / f"images/{path}.jpg")
    return {"train": 3, "test": 2}


def dtd(root, monkeypatch):
    base = root / "dtd/dtd"
    for k, split in enumerate(("train", "val", "test")):
        names = [f"woven/{k}.jpg", f"banded/{k}.jpg"]
        write(base / f"labels/{split}1.txt", *names)
        for name in names:
            draw(base / "images" / name)
    return {"train": 2, "val": 2, "test": 2}


def flowers102(root, monkeypatch):
    base = root / "flowers-102"
    for i in range(1, 7):
        draw(base / f"jpg/image_{i:05d}.jpg")
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([2, 1, 2, 1, 1, 2])})
    ids = {"trnid": [5, 6], "valid": [1, 2], "tstid": [3, 4]}
    scipy.io.savemat(base / "setid.mat", {k: np.array(v) for k, v in ids.items()})
    known = dict(torchvision.datasets.Flowers102._file_dict)
    for key in ("label", "setid"):
        file = known[key][0]
        known[key] = (file, md5((base / file).read_bytes()).hexdigest())
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", known)
    return {"train": 2, "val": 2, "test": 2}


def fgvc_aircraft(root, monkeypatch):
    base = root / "fgvc-aircraft-2013b/data"
    write(base / "variants.txt", "707-320", "Boeing 717")
    for k, split in enumerate(("train", "val", "test")):
        write(base / f"images_variant_{split}.txt", f"{k}9 Boeing 717", f"{k}1 707-320")
        draw(base / f"images/{k}9.jpg")
        draw(base / f"images/{k}1.jpg")
    return {"train": 2, "val": 2, "test": 2}


def oxford_pets(root, monkeypatch):
    base = root / "oxford-iiit-pet"
    for k, split in enumerate(("trainval", "test")):
        write(base / f"annotations/{split}.txt", f"Abyssinian_{k} 1 1 1", f"boxer_{k} 2 2 1")
        draw(base / f"images/Abyssinian_{k}.jpg")
        draw(base / f"images/boxer_{k}.jpg")
    return {"train": 2, "test": 2}


def imagenette(root, monkeypatch):
    for split, count in (("train", 3), ("val", 2)):
        for wnid in ("n02102040", "n01440764"):
            for i in range(count):
                draw(root / f"imagenette2/{split}/{wnid}/{wnid}_{i}.jpeg")
    return {"train": 6, "test": 4}


def idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def mnist(root, monkeypatch, folder="MNIST", train="train", test="t10k"):
    for part, count in ((train, 4), (test, 3)):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        idx(root / f"{folder}/raw/{part}-images-idx3-ubyte", images)
        idx(root / f"{folder}/raw/{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8)[::-1])
    return {"train": 4, "test": 3}


def kmnist(root, monkeypatch):
    return mnist(root, monkeypatch, "KMNIST")


def emnist(root, monkeypatch):
    return mnist(root, monkeypatch, "EMNIST", "emnist-balanced-train", "emnist-balanced-test")


def svhn(root, monkeypatch):
    known = {}
    for split, count in (("train", 5), ("test", 3)):
        file = root / f"{split}_32x32.mat"
        images = RNG.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        scipy.io.savemat(file, {"X": images, "y": np.arange(10, 10 - count, -1)[:, None]})
        known[split] = ["", file.name, md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", known)
    return {"train": 5, "test": 3}


def stl10(root, monkeypatch):
    base = root / "stl10_binary"
    base.mkdir()
    for part, count in (("train", 3), ("test", 2)):
        RNG.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(base / f"{part}_X.bin")
        np.arange(1, count + 1, dtype=np.uint8).tofile(base / f"{part}_y.bin")
    (base / "unlabeled_X.bin").touch()
    of = torchvision.datasets.STL10
    for name in ("train_list", "test_list"):
        known = [[f, md5((base / f).read_bytes()).hexdigest()] for f, _ in getattr(of, name)]
        monkeypatch.setattr(of, name, known)
    return {"train": 3, "test": 2}


MADE = {
    name: globals()[name.replace("-", "_")]  # a set without a maker is an error here
    for name in ENTRIES
}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A tiny raw data set, by name: made("svhn") -> the torchvision class's name, its root."""

    def make(name):
        variant = ENTRIES[name].variant
        images = MADE[name](tmp_path, monkeypatch)
        table = ARRAYS if variant in ARRAYS else FILES
        monkeypatch.setitem(table, variant, replace(table[variant], images=images))
        return variant, tmp_path

    return make


def of_torchvision(variant, root, arguments):
    """The images and labels of torchvision's own items."""
    dataset = getattr(torchvision.datasets, variant)(root=str(root), **arguments)
    return [(np.asarray(image.convert("RGB")), int(label)) for image, label in dataset]


@pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if e.variant in ARRAYS])
def test_arrays_are_those_of_torchvision(made, name):
    variant, root = made(name)
    source = arrays(variant, Raw(root))
    for split, part in (("train", source.train), ("test", source.test)):
        theirs = of_torchvision(variant, root, ARRAYS[variant].splits[split])
        assert part.images.dtype == np.uint8
        assert part.labels.dtype == np.int64
        assert len(part) == len(theirs) == len(part.images)
        for image, label, (their_image, their_label) in zip(
            part.images, part.labels, theirs, strict=True
        ):
            assert np.array_equal(image, their_image)
            assert label == their_label
    if ENTRIES[name].size:
        classes, _, height = ENTRIES[name].size
        assert (len(source.classes), source.train.image_size) == (classes, height)
    for file in ARRAYS[variant].files:
        content = (root / file).read_bytes()
        assert source.checksums[file.split("/")[-1]] == md5(content).hexdigest()


@pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if e.variant in FILES])
def test_files_are_those_of_torchvision(made, name, monkeypatch):
    variant, root = made(name)
    with monkeypatch.context() as blind:  # a listing opens no image
        blind.setattr(Image, "open", None)
        listing = files(variant, Raw(root))
    assert listing.root == root
    assert set(listing.parts) == set(FILES[variant].splits)
    for split, arguments in FILES[variant].splits.items():
        part = listing.parts[split]
        assert part.labels.dtype == np.int64
        assert part.paths.dtype.kind == "S"
        assert list(part.paths) == sorted(part.paths)
        images = [Image.open(root / path.decode()) for path in part.paths]
        ours = [
            (np.asarray(image.convert("RGB")).tobytes(), int(label))
            for image, label in zip(images, part.labels, strict=True)
        ]
        theirs = [(i.tobytes(), label) for i, label in of_torchvision(variant, root, arguments)]
        assert len(set(theirs)) == len(theirs)  # so that equal sets are equal items
        assert sorted(ours) == sorted(theirs)
        assert max(part.labels) < len(listing.classes)
    assert listing.mean is None  # computed, or ImageNet's


def test_names_of_classes(made):
    signs = files(made("gtsrb")[0], Raw(made("gtsrb")[1])).classes
    assert len(signs) == len(set(signs)) == 43
    assert (signs[14], signs[38]) == ("Stop", "Keep right")
    variant, root = made("imagenette")
    assert files(variant, Raw(root)).classes == ["tench", "English springer"]
    variant, root = made("caltech101")
    assert files(variant, Raw(root)).classes == ["Faces", "ant"]
    variant, root = made("svhn")
    assert arrays(variant, Raw(root)).classes == list("0123456789")


def test_every_entry_is_one_line_of_a_table_and_back():
    assert {e.variant for e in ENTRIES.values()} == set(ARRAYS) | set(FILES)
    for entry in ENTRIES.values():
        table = ARRAYS if entry.target.endswith(":arrays") else FILES
        spec = table[entry.variant]
        assert set(spec.splits) == set(spec.images)
        assert entry.needs.endswith("download")


@pytest.mark.parametrize("name", ENTRIES)
def test_torchvision_takes_the_arguments(name):
    variant = ENTRIES[name].variant
    of = getattr(torchvision.datasets, variant)
    for arguments in {**ARRAYS, **FILES}[variant].splits.values():
        inspect.signature(of).bind(root="raw", download=True, **arguments)


@pytest.mark.parametrize("name", ENTRIES)
def test_missing_data_is_told_and_nothing_is_made(tmp_path, name):
    entry = ENTRIES[name]
    with pytest.raises(MissingData) as told:
        registry.load(entry.target)(entry.variant, Raw(tmp_path))
    assert told.value.message.startswith(f"{name} is not there: no {tmp_path}")
    assert f"prepare --dataset {name}`" in told.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_is_told(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torchvision.datasets.gtsrb, "download_and_extract_archive", offline)
    with pytest.raises(LtnormError, match=r"gtsrb could not be downloaded .*unreachable"):
        files("GTSRB", Raw(tmp_path, download=True))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("svhn", "train_32x32.mat"),
        ("gtsrb", "gtsrb/GT-final_test.csv"),
        ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte"),
        ("sun397", "SUN397/ClassName.txt"),
    ],
)
def test_a_set_with_a_missing_part_is_missing(made, name, file):
    variant, root = made(name)
    (root / file).unlink()
    with pytest.raises(MissingData, match=file):
        registry.load(ENTRIES[name].target)(variant, Raw(root))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("gtsrb", "gtsrb/GTSRB/Training/00000/00001_00000.ppm"),
        ("caltech101", "caltech101/101_ObjectCategories/ant/image_0002.jpg"),
        ("eurosat", "eurosat/2750/River/River_1.jpg"),
    ],
)
def test_a_set_unpacked_in_part_is_refused(made, name, file):
    variant, root = made(name)
    (root / file).unlink()
    with pytest.raises(LtnormError, match="damaged: 4 train images, not 5") as told:
        files(variant, Raw(root))
    assert "prepare" in told.value.hint


def test_what_torchvision_does_not_find_is_missing(made):
    variant, root = made("svhn")
    with (root / "test_32x32.mat").open("ab") as file:
        file.write(b"more")
    with pytest.raises(MissingData, match=r"svhn in .* is not whole: Dataset not found"):
        arrays(variant, Raw(root))


@pytest.mark.parametrize("keep", [2, 40])
def test_a_cut_file_is_damage(made, keep):
    variant, root = made("mnist")
    file = root / "MNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(LtnormError, match=r"mnist in .* is damaged"):
        arrays(variant, Raw(root))


def test_a_relative_root(made, monkeypatch):
    variant, root = made("food101")
    monkeypatch.chdir(root.parent)
    listing = files(variant, Raw(Path(root.name)))
    assert listing.root == root
    assert all((root / path.decode()).is_file() for path in listing.parts["test"].paths)


def test_torchvision_is_imported_only_when_asked():
    code = "import sys, ltnorm.data.torchvision_sets; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_options_are_those_of_a_set_of_files():
    for name, entry in ENTRIES.items():
        fields = registry.options_model("dataset", name).model_fields
        wanted = {"cache_size", "image_size"} if entry.variant in FILES else set()
        assert set(fields) == wanted
    assert torchvision_sets.files.__kwdefaults__ == {"cache_size": None, "image_size": 224}


def test_the_list_says_what_each_set_needs(ltnorm):
    shown = {row["name"]: row for row in json.loads(ltnorm("list datasets --json").out)}
    assert {n for n, e in ENTRIES.items() if e.natural} <= {
        name for name, row in shown.items() if row["imbalance"] == "natural"
    }
    for name in ("gtsrb", "caltech101", "sun397"):
        assert shown[name]["imbalance"] == "natural"
    assert shown["cifar10"]["imbalance"] == "cut"
    assert all(row["needs"] for row in shown.values())
    table = ltnorm("list datasets").out.splitlines()
    assert table[0].split() == ["name", "summary", "imbalance", "needs", "source"]
    assert any("gtsrb" in line and "natural" in line and "264 MiB" in line for line in table)


def test_a_narrow_list_loses_nothing(ltnorm, monkeypatch):
    monkeypatch.setattr("ltnorm.console._PIPE_WIDTH", 80)
    table = ltnorm("list datasets").out
    assert max(map(len, table.splitlines())) <= 80
    for entry in ENTRIES.values():
        assert entry.source.split(",")[0] in table
        assert entry.needs in table
