import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rich.text
import yaml

from ltnorm import registry
from ltnorm.console import Output
from ltnorm.reporting import schema
from ltnorm.training import checkpoint
from ltnorm.training import run as running

TINY_BN = "train --recipe tiny.yaml --norm bn"
BN_RUN = "results/synthetic-exp10/resnet8-bn-ce/seed0"
SMALL = "--set dataset.image_size=8"


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_train_eval_compare(ltnorm):
    """The whole path: four norms, a table, the files of a run, the same numbers everywhere."""
    norms = "--norm bn --norm gn --norm split --norm compound"
    trained = ltnorm(f"train --recipe tiny.yaml {norms} --seeds 0,1 --json")
    assert trained.code == 0, trained.err
    runs = json.loads(trained.out)["runs"]
    assert [(r["norm"], r["seed"]) for r in runs] == [
        (norm, seed) for norm in ("bn", "gn", "split", "compound") for seed in (0, 1)
    ]
    assert "epoch 2/2" in trained.err
    for run in runs:
        files = sorted(os.listdir(run["directory"]))
        assert files == [
            "checkpoint.pt",
            "epochs.csv",
            "lock",
            "per_class.csv",
            "predictions.npz",
            "recipe.yaml",
            "result.csv",
        ]
        [row] = rows_of(f"{run['directory']}/result.csv")
        evaluated = ltnorm(f"eval {run['directory']} --json")
        measured = json.loads(evaluated.out)
        for metric in schema.METRICS:
            assert measured[metric] == float(row[metric]) == run[metric], metric
        classes = rows_of(f"{run['directory']}/per_class.csv")
        assert [float(c["accuracy"]) for c in classes] == measured["per_class"]

    compared = ltnorm("compare results --format json")
    rows = json.loads(compared.out)["rows"]
    assert [(r["norm"], r["n"]) for r in rows] == [
        ("bn", 2),
        ("gn", 2),
        ("split", 2),
        ("compound", 2),
    ]
    mean = sum(r["tail"] for r in runs if r["norm"] == "compound") / 2
    assert rows[3]["tail_mean"] == pytest.approx(mean)
    table = ltnorm("compare").out
    for word in ("bn", "compound", "head", "medium", "tail", "Δ tail", "±", "1.00x"):
        assert word in table


def test_a_finished_run_is_skipped_and_force_repeats_it(ltnorm):
    assert ltnorm(TINY_BN).code == 0
    before = os.stat(f"{BN_RUN}/result.csv").st_mtime_ns
    again = ltnorm(TINY_BN)
    assert "is finished" in again.err
    assert BN_RUN in again.out
    assert os.stat(f"{BN_RUN}/result.csv").st_mtime_ns == before
    assert ltnorm(f"{TINY_BN} --force").code == 0
    assert os.stat(f"{BN_RUN}/result.csv").st_mtime_ns > before


def test_two_settings_give_two_rows(ltnorm):
    command = "train --recipe tiny.yaml --norm compound"
    assert ltnorm(command).code == ltnorm(f"{command} --set norm.dual_path=false").code == 0
    rows = json.loads(ltnorm("compare --json").out)["rows"]
    assert [r["label"] for r in rows] == ["compound", "compound (dual_path=false)"]


def test_a_bare_command_prints_help(ltnorm):
    shown = ltnorm("")
    assert shown.code == 0
    assert "compare" in shown.out


def test_the_default_recipe_follows_the_data_set_however_it_is_named(failing):
    for way in ("--dataset cifar10", "--set dataset.name=cifar10"):
        assert "cifar10 is not there" in failing(f"train {way} --quiet", code=2)
    from ltnorm.cli.options import default_recipe

    assert default_recipe(None, ["dataset.name=cifar10"]) == "cifar10-lt"


def test_an_output_that_knows_no_delta(ltnorm, tmp_path):
    ltnorm(TINY_BN)
    done = subprocess.run(
        [sys.executable, "-m", "ltnorm", "compare"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=True,
    )
    assert b"bn" in done.stdout


def test_files_that_cannot_be_read(failing, ltnorm, tmp_path, monkeypatch):
    ltnorm("prepare --recipe tiny.yaml")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("ltnorm.data.prepared.sha256", denied)
    text = failing("prepare --recipe tiny.yaml --quiet", code=1)
    assert "Permission denied" in text
    assert "images.npy" in text


def test_a_run_kept_without_its_checkpoint(failing, ltnorm, tmp_path):
    ltnorm(TINY_BN)
    (tmp_path / BN_RUN / "checkpoint.pt").unlink()
    assert "without its checkpoint" in failing(f"eval {BN_RUN}", code=3)


def test_the_recipe_of_a_run_repeats_it(ltnorm):
    ltnorm("train --recipe tiny.yaml --norm compound --seed 5 --set norm.components=3")
    path = "results/synthetic-exp10/resnet8-compound-ce/seed5"
    assert ltnorm(f"train --recipe {path}/recipe.yaml --out again").code == 0
    first, second = (
        schema.read_result(next(run.result for run in schema.find_runs([Path(out)]) if run.result))
        for out in ("results", "again")
    )
    assert first.fingerprint == second.fingerprint
    for metric in schema.METRICS:
        assert getattr(first, metric) == getattr(second, metric)


def test_the_test_set_is_never_opened_with_eval_split_val(ltnorm, tmp_path):
    assert ltnorm("prepare --recipe tiny.yaml --val 5").code == 0
    [folder] = (tmp_path / "data").iterdir()
    for file in folder.glob("test_*"):
        file.unlink()
    assert ltnorm(f"{TINY_BN} --val 5 --eval-split val").code == 0
    [row] = rows_of(f"{BN_RUN}/result.csv")
    assert row["eval_split"] == "val"
    assert ltnorm(f"eval {BN_RUN} --json").code == 0
    assert ltnorm(f"eval {BN_RUN} --split test").code == 1


def test_prepare_prints_classes_and_is_idempotent(ltnorm):
    first = ltnorm("prepare --recipe tiny.yaml --ratio 5")
    assert first.code == 0
    for word in ("texture-0", "30", "█", "head", "tail", "thirds"):
        assert word in first.out
    assert "written to" in first.err
    second = ltnorm("prepare --recipe tiny.yaml --ratio 5 --json")
    assert "up to date" in second.err
    assert json.loads(second.out)["counts"][0] == 30


def test_eval_prints_groups_and_classes(ltnorm):
    ltnorm(TINY_BN)
    shown = ltnorm(f"eval {BN_RUN}")
    for word in ("macro F1", "G-mean", "worst class", "NLL", "ECE", "texture-3", "medium"):
        assert word in shown.out


@pytest.mark.parametrize("kind", ["norms", "losses", "models", "datasets", "recipes"])
def test_list(ltnorm, kind):
    shown = ltnorm(f"list {kind}")
    assert shown.code == 0
    names = [entry["name"] for entry in json.loads(ltnorm(f"list {kind} --json").out)]
    assert all(name in shown.out for name in names)
    if kind == "norms":
        assert names == list(registry.NORMS)
        entries = json.loads(ltnorm("list norms --json").out)
        assert all(entry["cost"].startswith(("0.", "1.")) for entry in entries)
        assert "ltnorm bench" in shown.out  # what measures the cost elsewhere


def test_compare_formats(ltnorm):
    ltnorm(TINY_BN)
    assert ltnorm("compare --format markdown").out.startswith("**synthetic-exp10")
    assert ltnorm("compare --format csv").out.startswith("block,label,model,norm")
    assert "worst class" in ltnorm("compare --metric worst_class --sort worst_class").out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train --norm compond", ["unknown norm 'compond'", "did you mean 'compound'"]),
        ("train --dataset cifr10", ["unknown dataset", "did you mean 'cifar10'"]),
        ("train --model resnet9", ["unknown model", "resnet8"]),
        ("train --loss cee", ["unknown loss", "did you mean 'ce'"]),
        ("train --recipe quik", ["no recipe 'quik'", "did you mean 'quick'"]),
        ("train --recipe tiny.yaml --set trian.lr=1", ["trian", "did you mean 'train'"]),
        ("train --set train.lrr=1", ["train.lrr", "did you mean 'lr'"]),
        ("train --ratio 0.5", ["dataset.ratio", "greater than or equal to 1"]),
        ("train --ratio nan", ["dataset.ratio", "finite"]),
        ("train --seed -1", ["seed", "-1"]),
        ("train --set train.epochs=1.5", ["train.epochs", "1.5"]),
        (f"train --n-max 501 {SMALL}", ["n_max 501", "at most 500"]),
        (f"train --ratio 1000 {SMALL}", ["empty", "--ratio"]),
        (f"train --val 500 {SMALL}", ["val 500", "--val"]),
        ("train --norm compound --set norm.components=0", ["norm.components", "0"]),
        (f"train --norm compound --set norm.components=11 {SMALL}", ["more than the 10 classes"]),
        ("train --norm bn --set norm.components=2", ["none of the norms", "components"]),
        ("train --eval-split val", ["eval.split", "--val N"]),
        (f"train --batch-size 100000 {SMALL}", ["batch size 100000", "--batch-size"]),
        ("train --seeds 4-0", ["--seeds '4-0'", "0-4"]),
        ("train --device cuda:99", ["cuda:99", "--device cpu"]),
        ("train --set lr", ["--set lr", "key=value"]),
        ("train --nrom bn", ["--nrom", "--help"]),
        ("train --epochs many", ["--epochs", "integer", "--help"]),
        ("trian", ["trian", "--help"]),
        ("compare --format pdf", ["pdf", "--help"]),
        ("train --batch-size 1", ["train.batch_size"]),
        ("train --set norm=gn", ["'norm' is a section", "norm.KEY"]),
        ("train --norm foo --lr -1", ["2 mistakes", "foo", "train.lr"]),
        ("eval nowhere --split dev", ["dev", "test, val"]),
        ("list normz", ["normz"]),
        ("prepare --profile cubic", ["dataset.profile"]),
    ],
)
def test_bad_usage(failing, command, words):
    text = failing(command, code=2)
    for word in words:
        assert word in text


def test_an_empty_class_of_cifar100_is_refused(failing, tmp_path, monkeypatch):
    import numpy as np

    from ltnorm.data import datasets

    def tiny_cifar100(raw):
        labels = np.repeat(np.arange(100), 500)
        images = np.zeros((50000, 1, 1, 3), np.uint8)
        names = [str(i) for i in range(100)]
        part = datasets.Pixels(images, labels)
        return datasets.Source(part, part, names, (0.5,) * 3, (0.5,) * 3, {})

    monkeypatch.setattr(datasets, "cifar100", tiny_cifar100)
    text = failing("prepare --dataset cifar100 --ratio 1000 --quiet", code=2)
    assert "leaves" in text
    assert "of 100 classes empty" in text


def test_a_recipe_with_three_mistakes(failing, tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "train: {epochs: none, batchsize: 3}\nnorm: {name: compound, components: -1}\n"
    )
    text = failing("train --recipe bad.yaml", code=2)
    for word in ("3 mistakes", "train.epochs", "train.batchsize", "norm.components"):
        assert word in text


@pytest.mark.parametrize("content", ["a: [1", "- 1", "just words", "\x00", "train: 3"])
def test_recipes_that_are_no_recipes(failing, tmp_path, content):
    (tmp_path / "bad.yaml").write_text(content)
    failing("train --recipe bad.yaml", code=2)


def test_scientific_notation_in_yaml(ltnorm, tmp_path):
    tiny = (tmp_path / "tiny.yaml").read_text()
    assert "lr: 0.05" in tiny
    (tmp_path / "tiny.yaml").write_text(tiny.replace("lr: 0.05", "lr: 5e-2"))
    assert ltnorm(TINY_BN).code == 0
    assert yaml.safe_load(Path(f"{BN_RUN}/recipe.yaml").read_text())["train"]["lr"] == 0.05


def test_missing_data_tells_the_command_that_fetches_it(failing, ltnorm):
    text = failing("prepare --dataset cifar10 --no-download", code=2)
    assert "`ltnorm prepare --dataset cifar10`" in text
    text = failing("train --dataset cifar10 --quiet", code=2).splitlines()
    assert "`ltnorm prepare --dataset cifar10`" in text[1]


def test_a_damaged_prepared_set(failing, ltnorm, tmp_path):
    ltnorm("prepare --recipe tiny.yaml")
    [file] = (tmp_path / "data").glob("*/train_images.npy")
    file.write_bytes(file.read_bytes()[:-1])
    for command in ("prepare --recipe tiny.yaml --quiet", f"{TINY_BN} --quiet"):
        text = failing(command, code=1)
        assert "train_images.npy" in text
        assert "--force" in text
    assert ltnorm("prepare --recipe tiny.yaml --force").code == 0
    assert ltnorm(TINY_BN).code == 0


def test_damaged_checkpoints_and_missing_runs(failing, ltnorm, tmp_path):
    assert "no checkpoint" in failing("eval results/none", code=3)
    ltnorm(TINY_BN)
    checkpoint = tmp_path / BN_RUN / "checkpoint.pt"
    content = checkpoint.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no checkpoint"):
        checkpoint.write_bytes(damaged)
        assert "damaged" in failing(f"eval {BN_RUN}", code=1)


def test_results_of_another_schema(failing, ltnorm, tmp_path):
    ltnorm(TINY_BN)
    file = tmp_path / BN_RUN / "result.csv"
    file.write_text(file.read_text().replace("schema,", "schema,added,").replace("\n2,", "\n9,x,"))
    assert "schema 9" in failing("compare results", code=1)


def test_nothing_to_compare(failing, tmp_path):
    (tmp_path / "results").mkdir()
    assert "ltnorm train" in failing("compare results", code=3)
    assert "ltnorm train" in failing("compare nowhere", code=3)


def test_a_baseline_that_is_not_there(failing, ltnorm):
    ltnorm("train --recipe tiny.yaml --norm gn")
    assert "--baseline takes gn" in ltnorm("compare").err
    assert "did you mean 'gn'" in failing("compare --baseline gnn", code=2)
    assert ltnorm("compare --baseline gn").err == ""


def test_odd_places(failing, ltnorm, tmp_path):
    for place in ("a[red] [/b] c", "r:cat:"):
        answer = ltnorm("train --recipe tiny.yaml --norm bn --out", place)
        assert answer.code == 0
        assert f"{place}/synthetic-exp10/resnet8-bn-ce/seed0" in answer.out
    assert '"r:cat:/' in ltnorm("train --recipe tiny.yaml --norm bn --json --out", "r:cat:").out
    assert failing(TINY_BN, "--out", "x" * 300, code=2)
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "synthetic-exp10").write_text("a file")
    answer = ltnorm(f"{TINY_BN} --out blocked")
    assert answer.code == 1
    assert "error: cannot use blocked/synthetic-exp10" in answer.err


def test_a_result_of_other_settings_is_never_taken_for_this_run(ltnorm, tmp_path):
    ltnorm(TINY_BN)
    before = (tmp_path / BN_RUN / "result.csv").read_text()
    (tmp_path / BN_RUN).parent.joinpath("fingerprint").unlink()
    answer = ltnorm(f"{TINY_BN} --lr 0.07 --json")
    assert json.loads(answer.out)["runs"][0]["lr"] == 0.07
    assert (tmp_path / BN_RUN / "result.csv").read_text() == before


def test_a_failed_repetition_keeps_the_old_result(ltnorm, tmp_path, monkeypatch):
    ltnorm(TINY_BN)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "fit", interrupted)
    answer = ltnorm(f"{TINY_BN} --force")
    assert answer.code == 130
    assert "without it, earlier results are kept" in answer.err
    assert schema.read_result(tmp_path / BN_RUN / "result.csv")


def test_places_that_cannot_be_written(failing, tmp_path):
    (tmp_path / "results").write_text("a file")
    assert "is a file" in failing(TINY_BN, code=2)
    assert "is not a result" in failing("compare results", code=1)
    (tmp_path / "below").write_text("a file")
    assert "not writable" in failing(f"{TINY_BN} --out below/results", code=2)
    assert "--data-dir" in failing(f"{TINY_BN} --out o --data-dir below/data --quiet", code=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(failing, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "not writable" in failing(f"{TINY_BN} --out locked", code=2)


def test_a_full_disk_in_the_middle_keeps_finished_runs(failing, ltnorm, tmp_path, monkeypatch):
    ltnorm(TINY_BN)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_bytes", full)
    text = failing("train --recipe tiny.yaml --norm gn --quiet", code=1)
    assert "No space left" in text
    assert (tmp_path / BN_RUN / "result.csv").exists()
    assert len([run.result for run in schema.find_runs([tmp_path / "results"]) if run.result]) == 1


def test_divergence_ends_one_run_and_the_others_go_on(ltnorm, monkeypatch):
    fit = running.fit

    def fit_gn_diverges(objective, loader, train, progress, **more):
        if "gn" in progress.label:
            train = train.model_copy(update={"lr": 1e30})
        return fit(objective, loader, train, progress, **more)

    monkeypatch.setattr(running, "fit", fit_gn_diverges)
    answer = ltnorm("train --recipe tiny.yaml --norm bn --norm gn --norm compound")
    assert answer.code == 1
    assert "epoch" in answer.err.splitlines()[-2]
    assert "--lr" in answer.err.splitlines()[-1]
    assert BN_RUN in answer.out
    assert "compound" in answer.out


def test_ctrl_c_keeps_finished_runs_and_says_how_to_go_on(ltnorm, monkeypatch):
    fit = running.fit

    def interrupted(objective, loader, train, progress, **more):
        if "gn" in progress.label:
            raise KeyboardInterrupt
        return fit(objective, loader, train, progress, **more)

    monkeypatch.setattr(running, "fit", interrupted)
    answer = ltnorm("train --recipe tiny.yaml --norm bn --norm gn")
    assert answer.code == 130
    assert "1 of 2 runs finished" in answer.err
    assert "same command" in answer.err
    assert "Traceback" not in answer.err
    assert schema.finished(Path(BN_RUN))
    monkeypatch.setattr(running, "fit", fit)
    assert "is finished" in ltnorm("train --recipe tiny.yaml --norm bn --norm gn").err


def test_sigterm_before_training(ltnorm, monkeypatch):
    def terminated(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    monkeypatch.setattr("ltnorm.data.prepare.prepare", terminated)
    answer = ltnorm(TINY_BN)
    assert answer.code == 143
    assert "0 of 1 runs finished" in answer.err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_real_process(tmp_path, sent, code):
    command = [sys.executable, "-m", "ltnorm", "train", "--recipe", "smoke", "--epochs", "10000"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "epoch 1/" in line:
            break
    time.sleep(0.2)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "0 of 1 runs finished" in err
    assert "Traceback" not in err


def test_ctrl_c_outside_training(failing, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ltnorm.data.prepare.prepare", interrupted)
    assert "interrupted" in failing("prepare --quiet", code=130)


def test_a_crash_is_not_hidden_and_debug_shows_the_traceback(ltnorm, monkeypatch):
    monkeypatch.setenv("LTNORM_DEBUG", "1")
    answer = ltnorm("train --norm compond")
    assert "Traceback" in answer.err
    assert answer.code == 2


HEAVY = ("torch", "numpy", "scipy", "pandas", "yaml", "rich.progress")


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], [*HEAVY, "pydantic"]),
        (["list", "norms"], [*HEAVY, "ltnorm.recipe", "ltnorm.cli.train"]),
        (["compare", "--help"], [*HEAVY, "ltnorm.recipe", "ltnorm.cli.train"]),
        (["bench", "--help"], [*HEAVY, "ltnorm.recipe"]),
    ],
)
def test_light_commands_load_little(arguments, heavy):
    code = f"""
import sys
from ltnorm.cli import main
main({arguments!r})
print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout


def test_compare_loads_little(ltnorm, tmp_path):
    ltnorm(TINY_BN)
    heavy = ("torch", "scipy", "pandas", "matplotlib", "rich.progress", "ltnorm.cli.train")
    code = (
        "import sys; from ltnorm.cli import main; main(['compare']);"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("[]")
    assert "bn" in done.stdout


def test_version_and_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ltnorm", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("ltnorm 0.")


def test_colour_is_left_out_when_asked(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    red = rich.text.Text("word", style="red")

    def shown():
        output = Output()
        with output.out.capture() as captured:
            output.product(red)
        return captured.get()

    assert "\x1b[31m" in shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in shown()
