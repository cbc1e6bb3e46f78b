import codecs
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltnorm.data.entries import parse
from ltnorm.errors import UsageError


def parsed(folder, content):
    file = folder / "list.txt"
    file.write_bytes(content)
    entries = parse(file)
    return list(zip(entries.paths, entries.labels.tolist(), strict=True))


EXPECTED = [("a b/x 1.jpg", 0), ("c.jpg", 12)]


@pytest.mark.parametrize(
    "content",
    [
        b"a b/x 1.jpg 0\nc.jpg 12\n",
        b"a b/x 1.jpg\t0\nc.jpg\t12",
        b"a b/x 1.jpg,0\nc.jpg, 12\n",
        b"a b/x 1.jpg   0\r\nc.jpg 12 \r\n",
        b"# head\n\n  a b/x 1.jpg 0\n \t\nc.jpg 012\n#c.jpg 3\n",
        codecs.BOM_UTF8 + b"a b\\x 1.jpg 0\n.\\c.jpg 12\n",
        b"./a b/x 1.jpg 0\n././c.jpg 12\n",
        b"a b//x 1.jpg 0\n./c.jpg 12\n",
        b"a b/./x 1.jpg 0\nc.jpg 12\n",
    ],
)
def test_forms_of_a_line(tmp_path, content):
    assert parsed(tmp_path, content) == EXPECTED


def test_only_line_feeds_end_lines(tmp_path):
    odd = "a\x0bb\x1c\u2028\x85.jpg"
    assert parsed(tmp_path, f"{odd} 1\n".encode()) == [(odd, 1)]


def test_bytes_that_are_no_text_survive(tmp_path):
    [(path, _)] = parsed(tmp_path, b"caf\xe9/1.jpg 0\n")
    assert os.fsencode(path) == b"caf\xe9/1.jpg"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"a.jpg", "no number"),
        (b"a.jpg one", "no number"),
        (b"a.jpg -1", "no number"),
        (b"a.jpg 1.0", "no number"),
        (b"a.jpg1", "no number"),
        (b"cat/12", "no number"),
        ("a.jpg \u0663".encode(), "no number"),
        (b"7", "no number"),
        (b"/ 7", "absolute"),
        (b", 7", "no file"),
        (b"cat/ 7", "no file"),
        (b"./ 7", "no file"),
        (b"a.jpg 12345678901", "digits"),
        (b"/etc/a.jpg 1", "absolute"),
        (b"\\\\server\\a.jpg 1", "absolute"),
        (b"C:\\a.jpg 1", "absolute"),
        (b"../a.jpg 1", "leaves the root"),
        (b"a/../../b.jpg 1", "leaves the root"),
        (b"a\\..\\b.jpg 1", "leaves the root"),
        (b"a\0.jpg 1", "zero byte"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, what):
    with pytest.raises(UsageError, match=re.escape(what)) as caught:
        parsed(tmp_path, b"# fine\nok.jpg 0\n" + line + b"\nok2.jpg 0\n" + line + b"\n")
    file = tmp_path / "list.txt"
    assert caught.value.message.startswith(f"{file}:3: ")
    assert caught.value.message.endswith("(and 1 more)")
    assert "path label" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"\n# nothing\n"])
def test_an_empty_list(tmp_path, content):
    with pytest.raises(UsageError, match="lists no images"):
        parsed(tmp_path, content)


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_list_that_cannot_be_read(tmp_path, name):
    with pytest.raises(UsageError, match=re.escape(f"cannot read {tmp_path / name}")):
        parse(tmp_path / name)


# A step of a path in normal form; at its ends no blanks, which separate, and no comma.
STEP = st.text(
    st.characters(exclude_characters="/\\\n\r\0", exclude_categories=("Cs",)), min_size=1
).filter(lambda s: s.strip(" \t,") == s and s not in (".", "..") and s[0] not in "#\ufeff")
PATH = st.lists(STEP, min_size=1, max_size=4).map("/".join).filter(lambda p: p[1:3] != ":/")
BLANK = st.sampled_from([" ", "\t", ",", "  ", ", ", " ,", "\t "])


@settings(deadline=None, max_examples=100)
@given(
    rows=st.lists(st.tuples(PATH, st.integers(0, 999_999_999), BLANK), min_size=1),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_any_path_survives_a_round_trip(tmp_path_factory, rows, end):
    text = end.join(f"{path}{blank}{label}" for path, label, blank in rows)
    found = parsed(tmp_path_factory.getbasetemp(), text.encode())
    assert found == [(path, label) for path, label, _ in rows]
