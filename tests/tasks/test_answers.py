from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.answers import extract_answer, is_same_answer

VERDICTS = [
    ("#### 18", "18"),
    ("####18", "18"),
    ("#### 18.", "18"),
    ("#### 18.0", "18"),
    ("#### 18.00", "18"),
    ("#### 018", "18"),
    ("#### $18", "18"),
    ("#### $ 18", None),
    ("#### €18.50", "18.5"),
    ("#### 1,800", "1800"),
    ("#### 1,800,000.250", "1800000.25"),
    ("#### 1800", "1800"),
    ("#### -3", "-3"),
    ("#### \u22123", "-3"),
    ("#### +3", "3"),
    ("#### -$3", "-3"),
    ("#### $-3", "-3"),
    ("#### --3", None),
    ("#### -0", "0"),
    ("#### .5", "0.5"),
    ("#### 0.50", "0.5"),
    ("#### 18 dollars", "18"),
    ("#### 18kg", "18"),
    ("#### 25%", "25"),
    ("#### 18, I think!", "18"),
    ("#### 18\nThank you, 2 times.", "18"),
    ("#### 18\r\n", "18"),
    ("3 #### 4\n#### 5", "5"),
    ("#### 5 #### 4", "4"),
    ("##### 18", "18"),
    ("#### 1,8", None),
    ("#### 18,00", None),
    ("#### 1,8000", None),
    ("#### 1234,567", None),
    ("#### ,800", None),
    ("#### 1.8.0", None),
    ("#### 1/2", None),
    ("#### 18 + 2", None),
    ("#### 18 or 20", None),
    ("#### 18²", None),
    ("#### 18½", None),
    ("#### 1e3", None),
    ("#### \u0661\u0668", None),
    ("#### eighteen", None),
    ("#### x = 18", None),
    ("#### .", None),
    ("#### -", None),
    ("#### ", None),
    ("####\n18", None),
    ("#### 18\n####", None),
    ("#### 18\n#### none", None),
    ("### 18", None),
    ("18", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), VERDICTS)
def test_the_last_marker_and_one_number_behind_it(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_equal_numbers_however_they_are_written() -> None:
    eighteen = ["18", "18.", "18.0", "$18", "018", "18 dollars"]
    assert all(is_same_answer(a, b) for a in eighteen for b in eighteen)
    assert is_same_answer("1,800", "1800")
    assert is_same_answer("-0", "0.0")
    for other in ("1,8", "19", "-18", "18.000000000000000000001", "1.8", "", "18/1", "none"):
        assert not is_same_answer(other, "18"), other
    assert not is_same_answer("none", "none")  # no number is nobody's answer


def test_floats_would_be_fooled() -> None:
    assert not is_same_answer("9007199254740993", "9007199254740992")
    assert not is_same_answer("0.1", "0.1000000000000000055511151231257827")


@given(st.integers(), st.integers(0, 6), st.booleans())
def test_every_number_finds_itself(digits: int, num_decimals: int, grouped: bool) -> None:
    number = Decimal(digits).scaleb(-num_decimals) if abs(digits) < 10**20 else Decimal(digits)
    written = f"{number:,f}" if grouped else f"{number:f}"
    found = extract_answer(f"so it is\n#### {written} apples")
    assert found is not None
    assert Decimal(found) == number
    assert is_same_answer(found, written)


@given(st.text(), st.text())
def test_no_text_breaks_it(before: str, after: str) -> None:
    found = extract_answer(f"{before}####{after}")
    assert found is None or is_same_answer(found, found)
    is_same_answer(before, after)
