import csv
import dataclasses
import io
import json
import statistics

import pytest
import rich.console

from ltnorm import resolve as recipes
from ltnorm.errors import LtnormError, NothingFound, UsageError
from ltnorm.reporting import schema, tables
from ltnorm.reporting.compare import compare, load
from ltnorm.resolve import Overrides


def result(norm="bn", seed=0, tail=10.0, all_=50.0, sets=(), flags=None, **changes):
    """A made-up result row of a real recipe."""
    [recipe] = recipes.resolve({}, Overrides(flags or {}, sets, [norm], [seed]))
    row = schema.Result(
        schema=schema.SCHEMA,
        fingerprint=recipe.fingerprint(),
        dataset=recipe.dataset.name,
        profile="exp",
        ratio=recipe.dataset.ratio,
        data_seed=0,
        set_id=f"synthetic-exp{recipe.dataset.ratio:g}",
        index_sha256="ab",
        model="resnet32",
        norm=norm,
        norm_options=", ".join(s.removeprefix("norm.") for s in sets if s.startswith("norm.")),
        loss=recipe.loss.name,
        loss_options=recipe.loss.changes(),
        sampler=recipe.sampler.name,
        retrain=recipe.retrain.method if recipe.retrain else None,
        tau=None,
        first_stage=None,
        tag=None,
        seed=seed,
        epochs=200.0,
        steps=19400,
        batch_size=128,
        lr=recipe.train.lr,
        precision="fp32",
        eval_split="test",
        group_scheme="shots",
        head_classes=4,
        medium_classes=3,
        tail_classes=3,
        all=all_,
        head=80.0,
        medium=40.0,
        tail=tail,
        macro_f1=45.0,
        gmean=30.0,
        worst_class=1.0,
        nll=1.5,
        ece=20.0,
        train_loss=0.1,
        parameters=464154,
        images_processed=2_400_000,
        images_backpropagated=2_400_000,
        train_seconds=100.0,
        images_per_second=1000.0,
        device="cpu",
        torch="2.11.0",
        ltnorm="0.1.0",
        finished="2026-01-01T00:00:00+00:00",
        settings=schema.settings_json(recipe),
    )
    return dataclasses.replace(row, **changes)


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
    assert compound.delta["tail"] == pytest.approx(2)
    assert compound.delta["all"] == pytest.approx(0)
    assert compound.relative_time == pytest.approx(1.5)


def test_one_seed_has_no_spread():
    [block] = compare([result()])
    assert block.rows[0].std["tail"] is None
    assert "1 seed: no spread" in tables.legend(block)
    assert "±" not in tables._cells(block)[1][0][2]


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
    assert tables._cells(block)[1][0][5] == "–"
    [record] = json.loads(tables.as_json([block]))["rows"]
    assert record["tail_mean"] is None


def test_baseline_by_label_or_none():
    three, four = (result("compound", sets=[f"norm.components={k}"]) for k in (3, 4))
    [block] = compare([three, four])
    assert block.baseline is None
    assert block.rows[0].delta == {}
    [block] = compare([three, four], baseline="compound (components=4)")
    assert [row.is_baseline for row in block.rows] == [False, True]
    [block] = compare([three, four], baseline="compound")  # two rows have that norm
    assert block.baseline is None
    [block] = compare([three, result("gn")], baseline="compound")  # only one has it
    assert block.baseline == "compound (components=3)"


def test_times_of_different_devices_have_no_ratio():
    [block] = compare([result(), result("gn", device="GPU", train_seconds=1.0)])
    assert block.rows[1].relative_time is None
    assert "trained on GPU, cpu" in tables.legend(block)


def test_unpaired_seeds_are_told():
    [block] = compare([result(seed=0), result("gn", seed=7)])
    assert "different seeds" in tables.legend(block)
    [block] = compare([result(seed=0), result("gn", seed=0)])
    assert "different seeds" not in tables.legend(block)


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
    blocks = compare(runs, metrics=["tail", "nll"])
    markdown = tables.markdown(blocks)
    assert "| bn | 3 | 11.0 ± 1.0 | 1.500 ± 0.000 | – | – |" in markdown
    assert "| gn | 1 | 14.0 | 1.500 | +0.0 | +3.0 |" in markdown
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(blocks))))
    assert [float(row["tail_mean"]) for row in rows] == [11, 14]
    assert rows[0]["seeds"] == "0 1 2"
    records = json.loads(tables.as_json(blocks))["rows"]
    assert records[1]["tail_delta"] == 3.0


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_number_is_cut_on_a_narrow_terminal(width):
    runs = [result(seed=s, tail=10.0 + s) for s in range(3)] + [result("compound", seed=1)]
    console = rich.console.Console(width=width, file=io.StringIO())
    console.print(tables.table(compare(runs), width))
    shown = console.file.getvalue()
    for cell in ("compound", "11.0 ± 1.0", "464k", "2.4M", "100 s (1.00x)", "Δ tail"):
        assert cell in shown
    assert max(map(len, shown.splitlines())) <= width
    assert shown.count("norm ") == {60: 3, 80: 2, 200: 1}[width]


def test_a_long_label_is_folded_not_the_numbers():
    sets = ["norm.components=4", "norm.temperature=0.5", "norm.assign=position"]
    console = rich.console.Console(width=100, file=io.StringIO())
    console.print(tables.table(compare([result(), result("compound", sets=sets)]), 100))
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
    assert [r.all for r in results] == [10.0]
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
    assert [r.seed for r in results] == [ord("d")]
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
