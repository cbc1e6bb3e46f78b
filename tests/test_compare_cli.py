import csv
import io
import json
import subprocess
import sys

import pytest
import yaml
from made import result, write_run

from ltnorm.reporting import schema


@pytest.fixture
def tree(tmp_path):
    """Results of bn and gn (tail 2 points above, +- 0.1) at two ratios and two losses."""
    for ratio in (10.0, 100.0):
        for loss in ("ce", "ldam"):
            flags = {"dataset.ratio": ratio, "loss.name": loss}
            for seed in range(3):
                base = 20.0 + 5 * seed
                for norm, tail in (("bn", base), ("gn", base + 2 + (seed - 1) / 10)):
                    row = result(norm, seed=seed, tail=tail, flags=flags, index_sha256=str(ratio))
                    write_run(tmp_path / "results" / f"{ratio:g}", row, images=50, **flags)
    return tmp_path / "results"


def rows_of(answer):
    assert answer.code == 0, answer.err
    return json.loads(answer.out)["rows"]


def test_the_table_has_both_intervals_and_says_how(ltnorm, tree):
    answer = ltnorm("compare --where", "ratio==100 and loss=='ce'")
    assert answer.code == 0, answer.err
    [row] = [line for line in answer.out.splitlines() if line.startswith("gn ")]
    assert "+2.0 [+1.8, +2.2]*" in row
    assert "over images" in answer.out
    for rule in ("paired t", "Holm", "bootstrap draws, by class", "last epoch", "sample standard"):
        assert rule in " ".join(answer.out.split())
    assert "Tail accuracy against bn: higher with gn (+2.0 points, [+1.8, +2.2])." in answer.out


def test_json_has_what_the_table_leaves_out(ltnorm, tree):
    row = rows_of(ltnorm("compare --json --where", "ratio==100 and loss=='ce' or ratio<0"))[1]
    assert row["tail_paired"] is True
    assert row["tail_seed_correlation"] > 0.99
    assert row["tail_welch_low"] < row["tail_low"] < 2 < row["tail_high"] < row["tail_welch_high"]
    assert row["tail_images_low"] < row["tail_images_high"]
    assert row["tail_adjusted_p"] == row["tail_p"] < 0.05


def test_intervals_over_images_need_predictions_and_can_be_left_out(ltnorm, tree):
    where = ["--json", "--where", "ratio==100 and loss=='ce'"]
    assert rows_of(ltnorm("compare --no-images", *where))[1]["tail_images_low"] is None
    [first, *_] = sorted(tree.glob("100/*gn-ce*/seed0"))
    (first / schema.PREDICTIONS).write_bytes(b"no archive")
    answer = ltnorm("compare", *where)
    assert rows_of(answer)[1]["tail_images_low"] is None
    [block] = json.loads(answer.out)["blocks"]
    assert any(
        str((first / schema.PREDICTIONS).relative_to(tree)) in note for note in block["footnotes"]
    )
    (first / schema.PREDICTIONS).unlink()
    assert rows_of(ltnorm("compare", *where))[1]["tail_images_low"] is None


@pytest.mark.parametrize(
    ("flags", "blocks", "labels"),
    [
        ("", 4, {"bn", "gn"}),
        ("--by loss", 4, {"ce", "ldam"}),
        ("--by ratio", 4, {"ratio 10", "ratio 100"}),
        ("--by norm --by loss", 2, {"bn · ce", "bn · ldam", "gn · ce", "gn · ldam"}),
        ("--by norm --by ratio --by loss", 1, None),
    ],
)
def test_views_by_key(ltnorm, tree, flags, blocks, labels):
    rows = rows_of(ltnorm(f"compare {flags} --json"))
    assert len({row["block"] for row in rows}) == blocks
    assert labels is None or {row["label"] for row in rows} == labels
    assert sum(row["n"] for row in rows) == 24


def test_the_pivot_has_norms_down_and_ratios_across(ltnorm, tree):
    answer = ltnorm("compare --pivot ratio --metric tail --where", "loss=='ce'")
    lines = [line.split() for line in answer.out.splitlines()]
    assert ["norm", "\\", "ratio", "ratio", "10", "ratio", "100"] in lines
    assert any(line[:1] == ["gn"] and line.count("(+2.0*)") == 2 for line in lines)


def test_classes(ltnorm, tree):
    answer = ltnorm("compare --per-class --format csv --where", "ratio==100 and loss=='ce'")
    rows = list(csv.DictReader(io.StringIO(answer.out)))
    assert len(rows) == 20
    assert {row["group"] for row in rows} == {"head", "medium", "tail"}
    last = [row for row in rows if row["class"] == "9"]
    assert [float(row["accuracy_mean"]) for row in last] == pytest.approx([25, 27])


@pytest.mark.parametrize("format", ["table", "markdown", "latex", "csv", "json", "html"])
def test_output_goes_into_a_file(ltnorm, tree, tmp_path, format):
    command = ["compare", "--format", format, "--output", str(tmp_path / "out")]
    answer = ltnorm(command[0], *command[1:])
    assert (answer.code, answer.out) == (0, "")
    shown = ltnorm("compare", "--format", format).out
    assert (tmp_path / "out").read_text().strip() == shown.strip()


def test_gates_have_an_exit_code(ltnorm, tree):
    assert ltnorm("compare --fail-below tail=-1.0").code == 0
    assert ltnorm("compare --fail-unless tail=+0.5").code == 0
    failed = ltnorm("compare --fail-unless tail=+1.9")
    assert failed.code == 4
    assert "Tail accuracy" in failed.out  # the table is there all the same
    assert [line.split(":")[0] for line in failed.err.splitlines()[-2:]] == ["error", "hint"]
    assert ltnorm("compare --fail-below tail=3").code == 4
    assert ltnorm("compare --fail-below tail=3 --norm bn").code == 4  # nothing was judged


def test_one_seed_fails_a_gate_and_says_so(ltnorm, tree):
    answer = ltnorm("compare --fail-below tail=-100 --where", "seed==0")
    assert answer.code == 4
    assert "no interval" in answer.err.splitlines()[-2]


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        ("--by nrom", 2, "did you mean 'norm'"),
        ("--by norm.componens", 2, "norm.componens"),
        ("--pivot norm", 2, "already"),
        ("--pivot ratio --per-class", 2, "two views"),
        ("--metric tial", 2, "did you mean 'tail'"),
        ("--sort tial", 2, "did you mean 'tail'"),
        ("--baseline nope", 2, "nope"),
        ("--norm gn", 2, "--where"),
        ("--fail-below tail", 2, "tail"),
        ("--panel groups", 2, "--plot"),
        ("--output /no/such/folder/x", 2, "--output"),
        ("--html /no/such/folder/x.html", 2, "--html"),
        ("--plot x.bmp", 2, "--plot"),
        ("--where ratio=100", 2, "=="),
        ("--where ratio==7", 3, "none of 24 runs"),
        ("--where __import__('os')", 2, "--where"),
    ],
)
def test_what_cannot_be_asked(failing, tree, flags, code, told):
    name, _, value = flags.partition(" ")
    more = value.split() if name != "--where" else [value]
    assert told in failing("compare", name, *more, code=code)


def test_what_is_not_finished_is_told_with_its_path(ltnorm, tree, tmp_path):
    left = tree / "100" / "resnet32-split-ce" / "seed0"
    left.mkdir(parents=True)
    (left / schema.RECIPE).write_text(yaml.safe_dump({"seed": 0}))
    [lost] = sorted(tree.glob("10/*gn-ldam*/seed1"))
    (lost / schema.RESULT).unlink()
    answer = ltnorm("compare --quiet")
    assert answer.code == 0
    told = [line for line in answer.err.splitlines() if line.startswith("warning:")]
    assert any("results/100/resnet32-split-ce/seed0 is unfinished" in line for line in told)
    assert any("gn-ldam" in line and "seed1 is unfinished" in line for line in told)
    assert any(line.startswith("warning: gn lacks seed 1, of") for line in told)


def test_published_numbers_stand_beside_and_in_no_statistic(ltnorm, tmp_path):
    flags = {"dataset.name": "cifar10", "dataset.ratio": 100.0}
    for norm in ("bn", "gn"):
        for seed in range(3):
            write_run(tmp_path / "results", result(norm, seed=seed, flags=flags), **flags)
    with_, without = (ltnorm(f"compare --json {flag}").out for flag in ("--published", ""))
    assert json.loads(with_)["rows"] == json.loads(without)["rows"]
    [block] = json.loads(with_)["blocks"]
    assert {p["all"] for p in block["published"]} == {70.36, 71.95}
    shown = ltnorm("compare --published").out
    assert "70.36" in shown
    assert "arXiv 1906.07413" in shown


def test_published_numbers_that_belong_nowhere_are_told(ltnorm, tree):
    assert "no published number" in ltnorm("compare --published").err


def test_help_starts_without_what_statistics_need():
    code = (
        "import sys; from ltnorm.cli import main; main(['compare', '--help']);"
        "print([m for m in ('numpy', 'scipy', 'pandas', 'torch', 'matplotlib')"
        " if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--fail-below" in done.stdout
    assert done.stderr.strip() == "[]"
