"""What a recipe is judged by: an arithmetic expression over its recorded measures, such as `-fid - 150 * avg_bits`.

The text comes from a command line or a file, so it is read by a small grammar and never executed:

    sum      = product {("+" | "-") product}
    product  = signed {("*" | "/") signed}
    signed   = "-" signed | atom
    atom     = number | measure | "(" sum ")" | function "(" sum {"," sum} ")"

Precedence, grouping from the left and results are those of Python's floats. Higher values mean better recipes.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

from sedimo.errors import InputError

MAX_LENGTH = 200
MAX_DEPTH = 20
BITS_NAMES = ("avg_bits", "paper_bits")  # one measure: the word of Qua2SeDiMo, and that of the records

_FUNCTIONS = {"log10": 1, "sqrt": 1, "min": 2, "max": 2}  # and their numbers of arguments
_COMPUTE: dict[str, Callable[..., float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "negative": operator.neg,
    "log10": math.log10,
    "sqrt": math.sqrt,
    "min": min,
    "max": max,
}
_LEVELS: dict[str, int] = {"+": 1, "-": 1, "*": 2, "/": 2, "negative": 3}  # 4: binds most tightly
_ALLOWED = "Use measures, numbers, + - * /, parentheses, log10(x), sqrt(x), min(a, b) and max(a, b)."
_TOKEN = re.compile(r"\s*(?:((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|([A-Za-z_][A-Za-z0-9_]*)|([-+*/(),]))")


@dataclass(frozen=True, slots=True)
class _Number:
    value: float  # finite and not negative: a minus is an operation


@dataclass(frozen=True, slots=True)
class _Measure:
    name: str


@dataclass(frozen=True, slots=True)
class _Operation:
    symbol: str  # a key of _COMPUTE
    arguments: tuple[_Node, ...]


_Node: TypeAlias = _Number | _Measure | _Operation


@dataclass(frozen=True, slots=True)
class Target:
    """An expression over measures. Its text reads back as an equal target.

    Example:
        >>> Target.parse("-fid-150*avg_bits").value({"fid": 20.0, "avg_bits": 4.0})
        -620.0

    Raises:
        InputError: the expression has no text within the limits that reads back as it.
    """

    expression: _Node

    def __post_init__(self) -> None:
        """Refuses what could not be stored as text."""
        text = str(self)
        if _read(text) != self.expression:
            raise InputError(f"the target {text!r} does not read back as it is. Make targets with Target.parse.")

    def __str__(self) -> str:
        """The canonical text: single spaces, only the parentheses that are needed."""
        return _text(self.expression)

    @classmethod
    def parse(cls, text: str) -> Target:
        """The target that the text describes.

        Raises:
            InputError: the text is no expression, longer than 200 characters (as given, or with canonical spaces),
                or nested deeper than 20.
        """
        return cls(_read(text))

    @property
    def names(self) -> frozenset[str]:
        """The measures that the expression uses, as they are written in it."""
        return _names(self.expression)

    def value(self, measures: Mapping[str, float]) -> float:
        """The target's value for a recipe with these measures; `avg_bits` and `paper_bits` stand for each other.

        Raises:
            InputError: a measure is missing or not finite, or a step of the computation has no finite result.
        """
        return _evaluate(self.expression, {name: self._find(name, measures) for name in sorted(self.names)})

    def split_bits(self) -> tuple[Target, float]:
        """The target without its term in `avg_bits` (or `paper_bits`), and the coefficient of that term.

        A search within a budget of bits needs the first and keeps the second out: the budget pays for bits.

        Example:
            >>> rest, coefficient = Target.parse("-fid - 150 * avg_bits").split_bits()
            >>> str(rest), coefficient
            ('-fid', -150.0)

        Raises:
            InputError: bits do not enter as number * avg_bits, added to the rest.
        """
        rest, coefficient = _split(self.expression)
        if not math.isfinite(coefficient):
            raise InputError(f"the coefficient of avg_bits must be finite, got {coefficient} in the target '{self}'")
        return Target(_Number(0.0) if rest is None else rest), coefficient

    def _find(self, name: str, measures: Mapping[str, float]) -> float:
        same = (name, *BITS_NAMES) if name in BITS_NAMES else (name,)
        found = next((float(measures[n]) for n in same if n in measures), None)
        if found is None:
            there = f"There are {', '.join(sorted(measures))}." if measures else "There are none."
            raise InputError(f"the target '{self}' needs the measure {name!r}, which is not recorded. {there}")
        if not math.isfinite(found):
            raise InputError(f"the target '{self}' needs finite measures, got {name}={found}. Leave the recipe out.")
        return found


class _Reader:
    """The tokens of a text, and how far they are read."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._end = len(text.rstrip())
        self._depth = 0
        self._start = 0  # of the token that is next
        self._after = 0
        self._number = self._name = self._sign = ""
        self._advance()

    def read(self) -> _Node:
        node = self._sum()
        if self._start < self._end:
            self._fail("an operator or the end is needed")
        return node

    def _sum(self) -> _Node:
        node = self._product()
        while symbol := self._take("+-"):
            node = _Operation(symbol, (node, self._product()))
        return node

    def _product(self) -> _Node:
        node = self._signed()
        while symbol := self._take("*/"):
            node = _Operation(symbol, (node, self._signed()))
        return node

    def _signed(self) -> _Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail(f"signs, parentheses and functions may be nested {MAX_DEPTH} deep")
        node = _Operation("negative", (self._signed(),)) if self._take("-") else self._atom()
        self._depth -= 1
        return node

    def _atom(self) -> _Node:
        if self._number:
            if math.isinf(number := float(self._number)):
                self._fail("a number must be finite")
            self._advance()
            return _Number(number)
        if self._name:
            name = self._name
            if name in _FUNCTIONS:
                return self._function()
            self._advance()
            if self._sign == "(":
                self._fail(f"{name!r} is no function")
            return _Measure(name)
        if not self._take("("):
            self._fail("a number, a measure or an opening parenthesis is needed")
        node = self._sum()
        self._close()
        return node

    def _function(self) -> _Node:
        name = self._name
        self._advance()
        if not self._take("("):
            self._fail(f"the function {name} needs its arguments in parentheses")
        arguments = [self._sum()]
        for _ in range(1, _FUNCTIONS[name]):
            if not self._take(","):
                self._fail(f"{name} takes {_FUNCTIONS[name]} arguments, a comma is needed")
            arguments.append(self._sum())
        self._close()
        return _Operation(name, tuple(arguments))

    def _close(self) -> None:
        if not self._take(")"):
            self._fail("a closing parenthesis is needed")

    def _take(self, signs: str) -> str:
        """Reads on if one of the signs is next, and tells which it is; empty if none is."""
        sign = self._sign
        if not sign or sign not in signs:
            return ""
        self._advance()
        return sign

    def _advance(self) -> None:
        self._start = self._end - len(self._text[self._after : self._end].lstrip())
        match = _TOKEN.match(self._text, self._after)
        if match is None and self._start < self._end:
            self._fail("no such character is known")
        self._number, self._name, self._sign = (part or "" for part in match.groups()) if match else ("", "", "")
        self._after = match.end() if match else self._end

    def _fail(self, rule: str) -> NoReturn:
        found = repr(self._text[self._start]) if self._start < self._end else "the end"
        raise InputError(
            f"cannot read the target {self._text!r}: {rule}, got {found} at character {self._start + 1}. {_ALLOWED}"
        )


def _read(text: str) -> _Node:
    if len(text) > MAX_LENGTH:
        raise InputError(
            f"a target has at most {MAX_LENGTH} characters, with one space around each sign, got {len(text)}: "
            f"{text[:40]!r}... Shorten it."
        )
    return _Reader(text).read()


def _text(node: _Node) -> str:
    if isinstance(node, _Number):
        return repr(node.value).removesuffix(".0")
    if isinstance(node, _Measure):
        return node.name
    if node.symbol in _FUNCTIONS:
        return f"{node.symbol}({', '.join(map(_text, node.arguments))})"
    level = _LEVELS[node.symbol]
    if node.symbol == "negative":
        return f"-{_enclosed(node.arguments[0], level)}"
    left, right = node.arguments
    return f"{_enclosed(left, level)} {node.symbol} {_enclosed(right, level + 1)}"


def _enclosed(node: _Node, level: int) -> str:
    """The text, in parentheses where it binds less tightly than `level`."""
    is_loose = isinstance(node, _Operation) and _LEVELS.get(node.symbol, 4) < level
    return f"({_text(node)})" if is_loose else _text(node)


def _names(node: _Node) -> frozenset[str]:
    if isinstance(node, _Measure):
        return frozenset([node.name])
    return frozenset().union(*map(_names, node.arguments)) if isinstance(node, _Operation) else frozenset()


def _evaluate(node: _Node, measures: Mapping[str, float]) -> float:
    if isinstance(node, _Number):
        return node.value
    if isinstance(node, _Measure):
        return measures[node.name]
    values = [_evaluate(argument, measures) for argument in node.arguments]
    try:
        result = _COMPUTE[node.symbol](*values)
    except (ArithmeticError, ValueError):
        result = math.nan
    if not math.isfinite(result):
        raise InputError(
            f"'{_text(node)}' has no finite value: {node.symbol} of {' and '.join(f'{v:g}' for v in values)}. "
            "Leave the recipe out, or change the target."
        )
    return result


def _split(node: _Node) -> tuple[_Node | None, float]:
    """`node` as rest + coefficient * bits; no rest is None."""
    if isinstance(node, _Measure) and node.name in BITS_NAMES:
        return None, 1.0
    if _names(node).isdisjoint(BITS_NAMES):
        return node, 0.0
    if isinstance(node, _Operation) and node.symbol in ("+", "-", "negative"):
        return _split_sum(node)
    if isinstance(node, _Operation) and node.symbol in ("*", "/"):
        return _split_product(node)
    raise _not_linear(node)


def _split_sum(node: _Operation) -> tuple[_Node | None, float]:
    if node.symbol == "negative":
        rest, coefficient = _split(node.arguments[0])
        return _negative(rest), -coefficient
    (left, a), (right, b) = map(_split, node.arguments)
    coefficient = a + b if node.symbol == "+" else a - b
    if left is None:
        return (right if node.symbol == "+" else _negative(right)), coefficient
    return (left if right is None else _Operation(node.symbol, (left, right))), coefficient


def _negative(node: _Node | None) -> _Node | None:
    return None if node is None else _Operation("negative", (node,))


def _split_product(node: _Operation) -> tuple[_Node | None, float]:
    """Bits times or divided by a plain number."""
    left, right = node.arguments
    if not _names(right):
        (rest, coefficient), number = _split(left), right
        scaled = None if rest is None else _Operation(node.symbol, (rest, number))
    elif node.symbol == "*" and not _names(left):
        (rest, coefficient), number = _split(right), left
        scaled = None if rest is None else _Operation("*", (number, rest))
    else:
        raise _not_linear(node)
    factor = _evaluate(number, {})
    if node.symbol == "/" and factor == 0:
        raise _not_linear(node)
    return scaled, coefficient * factor if node.symbol == "*" else coefficient / factor


def _not_linear(node: _Node) -> InputError:
    return InputError(
        f"bits must enter a target as number * avg_bits, added to the rest, got '{_text(node)}'. "
        "Write it as in '-fid - 150 * avg_bits'."
    )
