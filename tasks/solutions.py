"""Solutions in GSM8K's text form <-> parts: `3*4 = <<3*4=12>>12` holds the calculator call 3*4 and what it gave, 12."""

from __future__ import annotations

import re

from rayllm.types import Part

_CALL = re.compile(r"<<([^<>]*)>>")


def solution_parts(solution: str) -> tuple[Part, ...]:
    """Cut a solution at its calculator calls: prose, python (`3*4`), python_output (`12`), prose, ...

    The text behind the last `=` of a call is its output; a call without one is a python part alone.
    """
    parts: list[Part] = []
    for idx, piece in enumerate(_CALL.split(solution)):
        if idx % 2 == 0:
            parts.append(Part("text", piece))
            continue
        expression, equals, output = piece.rpartition("=")
        parts.append(Part("python", expression if equals else output))
        if equals:
            parts.append(Part("python_output", output))
    return tuple(part for part in parts if part.text)


def prose(parts: tuple[Part, ...]) -> str:
    """What the assistant says outside its tool blocks: the text a verdict is given on."""
    return "".join(part.text for part in parts if part.type == "text")
