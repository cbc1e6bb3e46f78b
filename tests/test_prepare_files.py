"""Prepared sets of files: their identity, splits and storage, and what is noticed about them."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ltnorm.data import check, making
from ltnorm.data.decode import BadImage, decode, square
from ltnorm.data.longtail import largest_n_max, long_tail_counts, split_test
from ltnorm.data.making import Making
from ltnorm.data.prepare import prepare, preview
from ltnorm.data.prepared import find
from ltnorm.data.source import Files, Pixels
from ltnorm.errors import LtnormError, UsageError
from ltnorm.resolve import Overrides, resolve

COUNTS = {"ant": 30, "bee": 12, "cat": 6}


def draw(root: Path, counts=COUNTS, size=8, seed=0) -> Path:
    """A folder of PNGs, a folder a class, every image another one."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shape = (size, size, 3) if isinstance(size, int) else (*rng.integers(*size, 2), 3)
            pixels = rng.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


def spec(base=None, **flags):
    """The data set `folder` as a command line asks for it."""
    overrides = Overrides({f"dataset.{key}": value for key, value in flags.items()})
    return resolve({"dataset": {"name": "folder"} | (base or {})}, overrides)[0].dataset


@pytest.fixture
def photos(tmp_path) -> Path:
    return draw(tmp_path / "photos")


@pytest.fixture
def large(tmp_path) -> Path:
    return draw(tmp_path / "large", size=(70, 90))


def files_of(root: Path, made, split: str) -> set[str]:
    """The files of a split, found by their pixels."""
    by_pixels = {}
    for file in every(root):
        with suppress(BadImage):
            by_pixels[np.asarray(decode(file)).tobytes()] = str(file.relative_to(root))
    return {by_pixels[image.tobytes()] for image in made.open(split).images}


def every(root: Path) -> list[Path]:
    return sorted(root.rglob("*.png"))


def test_small_images_are_decoded_and_every_one_is_in_one_split(tmp_path, photos):
    made = prepare(spec(), photos, tmp_path / "data")
    assert (made.decoded, made.image_size) == (True, 8)
    assert made.classes == ["ant", "bee", "cat"]
    train, test = (files_of(photos, made, split) for split in ("train", "test"))
    assert not train & test
    assert len(train | test) == sum(COUNTS.values()) == sum(made.sizes.values())
    for split in ("train", "test"):
        found = made.open(split)
        assert isinstance(found, Pixels)
        for image, label in zip(found.images, found.labels, strict=True):
            name = {np.asarray(decode(f)).tobytes(): f for f in every(photos)}[image.tobytes()]
            assert name.parent.name == made.classes[label]
    images = made.open("train").images / 255
    assert np.allclose(made.mean, images.mean((0, 1, 2)), atol=1e-4)
    assert np.allclose(made.std, images.std((0, 1, 2)), atol=1e-4)


def test_large_images_stay_files(tmp_path, large):
    made = prepare(spec(image_size=64), large, tmp_path / "data")
    train = made.open("train")
    assert isinstance(train, Files)
    assert (made.decoded, train.image_size, train.resize) == (False, 64, 73)
    assert all((train.root / os.fsdecode(path)).is_file() for path in train.paths)
    labels = [made.classes.index(os.fsdecode(path).split("/")[0]) for path in train.paths]
    assert train.labels.tolist() == labels


def test_a_cache_holds_the_files_decoded(tmp_path, large):
    files = prepare(spec(), large, tmp_path / "data").open("test")
    cached = prepare(spec(cache_size=16), large, tmp_path / "data")
    assert (cached.decoded, cached.image_size) == (True, 16)
    expected = [square(decode(files.root / os.fsdecode(p)), 16) for p in files.paths]
    assert np.array_equal(cached.open("test").images, expected)


def test_a_large_cache_is_mapped_not_read(tmp_path, large, monkeypatch):
    made = prepare(spec(cache_size=16), large, tmp_path / "data")
    whole = made.open("train").images
    monkeypatch.setattr("ltnorm.data.prepared.READ_WHOLE", 1000)
    mapped = made.open("train").images
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, whole)
    file = made.path / "train_images.npy"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LtnormError, match="train_images"):
        made.open("train")


def test_two_folders_of_one_name_never_collide(tmp_path):
    first = draw(tmp_path / "a" / "photos")
    second = draw(tmp_path / "b" / "photos", seed=1)
    one, two = (prepare(spec(), root, tmp_path / "data") for root in (first, second))
    assert one.path != two.path
    assert one.index_sha256 != two.index_sha256
    assert (one.spec.title, two.spec.title) == ("photos", "photos")
    with pytest.raises(UsageError, match="several sets called 'photos'"):
        prepare(spec(title="photos"), Path("data/raw"), tmp_path / "data")
    again = prepare(one.spec, Path("data/raw"), tmp_path / "data")
    assert (again.path, again.fresh) == (one.path, False)


def test_what_was_read_is_not_read_again(tmp_path, photos, monkeypatch):
    made = prepare(spec(), photos, tmp_path / "data")
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    for file in every(copy):  # another time, the same bytes
        os.utime(file, ns=(1, 1))
    monkeypatch.setattr(check, "check", lambda *_: pytest.fail("files were read"))
    assert not prepare(spec(), photos, tmp_path / "data").fresh
    assert not prepare(spec(title="photos"), copy, tmp_path / "data").fresh
    assert not prepare(spec(title="photos"), Path("data/raw"), tmp_path / "data").fresh
    other = prepare(spec(ratio=3), photos, tmp_path / "data")
    assert other.fresh
    assert other.manifest["content"] == made.manifest["content"]


def change(file: Path) -> None:
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file)


@pytest.mark.parametrize("how", ["change", "add", "remove"])
def test_a_changed_folder_is_another_set_and_told(tmp_path, photos, how):
    made = prepare(spec(), photos, tmp_path / "data")
    file = photos / "bee" / "003.png"
    if how == "change":
        change(file)
    elif how == "add":
        change(photos / "bee" / "new.png")
    else:
        file.unlink()
    heard = []
    again = prepare(spec(), photos, tmp_path / "data", Making(tell=heard.append))
    assert again.path != made.path
    assert len(heard) == 1
    assert "has changed since photos-natural-" in heard[0]
    assert {"change": "bee/003.png", "add": "1 files added", "remove": "1 gone"}[how] in heard[0]
    # The recipe of a run names the images that it had.
    shutil.rmtree(made.path)
    with pytest.raises(UsageError, match="does not hold the images of photos-natural-"):
        prepare(made.spec, photos, tmp_path / "data")


def test_a_run_on_files_that_changed_does_not_start(tmp_path, large):
    wanted = prepare(spec(), large, tmp_path / "data").spec

    def again():
        return prepare(wanted, large, tmp_path / "data")

    file = large / os.fsdecode(again().open("train").paths[0])
    os.utime(file, ns=(1, 1))
    again().open("train")  # the bytes are what they were
    again().check()
    change(file)
    for action in (lambda: again().open("train"), lambda: again().check()):
        with pytest.raises(LtnormError, match=f"{file} has changed") as error:
            action()
        assert "ltnorm prepare" in error.value.hint
    file.unlink()
    with pytest.raises(LtnormError, match="is missing"):
        again().open("train")
    again().open("test")


def test_files_may_move(tmp_path, large):
    made = prepare(spec(), large, tmp_path / "data")
    moved = tmp_path / "elsewhere"
    large.rename(moved)
    found = prepare(made.spec, moved, tmp_path / "data")
    assert (found.fresh, found.open("train").root) == (False, moved)
    with pytest.raises(LtnormError, match="not there") as error:
        made.open("train")
    assert "--root" in error.value.hint


def test_bad_images_are_named(tmp_path, photos):
    bad = [photos / "ant" / f"{i:03d}.png" for i in range(12)]
    for file in bad:
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(LtnormError, match="12 of 48 images") as error:
        prepare(spec(), photos, tmp_path / "data")
    assert all(f"ant/{i:03d}.png" in error.value.message for i in range(10))
    assert "ant/010.png" not in error.value.message
    assert "and 2 more" in error.value.message
    listed = (tmp_path / "data" / "photos-bad-images.txt").read_text().splitlines()
    assert [line.split(" (")[0] for line in listed] == [f"ant/{i:03d}.png" for i in range(12)]
    assert "--on-bad skip" in error.value.hint
    assert not list((tmp_path / "data").glob("*/manifest.json"))

    made = prepare(spec(), photos, tmp_path / "data", Making(on_bad="skip"))
    assert sum(made.sizes.values()) == 48 - 12
    assert any("12 images that do not decode are left out" in n for n in made.manifest["notes"])
    assert not files_of(photos, made, "train") & {f"ant/{i:03d}.png" for i in range(12)}
    assert not prepare(spec(), photos, tmp_path / "data").fresh  # the choice stays with the set
    with pytest.raises(LtnormError, match="12 of 48 images"):  # and not with another one
        prepare(spec(ratio=2), photos, tmp_path / "data")
    # Mended images are noticed.
    draw(photos, {"ant": 12}, seed=5)
    assert prepare(spec(), photos, tmp_path / "data").path != made.path
    assert not (tmp_path / "data" / "photos-bad-images.txt").exists()


def test_a_class_that_is_all_bad_is_refused(tmp_path, photos):
    for file in (photos / "cat").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UsageError, match="'cat'"):
        prepare(spec(), photos, tmp_path / "data", Making(on_bad="skip"))


def test_own_splits_are_kept(tmp_path):
    for split, counts in (("train", COUNTS), ("val", {"ant": 2, "bee": 2, "cat": 1})):
        draw(tmp_path / "own" / split, counts, seed=len(split))
    draw(tmp_path / "own" / "test", {"ant": 3, "bee": 3}, seed=9)
    made = prepare(spec(), tmp_path / "own", tmp_path / "data")
    assert made.sizes == {"train": 48, "val": 5, "test": 6}
    assert made.counts == list(COUNTS.values())
    assert any("no test image of 'cat'" in note for note in made.manifest["notes"])
    with pytest.raises(UsageError, match="val split of its own"):
        prepare(spec(val=1), tmp_path / "own", tmp_path / "data")


def test_images_in_train_and_test_are_told(tmp_path):
    for split in ("train", "test"):
        draw(tmp_path / "own" / split, COUNTS, seed=len(split))
    for i in range(3):
        shutil.copy(tmp_path / f"own/train/ant/{i:03d}.png", tmp_path / f"own/test/ant/9{i}.png")
    notes = prepare(spec(), tmp_path / "own", tmp_path / "data").manifest["notes"]
    [note] = [note for note in notes if "bytes of a training image" in note]
    assert note.startswith("3 test images")
    assert "test/ant/90.png" in note


def test_a_ratio_makes_the_most_frequent_class_the_head(tmp_path, photos):
    made = prepare(spec(ratio=3, test_per_class=2), photos, tmp_path / "data")
    assert made.spec.class_order == "frequency"
    assert made.counts == long_tail_counts(made.counts[0], 3, 3)
    left = [count - 2 for count in COUNTS.values()]
    assert all(n <= most for n, most in zip(made.counts, left, strict=True))
    assert any(n == most for n, most in zip(made.counts, left, strict=True))


def test_what_is_natural_and_what_imposed():
    assert (spec().profile, spec().ratio) == ("natural", None)
    assert (spec(ratio=10.0).profile, spec(ratio=10.0).ratio) == ("exp", 10)
    resolved = {"name": "folder", "profile": "natural", "ratio": None}
    assert (spec(resolved, ratio=10.0).profile, spec(resolved).profile) == ("exp", "natural")
    assert spec({"ratio": 10.0}, profile="natural").ratio is None
    other = resolve({"dataset": {"name": "cifar10", "ratio": 50}}, Overrides())[0].dataset
    assert (other.profile, other.ratio) == ("exp", 50)
    switched = Overrides({"dataset.name": "folder"})
    assert resolve({"dataset": {"name": "cifar10", "ratio": 50}}, switched)[0].dataset == spec()
    with pytest.raises(UsageError, match=r"dataset\.ratio: has no effect"):
        spec(ratio=10.0, profile="natural")
    with pytest.raises(UsageError, match=r"dataset\.n_max: has no effect"):
        spec(n_max=10)


def test_a_preview_is_what_is_made(tmp_path, photos, large):
    for root in (photos, large):
        for wanted in (spec(), spec(ratio=2), spec(val=2), spec(cache_size=8)):
            before = preview(wanted, root, tmp_path / "data")
            made = prepare(wanted, root, tmp_path / "data")
            assert before.counts == made.counts
            assert (before.image_size, before.decoded) == (made.image_size, made.decoded)
            assert sorted(before.splits) == sorted(made.splits)


def test_no_room_is_told_before_work(tmp_path, large, monkeypatch):
    monkeypatch.setattr(making.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(LtnormError, match="left") as error:
        prepare(spec(cache_size=32), large, tmp_path / "data")
    assert "--cache-size" in error.value.hint
    assert find(spec(cache_size=32), tmp_path / "data") is None


@given(st.lists(st.integers(1, 60), min_size=2, max_size=8), st.integers(1, 30), st.integers(0, 5))
def test_a_test_set_leaves_every_class_an_image(sizes, per_class, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    train, test = split_test(labels, len(sizes), per_class, seed)
    assert sorted([*train, *test]) == list(range(len(labels)))
    held = np.bincount(labels[test], minlength=len(sizes))
    assert held.tolist() == [min(per_class, n // 2) for n in sizes]
    if min(sizes) >= 2 * per_class:
        assert set(held) == {per_class}
    again = split_test(labels, len(sizes), per_class, seed)
    assert np.array_equal(again[1], test)


@given(
    st.lists(st.integers(1, 300), min_size=2, max_size=10),
    st.floats(1, 50),
    st.sampled_from(["exp", "step", "pareto"]),
)
def test_the_largest_profile_that_fits(available, ratio, profile):
    def fits(n_max):
        counts = making_counts(n_max, len(available), ratio, profile)
        return all(n <= most for n, most in zip(counts, available, strict=True))

    n_max = largest_n_max(available, ratio, profile)
    assert fits(n_max)
    assert n_max == available[0] or not fits(n_max + 1)


def making_counts(n_max, classes, ratio, profile):
    try:
        return long_tail_counts(n_max, classes, ratio, profile)
    except UsageError:  # classes without images fit as well
        from ltnorm.data.longtail import _profile

        return _profile(n_max, classes, ratio, profile)


def test_published_images_that_are_left_out_make_another_set(tmp_path, large):
    for split, names in (("train", ("ant", "bee")), ("test", ("cat",))):
        lines = [f"{n}/{i:03d}.png {names.index(n)}" for n in names for i in range(COUNTS[n])]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    by_lists = resolve({"dataset": {"name": "lists"}}, Overrides())[0].dataset
    lists = {split: tmp_path / f"{split}.txt" for split in ("train", "test")}
    whole = prepare(by_lists, large, tmp_path / "data", Making(lists=lists))
    (large / "bee" / "004.png").write_bytes(b"no image")
    with pytest.raises(LtnormError, match=r"bee/004\.png \(is no image\)"):
        prepare(by_lists, large, tmp_path / "data", Making(lists=lists))
    less = prepare(by_lists, large, tmp_path / "data", Making(lists=lists, on_bad="skip"))
    assert less.sizes["train"] == whole.sizes["train"] - 1
    assert less.path != whole.path
    assert less.index_sha256 != whole.index_sha256
    assert not prepare(by_lists, large, tmp_path / "data", Making(lists=lists)).fresh


@pytest.mark.parametrize("cache_size", [None, 8, 16])
def test_images_kept_while_they_are_read_are_those_decoded_later(
    tmp_path, photos, cache_size, monkeypatch
):
    kept = prepare(spec(cache_size=cache_size), photos, tmp_path / "kept")
    monkeypatch.setattr("ltnorm.data.listing.KEPT", 0)
    later = prepare(spec(cache_size=cache_size), photos, tmp_path / "later")
    for split in ("train", "test"):
        assert np.array_equal(kept.open(split).images, later.open(split).images)
    assert (
        kept.manifest["sha256"]["train_images.npy"] == later.manifest["sha256"]["train_images.npy"]
    )


def test_one_image_of_another_size_leaves_all_of_them_files(tmp_path, photos):
    Image.new("RGB", (8, 9)).save(photos / "cat" / "tall.png")
    assert not prepare(spec(), photos, tmp_path / "data").decoded


def by_lists(**flags):
    overrides = Overrides({f"dataset.{key}": value for key, value in flags.items()})
    return resolve({"dataset": {"name": "lists"}}, overrides)[0].dataset


def write_lists(folder: Path, labels: dict[str, int]) -> dict[str, Path]:
    """Lists of the images of `draw`, every third of a class for the test; name -> label."""
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for name, label in labels.items():
        for i in range(COUNTS[name]):
            lines["train" if i % 3 else "test"].append(f"{name}/{i:03d}.png {label}")
    files = {split: folder / f"{split}.txt" for split in lines}
    for split, file in files.items():
        file.write_text("\n".join(lines[split]))
    return files


def test_other_labels_of_the_same_images_are_another_set(tmp_path, photos):
    made = [
        prepare(by_lists(), photos, tmp_path / "data", Making(lists=write_lists(tmp_path, labels)))
        for labels in ({"ant": 0, "bee": 1, "cat": 2}, {"ant": 0, "bee": 1, "cat": 1})
    ]
    assert made[0].path != made[1].path
    assert [len(one.classes) for one in made] == [3, 2]


def test_another_cut_of_what_is_prepared_needs_its_name_alone(tmp_path, photos, monkeypatch):
    lists = write_lists(tmp_path, {"ant": 0, "bee": 1, "cat": 2})
    prepare(spec(), photos, tmp_path / "data")
    prepare(by_lists(), photos, tmp_path / "data", Making(lists=lists))
    monkeypatch.setattr(check, "check", lambda *_: pytest.fail("files were read"))
    nowhere = Path("data/raw")
    for wanted in (spec(title="photos", ratio=3), by_lists(ratio=3)):
        made = prepare(wanted, nowhere, tmp_path / "data")
        assert made.fresh
        assert made.counts == long_tail_counts(made.counts[0], 3, 3)
        assert len(made.open("train")) == sum(made.counts)
    change(photos / "ant" / "005.png")
    with pytest.raises(UsageError, match=r"ant/005\.png has changed"):
        prepare(spec(title="photos", ratio=2), nowhere, tmp_path / "data")


def test_a_list_whose_files_changed_is_told(tmp_path, photos):
    lists = write_lists(tmp_path, {"ant": 0, "bee": 1, "cat": 2})
    prepare(by_lists(), photos, tmp_path / "data", Making(lists=lists))
    change(photos / "ant" / "005.png")
    heard = []
    prepare(by_lists(), photos, tmp_path / "data", Making(tell=heard.append))
    assert [("has changed" in text, "--force" in text) for text in heard] == [(True, True)]


def test_a_link_that_was_broken_and_is_mended_is_noticed(tmp_path, photos):
    (photos / "ant" / "link.png").symlink_to(".target.png")
    skip = Making(on_bad="skip")
    without = prepare(spec(), photos, tmp_path / "data", skip)
    assert not prepare(spec(), photos, tmp_path / "data", skip).fresh
    change(photos / "ant" / ".target.png")
    mended = prepare(spec(), photos, tmp_path / "data", skip)
    assert mended.fresh
    assert sum(mended.sizes.values()) == sum(without.sizes.values()) + 1


def test_a_set_without_test_images_is_refused(tmp_path):
    draw(tmp_path / "one", {"ant": 1, "bee": 1})
    with pytest.raises(UsageError, match="no test images"):
        prepare(spec(), tmp_path / "one", tmp_path / "data")


def test_a_damaged_record_is_told_or_done_without(tmp_path, photos):
    made = prepare(spec(), photos, tmp_path / "data")
    record = made.path / "source.npz"
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(LtnormError, match=r"source\.npz is damaged"):
        prepare(spec(title="photos"), Path("data/raw"), tmp_path / "data")
    again = prepare(spec(ratio=2), photos, tmp_path / "data")  # reads the files again
    assert again.manifest["content"] == made.manifest["content"]


@pytest.mark.parametrize("name", [".hidden", "a\\b", "x" * 120, "猫" * 80, "my cats", "my-cats"])
def test_any_name_of_a_folder_makes_a_title(tmp_path, name):
    made = prepare(spec(), draw(tmp_path / name), tmp_path / "data")
    again = resolve({"dataset": made.spec.model_dump()}, Overrides())[0].dataset
    assert again == made.spec


def test_titles_that_look_alike_are_apart(tmp_path):
    made = [
        prepare(spec(title=title), draw(tmp_path / "a"), tmp_path / "data")
        for title in ("my cats", "my-cats", "my,cats")
    ]
    assert len({one.path for one in made}) == 3


def test_what_has_no_effect_is_refused(tmp_path, photos):
    draw(tmp_path / "own" / "train")
    draw(tmp_path / "own" / "test", seed=1)
    with pytest.raises(UsageError, match=r"image_size: has no effect"):
        prepare(spec(image_size=64), photos, tmp_path / "data")
    with pytest.raises(UsageError, match="test_per_class"):
        prepare(spec(test_per_class=2), tmp_path / "own", tmp_path / "data")
    with pytest.raises(UsageError, match="inside the folder"):
        prepare(spec(), photos, photos / "data")


def test_the_order_of_the_command_line_does_not_matter():
    natural = {"dataset": {"name": "folder", "profile": "natural", "ratio": None}}
    sets = ["dataset.class_order=reversed", "dataset.ratio=10"]
    for typed in (
        Overrides(sets=sets),
        Overrides(sets=sets[::-1]),
        Overrides({"dataset.class_order": "reversed"}, sets[1:]),
    ):
        resolved = resolve(natural, typed)[0].dataset
        assert (resolved.profile, resolved.ratio, resolved.class_order) == ("exp", 10, "reversed")


def test_lists_of_a_set_that_has_none_are_refused(tmp_path, photos):
    made = prepare(spec(), photos, tmp_path / "data")
    with pytest.raises(UsageError, match="folder takes no lists"):
        prepare(made.spec, photos, tmp_path / "data", Making(lists={"train": tmp_path / "a.txt"}))
