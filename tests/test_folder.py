import os
import random
import unicodedata

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from ltnorm import registry
from ltnorm.data.folder import SUFFIXES, Title, folder, walk
from ltnorm.data.source import Raw, class_names, printable
from ltnorm.errors import UsageError


def make(root, *files):
    """Empty files, in an order that is not theirs, so that no listing is sorted by accident."""
    files = list(files)
    random.Random(0).shuffle(files)
    for file in files:
        path = os.path.join(os.fsencode(root), os.fsencode(file))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb"):
            pass
    return root


def content(listing, split="train"):
    """[(class name, path)] of a split."""
    part = listing.parts[split]
    assert part.paths.dtype.kind == "S"
    assert part.labels.dtype == np.int64
    pairs = zip(part.labels, part.paths, strict=True)
    return [(listing.classes[label], os.fsdecode(path)) for label, path in pairs]


def refused(root):
    with pytest.raises(UsageError) as caught:
        walk(root)
    for text in (caught.value.message, caught.value.hint):
        assert "\n" not in text
        text.encode()  # raises where a surrogate is left
    return caught.value


TREE = [f"{name}/{i}.jpg" for name, count in (("cat", 3), ("dog", 2)) for i in range(count)]


def test_three_splits(tmp_path):
    files = ["train/b/2.png", "train/b/10.png", "train/a/x.JPG", "val/a/v.jpg", "test/b/t.jpg"]
    listing = walk(make(tmp_path, *files, "test/a/t.jpg"))
    assert listing.classes == ["a", "b"]
    assert content(listing) == [
        ("a", "train/a/x.JPG"),
        ("b", "train/b/10.png"),
        ("b", "train/b/2.png"),
    ]
    assert content(listing, "val") == [("a", "val/a/v.jpg")]
    assert content(listing, "test") == [("a", "test/a/t.jpg"), ("b", "test/b/t.jpg")]
    assert listing.root == tmp_path
    [note] = listing.notes  # nothing else to say
    assert "val" in note
    assert "'b'" in note


@pytest.mark.parametrize("name", ["valid", "Validation", "VAL"])
def test_names_of_the_validation_split(tmp_path, name):
    make(tmp_path, *(f"{s}/{f}" for s in ("Train", name, "TEST") for f in TREE))
    listing = walk(tmp_path)
    assert {split: len(part.labels) for split, part in listing.parts.items()} == {
        "train": 5,
        "val": 5,
        "test": 5,
    }
    assert content(listing, "val")[0] == ("cat", f"{name}/cat/0.jpg")


def test_one_tree(tmp_path):
    listing = walk(make(tmp_path, *TREE))
    assert list(listing.parts) == ["train"]
    assert [path for _, path in content(listing)] == TREE
    assert listing.notes == ()


def test_train_alone_is_one_tree(tmp_path):
    listing = walk(make(tmp_path, *(f"train/{f}" for f in TREE)))
    assert list(listing.parts) == ["train"]
    assert len(content(listing)) == 5


def test_val_without_test_is_the_test_set_and_said(tmp_path):
    listing = walk(make(tmp_path, *(f"{s}/{f}" for s in ("train", "val") for f in TREE)))
    assert list(listing.parts) == ["train", "test"]
    assert content(listing, "test")[0] == ("cat", "val/cat/0.jpg")
    assert listing.notes == ("val is the test set: there is no test",)


@pytest.mark.parametrize("names", [["test"], ["val"], ["val", "test"]])
def test_without_train(tmp_path, names):
    error = refused(make(tmp_path, *(f"{s}/{f}" for s in names for f in TREE), "cat/1.jpg"))
    assert error.message == f"{tmp_path} has {' and '.join(sorted(names))} without train"
    assert "DIR/train/CLASS" in error.hint


def test_two_folders_for_a_split(tmp_path):
    names = ("train", "val", "valid")
    error = refused(make(tmp_path, *(f"{s}/{f}" for s in names for f in TREE)))
    assert "val and valid" in error.message


def test_images_in_subfolders_belong_to_the_class(tmp_path):
    make(tmp_path, "cat/b/deep/1.jpg", "cat/a/2.jpg", "cat/3.jpg", "dog/train/4.jpg")
    assert content(walk(tmp_path)) == [
        ("cat", "cat/3.jpg"),
        ("cat", "cat/a/2.jpg"),
        ("cat", "cat/b/deep/1.jpg"),
        ("dog", "dog/train/4.jpg"),
    ]


def test_what_is_skipped_is_counted_by_kind(tmp_path):
    hidden = [".git/x.jpg", "cat/.hidden.jpg", "cat/Thumbs.db", "dog/Desktop.ini", "__MACOSX/a.jpg"]
    other = ["cat/notes.txt", "cat/noSuffix", "dog/x.jpg.part", "cat/sub/.x/y.jpg"]
    listing = walk(make(tmp_path, *TREE, *hidden, *other, "loose.png", "README"))
    assert [path for _, path in content(listing)] == TREE
    notes = sorted(listing.notes)
    assert [note.split(" (")[0] for note in notes] == [
        "skipped files that are no images by their suffix: 4",
        "skipped hidden files and folders: 6",
        "skipped images that lie beside class folders: 1",
    ]
    assert "loose.png" in notes[2]


def test_folders_and_images_beside_train_are_counted(tmp_path):
    listing = walk(make(tmp_path, *(f"train/{f}" for f in TREE), "meta/a.jpg", "train/beside.jpg"))
    assert len(content(listing)) == 5
    assert {note.split(" (")[0] for note in listing.notes} == {
        "skipped folders that lie beside train: 1",
        "skipped images that lie beside class folders: 1",
    }


def test_every_suffix_is_taken_in_any_case(tmp_path):
    files = [f"{name}/{i}{s}" for name in "ab" for i, s in enumerate(SUFFIXES)]
    upper = [f"{name}/{i}X{s.upper()}" for name in "ab" for i, s in enumerate(SUFFIXES)]
    assert {p for _, p in content(walk(make(tmp_path, *files, *upper)))} == {*files, *upper}


NAMES = ["a b", "a,b", "it's", '"quoted"', "two\nlines", "Größe", "猫", " x", "%s{0}", "-f", "a\tb"]


def test_any_name_works(tmp_path):
    raw = [os.fsencode(name) for name in NAMES] + [b"latin\xe9", b"latin\xe8"]
    listing = walk(make(tmp_path, *(b"%s/%s.jpg" % (name, name) for name in raw)))
    names = sorted(os.fsdecode(name) for name in raw)
    assert [os.fsdecode(p) for p in listing.parts["train"].paths] == [f"{n}/{n}.jpg" for n in names]
    for path in listing.parts["train"].paths:
        assert os.path.isfile(os.path.join(os.fsencode(tmp_path), path))
    assert len(set(listing.classes)) == len(names)
    assert {"a b", "Größe", "猫", "latin\ufffd", "latin\ufffd (2)", "two\ufffdlines"} <= set(
        listing.classes
    )
    assert all(name == printable(name) for name in listing.classes)


def test_class_names_stay_unique():
    names = ["a\n", "a\t", "a\ufffd", "a\ufffd (2)", "b"]
    shown = class_names(names)
    assert len(set(shown)) == 5
    assert (shown[0], shown[4]) == ("a\ufffd", "b")
    assert "".join(shown).isprintable()
    assert class_names(["x", "y"]) == ["x", "y"]


def test_a_class_without_images_is_named(tmp_path):
    make(tmp_path, *TREE, "empty/readme.txt")
    (tmp_path / "void").mkdir()
    error = refused(tmp_path)
    assert f"class 'empty' has no images in {tmp_path} (and 1 more class)" == error.message


def test_a_class_that_train_has_not(tmp_path):
    make(tmp_path, *(f"{s}/{f}" for s in ("train", "test") for f in TREE))
    make(tmp_path, "test/wolf/1.jpg", "test/fox/1.jpg")
    error = refused(tmp_path)
    assert error.message.startswith(f"class 'fox' is in {tmp_path}/test but not in")
    assert error.message.endswith("(and 1 more class)")


def test_a_class_that_test_has_not_is_said(tmp_path):
    make(tmp_path, *(f"train/{f}" for f in TREE), "test/cat/1.jpg")
    (tmp_path / "test/wolf").mkdir()  # empty, so that it stands for nothing
    assert walk(tmp_path).notes == ("test has no images of 'dog': no accuracy there",)


def test_a_split_without_class_folders(tmp_path):
    make(tmp_path, *(f"train/{f}" for f in TREE), "test/1.jpg", "test/2.jpg")
    error = refused(tmp_path)
    assert error.message == f"{tmp_path}/test has no images in class folders"
    assert "move test away" in error.hint


def test_no_images_and_no_folder(tmp_path):
    for root, what in (
        (tmp_path / "missing", "is not there"),
        (make(tmp_path / "file", "x.jpg") / "x.jpg", "is no folder"),
        (make(tmp_path / "flat", "1.jpg", "2.jpg"), "no images in class folders"),
        (make(tmp_path / "texts", "cat/1.txt", "dog/2.txt"), "no images in class folders"),
        (make(tmp_path / "single", "cat/1.jpg"), "has 1 class"),
    ):
        error = refused(root)
        assert error.message.startswith(str(root))
        assert what in error.message
        assert "DIR/train/CLASS/IMAGE" in error.hint
        assert "DIR/CLASS/IMAGE" in error.hint


@pytest.mark.parametrize(
    ("one", "two"),
    [("Cat", "cat"), (*(unicodedata.normalize(f, "Größe") for f in ("NFC", "NFD")),)],
)
@pytest.mark.parametrize("splits", [("train", "train"), ("train", "test")])
def test_names_that_are_one_elsewhere(tmp_path, one, two, splits):
    make(tmp_path, "train/dog/1.jpg", f"train/{one}/1.jpg", "test/dog/1.jpg")
    make(tmp_path, f"{splits[1]}/{two}/2.jpg")
    if len({*os.listdir(tmp_path / "train"), *os.listdir(tmp_path / "test")}) < 3:
        pytest.skip("on this file system they are one")
    error = refused(tmp_path)
    assert f"'{one}'" in error.message
    assert f"'{two}'" in error.message


def link(path, target, folder=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target, target_is_directory=folder)


@pytest.mark.parametrize("relative", [False, True])
def test_links_that_leave_the_root(tmp_path, relative):
    out = make(tmp_path / "out", "1.jpg", "2.jpg")
    root = make(tmp_path / "root", *TREE)
    link(root / "cat/a.jpg", "../../out/1.jpg" if relative else out / "1.jpg")
    link(root / "dog/gone.jpg", out / "missing.jpg")  # broken, and it leaves
    link(root / "dog/sub", out, folder=True)
    error = refused(root)
    assert error.message.startswith(f"{root}/cat/a.jpg is a link that leaves {root}")
    assert error.message.endswith("as do 2 more")


def test_a_folder_whose_name_begins_as_the_roots_is_outside(tmp_path):
    make(tmp_path / "root2", "1.jpg")
    root = make(tmp_path / "root", *TREE)
    link(root / "cat/a.jpg", tmp_path / "root2/1.jpg")
    refused(root)


@pytest.mark.parametrize("name", ["train", "train/wolf"])
def test_a_split_or_class_that_is_a_link_out(tmp_path, name):
    make(tmp_path / "out", *TREE, "1.jpg")
    root = make(tmp_path / "root", *(f"test/{f}" for f in TREE))
    if name != "train":
        make(root, *(f"train/{f}" for f in TREE))
    link(root / name, tmp_path / "out", folder=True)
    assert refused(root).message.startswith(f"{root}/{name} is a link that leaves")


def test_links_inside_are_followed(tmp_path):
    root = make(tmp_path / "root", *(f"train/{f}" for f in TREE), "store/1.jpg", "store/s/2.jpg")
    link(root / "train/cat/linked.jpg", "../../store/1.jpg")
    link(root / "train/wolf", "../store", folder=True)
    link(tmp_path / "entry", root, folder=True)  # the root itself may be a link, too
    for place in (root, tmp_path / "entry"):
        paths = [path for _, path in content(walk(place))]
        assert "train/cat/linked.jpg" in paths
        assert paths[-2:] == ["train/wolf/1.jpg", "train/wolf/s/2.jpg"]
        assert len(paths) == 8
        assert walk(place).root == place


def test_loops_end_and_are_counted(tmp_path):
    make(tmp_path, *TREE)
    link(tmp_path / "cat/self", ".", folder=True)
    link(tmp_path / "cat/top", "..", folder=True)
    link(tmp_path / "cat/to_dog", "../dog", folder=True)
    link(tmp_path / "dog/to_cat", "../cat", folder=True)
    link(tmp_path / "dog/knot.jpg", "knot.jpg")
    listing = walk(tmp_path)
    paths = [path for _, path in content(listing)]
    assert set(TREE) <= set(paths)
    assert "cat/to_dog/0.jpg" in paths
    assert not any("/self/" in path or "/top/" in path for path in paths)
    assert max(path.count("/") for path in paths) == 2
    # self and top twice (cat, dog/to_cat), and the way back of either link to the other class.
    assert any(
        note.startswith("skipped links to a folder that they lie in: 6 ") for note in listing.notes
    )


def test_broken_links_stay_for_the_check_of_files(tmp_path):
    make(tmp_path, *TREE)
    link(tmp_path / "cat/gone.jpg", "nowhere.jpg")
    assert ("cat", "cat/gone.jpg") in content(walk(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_no_image(tmp_path):
    make(tmp_path, *TREE)
    os.mkfifo(tmp_path / "cat/pipe.jpg")
    assert [path for _, path in content(walk(tmp_path))] == TREE


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    make(tmp_path, *TREE, "cat/secret/1.jpg")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert refused(tmp_path).message == f"cannot read {tmp_path}/cat/secret: Permission denied"


def test_a_relative_root_gives_the_same_listing(tmp_path, monkeypatch):
    make(tmp_path / "set", *TREE)
    monkeypatch.chdir(tmp_path)
    relative = folder(Raw(tmp_path.__class__("set")))
    assert relative.root == tmp_path / "set"
    assert content(relative) == content(walk(tmp_path / "set"))


def test_options_are_checked():
    options = registry.options_model("dataset", "folder")
    assert options().image_size == 224
    assert options(content="0" * 64, cache_size=64, title="My set, 2", test_per_class=5)
    for wrong in (
        {"content": "x"},
        {"cache_size": 0},
        {"image_size": None},
        {"test_per_class": 0},
        {"root": "/somewhere"},
    ):
        with pytest.raises(ValidationError):
            options(**wrong)


@pytest.mark.parametrize("title", ["", ".", "..", "a/b", "a\\b", ".hidden", "a\nb", "x" * 101])
def test_titles_that_cannot_name_a_folder(title):
    with pytest.raises(ValidationError):
        TypeAdapter(Title).validate_python(title)
