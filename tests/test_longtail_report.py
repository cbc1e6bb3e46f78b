import io
import subprocess
import sys
import warnings
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from ltnorm.data.longtail import long_tail_counts, report_groups
from ltnorm.reporting import longtail, plots
from ltnorm.reporting.longtail import BLOCKS, EACH, SHOWN, chart, choose, ends, plot, statistics

RNG = np.random.default_rng(0)
SETS = {
    "cifar10": long_tail_counts(5000, 10, 100),
    "cifar100": long_tail_counts(500, 100, 100),
    "step": long_tail_counts(500, 10, 50, "step"),
    "thousand": long_tail_counts(1280, 1000, 256),
    "folder": [40, 22, 31],
    "two": [7, 1],
    "one": [3],
    "balanced": [12] * 5,
    "shuffled": [int(n) for n in RNG.permutation(long_tail_counts(900, 60, 90))],
}


def gini_by_pairs(counts):
    """The Gini coefficient by its definition over all pairs."""
    counts = np.asarray(counts, float)
    return np.abs(counts[:, None] - counts).mean() / (2 * counts.mean())


@pytest.mark.parametrize("name", SETS)
def test_gini_is_half_the_relative_mean_difference(name):
    assert statistics(SETS[name]).gini == pytest.approx(gini_by_pairs(SETS[name]))


def test_known_cases_of_gini():
    assert statistics([4, 4, 4]).gini == 0
    assert statistics([1, 3]).gini == pytest.approx(0.25)
    assert statistics([0] * 9 + [10]).gini == pytest.approx(0.9)  # 1 - 1 / C: all in one class
    assert statistics([30, 10]).gini == statistics([1, 3]).gini  # of shares, in any order


def test_the_other_numbers():
    found = statistics(SETS["cifar10"])
    assert (found.classes, found.images, found.n_max, found.n_min) == (10, 12406, 5000, 50)
    assert found.ratio == 100
    assert statistics([5, 0]).ratio is None
    assert "12,406 images, 10 classes, n_max 5,000, n_min 50, ratio 100, Gini 0.61" in str(found)


def test_the_numbers_of_places(real_data):
    lines = (real_data / "lists" / "Places_LT_train.txt").read_text().splitlines()
    counts = Counter(int(line.rsplit(" ", 1)[1]) for line in lines)
    found = statistics([counts[label] for label in range(365)])
    assert (found.classes, found.images, found.n_max, found.n_min) == (365, 62500, 4980, 5)
    assert (found.ratio, round(found.gini, 2)) == (996, 0.67)


def drawn(counts, width=100, height=8, **console):
    """The lines of a chart as a pipe gets them."""
    out = Console(file=io.StringIO(), width=width, **console)
    out.print(chart(counts, report_groups(list(counts))[1], width, height))
    return out.file.getvalue().splitlines()


def bars(lines, height=8):
    """The height of every column in eighths of a row, from the marks themselves."""
    rows = [line[max(line.find("┤"), line.find("│")) + 1 :] for line in lines[:height]]
    columns = max(map(len, rows))
    marks = [[BLOCKS.index(mark) for mark in row.ljust(columns)] for row in rows]
    return [sum(column) for column in zip(*marks, strict=True)]


@pytest.mark.parametrize("width", [60, 100, 160])
@pytest.mark.parametrize("name", SETS)
def test_bars_fall_and_no_class_vanishes(name, width):
    counts, lines = SETS[name], drawn(SETS[name], width)
    levels = [level for level in bars(lines) if level]  # gaps between wide bars are empty
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] > 0
    assert len(lines) == 8 + 3
    assert max(map(len, lines)) <= width
    if len(counts) < width // 2:
        changes = sum(a != b for a, b in pairwise(levels)) + 1
        assert changes <= len(counts)
        assert levels[0] == 64
        assert (len(set(levels)) == 1) == (len(set(counts)) == 1)


def test_every_class_has_a_bar_where_there_is_room():
    lines = drawn([9, 5, 2], 60)
    assert lines[0].split() == ["9", "┤███████████"]
    assert bars(lines) == [64] * 11 + [0] + [36] * 11 + [0] + [14] * 11  # 64 n / 9
    assert "linear scale" in lines[-1]


def test_a_log_scale_has_equal_steps_for_equal_factors():
    levels = sorted(set(bars(drawn([10000, 1000, 100, 10])[:8])) - {0})
    assert levels == [16, 32, 48, 64]  # from the decade below the smallest class
    assert "log scale" in drawn([10000, 1000, 100, 10])[-1]


def test_a_column_is_the_mean_of_its_classes():
    counts = [8] * 50 + [4] * 50 + [2] * 50 + [1] * 50
    lines = drawn(counts, 33)
    levels = bars(lines)
    assert len(levels) == 30  # and a margin of three
    assert (levels[0], levels[-1]) == (64, 8)
    assert set(levels) >= {64, 32, 16, 8}
    assert "6.7 a column" in lines[-1]


def test_thousands_of_classes_fit():
    counts = long_tail_counts(1000, 8142, 500)
    lines = drawn(counts, 60)
    assert "8,142 classes by images, log scale, 153.6 a column" in lines[-1]
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "thousand", "shuffled"])
def test_axes_name_the_largest_the_smallest_and_the_classes(name):
    counts, lines = SETS[name], drawn(SETS[name])
    ticks = [line.split("┤")[0].strip() for line in lines if "┤" in line[:12]]
    assert ticks[0] == f"{max(counts):,}"
    assert f"{min(counts):,}" in ticks
    assert f"{len(counts):,} classes" in lines[-1]


def test_groups_are_told_apart_without_colour():
    lines = drawn(SETS["thousand"])
    _, groups = report_groups(SETS["thousand"])
    spans = lines[-2].split("├")[1:]
    assert [span.strip("─┤ ").split() for span in spans] == [
        [name, str(groups.count(name))] for name in ("head", "medium", "tail")
    ]
    columns = len(lines[-2].strip())
    for name, span in zip(("head", "medium", "tail"), spans, strict=True):
        assert abs(len(span.strip()) + 1 - columns * groups.count(name) / 1000) <= 1


def test_narrow_groups_keep_a_letter():
    line = drawn(long_tail_counts(200, 90, 200), 60)[-2]
    assert all(name in line for name in ("head", "medium", "tail"))
    line = drawn([1000] + [50] * 198 + [1], 60)[-2]
    assert line.strip().startswith("├")
    assert "medium 198" in line


def test_colour_only_on_a_terminal(monkeypatch):
    assert not any("\x1b" in line for line in drawn(SETS["cifar10"]))
    coloured = drawn(SETS["cifar10"], force_terminal=True, color_system="truecolor")
    assert any("\x1b[34m" in line for line in coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = drawn(SETS["cifar10"], force_terminal=True, color_system="truecolor")
    assert plain == drawn(SETS["cifar10"])


def test_both_ends_of_the_tail():
    assert ends([5, 9, 7, 1, 3, 8, 2, 6, 4, 10, 11]) == ([10, 9, 1, 5, 2], [0, 8, 4, 6, 3])
    assert ends([3, 9, 5]) == ([1, 2], [0])
    assert ends([3]) == ([0], [])
    assert ends([3, 0, 2]) == ([0], [2])
    largest, smallest = ends(SETS["thousand"])
    assert len(largest) == len(smallest) == SHOWN
    assert not set(largest) & set(smallest)


def test_the_choice_of_images_follows_the_seed():
    counts = [40, 3, 12]
    labels = RNG.permutation(np.repeat(np.arange(3), counts))
    chosen = choose(labels, counts, seed=1)
    assert {label: len(images) for label, images in chosen.items()} == {0: EACH, 1: 3, 2: EACH}
    for label, images in chosen.items():
        assert len(set(images)) == len(images)
        assert set(labels[images]) == {label}
    assert choose(labels, counts, seed=1) == chosen
    assert choose(labels, counts, seed=2) != chosen


def pictures(counts, size=(20, 30)):
    """Images of the classes at both ends."""
    return {
        label: list(RNG.integers(0, 256, (min(counts[label], EACH), *size, 3), dtype=np.uint8))
        for part in ends(counts)
        for label in part
    }


@pytest.fixture
def figure(tmp_path, monkeypatch):
    """Draw, and give the figure instead of its bytes."""
    kept = []
    monkeypatch.setattr(plots, "rendered", lambda drawn, ending: kept.append(drawn) or b"drawn")

    def make(counts, classes=None, samples=None, **more):
        classes = classes or [f"class {i}" for i in range(len(counts))]
        samples = pictures(counts) if samples is None else samples
        groups = report_groups(list(counts))[1]
        plot(tmp_path / "a.png", "a title", classes, counts, groups, samples, **more)
        assert (tmp_path / "a.png").read_bytes() == b"drawn"
        return kept[-1]

    return make


def test_the_figure_shows_tail_and_classes(figure):
    counts = SETS["cifar10"]
    samples = pictures(counts)
    tail, largest, smallest = figure(counts, samples=samples, seed=7).get_axes()
    assert tail.get_yscale() == "log"
    assert [tick.get_text() for tick in tail.get_yticklabels()] == ["50", "100", "1,000", "5,000"]
    assert str(statistics(counts)) in tail.get_xlabel()
    names = [text.get_text() for text in tail.texts]
    assert names == ["head\n3 classes", "medium\n4 classes", "tail\n3 classes"]
    heights = np.concatenate(
        [patch.get_data().values for patch in tail.patches if hasattr(patch, "get_data")]
    )
    assert heights.tolist() == sorted(counts, reverse=True)
    for axis, labels in zip((largest, smallest), ends(counts), strict=True):
        beside = [text.get_text() for text in axis.texts]
        groups = report_groups(counts)[1]
        for label in labels:
            assert f"class {label}\n{counts[label]:,} · {groups[label]}" in beside
        assert len(axis.images) == sum(len(samples[label]) for label in labels)
    first = largest.images[0]
    assert np.array_equal(first.get_array(), samples[0][0][:, 5:25])  # the centre square
    left, right, bottom, top = first.get_extent()
    assert right - left == pytest.approx(bottom - top)


def test_the_seed_is_stated(figure):
    words = [text.get_text() for part in figure([9, 4], seed=7).subfigs for text in part.texts]
    assert any("seed 7" in word for word in words)
    assert "a title" in words


def test_large_images_are_made_small(figure):
    counts = [2, 1]
    _, axis, _ = figure(counts, samples=pictures(counts, (700, 500))).get_axes()
    assert {image.get_array().shape for image in axis.images} == {(160, 160, 3)}


@pytest.mark.parametrize("name", ["one", "two", "folder", "thousand", "balanced"])
def test_any_number_of_classes_can_be_drawn(figure, name):
    counts = SETS[name]
    axes = figure(counts).get_axes()
    assert len(axes) == 1 + (2 if len(counts) > 1 else 1)


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_strange_names_survive(tmp_path, ending):
    names = ['$x^2$, "quoted" $', "ねこ", "Straße\nund\tmehr", "a\udcff name", "long " * 40, ""]
    counts = [30, 20, 10, 5, 2, 1]
    path = tmp_path / f"tail{ending}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot(path, names[0], names, counts, report_groups(counts)[1], pictures(counts))
    assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF", b"<?xm")
    assert list(tmp_path.iterdir()) == [path]


def test_names_are_cut_to_two_lines(figure):
    _, axis, _ = figure([2, 1], classes=["a word " * 30, "b"]).get_axes()
    name, below = axis.texts[-1].get_text().rsplit("\n", 1)
    assert below == "2 · medium"
    assert name.count("\n") == 1
    assert name.endswith("…")
    assert max(map(len, name.splitlines())) <= longtail.NAME


def test_matplotlib_and_torch_are_not_imported_with_it():
    code = """
import sys
import ltnorm.reporting.longtail
print([m for m in ("torch", "numpy", "matplotlib", "PIL") if m in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
