"""The tables of results/README.md are those that its commands print from the committed runs.

`python tests/test_results.py` writes them anew.
"""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

import pytest

from ltnorm.cli import main

PROJECT = Path(__file__).parent.parent
PAGE = PROJECT / "results" / "README.md"
README = PROJECT / "README.md"
SHOWN = r"\||\*\*cifar|Tail accuracy against"
TABLES = re.compile(rf"```sh\nuv run (ltnorm compare [^`]*)\n```\n\n((?:(?:{SHOWN}).*\n+)*)")


def printed(command: str) -> str:
    """Titles, tables and outcomes, as Markdown."""
    arguments = shlex.split(command.replace("\\\n", ""))[1:]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        # Predictions are not committed: without them there are no intervals over images.
        assert main([*arguments, "--no-images", "--format", "markdown", "--quiet"]) == 0
    kept = [line for line in out.getvalue().splitlines() if re.match(rf"{SHOWN}|$", line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


@pytest.mark.parametrize(
    ("command", "shown"),
    [match.groups() for match in TABLES.finditer(PAGE.read_text())],
    ids=lambda text: text[:60],
)
def test_the_tables_are_those_of_the_runs(command, shown, monkeypatch):
    monkeypatch.chdir(PROJECT)
    assert shown.strip() == printed(command)


def test_there_are_tables_and_the_runs_take_little_room():
    assert len(TABLES.findall(PAGE.read_text())) > 2
    # What git keeps of results/, beside which users' own runs lie.
    kept = re.findall(r"^!/(results/\S+)$", (PROJECT / ".gitignore").read_text(), re.MULTILINE)
    assert "results/study/" in kept
    found = [path for name in kept for path in [PROJECT / name, *(PROJECT / name).rglob("*")]]
    committed = [p for p in found if p.suffix in (".csv", ".yaml", ".md", ".html", ".png")]
    assert sum(path.stat().st_size for path in committed) < 5e6


def test_what_the_readme_claims_is_in_the_tables():
    [claims] = re.findall(
        r"## What it has found.*?\n(.*?)\n## ", README.read_text(), flags=re.DOTALL
    )
    claimed = re.findall(r"[+-]\d+\.\d(?: points)?\s\[[^]]*\]", claims)
    assert claimed
    tables = "".join(match[2] for match in TABLES.finditer(PAGE.read_text()))
    for text in claimed:
        assert re.sub(r" points|\n", lambda m: " " * (m[0] == "\n"), text) in tables


if __name__ == "__main__":
    os.chdir(PROJECT)
    text = PAGE.read_text()
    PAGE.write_text(TABLES.sub(lambda m: f"```sh\nuv run {m[1]}\n```\n\n{printed(m[1])}\n\n", text))
