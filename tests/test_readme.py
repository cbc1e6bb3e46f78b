"""The README's commands, as they stand there, on fewer images."""

import re
import shlex
from pathlib import Path

import pytest

from ltnorm.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
LINES = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line.removeprefix("uv run ") for line in LINES if "ltnorm " in line]
SMALLER = "--epochs 1 --batch-size 32 --model resnet8 --seeds 0 --precision fp32"
FEWER = {
    "synthetic": "--n-max 100 --set dataset.train_per_class=100 --set dataset.test_per_class=5",
    "cifar10": "--n-max 100",
}


def test_the_two_commands_of_the_main_job_are_there():
    train = "uv run ltnorm train --norm bn --norm gn --norm split --norm compound --ratio 100"
    assert train in LINES
    assert "uv run ltnorm compare results/" in LINES
    assert "uv run pytest" in LINES
    assert len(COMMANDS) >= 8


def test_every_command_of_the_readme_runs(tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        arguments = shlex.split(command)[1:]
        needs_cifar = "cifar10" in command
        if needs_cifar and not monkeypatch_root(request):
            continue
        if arguments[0] == "train":
            arguments += shlex.split(SMALLER)
            arguments += shlex.split(FEWER["cifar10" if needs_cifar else "synthetic"])
        if needs_cifar and arguments[0] in ("train", "prepare"):
            arguments += ["--root", str(monkeypatch_root(request))]
        assert main(arguments) == 0, f"{command}\n{capsys.readouterr().err}"
        capsys.readouterr()


def monkeypatch_root(request) -> Path | None:
    """Where CIFAR-10 lies, or None."""
    try:
        return request.getfixturevalue("real_data")
    except pytest.skip.Exception:
        return None


def test_every_python_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
