"""What --log tensorboard writes, read back by tensorboard."""

import csv
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ltnorm.console import Output
from ltnorm.training import log
from ltnorm.training.loop import Epoch

RUN = "results/synthetic-exp10/resnet8-bn-ce/seed0"
TRAIN = "train --recipe tiny.yaml --norm bn --quiet"


def scalars(run):
    """tag -> [(step, value)]."""
    found = EventAccumulator(str(run / log.FOLDER)).Reload()
    return {t: [(e.step, e.value) for e in found.Scalars(t)] for t in found.Tags()["scalars"]}


def rows(file):
    with file.open() as text:
        return list(csv.DictReader(text))


def floats(cells):
    return [(i, pytest.approx(float(cell), rel=1e-6)) for i, cell in enumerate(cells, 1)]


def row(epoch, loss):
    return Epoch(epoch, 0.1, loss, 4, 64, 1.0, 64.0)


def test_epochs_and_final_metrics_are_logged_and_change_nothing(ltnorm, tmp_path):
    assert ltnorm(f"{TRAIN} --log tensorboard --set eval.every=1").code == 0
    run = tmp_path / RUN
    found, epochs = scalars(run), rows(run / "epochs.csv")
    for key, tag in log.EPOCH.items():
        assert found.pop(tag) == floats(epoch[key] for epoch in epochs), tag
    [result] = rows(run / "result.csv")
    measured = {f"final/{key}": float(result[key]) for key in log.FINAL if result[key]}
    assert {tag: values[0] for tag, values in found.items()} == {
        tag: (len(epochs), pytest.approx(value, rel=1e-6)) for tag, value in measured.items()
    }
    assert all(len(values) == 1 for values in found.values())
    assert len(measured) >= 4

    assert ltnorm(f"{TRAIN} --out plain").code == 0
    [plain] = rows(tmp_path / RUN.replace("results", "plain") / "result.csv")
    told = {"finished", "train_seconds", "images_per_second"}
    assert {k for k, v in plain.items() if v != result[k]} <= told
    assert not (tmp_path / RUN.replace("results", "plain") / log.FOLDER).exists()

    assert ltnorm(f"retrain {RUN} --method crt --epochs 1 --log tensorboard --quiet").code == 0
    second = scalars(tmp_path / RUN.replace("-ce", "-ce-crt"))
    assert [step for step, _ in second["train/loss"]] == [1]
    assert second["final/all"][0][0] == 1


def test_a_run_that_goes_on_writes_on_and_a_new_one_anew(tmp_path, monkeypatch):
    def told(*epochs):
        with log.logged(tmp_path, Output(quiet=True, log="tensorboard")) as writer:
            for epoch, loss in epochs:
                writer.epoch(row(epoch, loss))

    told((1, 1.0), (2, 2.0), (3, 3.0))
    [first] = (tmp_path / log.FOLDER).iterdir()
    first.write_bytes(first.read_bytes()[:-5])  # killed while it wrote
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0)]
    clock = log.time.time()
    monkeypatch.setattr(log.time, "time", lambda: clock - 7200)
    told((2, 20.0), (3, 30.0))
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 20.0), (3, 30.0)]
    told((1, 5.0))
    assert scalars(tmp_path)["train/loss"] == [(1, 5.0)]


def test_a_log_that_cannot_be_written_ends_no_run(ltnorm, tmp_path, capsys):
    writer = log.TensorBoard(tmp_path, Output(quiet=True))
    writer.epoch(row(1, 1.0))
    writer.file.close()
    with open("/dev/full", "wb") as full:
        writer.file = full
        for epoch in (2, 3):
            writer.epoch(row(epoch, 1.0))
        writer.close()
    assert capsys.readouterr().err.count("No space left on device") == 1

    (tmp_path / RUN).mkdir(parents=True)
    (tmp_path / RUN / log.FOLDER).write_text("no folder")
    answer = ltnorm(f"{TRAIN} --log tensorboard")
    assert answer.code == 0
    assert answer.err.count("warning: the log in") == 1
    assert (tmp_path / RUN / "result.csv").is_file()


def test_a_run_that_fails_closes_its_log(ltnorm, monkeypatch):
    closed = []
    monkeypatch.setattr(log.TensorBoard, "close", lambda self: closed.append(self))
    assert ltnorm(f"{TRAIN} --log tensorboard --lr 1e12 --precision fp32").code == 1
    assert len(closed) == 1


def test_logs_that_are_not_there(failing, monkeypatch, tmp_path):
    assert "'tensorboard'?" in failing(f"{TRAIN} --log tensorbord", code=2)
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    text = failing(f"{TRAIN} --log tensorboard", code=2)
    assert 'pip install "ltnorm[tensorboard]"' in text
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "data").exists()
