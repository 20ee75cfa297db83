"""Numeric answers in GSM8K's form: `#### 18` at the end of a solution.

The last `####` of a text counts, and on its line one number: a sign and a currency sign may stand before it, words or a
unit after it. Digits may be grouped in threes by commas. So `#### 18`, `#### 18.`, `#### $18.0` and `#### 18 dollars`
all answer 18, `#### -1,800.50` answers -1800.5, and `#### 25%` answers 25. No answer is given by what is not one
well-formed number: `#### 1,8`, `#### 1/2`, `#### 3 + 4`, `#### 18 or 20`, `#### eighteen`.
"""

from __future__ import annotations

import re
from decimal import Decimal

MARKER = "####"

_NUMBER = re.compile(
    r"\s*(?P<sign>[-+\u2212]?)[$€£]?(?P<inner_sign>[-+\u2212]?)"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?P<fraction>\.[0-9]*)?"
    r"(?P<rest>.*)"
)


def extract_answer(text: str) -> str | None:
    """The number behind the last `####`, in its plainest form (`1800`, `-0.5`); None where there is no such number."""
    _, marker, after = text.rpartition(MARKER)
    return _plain_number(after.split("\n", 1)[0]) if marker else None


def is_same_answer(a: str, b: str) -> bool:
    """Whether two texts are the same number, exactly: 18, 18., 18.0 and $18 are. What is no number never is."""
    plain_a, plain_b = _plain_number(a), _plain_number(b)
    return plain_a is not None and plain_b is not None and Decimal(plain_a) == Decimal(plain_b)


def _plain_number(text: str) -> str | None:
    """Digits without commas, currency, unit or needless zeros; None where the text is not one well-formed number."""
    match = _NUMBER.fullmatch(text.rstrip())
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    if any(char.isnumeric() for char in match["rest"]):  # a second number, a sum, an exponent, a broken grouping
        return None
    whole, fraction = (match["whole"] or "").replace(",", ""), (match["fraction"] or "").strip(".").rstrip("0")
    if not whole and len(match["fraction"] or "") < 2:
        return None
    plain = (whole.lstrip("0") or "0") + (f".{fraction}" if fraction else "")
    is_negative = (match["sign"] or match["inner_sign"]) in ("-", "\u2212") and plain != "0"
    return "-" + plain if is_negative else plain
