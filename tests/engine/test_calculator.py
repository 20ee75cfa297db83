from __future__ import annotations

import ast
import operator
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rayllm.engine.calculator import MAX_BITS, MAX_CHARS, MAX_DEPTH, calculate

VALUES = {
    "48/2": "24",
    "2+3*4": "14",
    "(2+3)*4": "20",
    " 2 + 3 ": "5",
    "0.2*50": "10",
    "100*1.1": "110",
    "0.1+0.2": "0.3",
    "1/3": "0.3333333333",
    "2/3": "0.6666666667",
    "1/3*3": "1",
    "10/4": "2.5",
    ".5+1.": "1.5",
    "7//2": "3",
    "-7//2": "-4",
    "7%3": "1",
    "-7%3": "2",
    "5--3": "8",
    "2*-3": "-6",
    "-(2+3)": "-5",
    "+5": "5",
    "8-3-2": "3",
    "24/4/2": "3",
    "1,800+1": "1801",
    "1,234,567.5*2": "2469135",
    "007": "7",
    "9007199254740993+0": "9007199254740993",
    "12345678901.5": "12345678901.5",
    "1/100000000000": "0",
    "-1/100000000000": "0",
    "'strawberry'.count('r')": "3",
    '"strawberry".count("rr")': "1",
    "'a,b,c'.count(',')": "2",
    "'1,800'.count(',')": "1",
    "\"it's\".count('s')": "1",
    "'été'.count('é')": "2",
    "'abc'.count('x')": "0",
    "'aa'.count('a') * 2 + 1": "5",
}


@pytest.mark.parametrize("expression", VALUES)
def test_values(expression: str) -> None:
    assert calculate(expression) == VALUES[expression]


NO_VALUES = [
    "", " ", "()", "(", ")", "1+", "*2", "1 2", "1,8", "1,8+2", "1,8000", "1,80,000", "1.2.3", "1..2", ",5",
    "2**3", "9**9**9", "2^3", "5%", "50%*2", "1e5", "0x10", "1_000", "1j", "$5", "3x4", "\u0661+1", "½",
    "1\n+2", "1\x001", "\x00", "1/0", "1//0", "1%0", "0/0", "1/(2-2)", "inf", "nan", "True", "x", "None",
    "[1]", "1,2", "1<2", "1 if 1 else 2", "lambda: 1", "'a'", "'a'+'b'", "'a'*3", "'a'.count", "'a'.count()",
    "'a'.count('a'", "'a'.count(1)", "'a'.counts('a')", "3.count('a')", "'a'.upper()",
    "'a'.ljust(50000000).count(' ')", "('a'*9).count('a')", r"'a\n'.count('n')", "'a.count('a')",
    "f'a'.count('a')", "__import__('os').getcwd()", "open('x')", "().__class__", "'a'.__class__.count('a')",
    "1;2", "# 1", "-", "--",
]  # fmt: skip


@pytest.mark.parametrize("expression", NO_VALUES)
def test_no_values(expression: str) -> None:
    assert calculate(expression) is None


def test_bounds() -> None:
    assert calculate("1" + "+1" * (MAX_CHARS // 2 - 1)) == str(MAX_CHARS // 2)
    assert calculate("1" + "+1" * MAX_CHARS) is None
    assert calculate("(" * (MAX_DEPTH - 1) + "1" + ")" * (MAX_DEPTH - 1)) == "1"
    assert calculate("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH) is None
    assert calculate("-" * (MAX_DEPTH - 1) + "1") in ("1", "-1")
    assert calculate("-" * MAX_DEPTH + "1") is None
    largest = 2**MAX_BITS - 1
    assert calculate(str(largest)) == str(largest)
    assert calculate(f"{largest}+1") is None
    assert calculate(f"{largest}*{largest}/{largest}") is None  # also on the way
    assert calculate(f"1/{largest}/{largest}") is None


# Of its own words, so that many of them are read to the end.
_WORDS = ["1", "0", "2.5", "1,800", ".5", "+", "-", "*", "/", "//", "%", "(", ")", "'ab'", ".count(", "'b')", " ", "**"]
HOSTILE = (
    st.lists(st.sampled_from(_WORDS), max_size=40).map("".join)
    | st.text(alphabet="0123456789+-*/%().,'\"count e_\\\x00\n", max_size=60)
    | st.text(max_size=60)
)


@given(HOSTILE)
@example("(" * 10**6)
@example("9" * 10**6)
@example("9" * MAX_CHARS)
@example("-" * 10**6 + "1")
@example("1*" * (MAX_CHARS // 2) + "1")
@example("99999999*" * 50 + "1")
@example("1/3/" * 100 + "7")
@example("'" * MAX_CHARS)
@example("'a'.count(" * 40)
@example("\ud800")
@example(" " * MAX_CHARS)
def test_never_raises_and_never_is_slow(expression: str) -> None:
    began = time.perf_counter()
    value = calculate(expression)
    assert time.perf_counter() - began < 0.2
    assert value is None or Fraction(value) is not None


WHOLE_MARKS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
MARKS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_NUMBERS = st.integers(0, 10**6).map(str) | st.decimals(0, 1000, places=2).map(lambda number: f"{number:f}")
_EXPRESSIONS = st.recursive(
    _NUMBERS,
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})")
        | inner.map("(-{})".format)
    ),
    max_leaves=5,
)


@given(_EXPRESSIONS)
@settings(deadline=None)
def test_agrees_with_exact_arithmetic(expression: str) -> None:
    exact, value = _by_shunting_yard(expression), calculate(expression)
    if exact is None:
        assert value is None
    elif value is not None:  # else it went beyond the bounds
        assert abs(Fraction(value) - exact) <= Fraction(1, 2 * 10**10)
        assert (exact.denominator == 1) <= ("." not in value)


_WHOLE = st.recursive(
    st.integers(0, 10**9).map(str) | st.integers(1000, 10**9).map("{:,}".format),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
        | inner.map("(-{})".format)
    ),
    max_leaves=8,
)


@given(_WHOLE)
def test_whole_numbers_stay_whole_and_are_those_of_python(expression: str) -> None:
    """Python's own arithmetic on the same text, which holds nothing but digits, marks and brackets."""
    value = calculate(expression)
    if value is not None:  # else it divided by zero, or went beyond the bounds
        assert str(int(value)) == value
        assert int(value) == _whole_value(ast.parse(expression.replace(",", ""), mode="eval").body)


def _whole_value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int)
        return node.value
    if isinstance(node, ast.UnaryOp):
        return -_whole_value(node.operand)
    assert isinstance(node, ast.BinOp)
    return WHOLE_MARKS[type(node.op)](_whole_value(node.left), _whole_value(node.right))


def _by_shunting_yard(expression: str) -> Fraction | None:
    """The value of a fully parenthesised expression, by another way than the calculator's."""
    stack: list[str | Fraction] = []
    token = ""
    for char in expression + " ":
        if char.isdigit() or char == ".":
            token += char
            continue
        if token:
            stack.append(Fraction(token))
            token = ""
        if char == ")":
            opened = len(stack) - 1 - stack[::-1].index("(")
            inside = stack[opened + 1 :]
            del stack[opened:]
            if len(inside) == 2:
                assert isinstance(inside[1], Fraction)
                stack.append(-inside[1])
            elif len(inside) == 3:
                left, mark, right = inside
                assert isinstance(left, Fraction) and isinstance(right, Fraction)
                if mark == "/" and right == 0:
                    return None
                stack.append(MARKS[str(mark)](left, right))
        elif char != " ":
            stack.append(char)
    assert len(stack) == 1 and isinstance(stack[0], Fraction)
    return stack[0]


def test_works_on_any_thread_and_deep_in_the_stack() -> None:
    answers: list[str | None] = []
    threads = [threading.Thread(target=lambda: answers.append(calculate("6*7"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["42"] * 8

    def dig(depth: int) -> str | None:
        return calculate("((1+2)*3)") if depth == 0 else dig(depth - 1)

    assert dig(sys.getrecursionlimit() // 2) == "9"
