"""The files of a run: what is written is what is read, and a spreadsheet runs none of it."""

import csv
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_compare import result

from ltnorm.errors import LtnormError
from ltnorm.reporting import cells, schema

FORMULAS = ("=", "+", "-", "@", "\t", "\r")
# Text of any kind, and such as begins with what matters here.
TEXT = st.text() | st.text("'=+-@\t\r\n\",a1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("csv")


@given(TEXT)
def test_escaping_is_undone_and_leaves_no_formula(text):
    cell = cells.escape(text)
    assert cells.unescape(cell) == text
    assert not cell.startswith(FORMULAS)
    if not text.lstrip("'").startswith(FORMULAS):
        assert cell == text


@pytest.mark.parametrize("number", [-1, -1.5, None, 0, 1e-300])
def test_numbers_are_left_alone(number):
    assert cells.escape(number) is number


@given(st.lists(st.tuples(TEXT, st.integers(), st.none() | st.floats(-1e9, 1e9)), min_size=1))
def test_class_names_of_any_text_survive_the_disk(folder, classes):
    rows = [
        schema.ClassRow(i, name, images, "tail", 5, accuracy)
        for i, (name, images, accuracy) in enumerate(classes)
    ]
    schema.write_per_class(folder, rows)
    assert schema.read_per_class(folder / schema.PER_CLASS) == rows
    with (folder / schema.PER_CLASS).open(newline="") as file:
        for row in csv.DictReader(file):  # what a spreadsheet would see
            assert not row["name"].startswith(FORMULAS)


@given(TEXT.filter(bool), TEXT)
def test_a_result_with_any_text_survives_the_disk(folder, tag, dataset):
    row = dataclasses.replace(result(), tag=tag, dataset=dataset, nll=-0.5)
    schema.write_result(folder, row)
    assert schema.read_result(folder / schema.RESULT) == row


def test_the_header_is_that_of_the_docs(tmp_path):
    schema.write_per_class(tmp_path, [schema.ClassRow(0, "=1+1", 3, "head", 2, 50.0)])
    assert (tmp_path / schema.PER_CLASS).read_text() == (
        "class,name,train_images,group,eval_images,accuracy\n0,'=1+1,3,head,2,50.0\n"
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"class,name\n0,a\n",
        b"class,name,train_images,group,eval_images,accuracy\n",
        b"class,name,train_images,group,eval_images,accuracy\n0,a,3,head,2\n",
        b"class,name,train_images,group,eval_images,accuracy\n0,a,x,head,2,50\n",
        b"class,name,train_images,group,eval_images,accuracy\n0,a,3,head,2,nan\n",
        b"\xff\xfe",
    ],
)
def test_damaged_classes_are_told_with_their_path(tmp_path, content):
    path = tmp_path / schema.PER_CLASS
    path.write_bytes(content)
    with pytest.raises(LtnormError, match="per_class") as error:
        schema.read_per_class(path)
    assert "--force" in error.value.hint


def test_missing_classes_are_told(tmp_path):
    with pytest.raises(LtnormError, match="per_class"):
        schema.read_per_class(tmp_path / schema.PER_CLASS)
