import os
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ltnorm import registry
from ltnorm.data import lists as module
from ltnorm.data.lists import PUBLISHED, lists
from ltnorm.data.source import IMAGENET_MEAN, Raw
from ltnorm.errors import UsageError

OWN = {
    "train": [("cat/1.jpg", 0), ("cat/2.jpg", 0), ("dog/3.jpg", 1)],
    "test": [("cat/4.jpg", 0), ("dog/5.jpg", 1)],
}


def write(folder, entries, line="{} {}\n"):
    """Lists in `folder`: {split: [(path, label)]} -> {split: file}."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"list_{split}.txt" for split in entries}
    for split, rows in entries.items():
        files[split].write_text("".join(line.format(*row) for row in rows), encoding="utf-8")
    return files


def read(tmp_path, entries, variant="lists", root=None):
    return lists(variant, Raw(root or tmp_path, lists=write(tmp_path / "lists", entries)))


def refused(tmp_path, entries, variant="lists"):
    with pytest.raises(UsageError) as caught:
        read(tmp_path, entries, variant)
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value


def paths(listing, split="train"):
    return [os.fsdecode(path) for path in listing.parts[split].paths]


def test_lists_of_ones_own(tmp_path):
    listing = read(tmp_path, OWN)
    assert listing.root == tmp_path
    assert listing.classes == ["cat", "dog"]
    assert list(listing.parts) == ["train", "test"]
    assert paths(listing) == ["cat/1.jpg", "cat/2.jpg", "dog/3.jpg"]
    assert listing.parts["train"].labels.tolist() == [0, 0, 1]
    assert listing.parts["train"].labels.dtype == np.int64
    assert listing.parts["train"].paths.dtype.kind == "S"
    assert paths(listing, "test") == ["cat/4.jpg", "dog/5.jpg"]
    assert (listing.notes, listing.mean) == ((), IMAGENET_MEAN)
    # Two sets of one's own may use the same names for other images.
    assert listing.content is None


def test_any_order_is_the_same_listing(tmp_path):
    straight = read(tmp_path, OWN)
    turned = read(tmp_path, {split: rows[::-1] for split, rows in OWN.items()})
    for split in OWN:
        assert paths(turned, split) == paths(straight, split)
        assert np.array_equal(turned.parts[split].labels, straight.parts[split].labels)


def test_names_that_repeat_in_a_class_have_an_order_too(tmp_path):
    for first, second in (("a/1.jpg", "b/1.jpg"), ("a/x/1.jpg", "b/x/1.jpg")):
        rows = [(second, 0), (first, 0), ("c/2.jpg", 1)]
        for order in (rows, rows[::-1]):
            listing = read(tmp_path, OWN | {"train": order})
            assert paths(listing) == [first, second, "c/2.jpg"]


def test_classes_without_a_folder_of_their_own_are_called_by_label(tmp_path):
    for train in (
        [("1.jpg", 0), ("2.jpg", 1)],  # none
        [("all/1.jpg", 0), ("all/2.jpg", 1)],  # shared
        [("a/1.jpg", 0), ("b/2.jpg", 0), ("c/3.jpg", 1)],  # several
    ):
        listing = read(tmp_path, {"train": train, "test": [("x/9.jpg", 0), ("x/8.jpg", 1)]})
        assert listing.classes == ["0", "1"]


@pytest.mark.parametrize("variant", ["lists", "imagenet-lt", "places-lt", "inat2018"])
def test_a_missing_list_names_its_flag(tmp_path, variant):
    for given_lists, flag in (({"test"}, "--list-train"), ({"train"}, "--list-(test|val)")):
        entries = {split: OWN[split] for split in given_lists}
        error = refused(tmp_path, entries, variant)
        assert re.fullmatch(f"{variant} needs {flag} FILE", error.message)


def test_gaps_between_labels(tmp_path):
    error = refused(tmp_path, OWN | {"train": [("a/1.jpg", 0), ("b/2.jpg", 2)]})
    assert "no image of label 1, and labels up to 2" in error.message
    error = refused(tmp_path, OWN | {"train": [("a/1.jpg", 1), ("b/2.jpg", 2)]})
    assert "no image of label 0" in error.message
    error = refused(tmp_path, OWN | {"train": [("a/1.jpg", 0), ("b/2.jpg", 999_999_999)]})
    assert "no image of label 1," in error.message
    error = refused(tmp_path, OWN | {"train": [("a/1.jpg", 0)], "test": [("a/2.jpg", 0)]})
    assert "has 1 class" in error.message


@pytest.mark.parametrize("split", ["val", "test"])
def test_labels_that_train_has_not(tmp_path, split):
    error = refused(tmp_path, OWN | {split: [("a/8.jpg", 1), ("a/9.jpg", 2), ("a/7.jpg", 3)]})
    assert re.search(rf"list_{split}.txt:2: label 2 is not in .*list_train.txt", error.message)
    assert error.message.endswith("(and 1 more)")


def test_a_class_that_test_has_not_is_said(tmp_path):
    listing = read(tmp_path, OWN | {"test": [("cat/4.jpg", 0)], "val": [("dog/6.jpg", 1)]})
    assert listing.notes == (
        "val has no images of label 0: no accuracy there",
        "test has no images of label 1: no accuracy there",
    )


def test_a_path_twice_in_a_list(tmp_path):
    rows = [*OWN["train"], ("./cat//1.jpg", 1), ("dog/3.jpg", 1)]
    error = refused(tmp_path, OWN | {"train": rows})
    assert "list_train.txt:4: cat/1.jpg stands in line 1 already" in error.message
    assert error.message.endswith("(and 1 more)")


@pytest.mark.parametrize(("one", "two"), [("train", "test"), ("train", "val"), ("val", "test")])
def test_a_path_in_two_lists(tmp_path, one, two):
    entries = OWN | {"val": [("cat/6.jpg", 0)]}
    entries = entries | {two: [*entries[two], entries[one][0]]}
    error = refused(tmp_path, entries)
    line, path = len(entries[two]), entries[one][0][0]
    assert f"list_{two}.txt:{line}: {path} is in " in error.message
    assert f"list_{one}.txt as well" in error.message
    assert f"--list-{one}" in error.hint
    assert f"--list-{two}" in error.hint


def test_a_root_that_is_no_folder(tmp_path):
    files = write(tmp_path / "lists", OWN)
    for root, what in ((tmp_path / "missing", "is not there"), (files["train"], "is no folder")):
        with pytest.raises(UsageError, match=re.escape(f"{root} {what}")):
            lists("lists", Raw(root, lists=files))


def test_folders_that_leave_the_root_by_links(tmp_path):
    root = tmp_path / "root"
    (tmp_path / "out").mkdir()
    (root / "dog").mkdir(parents=True)
    (root / "cat").symlink_to(tmp_path / "out", target_is_directory=True)
    files = write(tmp_path / "lists", OWN)
    with pytest.raises(UsageError, match=re.escape(f"{root}/cat is a link that leaves {root}")):
        lists("lists", Raw(root, lists=files))
    (root / "cat").unlink()
    (root / "cat").symlink_to("dog", target_is_directory=True)
    (tmp_path / "entry").symlink_to(root, target_is_directory=True)
    assert lists("lists", Raw(tmp_path / "entry", lists=files)).parts


# --- published lists ------------------------------------------------------------------------------

# Per variant and style the same images: (train, val from the training archive, test).
PLACES_EASY = {
    "train": [
        ("train/airfield/00000001.jpg", 0),
        ("train/airfield/00000002.jpg", 0),
        ("train/apartment_building-outdoor/00000001.jpg", 1),
    ],
    "val": [("train/apartment_building-outdoor/00000009.jpg", 1)],
    "test": [
        ("val/airfield/Places365_val_00000007.jpg", 0),
        ("val/apartment_building-outdoor/Places365_val_00000005.jpg", 1),
    ],
}
PLACES_256 = {
    "train": [
        ("data_256/a/airfield/00000001.jpg", 0),
        ("data_256/a/airfield/00000002.jpg", 0),
        ("data_256/a/apartment_building/outdoor/00000001.jpg", 1),
    ],
    "val": [("data_256/a/apartment_building/outdoor/00000009.jpg", 1)],
    "test": [
        ("val_256/Places365_val_00000007.jpg", 0),
        ("val_256/Places365_val_00000005.jpg", 1),
    ],
}
IMAGENET = {
    "train": [("train/n01440764/n01440764_1.JPEG", 0), ("train/n01443537/n01443537_2.JPEG", 1)],
    "val": [("train/n01440764/n01440764_3.JPEG", 0)],
    "test": [
        ("val/n01440764/ILSVRC2012_val_00000001.JPEG", 0),
        ("val/n01443537/ILSVRC2012_val_00000002.JPEG", 1),
    ],
}
INAT = {
    "train": [("train_val2018/Plantae/1/aa.jpg", 1), ("train_val2018/Aves/0/bb.jpg", 0)],
    "val": [("train_val2018/Plantae/1/cc.jpg", 1), ("train_val2018/Aves/0/dd.jpg", 0)],
}


def moved(entries, change):
    """The same entries with other paths: `change(path)`."""
    return {s: [(change(path), label) for path, label in rows] for s, rows in entries.items()}


def flat(path):
    return re.sub(r"val/n\d+/", "val/", path)


@pytest.fixture
def small(monkeypatch):
    """Make a published set as small as these entries, so that they are what is expected."""

    def make(variant, entries):
        totals = {split: len(rows) for split, rows in entries.items()}
        known = replace(PUBLISHED[variant], totals=totals, classes=2, groups=(0, 0, 2))
        monkeypatch.setitem(module.PUBLISHED, variant, known)

    return make


def lay(root, entries):
    """Empty files where `entries` say."""
    for rows in entries.values():
        for path, _ in rows:
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    return root


PLACES_ABOVE = moved(PLACES_EASY, lambda p: f"places365_standard/{p}")
PLACES_TORCHVISION = moved(PLACES_256, lambda p: p.replace("data_256", "data_256_standard"))
PLACES_MIXED = PLACES_EASY | {"test": PLACES_256["test"]}  # archives are unpacked one by one
IMAGENET_FLAT = moved(IMAGENET, flat)
IMAGENET_KAGGLE = moved(IMAGENET_FLAT, lambda p: f"ILSVRC/Data/CLS-LOC/{p}")
INAT_BELOW = moved(INAT, lambda p: p.replace("train_val2018/", ""))
STYLES = {
    "places-lt": (
        [PLACES_EASY, PLACES_256, PLACES_ABOVE],
        [PLACES_EASY, PLACES_256, PLACES_ABOVE, PLACES_TORCHVISION, PLACES_MIXED],
    ),
    "imagenet-lt": ([IMAGENET, IMAGENET_FLAT], [IMAGENET, IMAGENET_FLAT, IMAGENET_KAGGLE]),
    "inat2018": ([INAT, INAT_BELOW], [INAT, INAT_BELOW]),
}


@pytest.mark.parametrize(
    ("variant", "listed", "disk"),
    [(name, a, b) for name, (listed, disks) in STYLES.items() for a in listed for b in disks],
)
def test_styles_of_lists_and_of_disks(tmp_path, small, variant, listed, disk):
    small(variant, listed)
    root = lay(tmp_path / "root", disk)
    listing = read(tmp_path, listed, variant, root)
    found = {
        path: label
        for split, part in listing.parts.items()
        for path, label in zip(paths(listing, split), part.labels.tolist(), strict=True)
    }
    # Every file that there is, with its own label.
    assert found == {path: label for rows in disk.values() for path, label in rows}
    as_listed = found.keys() == {path for rows in listed.values() for path, _ in rows}
    assert as_listed == (not any("listed as" in note for note in listing.notes))


@pytest.mark.parametrize(
    ("variant", "styles"),
    [
        ("places-lt", [PLACES_EASY, PLACES_256, moved(PLACES_EASY, lambda p: f"places365/{p}")]),
        ("imagenet-lt", [IMAGENET, IMAGENET_FLAT]),
        ("inat2018", [INAT, moved(INAT, lambda p: p.replace("train_val2018/", "x/y/"))]),
    ],
)
def test_content_is_of_images_alone(tmp_path, small, variant, styles):
    small(variant, styles[0])
    shuffled = {s: random.Random(1).sample(rows, len(rows)) for s, rows in styles[0].items()}
    listings = [read(tmp_path, style, variant) for style in [*styles, shuffled]]
    names = {tuple(p.rpartition("/")[2] for p in paths(one)) for one in listings}
    assert len(names) == 1  # and the images come in one order
    assert len({listing.content for listing in listings}) == 1
    assert re.fullmatch("[0-9a-f]{64}", listings[0].content)
    # Another label, image or split is another content.
    train = styles[0]["train"]
    others = (
        [(train[0][0].replace(".", "0."), train[0][1]), *train[1:]],
        [(path, 1 - label) for path, label in train],
    )
    for other in others:
        changed = read(tmp_path, styles[0] | {"train": other}, variant)
        assert changed.content != listings[0].content


def test_content_knows_which_split_an_image_is_in(tmp_path, small):
    a, b, c, d = ((f"train/n0000000{i > 0:d}/{i}.JPEG", int(i > 0)) for i in range(4))
    contents = []
    for train, val in (([a, b, c], [d]), ([a, b], [c, d])):
        entries = IMAGENET | {"train": train, "val": val}
        small("imagenet-lt", entries)
        contents.append(read(tmp_path, entries, "imagenet-lt").content)
    assert contents[0] != contents[1]


def test_names_of_classes(tmp_path, small):
    for variant, entries, names in (
        ("places-lt", PLACES_EASY, ["airfield", "apartment_building-outdoor"]),
        ("places-lt", PLACES_256, ["airfield", "apartment_building-outdoor"]),
        ("imagenet-lt", IMAGENET, ["n01440764", "n01443537"]),
        ("inat2018", INAT, ["0", "1"]),
    ):
        small(variant, entries)
        listing = read(tmp_path, entries, variant)
        assert listing.classes == names
        assert listing.mean == PUBLISHED[variant].mean


def test_where_nothing_lies_the_lists_are_kept_and_the_archives_named(tmp_path, small):
    for variant, entries, archive in (
        ("places-lt", PLACES_256, "places365standard_easyformat.tar"),
        ("imagenet-lt", IMAGENET, "ILSVRC2012_img_val.tar"),
        ("inat2018", INAT, "train_val2018.tar.gz"),
    ):
        small(variant, entries)
        listing = read(tmp_path, entries, variant)
        assert set(paths(listing)) == {path for path, _ in entries["train"]}
        assert archive in listing.layout


def test_the_validation_list_of_inat_is_its_test_set(tmp_path, small):
    small("inat2018", INAT)
    by_val = read(tmp_path, INAT, "inat2018")
    assert list(by_val.parts) == ["train", "test"]
    assert by_val.notes == ("the validation list of iNaturalist 2018 is its test set",)
    by_test = read(tmp_path, {"train": INAT["train"], "test": INAT["val"]}, "inat2018")
    assert (by_test.content, by_test.notes) == (by_val.content, ())
    more = INAT | {"test": [("train_val2018/Aves/0/ee.jpg", 0)]}
    assert (
        "val list of iNaturalist 2018 does not exist" in refused(tmp_path, more, "inat2018").message
    )


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_other_totals_than_the_published(tmp_path, small, split):
    small("imagenet-lt", IMAGENET)
    more = IMAGENET | {split: [*IMAGENET[split], ("train/n01443537/n01443537_9.JPEG", 1)]}
    error = refused(tmp_path, more, "imagenet-lt")
    count = len(IMAGENET[split])
    assert f"has {count + 1} images, the {split} list of ImageNet-LT has {count}" in error.message
    assert "--dataset lists" in error.hint


def test_other_classes_and_groups_than_the_published(tmp_path, small, monkeypatch):
    small("imagenet-lt", IMAGENET)
    known = PUBLISHED["imagenet-lt"]
    for change, what in (
        ({"classes": 3}, "has 2 classes, ImageNet-LT has 3"),
        ({"groups": (0, 1, 1)}, "has 0 / 0 / 2 classes of many, medium and few images"),
    ):
        monkeypatch.setitem(module.PUBLISHED, "imagenet-lt", replace(known, **change))
        assert what in refused(tmp_path, IMAGENET, "imagenet-lt").message


def test_every_published_set_is_in_the_registry():
    variants = {
        name: entry.variant
        for name, entry in registry.DATASETS.items()
        if entry.target == "ltnorm.data.lists:lists"
    }
    assert variants == {name: name for name in ("lists", *PUBLISHED)}
    for name in variants:
        entry = registry.lookup("dataset", name)
        assert "--list-train FILE" in entry.needs
        assert entry.natural
        assert registry.options_model("dataset", name)().image_size == 224


# --- the real lists -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_lists(real_data) -> Path:
    if not (real_data / "lists").is_dir():
        pytest.skip("needs the published lists in lists/")
    return real_data / "lists"


@pytest.fixture(scope="module")
def places(real_lists):
    return {s: real_lists / f"Places_LT_{s}.txt" for s in ("train", "val", "test")}


def test_places_lt(places, tmp_path):
    start = time.process_time()
    listing = lists("places-lt", Raw(tmp_path, lists=places))
    assert time.process_time() - start < 2
    assert {s: len(p.labels) for s, p in listing.parts.items()} == {
        "train": 62_500,
        "val": 7_300,
        "test": 36_500,
    }
    assert (len(listing.classes), listing.classes[8]) == (365, "apartment_building-outdoor")
    counts = np.bincount(listing.parts["train"].labels)
    assert (counts.max(), counts.min()) == (4980, 5)
    assert np.bincount(listing.parts["test"].labels).tolist() == [100] * 365
    assert listing.notes == ()
    for split, file in places.items():
        lines = {line.split()[0] for line in file.read_text().splitlines()}
        assert set(paths(listing, split)) == lines


def test_places_lt_in_the_other_style_is_the_same_set(places, tmp_path):
    """Lists for the other archives, made here line by line, in reverse order."""
    files = {}
    for split, file in places.items():
        lines = []
        for line in file.read_text().splitlines():
            archive, folder, name = line.split("/")
            nested = folder.replace("-", "/")
            before = f"data_256/{folder[0]}/{nested}" if archive == "train" else "val_256"
            lines.append(f"{before}/{name}")
        files[split] = tmp_path / file.name
        files[split].write_text("\n".join(lines[::-1]))
    other = lists("places-lt", Raw(tmp_path, lists=files))
    same = lists("places-lt", Raw(tmp_path, lists=places))
    assert other.content == same.content
    assert other.classes == same.classes
    assert paths(other)[0].startswith("data_256/a/airfield/")
    for split in same.parts:
        assert np.array_equal(other.parts[split].labels, same.parts[split].labels)


def test_a_published_list_that_was_cut_or_swapped(places, tmp_path):
    cut = tmp_path / "cut.txt"
    cut.write_text("\n".join(places["train"].read_text().splitlines()[:-1]))
    with pytest.raises(UsageError, match="has 62,499 images, the train list of Places-LT has 62,5"):
        lists("places-lt", Raw(tmp_path, lists=places | {"train": cut}))
    swapped = places | {"val": places["test"], "test": places["val"]}
    with pytest.raises(UsageError, match="has 36,500 images, the val list of Places-LT has 7,300"):
        lists("places-lt", Raw(tmp_path, lists=swapped))
    with pytest.raises(UsageError, match="the train list of ImageNet-LT has 115,846"):
        lists("imagenet-lt", Raw(tmp_path, lists=places))


def test_imagenet_lt(real_lists, tmp_path):
    """Its validation and test lists, and a training list made with its group sizes and total."""
    files = {s: real_lists / f"ImageNet_LT_{s}.txt" for s in ("val", "test")}
    wnids = dict(
        reversed(line.split("/", 2)[1:2] + line.split()[1:])
        for line in files["test"].read_text().splitlines()
    )
    many, medium, _ = np.load(real_lists / "imagenet_lt_shot_list.npy")
    counts = np.where(many, 150, np.where(medium, 100, 19))
    counts[np.flatnonzero(many)[0]] += 115_846 - counts.sum()
    files["train"] = tmp_path / "train.txt"
    files["train"].write_text(
        "".join(
            f"train/{wnids[str(label)]}/{wnids[str(label)]}_made{i}.JPEG {label}\n"
            for label, count in enumerate(counts.tolist())
            for i in range(count)
        )
    )
    listing = lists("imagenet-lt", Raw(tmp_path, lists=files))
    assert {s: len(p.labels) for s, p in listing.parts.items()} == {
        "train": 115_846,
        "val": 20_000,
        "test": 50_000,
    }
    assert (listing.classes[0], listing.classes[999]) == ("n01440764", "n15075141")
    assert np.bincount(listing.parts["val"].labels).tolist() == [20] * 1000
    # One image more or less at a border, in a list of the same total, is not ImageNet-LT.
    text = files["train"].read_text()
    first = int(np.flatnonzero(~many & ~medium)[0])
    label = int(np.flatnonzero(many)[0])
    old = f"train/{wnids[str(label)]}/{wnids[str(label)]}_made0.JPEG {label}\n"
    assert old in text
    new = f"train/{wnids[str(first)]}/{wnids[str(first)]}_more.JPEG {first}\n"
    files["train"].write_text(text.replace(old, new))
    with pytest.raises(UsageError, match=r"385 / 480 / 135 .* has 385 / 479 / 136"):
        lists("imagenet-lt", Raw(tmp_path, lists=files))
