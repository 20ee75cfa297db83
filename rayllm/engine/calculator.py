"""The calculator behind python blocks: arithmetic and letter counts, by a parser of its own.

What it reads: numbers (`12`, `.5`, `1,800`), `+ - * / // %` with Python's precedence, signs, parentheses, and
`'text'.count('t')` on plain string literals (no backslashes). Everything else, `**` and `5%` among it, has no value.

Arithmetic is exact (fractions), so `0.2*50` is 10 and `1/3*3` is 1, and whole results print without a point. Others
print with at most 10 digits behind it. Length, nesting and the size of every number on the way are bounded, so an
expression takes a few milliseconds at most, on whatever thread asks.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARS = 500
"""Longest expression."""
MAX_DEPTH = 30
"""Most parentheses and signs within each other."""
MAX_BITS = 128
"""Size of the largest numerator or denominator on the way, in bits: some 38 digits."""
NUM_DECIMALS = 10
"""Digits behind the point of a result."""

_TOKEN = re.compile(
    r"""[ \t]*(?:
    (?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?(?![0-9.,_\w])|\.[0-9]+(?![0-9.,_\w]))
    |(?P<string>'[^'\\\r\n]*'|"[^"\\\r\n]*")
    |(?P<mark>//|\.count\b|[-+*/%()])
    |(?P<end>\Z)
    )""",
    re.VERBOSE | re.ASCII,
)
_SUMS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {"+": operator.add, "-": operator.sub}
_PRODUCTS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "*": operator.mul,
    "/": operator.truediv,
    "//": lambda a, b: Fraction(a // b),
    "%": operator.mod,
}


class _NoValue(Exception):
    """The expression is none of ours, or goes beyond a bound."""


def calculate(expression: str) -> str | None:
    """The value of an expression as text (`12`, `-0.5`), None where it has none. Never raises, for any string."""
    if len(expression) > MAX_CHARS:
        return None
    try:
        return _print(_Parser(_cut(expression.strip())).result())
    except (_NoValue, ZeroDivisionError):
        return None


def _cut(expression: str) -> list[tuple[str, str]]:
    """(kind, text) of every token; the last is the end."""
    tokens: list[tuple[str, str]] = []
    position = 0
    while not tokens or tokens[-1][0] != "end":
        match = _TOKEN.match(expression, position)
        if match is None or match.lastgroup is None:
            raise _NoValue
        tokens.append((match.lastgroup, match[match.lastgroup]))
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent: a sum of products of signed values."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def result(self) -> Fraction:
        value = self._sum()
        if self._tokens[self._at][0] != "end":
            raise _NoValue
        return value

    def _take(self) -> tuple[str, str]:
        token = self._tokens[self._at]
        self._at += token[0] != "end"
        return token

    def _expect(self, mark: str) -> None:
        if self._take() != ("mark", mark):
            raise _NoValue

    def _chain(
        self, operators: dict[str, Callable[[Fraction, Fraction], Fraction]], operand: Callable[[], Fraction]
    ) -> Fraction:
        value = operand()
        while (mark := self._tokens[self._at][1]) in operators and self._tokens[self._at][0] == "mark":
            self._at += 1
            value = _bounded(operators[mark](value, operand()))
        return value

    def _sum(self) -> Fraction:
        return self._chain(_SUMS, lambda: self._chain(_PRODUCTS, self._signed))

    def _signed(self) -> Fraction:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _NoValue
        kind, text = self._take()
        if kind == "number":
            value = _bounded(Fraction(text.replace(",", "")))
        elif kind == "string":
            value = self._count(text)
        elif text == "(" and kind == "mark":
            value = self._sum()
            self._expect(")")
        elif text in ("+", "-") and kind == "mark":
            value = self._signed() if text == "+" else -self._signed()
        else:
            raise _NoValue
        self._depth -= 1
        return value

    def _count(self, literal: str) -> Fraction:
        """The rest of `'text'.count('t')`: how often the second string is in the first, without overlap."""
        self._expect(".count")
        self._expect("(")
        kind, sought = self._take()
        self._expect(")")
        if kind != "string":
            raise _NoValue
        return Fraction(literal[1:-1].count(sought[1:-1]))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NoValue
    return value


def _print(value: Fraction) -> str:
    """Plain digits: no exponent, no needless zeros."""
    scaled = round(value * 10**NUM_DECIMALS)
    whole, decimals = divmod(abs(scaled), 10**NUM_DECIMALS)
    text = f"{whole}.{decimals:0{NUM_DECIMALS}d}".rstrip("0").rstrip(".")
    return f"-{text}" if scaled < 0 else text
