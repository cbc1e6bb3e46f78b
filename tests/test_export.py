"""The formats of `compare`, as files in tests/golden.

`python tests/test_export.py` writes them anew.
"""

import csv
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import result

from ltnorm.reporting import cells, compare, export, published, sheets, views
from ltnorm.reporting.compare import Question
from ltnorm.reporting.schema import ClassRow, Run

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = '=cmd|"x"<script>&_%$#{}~^\\ *|`[a]'


def blocks():
    """Two tables: with every kind of row, and with what is missing."""
    runs = []
    for seed, tail in enumerate([10.0, 12.0, 14.0]):
        runs.append(result("bn", seed=seed, tail=tail, all_=38.0 + seed))
        runs.append(result("gn", seed=seed, tail=tail + 10 + seed / 10, train_seconds=150.0))
        runs.append(result("compound", seed=seed, tail=10 + 3 * seed, sets=["norm.components=3"]))
    runs.append(result("split", seed=0, tail=None, device=HOSTILE))
    runs.append(result("bn", flags={"loss.name": "ldam"}, tag=HOSTILE))
    made = [Run(run, Path(f"results/{i}")) for i, run in enumerate(runs)]
    paper = published.Published(
        keys={
            "norm.name": "bn",
            "loss.name": "ce",
            "dataset.name": "synthetic",
            "model.name": "resnet32",
            "train.epochs": 200,
        },
        label="A & B's paper",
        paper="A & B's paper",
        values={"all": 70.36},
        source="arXiv 0000.00000",
        method_source="",
        note="best test epoch",
        trials=5,
    )
    return compare.compare(made, Question(over_images=()), [paper])


def class_table():
    """Three classes of two rows, one without test images, one of a hostile name."""
    block = blocks()[0]
    names = ["plain", HOSTILE, "naïve 鳥"]
    classes = [ClassRow(i, n, 100 >> i, "head", 20, 50.0) for i, n in enumerate(names)]
    accuracy = {
        label: [views.ClassAccuracy(m, s) for m, s in ((base, 1.0), (base / 2, 0.5), (None, None))]
        for label, base in (("bn", 50.0), ("gn", 60.0))
    }
    return views.ClassTable(block, classes, accuracy)


def documents():
    """What is written, by file name."""
    tables, table = sheets.of_blocks(blocks()), class_table()
    classes = [sheets.of_classes(table)]
    return {
        "compare.txt": export.plain(tables),
        "compare.md": export.markdown(tables),
        "compare.tex": export.latex(tables),
        "compare.html": export.html_tables(tables),
        "compare.csv": export.as_csv(export.records(blocks())),
        "compare.json": export.as_json(blocks()),
        "classes.md": export.markdown(classes),
        "classes.tex": export.latex(classes),
        "classes.csv": export.as_csv(export.class_records([table])),
    }


@pytest.mark.parametrize("name", documents())
def test_a_format_is_as_it_was(name):
    was = (GOLDEN / name).read_text(encoding="utf-8")
    assert known(documents()[name]) == known(was), (
        "if the change is meant: python tests/test_export.py"
    )


def known(text: str) -> str:
    """Numbers to ten digits: the last ones are those of a machine's logarithm."""
    return re.sub(r"\d+\.\d{11,}(e[-+]\d+)?", lambda number: f"{float(number[0]):.10g}", text)


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_formats_for_programs_agree_with_each_other():
    from_csv, from_json = (
        rows_of(documents()["compare.csv"]),
        json.loads(documents()["compare.json"])["rows"],
    )
    assert len(from_csv) == len(from_json) == 5
    for ours, theirs in zip(from_csv, from_json, strict=True):
        for key, value in theirs.items():
            if isinstance(value, bool | str | list):
                continue
            assert ours[key] == ("" if value is None else str(value)), key


def test_no_cell_of_a_csv_is_a_formula():
    text = documents()["classes.csv"]
    names = {row["name"] for row in rows_of(text)}
    assert f"'{HOSTILE}" in names
    assert HOSTILE in {cells.unescape(name) for name in names}
    # Numbers below zero are numbers.
    assert any(row["tail_low"].startswith("-") for row in rows_of(documents()["compare.csv"]))


class Tags(html.parser.HTMLParser):
    """The tags of a page, each closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_has_only_its_own_tags():
    tags = Tags()
    tags.feed(documents()["compare.html"])
    tags.close()
    assert tags.open == []
    assert "script" not in tags.seen
    assert (
        HOSTILE.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace('"', "&quot;")
        in documents()["compare.html"]
    )


def test_markdown_has_as_many_cells_in_each_row():
    for name in ("compare.md", "classes.md"):
        for table in documents()[name].split("**\n\n")[1:]:
            rows = [line for line in table.splitlines() if line.startswith("|")]
            widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
            assert len(widths) == 1, rows


def compiled(text, tmp_path):
    document = (
        "\\documentclass{article}\n\\usepackage[utf8]{inputenc}\n\\usepackage[T1]{fontenc}\n"
        f"\\usepackage{{booktabs,graphicx}}\n\\begin{{document}}\n{text}\n\\end{{document}}\n"
    )
    (tmp_path / "paper.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
@pytest.mark.parametrize("name", ["compare.tex", "classes.tex"])
def test_latex_compiles(name, tmp_path):
    text = documents()[name].replace("鳥", "")  # letters that are not Latin need another engine
    done = compiled(text, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 1000


# What of TeX a piece of text may hold: an escaped sign, a known command, or plain letters.
SAFE = re.compile(
    r"(?:\\[&%$#_{}]|\\(?:text\w+|dots)\{\}|\$\\(?:pm|Delta|times|cdot)\$|\$-\$|[^\\&%$#_{}~^])*"
)


@given(st.text())
def test_latex_text_has_no_sign_that_is_a_command(text):
    assert SAFE.fullmatch(export.latex_text(text))


@given(st.lists(st.text(min_size=1), min_size=2, max_size=4))
def test_a_row_of_latex_and_of_markdown_has_its_cells(row):
    assert len(re.findall(r"(?<!\\)&", export._latex_row(row))) == len(row) - 1
    assert len(re.findall(r"(?<!\\)\|", export._markdown_row(row))) == len(row) + 1
    assert "\n" not in export._markdown_row(row)


def test_rows_of_the_literature_are_set_off():
    table = sheets.of_blocks(blocks())[0]
    assert [table.rows[i][:3] for i in table.apart] == [["bn · A & B's paper", "5", "70.36"]]
    lines = documents()["compare.tex"].splitlines()
    place = next(i for i, line in enumerate(lines) if "B's paper" in line)
    assert lines[place - 1] == r"\midrule"
    assert 'class="published"' in documents()["compare.html"]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, text in documents().items():
        (GOLDEN / name).write_text(text, encoding="utf-8")
        print(GOLDEN / name)
