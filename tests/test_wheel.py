"""The built wheel, installed into a clean environment."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ltnorm.reporting import published
from ltnorm.resolve import shipped_recipes

PROJECT = Path(__file__).parent.parent
UV = shutil.which("uv")


@pytest.mark.skipif(UV is None, reason="needs uv")
def test_the_wheel_brings_what_is_no_code(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command, cwd=tmp_path):
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(UV, "build", "--wheel", "--out-dir", str(tmp_path / "dist"), cwd=PROJECT)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"ltnorm/reporting/assets/report.{kind}" for kind in ("css", "js")} <= {*names}
    run(UV, "venv", "--python", sys.executable, "venv")
    python = str(tmp_path / "venv" / "bin" / "python")
    run(UV, "pip", "install", "--python", python, str(wheel))
    check = (
        "import ltnorm.reporting.published as p, ltnorm.resolve as r, ltnorm.validation as v\n"
        "import pathlib\n"
        "from ltnorm.cli import main\n"
        "path, venv = p.default_path(), pathlib.Path('venv').resolve()\n"
        "assert path.is_relative_to(venv) and pathlib.Path(r.__file__).is_relative_to(venv)\n"
        "recipes = [v.validate(r.read(name)) for name in r.shipped_recipes()]\n"
        "print(len(recipes), len(p.read(path)))\n"
        "main(['list', 'recipes'])\n"
    )
    counts, listed = run(python, "-c", check).split("\n", 1)
    expected = (len(shipped_recipes()), len(published.read(published.default_path())))
    assert tuple(map(int, counts.split())) == expected
    assert all(name in listed for name in shipped_recipes())
