"""What a recipe is judged by: an arithmetic expression over its recorded measures, such as `-fid - 150 * avg_bits`.

The text comes from a command line or a file. Python's own parser reads it and nothing executes it: all but numbers,
measures, `+ - * /`, minus signs and four functions is refused. Higher values mean better recipes.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sedimo.errors import InputError

MAX_LENGTH = 200
MAX_DEPTH = 20  # of signs and functions
BITS_NAMES = ("avg_bits", "paper_bits")  # one measure: the word of Qua2SeDiMo, and that of the records

_FUNCTIONS: dict[str, tuple[Callable[..., float], int]] = {  # and their numbers of arguments
    "log10": (math.log10, 1),
    "sqrt": (math.sqrt, 1),
    "min": (min, 2),
    "max": (max, 2),
}
_OPERATORS: dict[type[ast.operator], tuple[Callable[[float, float], float], str]] = {
    ast.Add: (operator.add, "+"),
    ast.Sub: (operator.sub, "-"),
    ast.Mult: (operator.mul, "*"),
    ast.Div: (operator.truediv, "/"),
}
_ALLOWED = "Use measures, numbers, + - * /, parentheses, log10(x), sqrt(x), min(a, b) and max(a, b)."
_UNKNOWN = re.compile(r"[^A-Za-z0-9_.+\-*/(),\s]")
_NUMBER = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Goal:
    """An expression over measures, by its canonical text: single spaces, only the parentheses that are needed.

    Example:
        >>> Goal.parse("-fid-150*avg_bits").value({"fid": 20.0, "avg_bits": 4.0})
        -620.0
    """

    text: str

    def __post_init__(self) -> None:
        if (canonical := ast.unparse(_read(self.text))) != self.text:
            raise InputError(f"the target {self.text!r} is written {canonical!r}. Make goals with Goal.parse.")

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> Goal:
        """The target that the text describes, whatever its spaces and parentheses."""
        return cls(ast.unparse(_read(text)))

    @property
    def names(self) -> frozenset[str]:
        """The measures that the expression uses, as they are written in it."""
        return _names(_read(self.text))

    def value(self, measures: Mapping[str, float]) -> float:
        """The target's value for a recipe with these measures; `avg_bits` and `paper_bits` stand for each other."""
        return _evaluate(_read(self.text), {name: self._find(name, measures) for name in sorted(self.names)})

    def split_bits(self) -> tuple[Goal, float]:
        """The target without its term in `avg_bits` (or `paper_bits`), and the coefficient of that term.

        A search within a budget of bits needs the first and keeps the second out: the budget pays for bits.

        Example:
            >>> rest, coefficient = Goal.parse("-fid - 150 * avg_bits").split_bits()
            >>> str(rest), coefficient
            ('-fid', -150.0)
        """
        rest, coefficient = _split(_read(self.text))
        if not math.isfinite(coefficient):
            raise InputError(f"the coefficient of avg_bits must be finite, got {coefficient} in the target '{self}'")
        return Goal("0" if rest is None else ast.unparse(rest)), coefficient

    def _find(self, name: str, measures: Mapping[str, float]) -> float:
        same = (name, *BITS_NAMES) if name in BITS_NAMES else (name,)
        found = next((float(measures[n]) for n in same if n in measures), None)
        if found is None:
            there = f"There are {', '.join(sorted(measures))}." if measures else "There are none."
            raise InputError(f"the target '{self}' needs the measure {name!r}, which is not recorded. {there}")
        if not math.isfinite(found):
            raise InputError(f"the target '{self}' needs finite measures, got {name}={found}. Leave the recipe out.")
        return found


def _read(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH:
        raise InputError(
            f"a target has at most {MAX_LENGTH} characters, with one space around each sign, got {len(text)}: "
            f"{text[:40]!r}... Shorten it."
        )
    line = " ".join(text.split())
    if unknown := _UNKNOWN.search(line):
        raise _refusal(line, f"no such character is known, got {unknown[0]!r}", unknown.start())
    try:
        with warnings.catch_warnings(action="error"):  # a number in front of a word is one
            tree = ast.parse(line, mode="eval").body
    except SyntaxError as error:
        place = error.offset - 1 if error.offset else len(line)
        raise _refusal(line, error.msg, place) from error
    _check(tree, line)
    return tree


def _check(node: ast.expr, line: str, depth: int = 1) -> None:
    """Refuses all that is not in the grammar; numbers become those that print without a needless `.0`."""
    if depth > MAX_DEPTH:
        raise _refusal(line, f"signs and functions may be nested {MAX_DEPTH} deep", node.col_offset)
    text = line[node.col_offset : node.end_col_offset]
    match node:
        case ast.Constant() if _NUMBER.fullmatch(text):
            number = float(text)
            if math.isinf(number):
                raise _refusal(line, "a number must be finite", node.col_offset)
            node.value = int(number) if repr(number).endswith(".0") else number
        case ast.Name(id=name) if name not in _FUNCTIONS:
            pass
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            _check(inner, line, depth + 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            _check(left, line, depth)
            _check(right, line, depth)
        case ast.Call(func=ast.Name(id=name), args=arguments) if len(arguments) == _FUNCTIONS.get(name, (0, -1))[1]:
            for argument in arguments:
                _check(argument, line, depth + 1)
        case _:
            raise _refusal(line, f"{text!r} is no arithmetic of measures", node.col_offset)


def _refusal(line: str, rule: str, place: int) -> InputError:
    return InputError(f"cannot read the target {line!r}: {rule}, at character {place + 1}. {_ALLOWED}")


def _names(node: ast.expr) -> frozenset[str]:
    return frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id not in _FUNCTIONS)


def _evaluate(node: ast.expr, measures: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=float() | int() as number):
            return float(number)
        case ast.Name(id=name):
            return measures[name]
        case ast.UnaryOp(operand=inner):
            return -_evaluate(inner, measures)
        case ast.BinOp(left=left, op=op, right=right):
            compute, symbol = _OPERATORS[type(op)]
            values = [_evaluate(left, measures), _evaluate(right, measures)]
        case ast.Call(func=ast.Name(id=symbol), args=arguments):
            compute = _FUNCTIONS[symbol][0]
            values = [_evaluate(argument, measures) for argument in arguments]
        case _:  # pragma: no cover
            raise AssertionError(f"_check lets no {type(node).__name__} pass")
    try:
        result = compute(*values)
    except (ArithmeticError, ValueError):
        result = math.nan
    if not math.isfinite(result):
        raise InputError(
            f"'{ast.unparse(node)}' has no finite value: {symbol} of {' and '.join(f'{v:g}' for v in values)}. "
            "Leave the recipe out, or change the target."
        )
    return result


def _split(node: ast.expr) -> tuple[ast.expr | None, float]:
    """`node` as rest + coefficient * bits; no rest is None."""
    match node:
        case ast.Name(id=name) if name in BITS_NAMES:
            return None, 1.0
        case _ if _names(node).isdisjoint(BITS_NAMES):
            return node, 0.0
        case ast.UnaryOp(operand=inner):
            rest, coefficient = _split(inner)
            return _negative(rest), -coefficient
        case ast.BinOp(op=ast.Add() | ast.Sub()):
            return _split_sum(node)
        case ast.BinOp(left=left, op=ast.Mult() | ast.Div() as op, right=number) if not _names(number):
            rest, coefficient = _split(left)
            factor = _evaluate(number, {})
            if isinstance(op, ast.Mult) or factor != 0:
                return rest and ast.BinOp(rest, op, number), _OPERATORS[type(op)][0](coefficient, factor)
        case ast.BinOp(left=number, op=ast.Mult() as op, right=right) if not _names(number):
            rest, coefficient = _split(right)
            return rest and ast.BinOp(number, op, rest), coefficient * _evaluate(number, {})
    raise InputError(
        f"bits must enter a target as number * avg_bits, added to the rest, got '{ast.unparse(node)}'. "
        "Write it as in '-fid - 150 * avg_bits'."
    )


def _split_sum(node: ast.BinOp) -> tuple[ast.expr | None, float]:
    (left, a), (right, b) = _split(node.left), _split(node.right)
    is_sum = isinstance(node.op, ast.Add)
    coefficient = a + b if is_sum else a - b
    if left is None:
        return (right if is_sum else _negative(right)), coefficient
    return (left if right is None else ast.BinOp(left, node.op, right)), coefficient


def _negative(node: ast.expr | None) -> ast.expr | None:
    return None if node is None else ast.UnaryOp(ast.USub(), node)
