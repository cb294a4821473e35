"""Arithmetic that a policy asks for, worked out exactly and within bounds; nothing in it is run as a program."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction

_MOST_CHARACTERS = 200
_MOST_BITS = 1024  # of a numerator or denominator, about 300 digits
_OPERATIONS: Mapping[type, Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_SPELLINGS = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-", "^": "**"})


class BadExpression(Exception):
    """What is wrong with an expression, in words for the one who wrote it."""


def work_out(expression: str) -> str:
    """Return the value of an expression of numbers, + - * / // % ** and parentheses, exact where a decimal can be.

    Decimals are exact too (0.1 + 0.2 is 0.3); what has no end, such as 1/3, has 12 digits. Raises BadExpression.
    """
    if len(expression) > _MOST_CHARACTERS:
        raise BadExpression(f"the expression is longer than {_MOST_CHARACTERS} characters; split it")
    try:
        text = expression.translate(_SPELLINGS).strip()
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadExpression("this is no arithmetic; write it like (12 + 3) * 4") from None
    return _write(_value(tree.body, text))


def _value(node: ast.expr, text: str) -> Fraction:
    """Return the value of a node of the tree of a text."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return _bounded(Fraction(node.value))
    if isinstance(node, ast.Constant) and type(node.value) is float:
        return _bounded(_decimal(node.value, ast.get_source_segment(text, node) or ""))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Tuple):
        raise BadExpression("write numbers without commas, such as 12000")
    if not isinstance(node, ast.BinOp):
        raise BadExpression("only numbers, + - * / // % ** and parentheses can be worked out")
    left, right = _value(node.left, text), _value(node.right, text)
    if isinstance(node.op, ast.Pow):
        return _power(left, right)
    if type(node.op) not in _OPERATIONS:
        raise BadExpression("only + - * / // % ** can be worked out")
    if right == 0 and isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod):
        raise BadExpression("division by zero")
    return _bounded(Fraction(_OPERATIONS[type(node.op)](left, right)))


def _decimal(rounded: float, written: str) -> Fraction:
    """Return what is written, of which Python has made a rounded number: exactly that, and no endless exponent."""
    if math.isinf(rounded):
        raise BadExpression("a number is too large")
    if rounded == 0:
        if any(digit in "123456789" for digit in written.lower().partition("e")[0]):
            raise BadExpression("a number is too close to 0")
        return Fraction(0)
    return Fraction(written)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise BadExpression("only whole exponents can be worked out")
    if base == 0 and exponent < 0:
        raise BadExpression("division by zero")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits > 1 and bits * abs(exponent) > 2 * _MOST_BITS:
        raise BadExpression("the result is too large")
    if bits <= 1:  # 0, 1, -1
        return Fraction(1) if exponent == 0 or base == 1 or (base == -1 and exponent % 2 == 0) else base
    return _bounded(base ** int(exponent))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
        raise BadExpression("the result is too large")
    return value


def _write(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    while rest % 10 == 0 or rest % 5 == 0 or rest % 2 == 0:
        rest //= 10 if rest % 10 == 0 else 5 if rest % 5 == 0 else 2
        places += 1
    if rest == 1 and places <= 12:
        digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
        return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
    try:
        return f"{float(value):.12g}"
    except OverflowError:
        raise BadExpression("the result is too large") from None
