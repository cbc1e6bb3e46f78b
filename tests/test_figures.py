"""The figure of `compare --plot`, from made results whose numbers are known."""

import csv
import dataclasses
import io
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from rich.console import Console
from scipy import stats

from ltnorm import resolve as recipes
from ltnorm.data.longtail import long_tail_counts, report_groups
from ltnorm.errors import LtnormError, UsageError
from ltnorm.reporting import figures, looks, panels, plots, schema
from ltnorm.reporting.compare import Question, compare
from ltnorm.reporting.curves import curves
from ltnorm.reporting.ranks import POINTS
from ltnorm.reporting.schema import Run
from ltnorm.resolve import Overrides

EPOCHS = 6
NORMS = ("bn", "gn", "split", "compound")
CLASSES = ("class", "name", "train_images", "group", "eval_images", "accuracy")
CURVE = ("epoch", "lr", "loss", "steps", "images", "seconds", "images_per_second", "accuracy")
# What a column of a made result has where nothing depends on it.
FILLER = {"str": "", "int": 1, "float": 1.0}


@dataclasses.dataclass
class Tree:
    """Made runs in a folder: accuracies fall from class to class, and differ by norm and seed."""

    root: Path

    def run(self, norm="bn", seed=0, sets=(), ratio=100, classes=10, **more) -> Run:
        """Write a run with its files; `more` are `names`, `epochs`, or columns of the result."""
        names = more.pop("names", [f"class-{i}" for i in range(classes)])
        epochs = more.pop("epochs", EPOCHS)
        [recipe] = recipes.resolve({}, Overrides({"dataset.ratio": ratio}, sets, [norm], [seed]))
        counts = long_tail_counts(5000, classes, ratio)
        scheme, groups = report_groups(counts)
        rng = np.random.default_rng([seed, *f"{norm}{sets}{ratio}".encode()])
        accuracy = np.linspace(90, 20, classes) + rng.uniform(-5, 5, classes)
        columns = self._columns(recipe, seed, ratio, classes, scheme, groups, accuracy) | more
        directory = self.root / recipe.fingerprint()[:12] / f"seed{seed}"
        directory.mkdir(parents=True, exist_ok=True)
        run = Run(schema.Result(**columns), directory)
        schema.write_result(directory, run.result)
        cells = enumerate(zip(names, counts, groups, accuracy, strict=True))
        rows = [(i, name, n, group, 50, a) for i, (name, n, group, a) in cells]
        schema.write_rows(directory / "per_class.csv", CLASSES, rows)
        write_curve(directory, [2.0 / e + 0.1 * seed for e in range(1, epochs + 1)])
        return run

    def _columns(self, recipe, seed, ratio, classes, scheme, groups, accuracy):
        kinds = {f.name: getattr(f.type, "__name__", "") for f in dataclasses.fields(schema.Result)}
        columns = {name: FILLER.get(kind) for name, kind in kinds.items()}
        for group in panels.GROUPS:
            of = [a for a, g in zip(accuracy, groups, strict=True) if g == group]
            columns |= {group: float(np.mean(of)) if of else None, f"{group}_classes": len(of)}
        return columns | {
            "schema": schema.SCHEMA,
            "fingerprint": recipe.fingerprint(),
            "dataset": recipe.dataset.name,
            "profile": "exp",
            "ratio": float(ratio),
            "set_id": f"made-exp{ratio:g}",
            "index_sha256": f"{ratio} {classes}",
            "model": "resnet32",
            "norm": recipe.norm.name,
            "norm_options": recipe.norm.changes(),
            "loss": recipe.loss.name,
            "sampler": recipe.sampler.name,
            "seed": seed,
            "eval_split": "test",
            "group_scheme": scheme,
            "all": float(accuracy.mean()),
            "device": "cpu",
            "settings": schema.settings_json(recipe),
        }


def write_curve(directory, losses):
    """An epochs.csv with these losses, and an accuracy of 10 e after every other epoch e."""
    rows = [
        (e, 0.1, loss, 1, 1, 1.0, 1.0, None if e % 2 else 10.0 * e)
        for e, loss in enumerate(losses, start=1)
    ]
    schema.write_rows(directory / "epochs.csv", CURVE, rows)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "results")


@pytest.fixture
def figure(monkeypatch):
    """Draw runs and give the figure instead of its bytes: figure(runs, "groups", "delta")."""
    kept = []
    monkeypatch.setattr(plots, "rendered", lambda drawn, ending: kept.append(drawn) or b"drawn")

    def make(runs, *names, **question):
        assert figures.draw(compare(runs, Question(**question)), names, ".png") == b"drawn"
        return kept[-1]

    return make


def axes_of(figure, title):
    """The axes whose titles start so."""
    return [axis for axis in figure.get_axes() if axis.get_title().startswith(title)]


def lines_of(axis):
    """The x and y of each line with points, in the order of the rows."""
    return [line.get_xydata().T for line in axis.get_lines() if line.get_marker() != "None"]


def bands_of(axis):
    """The low and the high edge of each band at its places."""
    found = []
    for band in axis.collections:
        points = band.get_paths()[0].vertices
        places = np.unique(points[:, 0])
        at = [points[points[:, 0] == x, 1] for x in places]
        found.append((np.array([y.min() for y in at]), np.array([y.max() for y in at])))
    return found


def written(runs, norm):
    """The accuracies in the files of a norm, [seeds, classes]."""
    tables = []
    for run in runs:
        if run.result.norm == norm:
            with (run.directory / "per_class.csv").open(newline="") as file:
                tables.append([float(row["accuracy"]) for row in csv.DictReader(file)])
    return np.array(tables)


def test_classes_are_drawn_as_the_mean_and_the_deviation_of_the_files(tree, figure):
    runs = [tree.run(norm, seed) for norm in NORMS[:2] for seed in range(3)]
    [axis] = axes_of(figure(runs, "per-class"), "accuracy by class")
    for norm, (x, y), (low, high) in zip(NORMS, lines_of(axis), bands_of(axis), strict=False):
        accuracy = written(runs, norm)
        assert x == pytest.approx(range(1, 11))
        assert y == pytest.approx(accuracy.mean(0))
        assert low == pytest.approx(accuracy.mean(0) - accuracy.std(0, ddof=1))
        assert high == pytest.approx(accuracy.mean(0) + accuracy.std(0, ddof=1))
    assert len(lines_of(axis)) == len(bands_of(axis)) == 2
    assert [text.get_text() for text in axis.get_xticklabels()][:2] == ["class-0", "class-1"]
    [behind] = [one for one in axis.figure.get_axes() if one.get_yscale() == "log"]
    assert list(behind.patches[0].get_data().values) == long_tail_counts(5000, 10, 100)


def test_classes_are_sorted_by_their_images_not_by_their_labels(tree, figure):
    runs = [tree.run()]
    file = runs[0].directory / "per_class.csv"
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, *reversed(rows)]) + "\n")
    [axis] = axes_of(figure(runs, "per-class"), "accuracy by class")
    assert lines_of(axis)[0][1] == pytest.approx(written(runs, "bn")[0][::-1])
    assert axis.get_xticklabels()[0].get_text() == "class-0"


def test_many_classes_are_averaged_with_their_neighbours(tree, figure):
    runs = [tree.run(seed=seed, classes=100) for seed in range(2)]
    [axis] = axes_of(figure(runs, "per-class"), "accuracy by class")
    x, y = lines_of(axis)[0]
    means = written(runs, "bn").reshape(2, POINTS, 4).mean(2)
    assert x == pytest.approx(np.arange(POINTS) * 4 + 2.5)
    assert y == pytest.approx(means.mean(0))
    assert bands_of(axis)[0][1] == pytest.approx(means.mean(0) + means.std(0, ddof=1))
    assert "mean of 4 neighbours" in axis.get_xlabel()


def test_a_class_without_test_images_is_a_gap(tree, figure):
    runs = [tree.run()]
    file = runs[0].directory / "per_class.csv"
    lines = file.read_text().splitlines()
    lines[3] = lines[3].rpartition(",")[0] + ","
    file.write_text("\n".join(lines) + "\n")
    [axis] = axes_of(figure(runs, "per-class"), "accuracy by class")
    assert np.flatnonzero(np.isnan(lines_of(axis)[0][1])).tolist() == [2]


def test_bars_are_means_and_whiskers_their_t_intervals(tree, figure):
    runs = [tree.run(norm, seed) for norm in NORMS[:2] for seed in range(4)]
    [axis] = axes_of(figure(runs, "groups"), "accuracy by group")
    bars = [bar for bar in axis.patches if bar.get_width()]
    values = [
        [getattr(r.result, g) for r in runs if r.result.norm == n]
        for n in NORMS[:2]
        for g in panels.GROUPS
    ]
    assert [bar.get_height() for bar in bars] == pytest.approx([np.mean(v) for v in values])
    ends = [one.get_segments()[0][:, 1] for one in axis.collections][::2]
    for end, v in zip(ends, values, strict=True):
        assert end == pytest.approx(stats.t.interval(0.95, 3, np.mean(v), stats.sem(v)))


def test_an_empty_group_has_no_bar_and_one_seed_no_whisker(tree, figure):
    runs = [tree.run(norm, tail=None, tail_classes=0) for norm in NORMS[:2]]
    [axis] = axes_of(figure(runs, "groups"), "accuracy by group")
    assert len(axis.patches) == 4
    assert not axis.collections
    assert [t.get_text() for t in axis.get_xticklabels()] == ["head", "medium", "tail\n(no class)"]


def test_differences_are_paired_by_seed_where_seeds_match(tree, figure):
    runs = [tree.run(norm, seed) for norm in NORMS[:2] for seed in range(3)]
    [axis] = axes_of(figure(runs, "delta"), "difference to bn")
    difference = written(runs, "gn") - written(runs, "bn")
    [(_, y)], [(low, high)] = lines_of(axis), bands_of(axis)
    assert y == pytest.approx(difference.mean(0))
    assert high - low == pytest.approx(2 * difference.std(0, ddof=1))
    [axis] = axes_of(figure(runs[1:], "delta"), "difference to bn")
    assert lines_of(axis)[0][1] == pytest.approx(
        written(runs, "gn").mean(0) - written(runs[1:], "bn").mean(0)
    )
    assert not bands_of(axis)


def test_head_against_tail_with_names_that_cover_nothing(tree, figure):
    runs = [tree.run(norm, seed) for norm in NORMS for seed in range(2)]
    drawn = figure(runs, "head-tail")
    [axis] = axes_of(drawn, "tail against head")
    points = [line.get_xydata()[0] for line in axis.get_lines() if line.get_marker() in "os^D"]
    for norm, point in zip(NORMS, points, strict=True):
        of = [run.result for run in runs if run.result.norm == norm]
        assert point == pytest.approx(
            [np.mean([r.head for r in of]), np.mean([r.tail for r in of])]
        )
    names = [text for text in axis.texts if text.get_text()]
    assert {text.get_text() for text in names} <= {*NORMS}
    assert len(names) > 1
    boxes = [text.get_window_extent() for text in names]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    for text in names:
        pixel = axis.transData.transform(text.xy)
        assert not any(box.contains(*pixel) for box in boxes)


def test_accuracy_against_ratio_belongs_to_a_pivot(tree, figure):
    runs = [
        tree.run(norm, seed, ratio=r) for norm in NORMS[:2] for seed in (0, 1) for r in (100, 10)
    ]
    drawn = figure(runs, "ratio")
    for title, metric in (("accuracy by ratio", "all"), ("tail accuracy by ratio", "tail")):
        [axis] = axes_of(drawn, title)
        for norm, (x, y) in zip(NORMS, lines_of(axis), strict=False):
            assert x.tolist() == [10, 100]
            for ratio, value in zip(x, y, strict=True):
                of = [r.result for r in runs if (r.result.norm, r.result.ratio) == (norm, ratio)]
                assert value == pytest.approx(np.mean([getattr(r, metric) for r in of]))
    assert len(drawn.subfigs) == 1
    assert len(figure(runs).subfigs) == 3  # two blocks, and the ratios


def test_curves_end_with_the_shortest_run(tree, figure):
    runs = [tree.run(seed=seed, epochs=6 - seed) for seed in range(3)]
    drawn = figure(runs, "curves")
    [axis] = axes_of(drawn, "training loss")
    [(x, y)], [(low, high)] = lines_of(axis), bands_of(axis)
    assert x.tolist() == [1, 2, 3, 4]
    assert y == pytest.approx([2 / e + 0.1 for e in x])
    assert high - low == pytest.approx([0.2] * 4)
    [axis] = axes_of(drawn, "accuracy while training")
    assert lines_of(axis)[0].tolist() == [[2, 4], [20, 40]]


@pytest.mark.parametrize("text", ["", "epoch,loss\n1,x\n", "loss\n0.5\n", "\xff"])
def test_an_unreadable_curve_is_left_out(tree, text):
    runs = [tree.run(seed=seed) for seed in range(2)]
    (runs[1].directory / "epochs.csv").write_bytes(text.encode("latin-1"))
    [block] = compare(runs)
    [whole] = compare(runs[:1])
    assert curves(block.rows[0]) == curves(whole.rows[0])


def test_rows_without_files_are_told(tree, figure):
    runs = [tree.run(norm) for norm in NORMS[:3]]
    (runs[1].directory / "per_class.csv").unlink()
    (runs[2].directory / "epochs.csv").unlink()
    drawn = figure(runs)
    [axis] = axes_of(drawn, "accuracy by class (2 of 3 rows)")
    assert len(lines_of(axis)) == 2
    assert axes_of(drawn, "training loss (2 of 3 rows)")
    assert len(lines_of(axes_of(drawn, "difference to bn")[0])) == 1


def test_a_loss_that_is_no_number_is_a_missing_one(tree):
    run = tree.run()
    write_curve(run.directory, [1.0, float("nan"), 0.5])
    [block] = compare([run])
    assert curves(block.rows[0])["loss"].epochs == [1, 3]


def test_a_row_looks_the_same_everywhere(tree, figure):
    runs = [tree.run(norm, ratio=10) for norm in NORMS]
    runs += [tree.run(norm, ratio=100) for norm in ("bn", "compound")]
    found = {}
    drawn = figure(runs)
    for title, labels in {
        "accuracy by class": [NORMS, ("bn", "compound")],
        "training loss": [NORMS, ("bn", "compound")],
        "accuracy by ratio": [NORMS],
    }.items():
        for axis, rows in zip(axes_of(drawn, title), labels, strict=True):
            shown = [line for line in axis.get_lines() if line.get_marker() != "None"]
            for label, line in zip(rows, shown, strict=True):
                look = (line.get_color(), line.get_marker(), line.get_linestyle())
                assert found.setdefault(label, look) == look
    assert found["bn"][0] == looks.BASELINE
    bars = [b.get_facecolor()[:3] for b in axes_of(drawn, "accuracy by group")[1].patches]
    assert bars[::3] == [to_rgb(found[norm][0]) for norm in ("bn", "compound")]


def grey(colour):
    """How light a colour is without its hue (Rec. 601)."""
    return float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)))


def test_looks_are_distinct_in_greyscale(tree):
    options = [f"norm.components={k}" for k in range(2, 2 + figures.MOST_ROWS - 1)]
    runs = [tree.run(), *(tree.run("compound", sets=[option]) for option in options)]
    shown = [*looks.looks(compare(runs)).values()]
    assert len(shown) == figures.MOST_ROWS
    for one, other in combinations(shown, 2):
        assert (one.marker, one.hollow) != (other.marker, other.hollow)
        assert (one.colour, one.line) != (other.colour, other.line)
        assert (one.colour, one.hatch) != (other.colour, other.hatch)
    for one, next_one in pairwise(shown[:5]):
        assert abs(grey(one.colour) - grey(next_one.colour)) > 0.1


def test_the_same_results_give_the_same_file_of_every_kind(tree):
    blocks = compare([tree.run(norm, seed) for norm in NORMS[:2] for seed in range(2)])
    for ending in plots.ENDINGS:
        content = figures.draw(blocks, ["head-tail"], ending)
        assert content == figures.draw(blocks, ["head-tail"], ending)
        if ending == ".png":
            with Image.open(io.BytesIO(content)) as image:
                assert len(image.convert("L").getcolors()) > 10
        elif ending == ".svg":
            assert ElementTree.fromstring(content).tag.endswith("svg")
        else:
            assert content.startswith(b"%PDF")
            assert b"CreationDate" not in content


def test_names_are_drawn_as_they_are(tree):
    names = ["a $price$ of \\alpha", "日本語" * 9, "bad\x07\nline", "x" * 60, "<b>", *"abcde"]
    blocks = compare([tree.run(norm, names=names) for norm in NORMS[:2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert figures.draw(blocks, ["per-class", "delta"], ".svg")
    assert plots.line("x" * 60, 10) == "x" * 9 + "…"
    assert plots.line("日本語" * 9, 10) == "日本語日 …"
    assert plots.line("bad\x07\nline\udc80", 20) == "bad  line\ufffd"


def test_long_labels_stay_in_the_figure(tree, figure):
    sets = [
        "norm.components=4",
        "norm.dual_path=false",
        "norm.assign=position",
        "norm.temperature=0.25",
    ]
    runs = [tree.run(), *(tree.run("compound", sets=sets[:k]) for k in (2, 3, 4))]
    for names in (["groups"], []):
        drawn = figure(runs, *names)
        [part] = drawn.subfigs
        [legend] = part.legends
        box = legend.get_window_extent()
        assert drawn.bbox.x0 <= box.x0
        assert box.x1 <= drawn.bbox.x1
        assert legend.get_texts()[0].get_text() == "bn (n=1)"
        for axis in part.get_axes():
            assert axis.get_window_extent().y0 > box.y1


def test_pictures_that_do_not_apply_are_left_out(tree, figure):
    runs = [tree.run(norm) for norm in ("gn", "split")]
    for run in runs:
        (run.directory / "per_class.csv").unlink()
        (run.directory / "epochs.csv").unlink()
    titles = [axis.get_title() for axis in figure(runs).get_axes() if axis.get_title()]
    assert titles == ["accuracy by group", "tail against head"]


@pytest.mark.parametrize(
    ("panel", "error", "words"),
    [
        ("per-class", LtnormError, "per_class.csv"),
        ("delta", UsageError, "is the baseline"),
        ("head-tail", UsageError, "no class in the head or in the tail"),
        ("curves", LtnormError, "epochs.csv"),
        ("ratio", UsageError, "one ratio alone"),
    ],
)
def test_a_picture_that_is_asked_for_and_cannot_be_drawn_says_why(
    tree, figure, panel, error, words
):
    runs = [tree.run(norm, tail=None, tail_classes=0) for norm in ("gn", "split")]
    for run in runs:
        (run.directory / "per_class.csv").unlink()
        (run.directory / "epochs.csv").unlink()
    with pytest.raises(error, match=words):
        figure(runs, panel)


def test_rows_that_differ_in_the_ratio_have_no_picture_of_it(tree, figure):
    runs = [tree.run(ratio=ratio) for ratio in (10, 100)]
    with pytest.raises(UsageError, match="the rows differ in the ratio"):
        figure(runs, "ratio", by=("dataset.ratio",))
    drawn = figure(runs, "per-class", by=("dataset.ratio",))
    assert not [axis for axis in drawn.get_axes() if axis.get_yscale() == "log"]


def test_what_nobody_could_read_is_refused(tree, figure):
    options = [f"norm.components={k}" for k in range(2, 2 + figures.MOST_ROWS + 1)]
    with pytest.raises(UsageError, match=f"at most {figures.MOST_ROWS} rows"):
        figure([tree.run("compound", sets=[option]) for option in options])
    runs = [tree.run(ratio=10 + i) for i in range(figures.MOST_PARTS + 1)]
    with pytest.raises(UsageError, match=f"at most {figures.MOST_PARTS} tables"):
        figure(runs, "groups")
    assert len(figure(runs, "ratio").subfigs) == 1
    assert len(figure(runs[1:], "groups", "ratio").subfigs) == figures.MOST_PARTS + 1


def printed(blocks, width):
    console = Console(width=width, file=io.StringIO())
    console.print(figures.bars(blocks, width))
    return console.file.getvalue().strip().splitlines()


def test_bars_of_text_are_as_long_as_their_numbers(tree):
    runs = [tree.run("bn", head=100.0), tree.run("gn", head=50.0), tree.run("split", head=0.01)]
    title, *lines = printed(compare(runs), 100)
    assert title.startswith("made-exp100")
    full = [line.count("█") for line in lines[:3]]
    assert full == [figures.LONGEST, figures.LONGEST // 2, 0]
    assert "▏" in lines[2]
    assert [line.split()[-1] for line in lines[:3]] == ["100.0", "50.0", "0.0"]
    assert [line.split()[0] for line in lines[::3]] == list(panels.GROUPS)


@pytest.mark.parametrize("width", [50, 80, 160])
def test_bars_fit_the_terminal_and_tell_empty_groups(tree, width):
    sets = ["norm.components=4", "norm.dual_path=false", "norm.temperature=0.25"]
    runs = [tree.run("compound", s, sets, tail=None, tail_classes=0) for s in range(2)]
    lines = printed(compare(runs), width)[1:]
    assert max(map(len, lines)) <= width
    assert "no class" in lines[-1]
    assert sum("±" in line for line in lines) == 2


def test_compare_draws_into_a_file(ltnorm, tree):
    for norm in NORMS[:2]:
        tree.run(norm)
    answer = ltnorm("compare results --plot a.png --panel groups")
    assert answer.code == 0, answer.err
    assert "figure written to a.png" in answer.err
    with Image.open("a.png") as image:
        assert image.width > 500


def test_compare_without_matplotlib_prints_bars(ltnorm, tree, monkeypatch):
    tree.run()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    answer = ltnorm("compare results --plot a.png")
    assert answer.code == 0, answer.err
    assert 'pip install "ltnorm[plot]"' in answer.err
    assert "█" in answer.out
    assert not Path("a.png").exists()


def test_an_unknown_picture_is_told_before_work_starts(failing):
    assert "did you mean 'groups'" in failing("compare nowhere --plot a.png --panel group", code=2)
    assert ".svg" in failing("compare nowhere --plot a.gif", code=2)


def test_neither_torch_nor_matplotlib_is_imported_with_it():
    code = """
import sys
import ltnorm.reporting.figures
print([m for m in ("torch", "matplotlib") if m in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
