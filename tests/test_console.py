import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ltnorm.console import Grid, _width, grid

CELL = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12).map(str.strip)


def shown(renderable, width=200):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(renderable)
    return [line.rstrip() for line in console.file.getvalue().rstrip().splitlines()]


@st.composite
def tables(draw):
    rows = draw(st.integers(1, 4))
    cells = st.lists(CELL, min_size=rows, max_size=rows)
    columns = draw(st.lists(st.tuples(st.text("ab µ", min_size=1), cells), min_size=1, max_size=5))
    columns = [[f"{heading}.", *cells] for heading, cells in columns]
    return columns, draw(st.sets(st.integers(0, len(columns) - 1)))


@given(tables())
def test_lines_are_those_of_the_table_that_rich_draws(table):
    columns, left = table
    made = grid(columns, tuple(left))
    assert isinstance(made, Grid)
    assert shown(made) == shown(made._table([_width(column) for column in columns]))


def test_text_is_folded_where_it_is_too_wide_and_numbers_are_not():
    columns = [["setting", "a " * 40], ["n", "12345678"]]
    for width in (200, 40, 20):
        lines = shown(grid(columns), width)
        assert max(map(len, lines)) <= max(width, 36 + 2 + 8)
        assert any("12345678" in line for line in lines)
        assert len(lines) > 3


def test_the_heading_is_bold_on_a_terminal_either_way():
    for columns in ([["norm", "bn"], ["n", "3"]], [["norm", "b\nn"], ["n", "3"]]):
        console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
        console.print(grid(columns))
        assert "\x1b[1m" in console.file.getvalue().splitlines()[0]
