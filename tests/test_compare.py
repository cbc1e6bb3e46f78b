import csv
import dataclasses
import io
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import rich.console
import scipy.stats
from made import result, write_run

from ltnorm import resolve as recipes
from ltnorm.errors import LtnormError, NothingFound, UsageError
from ltnorm.reporting import bootstrap, export, labels, schema, sheets, views, wording
from ltnorm.reporting import compare as comparing
from ltnorm.reporting.compare import Question
from ltnorm.reporting.load import frame, load
from ltnorm.reporting.schema import Run
from ltnorm.resolve import Overrides


def compare(results, **question):
    """Blocks of made-up results, each in a directory of its own."""
    runs = [Run(r, Path(f"results/{i}/seed{r.seed}")) for i, r in enumerate(results)]
    return comparing.compare(runs, Question(over_images=(), **question))


def test_seeds_are_averaged_with_the_sample_deviation_and_deltas_to_the_baseline():
    tails = [10.0, 12.0, 17.0]
    runs = [result(seed=i, tail=t) for i, t in enumerate(tails)]
    runs += [
        result("compound", seed=i, tail=t + 2, train_seconds=150.0) for i, t in enumerate(tails)
    ]
    [block] = compare(runs)
    bn, compound = block.rows
    assert (bn.label, bn.is_baseline, bn.n, bn.seeds) == ("bn", True, 3, [0, 1, 2])
    assert bn.mean["tail"] == pytest.approx(13)
    assert bn.std["tail"] == pytest.approx(statistics.stdev(tails))
    assert compound.deltas["tail"].estimate.delta == pytest.approx(2)
    assert compound.deltas["all"].estimate.delta == pytest.approx(0)
    assert bn.deltas == {}
    assert compound.relative_time == pytest.approx(1.5)


def test_one_seed_has_no_spread():
    [block] = compare([result()])
    assert block.rows[0].std["tail"] is None
    assert "1 seed: no spread" in wording.legend([block])
    assert "±" not in sheets.of_blocks([block])[0].rows[0][2]


def test_rows_are_fingerprints_labelled_by_what_differs():
    runs = [
        result("compound", sets=["norm.dual_path=false"]),
        result("compound"),
        result("compound", seed=1),
        result("bn"),
    ]
    [block] = compare(runs)
    assert [(row.label, row.n) for row in block.rows] == [
        ("bn", 1),
        ("compound", 2),
        ("compound (dual_path=false)", 1),
    ]


def test_fingerprints_that_look_alike_are_not_merged():
    runs = [result("compound", all_=20.0), result("compound", all_=80.0, fingerprint="f" * 64)]
    [block] = compare(runs)
    assert [row.n for row in block.rows] == [1, 1]
    assert len({row.label for row in block.rows}) == 2
    assert "compound [ffffff]" in [row.label for row in block.rows]


def test_blocks_share_everything_but_the_norm():
    runs = [
        result(flags={"dataset.ratio": 10}),
        result("compound", flags={"dataset.ratio": 10}),
        result(),
        result(flags={"train.lr": 0.2}),
        result(index_sha256="cd"),
        result(group_scheme="thirds"),
    ]
    blocks = compare(runs)
    assert sorted(len(block.rows) for block in blocks) == [1, 1, 1, 1, 2]
    titles = [block.title for block in blocks]
    assert any("train.lr 0.2" in title for title in titles)
    assert any("synthetic-exp10 " in title for title in titles)


def test_a_second_on_another_device_is_another_budget():
    flags = {"train.seconds": 60.0}
    runs = [result(seed=0, flags=flags), result(seed=1, flags=flags, device="H100")]
    titles = [block.title for block in compare(runs)]
    assert [title.split(" · ")[3] for title in titles] == [
        "60 seconds on H100",
        "60 seconds on cpu",
    ]
    steps = [result(seed=0), result(seed=1, device="H100")]
    assert len(compare(steps)) == 1


def test_runs_of_one_seed_on_two_devices_are_two_by_the_clock_alone(tmp_path):
    for i, flags in enumerate(({"train.seconds": 60.0}, {"train.steps": 60})):
        for device in ("cpu", "H100"):
            (tmp_path / f"{i}" / device).mkdir(parents=True)
            schema.write_result(tmp_path / f"{i}" / device, result(flags=flags, device=device))
    assert len(load([tmp_path / "0"])[0]) == 2
    assert len(load([tmp_path / "1"])[0]) == 1


def test_titles_tell_losses_samplers_budgets_and_second_stages():
    def title(**flags):
        [block] = compare([result(flags=flags)])
        return block.title.removeprefix("synthetic-exp100 · resnet32 · ")

    assert title() == "ce · 200 epochs"
    flags = {"loss.name": "ldam", "loss.schedule": "drw", "sampler.name": "sqrt", "train.steps": 10}
    assert title(**flags) == "ldam (schedule=drw) · sampler sqrt · 10 steps"
    assert title(**{"retrain.method": "crt"}) == "ce · 200 epochs · then crt, norms frozen"
    assert title(**{"retrain.method": "ncm"}) == "ce · 200 epochs · then ncm"


def test_what_differs_is_told_with_its_default():
    runs = [
        result(flags={"retrain.method": "crt"}),
        result(flags={"retrain.method": "crt", "retrain.epochs": 5}),
        result(flags={"retrain.method": "crt", "train.optimizer": "sam"}),
    ]
    titles = " ".join(block.title for block in compare(runs))
    assert "retrain.epochs 10" in titles
    assert "retrain.epochs 5" in titles
    assert "train.optimizer sgd" in titles
    assert "default" not in titles


def test_a_tag_shows_in_its_own_block_alone():
    blocks = compare([result(), result(tag="t1", flags={"tag": "t1"})])
    assert sorted("tag" in block.title for block in blocks) == [False, True]
    assert not any("nan" in block.title for block in blocks)


def test_an_empty_group_stays_empty():
    [block] = compare([result(tail=None, seed=s) for s in range(2)])
    assert block.rows[0].mean["tail"] is None
    assert sheets.of_blocks([block])[0].rows[0][5] == "–"
    [record] = json.loads(export.as_json([block]))["rows"]
    assert record["tail_mean"] is None


def test_baseline_by_label_or_none():
    three, four = (result("compound", sets=[f"norm.components={k}"]) for k in (3, 4))
    [block] = compare([three, four])
    assert block.baseline is None
    assert block.rows[0].deltas == {}
    [block] = compare([three, four], baseline="compound (components=4)")
    assert [row.is_baseline for row in block.rows] == [False, True]
    [block] = compare([three, four], baseline="compound")  # two rows have that norm
    assert block.baseline is None
    [block] = compare([three, result("gn")], baseline="compound")  # only one has it
    assert block.baseline == "compound (components=3)"


def test_baseline_by_parts_of_the_label():
    keys = ("norm", "train.lr", "train.epochs")
    runs = [
        result(norm, flags={"loss.name": loss, "train.lr": lr, "train.epochs": epochs})
        for norm in ("bn", "gn")
        for loss, lr in (("ce", 0.4), ("ldam", 0.8))
        for epochs in (5, 6)
    ]
    blocks = compare(runs, by=keys, baseline="bn · epochs 6")
    assert {b.baseline for b in blocks} == {f"bn · lr {lr} · epochs 6" for lr in (0.4, 0.8)}
    # Not one row alone: two of a block have "epochs 6", two "bn", and none "epochs".
    for several in ("epochs 6", "bn", "epochs", "bn · epochs 6 · gn"):
        assert all(b.baseline is None for b in compare(runs, by=keys, baseline=several))


def test_times_of_different_devices_have_no_ratio():
    [block] = compare([result(), result("gn", device="GPU", train_seconds=1.0)])
    assert block.rows[1].relative_time is None
    assert "Device: cpu (bn); GPU (gn)." in wording.footnotes(block)


def test_unpaired_seeds_are_told():
    [block] = compare([result(seed=0), result("gn", seed=7)])
    assert "Seeds: 0 (bn); 7 (gn)." in wording.footnotes(block)
    [block] = compare([result(seed=0), result("gn", seed=0)])
    assert wording.footnotes(block) == []


def test_sorting_puts_the_best_first_and_knows_what_is_better():
    runs = [
        result("bn", tail=5.0, nll=1.0),
        result("gn", tail=None, nll=3.0),
        result("split", nll=2.0),
    ]
    [block] = compare(runs, sort="tail")
    assert [row.label for row in block.rows] == ["split", "bn", "gn"]
    [block] = compare(runs, sort="nll")
    assert [row.label for row in block.rows] == ["bn", "split", "gn"]
    with pytest.raises(UsageError) as error:
        compare(runs, sort="tial")
    assert "did you mean 'tail'" in error.value.hint


def test_every_format_tells_the_same_numbers():
    runs = [result(seed=s, tail=10.0 + s) for s in range(3)] + [result("gn", tail=14.0)]
    blocks = compare(runs, metrics=("tail", "nll"))
    markdown = export.markdown(sheets.of_blocks(blocks))
    assert "| bn | 3 | 11.0 ± 1.0 | 1.500 ± 0.000 | – | – |" in markdown
    assert "| gn | 1 | 14.0 | 1.500 | +3.0 | +0.000 |" in markdown
    rows = list(csv.DictReader(io.StringIO(export.as_csv(export.records(blocks)))))
    assert [float(row["tail_mean"]) for row in rows] == [11, 14]
    assert rows[0]["seeds"] == "0 1 2"
    records = json.loads(export.as_json(blocks))["rows"]
    assert records[1]["tail_delta"] == 3.0


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_number_is_cut_on_a_narrow_terminal(width):
    runs = [result(seed=s, tail=10.0 + s) for s in range(3)] + [result("compound", seed=1)]
    console = rich.console.Console(width=width, file=io.StringIO())
    console.print(export.table(sheets.of_blocks(compare(runs)), width))
    shown = console.file.getvalue()
    for cell in ("compound", "11.0 ± 1.0", "464k", "2.4M", "100 s (1.00x)", "Δ tail"):
        assert cell in shown
    assert max(map(len, shown.splitlines())) <= width
    assert shown.count("norm ") == {60: 3, 80: 2, 200: 1}[width]


def test_a_long_label_is_folded_not_the_numbers():
    sets = ["norm.components=4", "norm.temperature=0.5", "norm.assign=position"]
    console = rich.console.Console(width=100, file=io.StringIO())
    [block] = compare([result(), result("compound", sets=sets)])
    console.print(export.table(sheets.of_blocks([block]), 100))
    shown = console.file.getvalue()
    assert shown.count("norm ") == 2
    assert "assign=position" in shown
    assert "2.4M" in shown


def test_a_result_survives_the_disk(tmp_path):
    row = result(tail=None, all_=100 / 3)
    schema.write_result(tmp_path, row)
    assert schema.read_result(tmp_path / schema.RESULT) == row
    assert [p.name for p in tmp_path.iterdir()] == [schema.RESULT]


def test_the_same_run_found_twice_counts_once(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        schema.write_result(tmp_path / place, result())
    results, problems = load([tmp_path, tmp_path / "a"])
    assert (len(results), problems) == (1, [])


def test_two_runs_that_contradict_are_told(tmp_path):
    for place, accuracy in (("a", 10.0), ("b", 90.0)):
        (tmp_path / place).mkdir()
        schema.write_result(tmp_path / place, result(all_=accuracy))
    results, warnings = load([tmp_path])
    assert [run.result.all for run in results] == [10.0]
    assert "other numbers" in warnings[0]


@pytest.mark.parametrize("settings", ["5", "[]", "null", "{}", '{"norm": 3}', "{"])
def test_settings_of_another_shape_are_refused(tmp_path, settings):
    schema.write_result(tmp_path, result(settings=settings))
    with pytest.raises(LtnormError, match="damaged"):
        schema.read_result(tmp_path / schema.RESULT)


def test_numbers_that_are_none_are_refused(tmp_path):
    schema.write_result(tmp_path, result(all_=float("nan")))
    with pytest.raises(LtnormError, match="not a finite number"):
        schema.read_result(tmp_path / schema.RESULT)


def test_bad_files_are_told_and_the_rest_is_compared(tmp_path):
    for place in "abcd":
        (tmp_path / place).mkdir()
        schema.write_result(tmp_path / place, result(seed=ord(place)))
    text = (tmp_path / "a" / schema.RESULT).read_text()
    (tmp_path / "a" / schema.RESULT).write_text(text.replace("\n2,", "\n7,", 1))
    (tmp_path / "b" / schema.RESULT).write_text(text.splitlines()[0] + "\n2,2\n")
    (tmp_path / "c" / schema.RESULT).write_bytes(b"\xff\xfe\x00")
    results, problems = load([tmp_path])
    assert [run.result.seed for run in results] == [ord("d")]
    assert len(problems) == 3
    assert any("schema 7" in p for p in problems)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "schema,fingerprint\n1,x\n"])
def test_nothing_readable_is_an_error(tmp_path, text):
    (tmp_path / schema.RESULT).write_text(text)
    with pytest.raises(LtnormError) as error:
        load([tmp_path])
    assert error.value.exit_code == 1


def test_nothing_found_is_told(tmp_path):
    with pytest.raises(NothingFound):
        load([tmp_path])
    with pytest.raises(NothingFound, match="no such"):
        load([tmp_path / "nowhere"])


def test_two_recipes_never_share_a_directory(tmp_path):
    made = [
        recipes.resolve({}, Overrides(sets=sets, norms=["compound"], seeds=[seed]))[0]
        for sets in ([], ["norm.dual_path=false"], ["train.lr=0.2"])
        for seed in (0, 1)
    ]
    directories = [schema.run_directory(recipe, tmp_path) for recipe in made]
    assert len(set(directories)) == 6
    assert directories[0].parent.name == "resnet32-compound-ce"
    assert directories[2].parent.name == f"resnet32-compound-ce-{made[2].fingerprint()[:6]}"
    # The same again, in another order, gives the same places.
    assert [schema.run_directory(r, tmp_path) for r in reversed(made)] == directories[::-1]


def test_a_run_stays_where_it_is_though_a_shorter_name_becomes_free(tmp_path):
    first, second = (
        recipes.resolve({}, Overrides(sets=sets, norms=["bn"]))[0]
        for sets in ([], ["train.lr=0.7"])
    )
    plain, own = (schema.run_directory(recipe, tmp_path) for recipe in (first, second))
    shutil.rmtree(plain.parent)
    for claim in (False, True):
        assert schema.run_directory(second, tmp_path, claim=claim) == own
    assert schema.run_directory(first, tmp_path) == plain


def test_a_tree_without_marks_still_belongs_to_its_results(tmp_path):
    ours, other = (
        recipes.resolve({}, Overrides(sets=sets, norms=["bn"]))[0]
        for sets in ([], ["train.lr=0.7"])
    )
    directory = schema.run_directory(ours, tmp_path)
    directory.mkdir()
    schema.write_result(directory, result())
    (directory.parent / schema.OWNER).unlink()
    assert schema.run_directory(other, tmp_path) != directory
    assert schema.run_directory(ours, tmp_path) == directory


def seeds(norm, tails, **changes):
    return [result(norm, seed=i, tail=t, **changes) for i, t in enumerate(tails)]


def test_the_same_seeds_are_paired_and_others_are_not():
    base = seeds("bn", [10.0, 20.0, 30.0])
    same = seeds("gn", [11.0, 21.5, 31.0])
    more = seeds("split", [11.0, 21.5, 31.0, 40.0])
    [block] = compare([*base, *same, *more])
    paired, welch = (row.deltas["tail"] for row in block.others)
    differences = scipy.stats.ttest_rel([11.0, 21.5, 31.0], [10.0, 20.0, 30.0])
    assert (paired.paired, welch.paired) == (True, False)
    assert paired.estimate.p == pytest.approx(differences.pvalue)
    assert paired.correlation == pytest.approx(np.corrcoef([11, 21.5, 31], [10, 20, 30])[0, 1])
    independent = scipy.stats.ttest_ind(
        [11.0, 21.5, 31.0, 40.0], [10.0, 20.0, 30.0], equal_var=False
    )
    assert welch.estimate.p == pytest.approx(independent.pvalue)
    # The Welch interval of the paired row is there as well, and far wider.
    assert paired.welch.high - paired.welch.low > 10 * (paired.estimate.high - paired.estimate.low)


def test_the_family_is_the_tail_of_the_rows_with_enough_seeds():
    base = seeds("bn", [10.0, 12.0, 14.0])
    better = seeds("gn", [20.0, 22.1, 23.9])
    few = seeds("split", [20.0, 22.1])
    wide = seeds("compound", [9.0, 13.0, 16.0])
    [block] = compare([*base, *better, *few, *wide])
    by_name = {row.name: row.deltas["tail"] for row in block.others}
    assert by_name["split"].adjusted_p is None
    assert by_name["gn"].adjusted_p == pytest.approx(2 * by_name["gn"].estimate.p)
    assert [name for name, delta in by_name.items() if delta.marked] == ["gn"]
    assert all(row.deltas["all"].adjusted_p is None for row in block.others)
    # In a family of its own the same row has its own p.
    [block] = compare([*base, *better])
    assert block.rows[1].deltas["tail"].adjusted_p == block.rows[1].deltas["tail"].estimate.p


@pytest.mark.parametrize("n", [1, 2])
def test_nothing_is_marked_below_three_seeds(n):
    far = seeds("gn", [90.0, 90.1, 90.2])
    for base, other in ((seeds("bn", [1.0, 1.1, 1.2][:n]), far), (seeds("bn", [1.0] * 3), far[:n])):
        [block] = compare([*base, *other])
        assert not any(delta.marked for row in block.rows for delta in row.deltas.values())
        assert "not judged" in wording.outcome(block)
        assert "*" not in sheets.of_blocks([block])[0].rows[1][7]


def test_the_outcome_is_told_in_words():
    base = seeds("bn", [10.0, 12.0, 14.0])
    better = seeds("gn", [20.0, 22.1, 23.9])
    worse = seeds("split", [5.0, 7.1, 8.9])
    open_ = seeds("compound", [9.0, 13.0, 16.0])
    [block] = compare([*base, *better, *worse, *open_])
    told = wording.outcome(block)
    needed = block.rows[-1].deltas["tail"].seeds_needed
    assert told.startswith("Tail accuracy against bn: higher with gn (+10.0 points, [")
    assert "lower with split (-5.0 points, [" in told
    assert "no difference that 3 seeds can show with compound" in told
    assert needed > 3
    assert f"one of 1 point would take about {needed} seeds" in told


def test_a_row_that_differs_by_nothing_needs_no_seeds():
    runs = [*seeds("bn", [0.0, 0.0, 0.0]), *seeds("gn", [0.0, 0.0, 0.0])]
    [block] = compare(runs)
    estimate = block.rows[1].deltas["tail"].estimate
    assert (estimate.low, estimate.high, estimate.p) == (0, 0, 1)
    assert wording.outcome(block).endswith("no difference that 3 seeds can show with gn.")


@pytest.mark.parametrize(
    ("by", "flag", "values", "called"),
    [
        ("loss", "loss.name", ["ce", "ldam"], ["ce", "ldam"]),
        ("ratio", "dataset.ratio", [10.0, 50.0, 100.0], ["ratio 10", "ratio 50", "ratio 100"]),
        ("model", "model.name", ["resnet8", "resnet32"], ["resnet8", "resnet32"]),
        ("train.lr", "train.lr", [0.1, 0.4], ["lr 0.1", "lr 0.4"]),
        ("sampler", "sampler.name", ["instance", "sqrt"], ["instance", "sqrt"]),
    ],
)
def test_rows_differ_in_what_by_says(by, flag, values, called):
    runs = [
        result(norm, flags={flag: value}, index_sha256=str(value) if by == "ratio" else "ab")
        for norm in ("bn", "gn")
        for value in values
    ]
    if by == "model":
        runs = [dataclasses.replace(r, model=v) for r, v in zip(runs, values * 2, strict=True)]
    blocks = compare(runs, by=(labels.key_of(by),))
    assert len(blocks) == 2
    for block, norm in zip(blocks, ("bn", "gn"), strict=True):
        assert sorted(row.label for row in block.rows) == sorted(called)
        assert norm in block.title.split(" · ")
        assert not any(label in block.title.split(" · ") for label in called)


def test_by_several_keys_crosses_them():
    runs = [
        result(norm, flags={"loss.name": loss}) for norm in ("bn", "gn") for loss in ("ce", "ldam")
    ]
    [block] = compare(runs, by=("norm", "loss"))
    assert {row.label for row in block.rows} == {"bn · ce", "bn · ldam", "gn · ce", "gn · ldam"}
    assert block.baseline == "bn · ce"


@pytest.mark.parametrize("name", ["nrom", "seed", "device", "train.lrr", "eval.every", ""])
def test_what_rows_cannot_differ_in_is_refused(name):
    with pytest.raises(UsageError):
        labels.key_of(name)


def test_a_key_that_no_run_has_is_refused():
    with pytest.raises(UsageError, match=r"no run sets norm\.componens"):
        compare([result("compound", sets=["norm.components=3"])], by=("norm.componens",))


def test_the_best_of_a_name_is_kept():
    low, high = ({"train.lr": lr} for lr in (0.1, 0.4))
    runs = [
        *[result("bn", seed=s, all_=50.0 + s, flags=low) for s in range(3)],
        *[result("bn", seed=s, all_=60.0 + s, flags=high) for s in range(3)],
        *[result("gn", seed=s, all_=40.0 + s, tail=70.0 + s / 9, flags=low) for s in range(3)],
        *[result("gn", seed=s, all_=30.0 + s, flags=high) for s in range(3)],
    ]
    [block] = compare(runs, by=("norm", "train.lr"), best_only=True, baseline="bn")
    assert {row.label for row in block.rows} == {"bn · lr 0.4", "gn · lr 0.1"}
    assert block.baseline == "bn · lr 0.4"
    # They were chosen on the test set: nothing may be called a finding.
    assert not any(d.marked for row in block.rows for d in row.deltas.values())
    assert "chosen" in wording.outcome(block)
    held_out = [dataclasses.replace(run, eval_split="val") for run in runs]
    [block] = compare(held_out, by=("norm", "train.lr"), best_only=True, baseline="bn")
    # Validation images on which rows were chosen are no better.
    assert not block.rows[1].deltas["tail"].marked
    assert "run what was chosen on the test set" in wording.outcome(block)


def test_missing_seeds_are_told_with_their_place():
    runs = [*seeds("bn", [1.0, 2.0, 3.0]), result("gn", seed=1)]
    blocks = compare(runs)
    there = [run for block in blocks for row in block.rows for run in row.runs]
    [line] = wording.missing_seeds(blocks, there)
    assert line.startswith("gn lacks seeds 0, 2, of synthetic-exp100")
    assert line.endswith("results/3/seed0, …")
    # A line a block, however many rows.
    several = [*runs, *(result(norm, seed=1) for norm in ("ln", "split", "compound", "brn"))]
    [line] = wording.missing_seeds(compare(several), there)
    assert "gn, ln, brn and 2 more lack seeds that others have, of synthetic" in line
    assert list(wording.missing_seeds(compare(seeds("bn", [1.0, 2.0])), [])) == []
    # What is there and was only not selected is not missing.
    left_out = [Run(result("gn", seed=seed), Path()) for seed in (0, 2)]
    assert list(wording.missing_seeds(blocks, [*there, *left_out])) == []


def test_titles_sort_by_their_numbers():
    runs = [result(flags={"dataset.ratio": r}) for r in (100.0, 50.0, 10.0)]
    assert [block.first.ratio for block in compare(runs)] == [10, 50, 100]


def test_the_pivot_has_a_block_a_value():
    runs = [
        result(norm, seed=s, tail=r / 10 + s, flags={"dataset.ratio": r}, index_sha256=str(r))
        for norm in ("bn", "gn")
        for r in (10.0, 50.0, 100.0)
        for s in range(2)
        if not (norm == "gn" and r == 50)
    ]
    [pivot] = views.pivot(compare(runs), "dataset.ratio")
    assert pivot.values == ["ratio 10", "ratio 50", "ratio 100"]
    assert "ratio" not in pivot.title
    [sheet] = [s for s in sheets.of_pivots([pivot]) if s.title.endswith("tail")]
    assert sheet.headings == ["norm \\ ratio", "ratio 10", "ratio 50", "ratio 100"]
    assert [row[0] for row in sheet.rows] == ["bn", "gn"]
    assert [row[2] for row in sheet.rows] == ["5.5 ± 0.7", "–"]
    assert sheet.rows[1][3] == "10.5 ± 0.7 (+0.0)"


def test_classes_are_averaged_over_seeds_and_told_from_the_baseline(tmp_path):
    runs = [
        write_run(tmp_path, result(norm, seed=s, tail=10.0 + s + (norm == "gn")))
        for norm in ("bn", "gn")
        for s in range(3)
    ]
    [block] = comparing.compare(runs, Question(over_images=()))
    table, warnings = views.per_class(block)
    assert warnings == []
    [sheet] = [sheets.of_classes(table)]
    assert sheet.headings[4:] == ["bn (n=3)", "gn (n=3)", "Δ gn"]
    assert sheet.rows[9] == ["9", "class 9", "5", "tail", "11.0 ± 1.0", "12.0 ± 1.0", "+1.0"]
    (runs[4].directory / "per_class.csv").unlink()
    table, warnings = views.per_class(block)
    assert str(runs[4].directory) in warnings[0]
    assert table.accuracy["gn"][9].mean == pytest.approx(12)  # of seeds 0 and 2


def test_the_runs_are_a_data_frame(tmp_path):
    rows = [result(norm, seed=s, tail=s) for norm in ("bn", "gn") for s in range(2)]
    made = [write_run(tmp_path, row) for row in rows]
    runs = frame(tmp_path)
    assert set(runs["directory"]) == {str(run.directory) for run in made}
    assert runs.groupby("norm")["tail"].mean().to_dict() == {"bn": 0.5, "gn": 0.5}
    assert runs["retrain"].isna().all()


def test_the_fewer_seeds_of_both_are_what_a_row_shows():
    runs = [*seeds("bn", [10.0, 12.0, 14.5]), *seeds("gn", [10.0, 13.0, 12.0, 11.0, 14.0])]
    [block] = compare([*runs, result("split", seed=0, tail=11.0), result("frn", tail=None)])
    told = wording.outcome(block)
    assert "no difference that 3 seeds can show with gn" in told
    assert "split is not judged (1 seed has no spread)" in told
    assert "frn is without a tail" in told


def test_each_side_has_its_own_groups(tmp_path, monkeypatch):
    """Where rows differ in their images, a class may be of the tail in one alone."""
    asked = []
    monkeypatch.setattr(bootstrap, "class_weights", lambda metric, groups, _: asked.append(groups))
    runs = [write_run(tmp_path, result(norm)) for norm in ("bn", "gn")]
    rows = schema.read_per_class(runs[1].directory / schema.PER_CLASS)
    others = [dataclasses.replace(row, group="medium") for row in rows]
    schema.write_per_class(runs[1].directory, others)
    comparing.compare(runs, Question(over_images=("tail",)))
    assert sorted(map(len, map(set, asked))) == [1, 3]


def test_a_second_on_two_devices_is_never_averaged():
    flags = {"train.seconds": 60.0}
    runs = [result(seed=0, flags=flags), result(seed=1, flags=flags, device="H100")]
    blocks = compare(runs, by=("train.seconds",))
    assert [row.n for block in blocks for row in block.rows] == [1, 1]


def test_blocks_of_other_images_have_titles_and_columns_of_their_own():
    runs = [result(index_sha256=sha) for sha in ("aaaaaaaa", "bbbbbbbb")]
    runs.append(result(group_scheme="thirds", index_sha256="aaaaaaaa"))
    blocks = compare(runs)
    assert len({block.title for block in blocks}) == 3
    [pivot] = views.pivot(blocks, "dataset.ratio")
    assert len(set(pivot.values)) == 3


def test_numbers_sort_by_their_value():
    names = ["lr 0.1", "lr 1e-05", "lr 0.01", "ratio 100", "ratio 20", "lr 1"]
    expected = ["lr 1e-05", "lr 0.01", "lr 0.1", "lr 1", "ratio 20", "ratio 100"]
    assert sorted(names, key=labels.natural) == expected


@pytest.mark.parametrize(
    ("section", "called"),
    [
        ("loss", ["ce", "ldam (schedule=drw)"]),
        ("retrain", ["no retrain", "crt epochs 5"]),
        ("tag", ["no tag", "tag t1"]),
    ],
)
def test_sections_are_called_by_what_they_are(section, called):
    changed = {
        "loss": {"loss.name": "ldam", "loss.schedule": "drw"},
        "retrain": {"retrain.method": "crt", "retrain.epochs": 5},
        "tag": {"tag": "t1"},
    }[section]
    runs = [result(), result(flags=changed)]
    assert [labels.called(run, section) for run in runs] == called
