"""Shared fixtures: the command line in a folder of its own, and tiny data."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import settings

# What imports torch is imported where it is used: the process that only hands out the files to
# the workers loads this file too, and they wait for it.

# Ten classes are too many for a set of seconds; these are enough for three groups.
TINY = {
    "dataset": {
        "name": "synthetic",
        "ratio": 10,
        "classes": 4,
        "image_size": 8,
        "train_per_class": 30,
        "test_per_class": 6,
    },
    "model": {"name": "resnet8"},
    "train": {
        "epochs": 2,
        "batch_size": 16,
        "lr": 0.05,
        "warmup_epochs": 1,
        "crop_padding": 1,
        "precision": "fp32",  # the same numbers whatever the CPU multiplies
    },
}


# On a busy machine an example can take long; how long is measured in benchmarks alone.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: more threads would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, which reads it

# Long files, longest first: handed out first, so that no worker ends with a long one alone.
LONG = (
    "test_readme.py",
    "test_peer_norms.py",
    "test_cli.py",
    "test_models.py",
    "test_page.py",
    "test_state.py",
    "test_prepare.py",
    "test_combinations.py",
    "test_training.py",
    "test_distributed.py",
    "test_figures.py",
    "test_files.py",
    "test_dryrun.py",
    "test_wheel.py",
    "test_norms.py",
    "test_twostage.py",
    "test_convert.py",
    "test_bench.py",
    "test_compare_cli.py",
    "test_inspect.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of LONG first; the others stay in their order."""
    rank = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


@dataclass
class Answer:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def ltnorm(tmp_path, monkeypatch, capsys):
    """Run a command line in an empty folder: ltnorm("train --norm bn") -> Answer."""
    from ltnorm.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))

    def run(command: str, *more: str) -> Answer:
        capsys.readouterr()
        code = main([*command.split(), *more])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


@pytest.fixture
def failing(ltnorm):
    """Run a command that must fail as users expect: one error line, one hint line, no traceback."""

    def run(command: str, *more: str, code: int) -> str:
        answer = ltnorm(command, *more)
        lines = answer.err.splitlines()
        assert answer.code == code, answer.err
        assert [line.split(":")[0] for line in lines[-2:]] == ["error", "hint"], answer.err
        assert answer.err.count("error:") == 1
        assert "Traceback" not in answer.err
        assert answer.out == ""
        return "\n".join(lines[-2:])

    return run


@pytest.fixture
def tiny_recipe():
    """A validated tiny recipe: tiny_recipe(norm="compound", **{"train.epochs": 3})."""

    from ltnorm import resolve as recipes

    def make(norm: str = "bn", seed: int = 0, **flags):
        overrides = recipes.Overrides(flags, norms=[norm], seeds=[seed])
        return recipes.resolve(TINY, overrides)[0]

    return make


@pytest.fixture
def tiny_set(tiny_recipe, tmp_path):
    """The prepared set of the tiny recipe."""
    from ltnorm.data.prepare import prepare

    return prepare(tiny_recipe().dataset, tmp_path / "raw", tmp_path / "data")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Where real data lies; the test is skipped without it."""
    place = os.environ.get("LTNORM_DATA")
    if not place:
        pytest.skip("needs real data: set LTNORM_DATA to a folder with cifar-10-batches-py")
    return Path(place).resolve()
