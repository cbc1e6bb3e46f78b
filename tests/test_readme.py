"""The commands and examples of the README and the pages of docs/, as they stand there.

They run on fewer images; those that need CIFAR-10 run where LTNORM_DATA names it.
"""

import os
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ltnorm import registry
from ltnorm.cli import main

PROJECT = Path(__file__).parent.parent
ADDING = PROJECT / "docs" / "adding.md"
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
SMALLER = "--epochs 1 --batch-size 32 --model resnet8 --n-max 100 --seeds 0"
HELD_OUT = "--val 10 --eval-split val"  # 10,000 test images take long
SMALLER_SYNTHETIC = "--set dataset.train_per_class=100 --set dataset.test_per_class=5"
SMALLER_SYNTHETIC += " --set dataset.image_size=8"


def commands(page: Path) -> list[str]:
    """The ltnorm commands in the shell blocks of a page."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if "ltnorm " in line]


def draw_photos(root: Path) -> None:
    """The folder that the commands of the pages name: three classes of images of several sizes."""
    if root.exists():
        return
    rng = np.random.default_rng(0)
    for name, count in (("heron", 12), ("owl", 6), ("wren", 3)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (70 + i, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg")


def test_the_main_job_is_told():
    lines = commands(PAGES[0])
    assert (
        "uv run ltnorm train --norm bn --norm gn --norm split --norm compound --ratio 100" in lines
    )
    assert "uv run ltnorm compare results/synthetic-exp100" in lines
    assert len(lines) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        words = shlex.split(command)  # (torchrun's is run by one process)
        verb, *arguments = words[words.index("ltnorm") + 1 :]
        if "cifar10" in command:
            if "LTNORM_DATA" not in os.environ:
                continue
            root = (PROJECT / os.environ["LTNORM_DATA"]).resolve()
            arguments += ["--root", str(root)]
        if "folder" in arguments:
            draw_photos(tmp_path / "photos")
            if verb == "train":
                arguments += shlex.split("--epochs 1 --batch-size 8 --model resnet8 --seeds 0")
                arguments += ["--workers", "0"]
                cached = "--cache-size" in arguments
                arguments += [] if cached else ["--set", "dataset.image_size=32"]
        elif verb == "train":
            # Deferred weights need an epoch after four fifths of them.
            epochs = "5" if "drw" in command else "1"
            arguments += shlex.split(SMALLER.replace("--epochs 1", f"--epochs {epochs}"))
            smaller = HELD_OUT if "cifar10" in command else SMALLER_SYNTHETIC
            arguments += shlex.split(smaller)
        if verb == "bench":
            arguments += ["--batch-size", "4", "--rounds", "1"]
        # Of the one seed that is trained here, no gate can be judged.
        expected = (4,) if "--fail-" in command else (0,)
        assert main([verb, *arguments]) in expected, f"{command}\n{capsys.readouterr().err}"
        capsys.readouterr()


def test_the_python_examples_run():
    [library] = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), flags=re.DOTALL)
    [norm] = re.findall(r"```python\n(.*?)```", ADDING.read_text(), flags=re.DOTALL)
    names = _run(library)
    assert names["logits"].shape == (8, 100)
    rms = _run(norm)["RMSNorm2d"](4)(torch.randn(2, 4, 3, 3)).square().mean(1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=1e-3)


def _run(example: str) -> dict:
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    return names


def test_the_norm_of_the_page_is_added_by_its_one_line(monkeypatch, tmp_path, capsys):
    [norm] = re.findall(r"```python\n(.*?)```", ADDING.read_text(), flags=re.DOTALL)
    [line] = re.findall(r'^"rms": (Entry\(.*\)),$', ADDING.read_text(), flags=re.MULTILINE)
    module = types.ModuleType("ltnorm.norms.rms")
    monkeypatch.setitem(sys.modules, "ltnorm.norms.rms", module)
    exec(norm, module.__dict__)
    monkeypatch.setitem(registry.NORMS, "rms", eval(line, {"Entry": registry.Entry}))
    monkeypatch.chdir(tmp_path)
    command = ["train", "--recipe", "smoke", "--norm", "rms", "--set", "norm.eps=1e-3", "--json"]
    assert main(command) == 0
    assert '"norm_options": "eps=0.001"' in capsys.readouterr().out


def test_pages_have_no_placeholders_and_their_links_resolve():
    for page in [*PAGES, PROJECT / "results" / "README.md"]:
        text = page.read_text()
        assert not re.findall(
            r"^(?:OUTPUT|VALIDATION|REFERENCE|TODO|@[A-Z0-9]+@)$", text, flags=re.MULTILINE
        )
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_pasted_output_looks_like_what_compare_prints(tmp_path, monkeypatch, capsys):
    pasted = re.search(r"```\n(synthetic-.*?)```", PAGES[0].read_text(), flags=re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    main(["train", "--recipe", "smoke", "--norm", "bn", "--norm", "gn", "--quiet"])
    shown = capsys.readouterr().out
    assert pasted.splitlines()[1].split() == shown.splitlines()[1].split()
    for norm in ("bn", "gn", "split", "compound"):
        assert f"\n{norm} " in pasted
