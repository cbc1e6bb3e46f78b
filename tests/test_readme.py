"""The commands and examples of the README and the pages of docs/, as they stand there.

They run on fewer images; those that need CIFAR-10 run where LTNORM_DATA names it.
"""

import os
import re
import shlex
from pathlib import Path

import pytest

from ltnorm.cli import main

PROJECT = Path(__file__).parent.parent
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
SMALLER = "--epochs 1 --batch-size 32 --model resnet8 --n-max 100 --seeds 0"
SMALLER_SYNTHETIC = "--set dataset.train_per_class=100 --set dataset.test_per_class=5"


def commands(page: Path) -> list[str]:
    """The ltnorm commands in the shell blocks of a page."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if "ltnorm " in line]


def test_the_main_job_is_told():
    lines = commands(PAGES[0])
    assert (
        "uv run ltnorm train --norm bn --norm gn --norm split --norm compound --ratio 100" in lines
    )
    assert "uv run ltnorm compare results/" in lines
    assert len(lines) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        _, _, _, verb, *arguments = shlex.split(command)
        if "cifar10" in command:
            if "LTNORM_DATA" not in os.environ:
                continue
            root = (PROJECT / os.environ["LTNORM_DATA"]).resolve()
            arguments += ["--root", str(root)]
        if verb == "train":
            arguments += shlex.split(SMALLER)
            arguments += [] if "cifar10" in command else shlex.split(SMALLER_SYNTHETIC)
        assert main([verb, *arguments]) == 0, f"{command}\n{capsys.readouterr().err}"
        capsys.readouterr()


def test_the_python_examples_of_the_readme_run():
    examples = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), flags=re.DOTALL)
    names: dict = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    assert names["logits"].shape == (8, 100)
    x = names["torch"].randn(2, 4, 3, 3)
    rms = names["RMSNorm2d"](4)(x).square().mean(1).sqrt()
    names["torch"].testing.assert_close(rms, names["torch"].ones_like(rms), rtol=1e-3, atol=1e-3)
