"""Conditions agree with Python's own meaning, refuse everything else, and find what runs have."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compare import result

from ltnorm import resolve as recipes
from ltnorm.errors import LtnormError, NothingFound, UsageError
from ltnorm.reporting import labels, schema, where
from ltnorm.reporting.condition import DEEPEST, LONGEST, Condition
from ltnorm.resolve import Overrides

# Names by kind; of the two that a name of each kind can be, the second looks like another's.
NUMBERS = {"ratio": 100.0, "seed": 3, "train.lr": 0.1, "negative": -2.5}
TEXTS = {"loss": "ce", "norm": "compound", "tag": "a b", "odd": "é'\"\\"}
TRUTHS = {"norm.dual_path": True, "train.nesterov": False}
VALUES = NUMBERS | TEXTS | TRUTHS


def name_or_literal(names, literals):
    """A pair: how it is written here, and how Python must write it for a dict `v`."""
    named = st.sampled_from(sorted(names)).map(lambda n: (n, f"v[{n!r}]"))
    return st.one_of(named, literals.map(lambda x: (repr(x), repr(x))))


numbers = name_or_literal(
    NUMBERS,
    st.one_of(
        st.integers(-(10**20), 10**20),
        st.sampled_from([100, 100.0, 0.1, -2.5, 3]),
        st.floats(allow_nan=False, allow_infinity=False),
    ),
)
texts = name_or_literal(TEXTS, st.one_of(st.sampled_from(["ce", "a b", "comp"]), st.text()))
truths = name_or_literal(TRUTHS, st.booleans())


def joined(parts, glue):
    return tuple(glue.join(side) for side in zip(*parts, strict=True))


@st.composite
def comparisons(draw):
    kind, operators = draw(
        st.sampled_from(
            [
                (numbers, ["==", "!=", "<", "<=", ">", ">="]),
                (texts, ["==", "!=", "<", "<=", ">", ">="]),
                (truths, ["==", "!="]),
            ]
        )
    )
    parts = [draw(kind)]
    for _ in range(draw(st.integers(1, 3))):
        operator = draw(st.sampled_from(operators))
        parts += [(operator, operator), draw(kind)]
    return joined(parts, " ")


@st.composite
def memberships(draw):
    kind, literals = draw(st.sampled_from([(numbers, st.integers(0, 200)), (texts, st.text())]))
    items = draw(st.lists(literals, max_size=4))
    listed = repr(draw(st.sampled_from([list, tuple]))(items))
    operator = draw(st.sampled_from(["in", "not in"]))
    return joined([draw(kind), (operator, operator), (listed, listed)], " ")


@st.composite
def substrings(draw):
    name = draw(st.sampled_from(sorted(TEXTS)))
    return joined([draw(texts), ("in", "in"), (name, f"v[{name!r}]")], " ")


leaves = st.one_of(comparisons(), memberships(), substrings(), truths)
conditions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda p: joined(p, " and ")),
        st.lists(inner, min_size=2, max_size=3).map(lambda p: joined(p, " or ")),
        inner.map(lambda p: (f"not ({p[0]})", f"not ({p[1]})")),
        inner.map(lambda p: (f"({p[0]})", f"({p[1]})")),
    ),
    max_leaves=8,
)


@settings(max_examples=120)
@given(conditions)
def test_a_condition_means_what_python_means(pair):
    ours, pythons = pair
    assert Condition.parse(ours)(VALUES.__getitem__) == bool(eval(pythons, {"v": VALUES}))


ALPHABET = "ab.()[]'\"=<>!&|,-+*:{}#\\\n\x00 0123456789 notandi"
KNOWN = where.known_names()


@settings(max_examples=120)
@given(st.one_of(st.text(), st.text(alphabet=ALPHABET)))
def test_garbage_is_a_usage_error_and_nothing_else(text):
    told = None
    try:
        condition = Condition.parse(text)
        where.check(condition, KNOWN)
        condition(dict.fromkeys(condition.names).__getitem__)
    except UsageError as error:
        told = error
    assert told is None or (told.message and told.hint and "\n" not in told.message)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "().__class__",
        "''.__class__.__mro__[1] == 1",
        "ratio.__class__() == 1",
        "9**9**9**9 == 1",
        '"a"*10**9 == norm',
        "0x" + "f" * 5000 + " == ratio",
        "9" * 5000 + " == ratio",
        "ratio == -" + "9" * 400,
        "(" * 4000 + "ratio" + ")" * 4000,
        "not " * 2400 + "True",
        "-" * 9000 + "1 == ratio",
        "ratio" + ".a" * 4500 + " == 1",
        "1" + "+1" * 4900 + " == ratio",
        "[" * 90 + "]" * 90 + " == ratio",
        "ratio == 1\x00",
        "\udcff == 1",
        "norm == '\udcff",
        "lambda: 1",
        "[r for r in (1, 2)] == 1",
        "(x := 1) == 1",
        'f"{ratio}" == "1"',
        "ratio[0] == 1",
        "1j == ratio",
        "b'a' == norm",
        "... == ratio",
        "{1: 2} == ratio",
        "ratio if True else seed",
        "ratio == 1 " + "or ratio == 1 " * 1000,
        "import os",
        "ratio == 1; seed == 1",
        "await ratio",
        "*ratio",
        "",
        "  \n ",
    ],
    ids=lambda text: text[:20].encode("ascii", "replace").decode(),
)
def test_attacks_are_usage_errors(text):
    with pytest.raises(UsageError):
        Condition.parse(text)


@pytest.mark.parametrize("text", ["int(seed)", "int(seed) == 1", "().__class__", "seed + 1"])
def test_what_stands_where_a_name_must_is_told_as_such(text):
    with pytest.raises(UsageError, match="can stand here, at character 1"):
        Condition.parse(text)


def test_what_is_long_or_deep_within_bounds_is_read():
    long = " or ".join(["ratio == 1"] * (LONGEST // 14))
    assert not Condition.parse(long)(NUMBERS.__getitem__)
    deep = "not " * (DEEPEST - 2) + "seed == 3"
    assert Condition.parse(deep)(NUMBERS.__getitem__)


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("ratio = 100", None, "=="),
        ('norm == "=" and ratio = 100', None, "=="),
        ("ratio == 100 & loss == 1", 10, "`and`"),
        ("ratio == 100 && loss == 1", None, "`and`"),
        ("ratio == 100 | loss == 1", 10, "`or`"),
        ("! nesterov", None, "`not`"),
        ("loss == balanced-softmax", 9, '"balanced-softmax"'),
        ("model == timm/resnet26", 10, '"timm/resnet26"'),
        ("norm in (bn, gn)", 10, '"bn"'),
        ('norm in ("bn")', 10, '("bn",)'),
        ("ratio in 100", 10, '("bn",)'),
        ("tag is None", 8, "=="),
        ('norm == "bn" or "gn"', 17, 'norm in ("bn", "gn")'),
        ("tag == 'é' and int(seed) == 1", 16, "for example"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_how_to_mend_it(text, place, hint):
    with pytest.raises(UsageError) as error:
        Condition.parse(text)
    assert hint in error.value.hint
    assert "character" in error.value.message
    if place:
        assert f"character {place}:" in error.value.message


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("ratio < 1", False),
        ("ratio >= 1", False),
        ("not ratio < 1", True),
        ("ratio == None", True),
        ("ratio != 100", True),
        ("ratio in (1, 2)", False),
        ("ratio not in (1, 2)", True),
        ("ratio in (None, 2)", True),
        ('"a" in ratio', False),
        ("ratio", False),
        ("None < 1", False),
    ],
)
def test_a_missing_value_is_neither_above_nor_below(text, answer):
    assert Condition.parse(text)({"ratio": None}.__getitem__) is answer


@pytest.mark.parametrize(
    ("text", "told", "hint"),
    [
        ('ratio == "100"', "ratio is a number", "ratio == 100"),
        ('"100" != ratio', "ratio is a number", "ratio == 100"),
        ('ratio < "x"', "ratio is a number", "ratio == 100"),
        ("norm == 3", "norm is text", 'norm == "compound"'),
        ("norm in (1, 2)", "norm is text", 'norm == "compound"'),
        ("norm == ratio", "norm is text", 'norm == "compound"'),
        ("norm.dual_path == 1", "norm.dual_path is True or False", "norm.dual_path == True"),
        ("train.betas == 0.9", "train.betas is a list", "(0.9, 0.999)"),
        ('"bn" in ratio', "ratio is a number", "a list has a comma"),
        ("train.betas < train.betas", "no order", "=="),
        ("norm", "norm is text", 'norm == "compound"'),
        ("ratio == 1 and norm == 3", "norm is text", 'norm == "compound"'),
        ("ratio == 100 or norm == 3", "norm is text", 'norm == "compound"'),
    ],
)
def test_kinds_that_never_agree_are_told_not_answered(text, told, hint):
    values = VALUES | {"train.betas": [0.9, 0.999]}
    with pytest.raises(UsageError) as error:
        Condition.parse(text)(values.__getitem__)
    assert told in error.value.message
    assert hint in error.value.hint


def test_lists_are_compared_whole_and_searched():
    values = {"train.betas": [0.9, 0.999]}
    for text in ("== (0.9, 0.999)", "== [0.9, 0.999]", "!= (0.9,)"):
        assert Condition.parse(f"train.betas {text}")(values.__getitem__)
    assert Condition.parse("0.9 in train.betas")(values.__getitem__)


@pytest.fixture
def runs(tmp_path):
    """Runs on disk as training leaves them: bn and compound, two ratios, one second stage."""
    made = []
    for i, (norm, flags, sets) in enumerate(
        [
            ("bn", {"dataset.ratio": 10}, []),
            ("bn", {"retrain.method": "crt", "retrain.epochs": 5}, []),
            ("compound", {}, ["norm.components=4", "train.lr=0.2"]),
            ("compound", {"loss.name": "ldam", "tag": "t1", "workers": 2}, []),
        ]
    ):
        [recipe] = recipes.resolve({}, Overrides(flags, sets, [norm], [0]))
        directory = tmp_path / str(i)
        directory.mkdir()
        row = dataclasses.replace(result(norm, sets=sets, flags=flags), tag=recipe.tag)
        schema.write_result(directory, row)
        (directory / schema.RECIPE).write_text(recipe.to_yaml())
        made.append(schema.Run(schema.read_result(directory / schema.RESULT), directory))
    return made


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("ratio==100", [1, 2, 3]),
        ('ratio==10 or loss=="ldam"', [0, 3]),
        ('norm == "compound"', [2, 3]),
        ('norm.name == "compound"', [2, 3]),
        ("norm.components == 4", [2]),
        ("norm.components == None", [0, 1]),
        ("norm.components > 0", [2, 3]),
        ("norm.dual_path", [2, 3]),
        ("train.lr == 0.2", [2]),
        ("train.momentum == 0.9", [0, 1, 2, 3]),
        ("train.milestones == [0.8, 0.9]", [0, 1, 2, 3]),
        ("retrain == None", [0, 2, 3]),
        ("retrain.epochs == 5", [1]),
        ("retrain.epochs != 5", [0, 2, 3]),
        ("retrain.lr == 0.1", [1]),
        ('loss.max_margin == 0.5 and tag == "t1"', [3]),
        ("workers == 2", [3]),
        ("eval.every == 0 and tail < 50", [0, 1, 2, 3]),
        ('norm in ("bn",) and retrain != None', [1]),
        ('"components" in norm_options', [2]),
    ],
)
def test_runs_are_selected_by_columns_settings_and_recipes(runs, text, chosen):
    assert [runs.index(run) for run in where.select(runs, Condition.parse(text))] == chosen


def test_a_recipe_is_read_only_if_it_is_needed_and_once_a_setting(runs, monkeypatch):
    read = []
    monkeypatch.setattr(where, "_read", lambda run: read.append(run) or {})
    where.select(
        runs, Condition.parse('ratio == 100 and norm.name == "bn" and dataset.name == "synthetic"')
    )
    assert read == []
    where.select([*runs, *runs], Condition.parse("train.momentum == 0.9"))
    assert read == runs


def test_a_key_younger_than_the_run_has_its_default(runs):
    path = runs[1].directory / schema.RECIPE
    lines = path.read_text().splitlines()
    younger = [line for line in lines if "crop:" not in line and "tau:" not in line]
    assert len(lines) - len(younger) >= 2
    path.write_text("\n".join(younger))
    assert (
        where.select(runs[1:2], Condition.parse('train.crop == "auto" and retrain.tau == None'))
        == runs[1:2]
    )


@pytest.mark.parametrize("damage", [None, "{", "[]", b"\xff\xfe"])
def test_a_recipe_that_is_needed_and_damaged_is_named(runs, damage):
    path = runs[0].directory / schema.RECIPE
    path.unlink()
    if damage is not None:
        path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert where.select(runs, Condition.parse("ratio == 10")) == runs[:1]
    with pytest.raises(LtnormError) as error:
        where.select(runs, Condition.parse("norm.components == 4"))
    assert str(path) in error.value.message
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("rati == 100", "did you mean 'ratio'"),
        ("train.learn == 1", "did you mean 'train.lr'"),
        ("optim.lr == 1", "train.lr"),
        ("momentum == 0.9", "train.momentum"),
        ("norm.componets == 1", "did you mean 'norm.components'"),
        ("norm.max_margin == 1", "norm.components"),
        ("train == 1", "choose from"),
        ("loss == ce", 'text stands in quotes: loss == "ce"'),
        ("norm.dual_path == true", "write True"),
        ("__class__ == 1", "choose from"),
        ("norm.__class__ == 1", "norm.components"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(runs, text, hint):
    with pytest.raises(UsageError) as error:
        where.select(runs, Condition.parse(text))
    assert hint in error.value.hint
    assert error.value.exit_code == 2


def test_nothing_selected_tells_what_there_is(runs):
    with pytest.raises(NothingFound) as error:
        where.select(runs, Condition.parse('ratio == 50 and norm == "bn"'))
    assert "none of 4 runs" in error.value.message
    assert error.value.hint == "ratio is 10, 100 in them"
    assert error.value.exit_code == 3
    with pytest.raises(NothingFound) as error:
        where.select(runs, Condition.parse('tag == "t2"'))
    assert error.value.hint == 'tag is "t1", None in them'
    many = [
        dataclasses.replace(run, result=dataclasses.replace(run.result, tail=float(i)))
        for i, run in enumerate(runs * 3)
    ]
    with pytest.raises(NothingFound) as error:
        where.select(many, Condition.parse("tail > 99"))
    assert error.value.hint == "tail is from 0 to 11 in them"


def test_names_of_settings_are_those_that_training_writes(runs):
    for run in runs:
        flat = labels.flatten(json.loads(run.result.settings))
        fixed = {key for key in flat if not where._is_option(key)}
        assert fixed <= where.known_names()
