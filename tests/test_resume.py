"""A run that was stopped, anywhere, and typed again is the run that was not."""

import contextlib
import csv
import errno
import hashlib
import io
import os
import pickle
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY

from ltnorm.cli import main
from ltnorm.console import Output
from ltnorm.data.prepare import prepare
from ltnorm.reporting import schema
from ltnorm.training import finish, loop, resume, run, stop
from ltnorm.training.resume import Keeper, Keeping

BN = Path("results/synthetic-exp10/resnet8-bn-ce/seed0")
TRAIN = "train --recipe tiny.yaml --norm bn --quiet"
# Of the same run they may differ: how long it took, and when.
TIMED = ("train_seconds", "images_per_second", "finished")


class Stopped(BaseException):
    """In place of a signal."""


def metrics(directory: Path) -> dict[str, str]:
    """The row of a finished run, without its times, and the rows of its epochs."""
    with (directory / schema.RESULT).open(newline="") as file:
        [row] = csv.DictReader(file)
    with (directory / schema.EPOCHS).open(newline="") as file:
        epochs = [
            [e[key] for key in ("epoch", "lr", "loss", "steps")] for e in csv.DictReader(file)
        ]
    return {k: v for k, v in row.items() if k not in TIMED} | {"epochs.csv": str(epochs)}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "checkpoint.pt", weights_only=True)["model"]


def same(a: Path, b: Path) -> bool:
    """Whether two runs have the same numbers and weights, to the bit."""
    mine, theirs = weights(a), weights(b)
    equal = mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    return equal and metrics(a) == metrics(b)


def stopped_at(steps: int, monkeypatch) -> None:
    """Training ends as by a signal after so many steps of this process."""
    plain, left = loop.step, iter(range(steps))

    def step(*arguments):
        if next(left, None) is None:
            raise Stopped
        return plain(*arguments)

    monkeypatch.setattr(loop, "step", step)


EVERYTHING = {
    "train.auto_augment": "randaugment",
    "train.cutout": 2,
    "train.mixup": 0.5,
    "train.cutmix": 0.5,
}


@pytest.mark.parametrize(
    ("norm", "flags"),
    [
        ("bn", {}),
        ("gn", {"train.optimizer": "adamw", "train.lr": 0.002, "train.steps": 13}),
        ("brn", {"train.optimizer": "sam", "train.ema": 0.9}),
        ("split", {"loss.name": "ldam", "loss.schedule": "drw", "loss.drw_start": 0.5}),
        ("compound", {"sampler.name": "progressive", "train.ema": 0.99, **EVERYTHING}),
        (
            "compound",
            {
                "norm.consistency": 0.5,
                "norm.aux_gradient": "full",
                "train.momentum": 0,
                **EVERYTHING,
            },
        ),
        ("nbn", {"loss.name": "cb", "eval.every": 1}),
        ("balanced", {"loss.name": "focal", "train.steps": 11, "loss.schedule": "drw"}),
    ],
)
def test_a_training_goes_on_as_if_nothing_had_happened(
    tiny_recipe, tiny_set, tmp_path, monkeypatch, norm, flags
):
    budget = {} if "train.steps" in flags else {"train.epochs": 3}
    recipe = tiny_recipe(norm, **budget | flags)
    output = Output(quiet=True)
    run.run(recipe, tiny_set, tmp_path / "whole", output)
    for steps in (1, 3, 4, 2):  # in the first epoch, and across its end, several times
        with monkeypatch.context() as patched:
            stopped_at(steps, patched)
            with contextlib.suppress(Stopped):
                run.run(recipe, tiny_set, tmp_path / "parts", output, keeping=Keeping(steps=1))
        torch.randn(7)  # the generators go on elsewhere
        random.random()
    run.run(recipe, tiny_set, tmp_path / "parts", output)
    whole, parts = (schema.run_directory(recipe, tmp_path / name) for name in ("whole", "parts"))
    assert same(whole, parts)
    assert not list(parts.glob("resume-*"))


def test_layers_that_draw_go_on_with_their_numbers(tiny_recipe, tiny_set, tmp_path, monkeypatch):
    """From any of the global generators."""
    plain = run.build_model

    def noisy(model, inputs):
        if model.training:
            return inputs[0] * (1 + float(torch.rand(())) + random.random() + np.random.rand())

    def build_model(*arguments):
        model = plain(*arguments)
        random.seed(1), np.random.seed(1)
        model.register_forward_pre_hook(noisy)
        return model

    monkeypatch.setattr(run, "build_model", build_model)
    recipe, output = tiny_recipe(), Output(quiet=True)
    run.run(recipe, tiny_set, tmp_path / "whole", output)
    with monkeypatch.context() as patched:
        stopped_at(6, patched)
        with contextlib.suppress(Stopped):
            run.run(recipe, tiny_set, tmp_path / "parts", output, keeping=Keeping(steps=1))
    run.run(recipe, tiny_set, tmp_path / "parts", output)
    assert same(*(schema.run_directory(recipe, tmp_path / name) for name in ("whole", "parts")))


@pytest.mark.parametrize("method", ["crt", "lws"])
def test_a_second_stage_goes_on_as_well(ltnorm, tmp_path, monkeypatch, method):
    command = f"{TRAIN} --set retrain.method={method} --set retrain.epochs=3"
    extra = "--set retrain.norm=adapting --set retrain.lr=0.01"
    assert ltnorm(f"{command} {extra} --out whole").code == 0
    assert ltnorm(f"{TRAIN} --out parts").code == 0
    for steps in (2, 4):
        with monkeypatch.context() as patched:
            stopped_at(steps, patched)
            with contextlib.suppress(Stopped):
                ltnorm(f"{command} {extra} --out parts --checkpoint-steps 1")
    assert ltnorm(f"{command} {extra} --out parts").code == 0
    [whole], [parts] = (
        list(tmp_path.glob(f"{n}/*/*-{method}-*/seed0")) for n in ("whole", "parts")
    )
    ours, theirs = metrics(whole), metrics(parts)
    assert ours.pop("first_stage") != ""
    theirs.pop("first_stage")  # the recipe of its checkpoint names no second stage either way
    assert ours == theirs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with a tiny recipe and its data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


def process(command: str, before=lambda: None) -> int:
    """A real process with a command line; returns its pid."""
    return forked(lambda: main(command.split()), before)


def forked(what, before) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:  # never back into pytest
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
        torch.set_num_threads(1)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1), os.dup2(said, 2)
        import sys

        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
        before()
        code = what()
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(code or 0)


def ended(pid: int, seconds: float = 60) -> int:
    """The exit status of a process, negative where a signal ended it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"did not end: {Path('said').read_text()[-2000:]}")


def killed_at(event: int):
    """A process kills itself at the n-th thing that it does to a file, or half-way through it."""

    def before():
        left = iter(range(event))

        def happen():
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        def dying(plain):
            def call(*arguments, **more):
                happen()
                return plain(*arguments, **more)

            return call

        def opened(path, mode="r", *arguments, **more):
            file = plain_open(path, mode, *arguments, **more)
            return Halves(file, happen) if mode == "wb" else file

        plain_open = Path.open
        Path.open = opened
        os.fsync, Path.replace, Path.unlink = map(dying, (os.fsync, Path.replace, Path.unlink))

    return before


class Halves:
    """A file in which something happens in the midst of each write."""

    def __init__(self, file, happen):
        self.file, self.happen = file, happen

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.happen()
        self.file.write(content[len(content) // 2 :])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_file_is_written_whole_or_not_at_all(folder):
    """Wherever the process is killed."""
    file, old, new = Path("file"), b"old" * 1000, b"new and longer" * 1000
    seen = []
    for event in range(6):
        file.write_bytes(old)
        pid = forked(lambda: schema.write_bytes(file, new), killed_at(event))
        killed = ended(pid) == -signal.SIGKILL
        assert file.read_bytes() in ([old, new] if killed else [new])
        seen.append((killed, file.read_bytes() == new))
    assert seen[0] == (True, False)
    assert seen[-1] == (False, True)
    assert {(True, False), (True, True)} < set(seen)  # before the file took its place, and after


def test_killed_at_twenty_random_moments_a_run_is_the_same(folder, capfd):
    """In the midst of steps and of writes; what is left goes on, until it is finished."""
    command = f"{TRAIN} --epochs 4 --checkpoint-steps 2"
    prepare(*_data())
    start = time.monotonic()
    assert ended(process(f"{command} --out whole")) == 0
    seconds = time.monotonic() - start
    whole = "whole" / BN.relative_to("results")
    rng, kills, finished = random.Random(0), 0, 0
    while kills < 20:
        if kills % 2:
            pid = process(command, killed_at(rng.randrange(70)))
        else:
            pid = process(command)
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        kills += code == -signal.SIGKILL
        if (BN / schema.RESULT).is_file():  # whole, or not there
            assert same(BN, whole)
            finished += 1
            shutil.rmtree("results")
        assert code in (0, -signal.SIGKILL), Path("said").read_text()[-2000:]
    assert ended(process(command)) == 0
    assert same(BN, whole)
    left = {path.name for path in BN.iterdir()}
    assert left == {path.name for path in whole.iterdir()}
    print(f"{kills} kills, {finished} runs finished between them")


def _data():
    recipe = yaml.safe_load(Path("tiny.yaml").read_text())
    from ltnorm.validation import validate

    return validate(recipe).dataset, Path("data/raw"), Path("data")


def slow_steps(seconds: float):
    """Each step takes so long."""

    def before():
        plain = loop.step

        def step(*arguments):
            loss = plain(*arguments)
            time.sleep(seconds)
            return loss

        loop.step = step

    return before


def when_there(pattern: str) -> list[Path]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := list(BN.glob(pattern)):
            return found
        time.sleep(0.02)
    raise AssertionError(f"no {pattern}: {Path('said').read_text()[-2000:]}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_who_is_asked_to_end_keeps_the_step_and_is_gone(folder, number, code):
    pid = process(TRAIN, slow_steps(0.3))
    when_there("resume-00001-*")  # the first epoch is over
    time.sleep(0.5)
    asked = time.monotonic()
    os.kill(pid, number)
    assert ended(pid) == code
    assert time.monotonic() - asked < 5
    assert "the others go on" in Path("said").read_text()
    steps = [int(path.name.split("-")[2]) for path in BN.glob("resume-*")]
    assert max(steps) > 4  # within the second epoch
    assert ended(process(TRAIN)) == 0
    assert ended(process(f"{TRAIN} --out whole")) == 0
    assert same(BN, "whole" / BN.relative_to("results"))


def test_a_step_that_takes_long_is_not_waited_for(folder):
    pid = process(TRAIN, slow_steps(60))
    when_there("status.json")
    time.sleep(1)
    asked = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 143
    assert time.monotonic() - asked < 5


def test_who_asks_twice_does_not_wait(monkeypatch):
    monkeypatch.setattr(stop, "GRACE", 60)
    with stop.deferred() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not asked.asked
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_signal_at_the_very_end_is_delivered():
    with pytest.raises(KeyboardInterrupt), stop.deferred():
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interrupted(ltnorm, monkeypatch):
    """A run that was stopped in its second epoch, with two states, and the whole one."""
    assert ltnorm(f"{TRAIN} --out whole").code == 0
    with monkeypatch.context() as patched:
        stopped_at(6, patched)
        with pytest.raises(Stopped):
            ltnorm(f"{TRAIN} --checkpoint-steps 1")
    files = resume._kept(BN)
    assert len(files) == 2
    return files


def again(ltnorm) -> str:
    """The run made again, and what it said; it has come to the same."""
    answer = ltnorm(TRAIN.removesuffix(" --quiet"))
    assert answer.code == 0, answer.err
    assert same(BN, "whole" / BN.relative_to("results"))
    return answer.err


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [flip, lambda c: c[:100], lambda c: b""])
def test_a_damaged_state_gives_way_to_the_one_before(interrupted, ltnorm, damage):
    last, before = interrupted
    last.write_bytes(damage(last.read_bytes()))
    said = again(ltnorm)
    assert f"{last} is damaged" in said
    assert f"goes on after step {int(before.name.split('-')[2]) - 4} of epoch 2" in said


def test_without_a_sound_state_a_run_begins_anew(interrupted, ltnorm):
    for file in interrupted:
        file.write_bytes(flip(file.read_bytes()))
    said = again(ltnorm)
    assert said.count("is damaged") == 2
    assert "goes on" not in said


def test_states_that_are_not_taken_do_not_cost_those_that_are_new(interrupted, ltnorm, monkeypatch):
    """They are of later epochs than a training that begins anew."""
    for file in interrupted:
        later = file.with_name(file.name.replace("resume-00001", "resume-00009"))
        file.rename(later).write_bytes(flip(later.read_bytes()))
    with monkeypatch.context() as patched:
        stopped_at(5, patched)
        with pytest.raises(Stopped):
            ltnorm(f"{TRAIN} --checkpoint-steps 1")
    assert [file.name.split("-")[1] for file in resume._kept(BN)] == ["00001", "00001"]
    assert "goes on after step 1 of epoch 2" in again(ltnorm)


def crafted(state, what):
    """A state that is none, for all that its hash says."""
    if what == "parts":
        del state["parts"]
    elif what == "weights":
        state["parts"]["objective"] = {}
    elif what == "optimizer":
        state["parts"]["optimizer"] = state["parts"]["optimizer"][:-1]
    elif what == "position":
        state["position"]["epochs"] = [(1, 2)]
    else:
        state["run"] = [1]
    return state


@pytest.mark.parametrize("what", ["parts", "weights", "optimizer", "position", "run"])
def test_a_state_that_is_none_gives_way_as_well(interrupted, ltnorm, what):
    last, _ = interrupted
    content = io.BytesIO()
    torch.save(crafted(torch.load(last, weights_only=True), what), content)
    last.unlink()
    name = last.name.split("-")[:3]
    made = last.with_name("-".join([*name, f"{resume._hash(content.getvalue())}.pt"]))
    made.write_bytes(content.getvalue())
    said = again(ltnorm)
    assert f"{made} is not the state of this training" in said
    assert "goes on after step 1 of epoch 2" in said


class Malice:
    """What makes a file where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("archive", [False, True])
def test_a_state_with_code_in_it_is_refused(interrupted, ltnorm, archive):
    content = io.BytesIO()
    if archive:
        torch.save({"run": Malice()}, content)
    else:
        pickle.dump(Malice(), content)
    torch.load(io.BytesIO(content.getvalue()), weights_only=False) if archive else pickle.loads(
        content.getvalue()
    )
    Path("harmed").unlink()  # it does what it says
    digest = hashlib.sha256(content.getvalue()).hexdigest()[:16]
    (BN / f"resume-00009-00000099-{digest}.pt").write_bytes(content.getvalue())
    assert "would run code: it names posix.system" in again(ltnorm)
    assert not Path("harmed").exists()


def test_another_runs_state_is_not_taken(interrupted, ltnorm):
    other = BN.with_name("seed1")
    other.mkdir()
    shutil.copy(interrupted[0], other)
    answer = ltnorm("train --recipe tiny.yaml --norm bn --seed 1")
    assert answer.code == 0
    assert "is of another seed" in answer.err
    assert "goes on" not in answer.err


def test_forced_a_run_begins_anew(interrupted, ltnorm):
    answer = ltnorm("train --recipe tiny.yaml --norm bn --force")
    assert answer.code == 0
    assert "goes on" not in answer.err
    assert same(BN, "whole" / BN.relative_to("results"))


def test_a_run_that_changes_its_machine_tells_of_both(interrupted, ltnorm, monkeypatch):
    monkeypatch.setattr(finish, "describe", lambda device: "another machine")
    assert ltnorm(TRAIN).code == 0
    row = schema.read_result(BN / schema.RESULT)
    assert row.device.endswith(", then another machine")
    assert row.torch == torch.__version__


def test_states_that_cannot_be_written_are_done_without(ltnorm, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert ltnorm(f"{TRAIN} --out whole").code == 0
    monkeypatch.setattr(resume, "write_bytes", full)
    answer = ltnorm(f"{TRAIN} --checkpoint-steps 1")
    assert answer.code == 0
    assert answer.err.count("warning") == 1
    assert "No space left on device; training goes on" in answer.err
    assert same(BN, "whole" / BN.relative_to("results"))


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(folder):
    """Files may have so many bytes: the state fits, the checkpoint's predictions do not."""
    assert ended(process(f"{TRAIN} --out whole")) == 0
    big = (Path("whole") / BN.relative_to("results") / "checkpoint.pt").stat().st_size

    def small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (big // 2, big // 2))

    assert ended(process(TRAIN, small)) == 1
    said = Path("said").read_text()
    assert "error: cannot read or write" in said
    assert "File too large" in said
    assert not (BN / schema.RESULT).exists()
    assert not list(BN.glob(".*.tmp"))
    assert ended(process(TRAIN)) == 0
    assert same(BN, "whole" / BN.relative_to("results"))


def test_a_repeated_run_that_finds_no_room_leaves_the_earlier_one(folder):
    assert ended(process(TRAIN)) == 0
    before = {path.name: path.read_bytes() for path in BN.iterdir() if path.suffix != ".csv"}
    result = (BN / schema.RESULT).read_text()
    big = (BN / "checkpoint.pt").stat().st_size

    def small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (big // 2, big // 2))

    assert ended(process(f"{TRAIN} --force", small)) == 1
    assert (BN / schema.RESULT).read_text() == result
    assert all((BN / name).read_bytes() == content for name, content in before.items())
    assert not list(BN.glob(".*.tmp"))


def test_of_two_processes_one_makes_a_run_and_the_other_waits(folder):
    command = f"{TRAIN.removesuffix(' --quiet')} --norm gn"
    pids = [process(command, slow_steps(0.1)), process(command, slow_steps(0.1))]
    assert [ended(pid) for pid in pids] == [0, 0]
    said = Path("said").read_text()
    assert said.count("waiting for it after the others") >= 1
    assert said.count(" epoch 2/2 ") == 2  # each of the two runs was made once


def test_who_waits_takes_over_from_one_that_is_killed(folder):
    first = process(TRAIN, slow_steps(0.3))
    when_there("resume-00001-*")
    second = process(TRAIN)
    time.sleep(1)
    os.kill(first, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL
    assert ended(second) == 0
    assert (BN / schema.RESULT).is_file()


def test_nothing_is_kept_where_nothing_is_asked(tiny_recipe, tiny_set, tmp_path):
    with Keeper().training(torch.nn.Linear(1, 1), None, None) as at:
        assert (at.steps, at.spent, at.epochs) == (0, 0, [])
        assert not Keeper().due(at)
