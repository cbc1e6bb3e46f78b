"""CSV text that no spreadsheet runs, and back again exactly."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ltnorm.errors import LtnormError

# How text begins that a spreadsheet takes for a formula, or that `escape` has changed.
FORMULA = re.compile(r"'*[=+\-@\t\r]")


def escape(cell: Any) -> Any:
    """A cell that no spreadsheet runs: an apostrophe leads text that begins as a formula does.

    That is text which begins with = + - @ tab or CR, or with apostrophes and one of these, so that
    `unescape` gives the same text back. What is no text stays as it is.
    """
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def unescape(cell: str) -> str:
    """The text that `escape` was given."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV, their cells escaped; None becomes an empty cell."""
    return "".join(_line([*map(escape, row)]) for row in rows)


def _line(row: Sequence[Any]) -> str:
    buffer = io.StringIO(newline="")
    # A writer quotes a line break in a cell only if its own line ends have that character.
    csv.writer(buffer, lineterminator="\r\n").writerow(row)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def read(path: Path, hint: str) -> list[list[str]]:
    """The rows of a CSV, at least one, the header first; cells as they stand there, escaped.

    Raises:
        LtnormError: it cannot be read; `hint` says what to do then.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [*csv.reader(file)] or [[]]
    except FileNotFoundError as error:
        raise LtnormError(f"there is no {path}", hint) from error
    except (OSError, ValueError, csv.Error) as error:
        raise LtnormError(f"{path} is not a readable CSV: {error}", hint) from error
