"""A condition on a run, as text: `ratio == 100 and loss == "ce"`.

The grammar is a part of Python's, and the meaning is Python's where both have one. Python's parser
makes the tree; nothing is ever compiled or run. A truth value is never guessed: what is compared
must be of one kind, and what `and`, `or` and `not` join must be comparisons.
"""

import ast
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ltnorm.errors import UsageError

LONGEST = 10_000  # characters
DEEPEST = 50  # levels of `and`, `or` and `not`
LARGEST = 1000  # bits of a whole number; none larger can be a float
EXAMPLE = """for example --where 'ratio == 100 and loss == "ce"'"""
LIST = 'a list has a comma: norm in ("bn",), norm in ["bn", "gn"]'

_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
# What is written out of habit, by what stands in the text instead.
_HABITS = (
    (r"&+", "write `and` for &"),
    (r"\|+", "write `or` for |"),
    (r"(?<![=!<>:])=(?!=)", "equality is =="),
    (r"!(?!=)", "write `not` for !"),
)

LookUp = Callable[[str], Any]


@dataclass(frozen=True)
class Condition:
    """A parsed condition.

    Attributes:
        text: what was parsed.
        names: the names that it reads.
        unquoted: of names compared with another on their left, the comparison with quotes: a word
            without quotes is a name.
    """

    text: str
    names: frozenset[str]
    unquoted: dict[str, str]
    _tree: ast.expr

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Read a condition.

        Raises:
            UsageError: not a condition; it says where the mistake is.
        """
        text = re.sub(r"[\r\n]", " ", text).strip()
        if not text:
            raise UsageError("--where is empty", EXAMPLE)
        if len(text) > LONGEST:
            raise UsageError(f"--where is longer than {LONGEST} characters", EXAMPLE)
        tree = _parse(text)
        _check_truth(tree, text, DEEPEST)
        names = frozenset(_names(tree))
        return cls(text, names, dict(_unquoted(tree)), tree)

    def __call__(self, look_up: LookUp) -> bool:
        """Whether the condition holds, with the values that `look_up` has for names.

        None is a missing value: nothing is above or below it, and only None equals it. All parts
        are read, so that a mistake in one is not hidden by another.

        Raises:
            UsageError: values of two kinds are compared, text with a number.
        """
        return _truth(self._tree, look_up)


def name_of(node: ast.AST) -> str | None:
    """The name that a node is, plain or dotted; None if it is no name."""
    parts = []
    while isinstance(node, ast.Attribute):  # thousands of them are no reason to fall
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def quoted(value: Any) -> str:
    """A value as a condition has it: text in double quotes."""
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:.12g}" if isinstance(value, float) else repr(value)


def _parse(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that run into words
            return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        place = min(max(error.offset or 1, 1), len(text))
        raise _mistake(text, place, "not a condition", _habit(text)) from None
    # Null bytes and surrogates; too deep for the parser.
    except (ValueError, OverflowError, MemoryError, RecursionError):
        raise UsageError("--where cannot be read as a condition", EXAMPLE) from None


def _habit(text: str) -> str:
    """A hint at what is another language's, EXAMPLE if nothing is found."""
    plain = re.sub(r"'[^']*'|\"[^\"]*\"", "", text)
    return next((hint for habit, hint in _HABITS if re.search(habit, plain)), EXAMPLE)


def _mistake(text: str, place: int, what: str, hint: str) -> UsageError:
    near = "".join(c if c.isprintable() else "\ufffd" for c in text[place - 1 : place + 29])
    return UsageError(f"--where: {what}, at character {place}: {near}", hint)


def _refuse(node: ast.expr, text: str, what: str, hint: str = EXAMPLE) -> UsageError:
    place = len(text.encode()[: node.col_offset].decode()) + 1  # the parser counts bytes
    return _mistake(text, place, what, hint)


def _check_truth(node: ast.expr, text: str, depth: int) -> None:
    """Check what is true or false: a comparison, or those joined by and, or and not."""
    if depth == 0:
        raise _refuse(node, text, f"more than {DEEPEST} levels")
    if isinstance(node, ast.BoolOp):
        for part in node.values:
            _check_truth(part, text, depth - 1)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check_truth(node.operand, text, depth - 1)
    elif isinstance(node, ast.Compare):
        _check_comparison(node, text)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | None):
        pass
    elif name_of(node) is None:
        _check_value(node, text)
        hint = 'compare it: norm == "bn" or norm == "gn", norm in ("bn", "gn")'
        raise _refuse(node, text, "a value by itself is neither true nor false", hint)


def _check_comparison(node: ast.Compare, text: str) -> None:
    for operand in (node.left, *node.comparators):
        _check_value(operand, text)
    for comparison, right in zip(node.ops, node.comparators, strict=True):
        if isinstance(comparison, ast.Is | ast.IsNot):
            raise _refuse(right, text, "'is' is not known here", "write == or !=: tag == None")
        listed = isinstance(right, ast.Tuple | ast.List) or name_of(right)
        if isinstance(comparison, ast.In | ast.NotIn) and not listed:
            raise _refuse(right, text, "'in' needs a list", LIST)


def _check_value(node: ast.expr, text: str, in_list: bool = False) -> None:
    """Check what can be compared: a name, text, a number, True, False, None, or a list."""
    node = node.operand if _negative(node) else node
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bool | int | float | None):
        if isinstance(node.value, int) and node.value.bit_length() > LARGEST:
            raise _refuse(node, text, "a number too large")
        return
    if name_of(node) is not None and not in_list:
        return
    if isinstance(node, ast.Tuple | ast.List) and not in_list:
        for item in node.elts:
            _check_value(item, text, in_list=True)
        return
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        raise _refuse(node, text, "& and | are not known here", _habit(text))
    allowed = "numbers and text in quotes" if in_list else "names, numbers, text in quotes, lists"
    what = f"only {allowed} can stand {'in a list' if in_list else 'here'}"
    raise _refuse(node, text, what, _quote_hint(node, text))


def _quote_hint(node: ast.expr, text: str) -> str:
    """Names such as balanced-softmax read as a difference without quotes, as bn does in a list."""
    source = ast.get_source_segment(text, node) or ""
    if re.fullmatch(r"[A-Za-z][\w./+-]*", source):
        return f'text stands in quotes: "{source}"'
    return EXAMPLE


def _negative(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
        and type(node.operand.value) in (int, float)
    )


def _names(node: ast.AST) -> Iterator[str]:
    if name := name_of(node):
        yield name
        return
    for child in ast.iter_child_nodes(node):
        yield from _names(child)


def _unquoted(tree: ast.expr) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = zip([node.left, *node.comparators], node.comparators, strict=False)
            for left, right in sides:
                if (name := name_of(right)) and (first := name_of(left)):
                    yield name, f'{first} == "{name}"'


def _truth(node: ast.expr, look_up: LookUp) -> bool:
    if isinstance(node, ast.BoolOp):
        parts = [_truth(part, look_up) for part in node.values]
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if isinstance(node, ast.UnaryOp):
        return not _truth(node.operand, look_up)
    if isinstance(node, ast.Compare):
        pairs = zip([node.left, *node.comparators], node.ops, node.comparators, strict=False)
        links = [_compare(*pair, look_up) for pair in pairs]
        return all(links)
    value = _value(node, look_up)
    if value is None or isinstance(value, bool):
        return bool(value)
    name = name_of(node)
    raise UsageError(
        f"--where: {name} is {_kind(value)}, neither true nor false",
        f"compare it, for example {name} == {quoted(value)}",
    )


def _compare(left: ast.expr, comparison: ast.cmpop, right: ast.expr, look_up: LookUp) -> bool:
    a, b = _value(left, look_up), _value(right, look_up)
    if isinstance(comparison, ast.In | ast.NotIn):
        return _contains(left, a, right, b) is isinstance(comparison, ast.In)
    _check_kinds(left, a, right, b)
    if isinstance(comparison, ast.Eq | ast.NotEq):
        return (a == b) is isinstance(comparison, ast.Eq)
    if a is None or b is None:
        return False
    if isinstance(a, tuple | bool):
        raise UsageError(
            f"--where: {_shown(left, a)} and {_shown(right, b)} have no order", "compare with =="
        )
    return _ORDER[type(comparison)](a, b)


def _contains(left: ast.expr, a: Any, right: ast.expr, b: Any) -> bool:
    if b is None:
        return False
    if isinstance(b, tuple):
        for item in b:
            _check_kinds(left, a, right, item)
        return a in b
    if not isinstance(b, str):
        raise UsageError(
            f"--where: {_shown(right, b)} is {_kind(b)}, nothing is in it",
            LIST,
        )
    _check_kinds(left, a, right, b)
    return a is not None and a in b


def _value(node: ast.expr, look_up: LookUp) -> Any:
    """The value of an operand; lists are tuples."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, look_up)
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_value(item, look_up) for item in node.elts)
    value = look_up(name_of(node) or "")
    return tuple(value) if isinstance(value, list) else value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "True or False"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, tuple) else "a number"


def _check_kinds(left: ast.expr, a: Any, right: ast.expr, b: Any) -> None:
    """Refuse to compare two kinds: Python finds them unequal, and nothing would be selected."""
    if a is None or b is None or _kind(a) == _kind(b):
        return
    node, value, other = (left, a, b) if name_of(left) else (right, b, a)
    name = name_of(node) or quoted(value)
    example = f"for example {name} == {quoted(value)}"
    raise UsageError(f"--where: {name} is {_kind(value)}, {quoted(other)} is not", example)


def _shown(node: ast.expr, value: Any) -> str:
    return name_of(node) or quoted(value)
