"""The templates of the word problems, as data; `word_world` says how one is read."""

from __future__ import annotations

from tasks.word_world import Template

_BAGS = "The bags hold {x} {things}."

SEEN = (
    Template(
        "find",
        1,
        "{A} has {a} {things}. {He} finds {b} more {things}. How many {things} does {he} have now?",
        ("x = a + b: {He} has {x} {things}.",),
        {"a": (2, 20), "b": (2, 20)},
    ),
    Template(
        "give",
        1,
        "{A} has {a} {things}. {He} gives {b} {things} to {B}. How many {things} does {he} have left?",
        ("x = a - b: {He} has {x} {things}.",),
        {"a": (5, 30), "b": (2, 20)},
    ),
    Template(
        "bags",
        1,
        "{A} has {a} bags with {b} {things} each. How many {things} does {he} have?",
        ("x = a * b: " + _BAGS,),
        {"a": (2, 12), "b": (2, 12)},
    ),
    Template(
        "boxes",
        1,
        "{A} puts {a} {things} into {b} boxes, the same number in each. How many {things} are in each box?",
        ("x = a / b: Each box holds {x} {things}.",),
        {"a": (4, 72), "b": (2, 9)},
    ),
    Template(
        "buy bags",
        2,
        "{A} has {a} {things}. {He} buys {b} bags with {c} {things} each. How many {things} does {he} have now?",
        ("x = b * c: " + _BAGS, "y = a + x: {He} has {y} {things}."),
        {"a": (2, 20), "b": (2, 9), "c": (2, 9)},
    ),
    Template(
        "give of bags",
        2,
        "{A} has {a} bags with {b} {things} each. {He} gives {c} {things} to {B}. "
        "How many {things} does {he} have left?",
        ("x = a * b: " + _BAGS, "y = x - c: {He} has {y} {things}."),
        {"a": (2, 9), "b": (2, 9), "c": (2, 20)},
    ),
    Template(
        "more than",
        2,
        "{A} has {a} {things}. {B} has {b} more {things} than {A}. How many {things} do they have together?",
        ("x = a + b: {B} has {x} {things}.", "y = a + x: They have {y} {things}."),
        {"a": (2, 20), "b": (2, 20)},
    ),
    Template(
        "times",
        2,
        "{A} has {a} {things}. {B} has {b} times as many. How many {things} do they have together?",
        ("x = a * b: {B} has {x} {things}.", "y = a + x: They have {y} {things}."),
        {"a": (2, 20), "b": (2, 9)},
    ),
    Template(
        "pay",
        2,
        "{A} buys {a} {things}. Each {thing} costs {b} dollars. {He} pays with {c} dollars. "
        "How many dollars does {he} get back?",
        ("x = a * b: The {things} cost {x} dollars.", "y = c - x: {He} gets {y} dollars."),
        {"a": (2, 9), "b": (2, 9), "c": (20, 90)},
    ),
    Template(
        "find and box",
        2,
        "{A} has {a} {things} and finds {b} more. {He} puts them into {c} boxes, the same number in each. "
        "How many {things} are in each box?",
        ("x = a + b: {He} has {x} {things}.", "y = x / c: Each box holds {y} {things}."),
        {"a": (2, 30), "b": (2, 20), "c": (2, 9)},
    ),
    Template(
        "buy bags and give",
        3,
        "{A} has {a} {things}. {He} buys {b} bags with {c} {things} each. Then {he} gives {d} {things} to {B}. "
        "How many {things} does {he} have left?",
        ("x = b * c: " + _BAGS, "y = a + x: {He} has {y} {things}.", "z = y - d: Then {he} has {z} {things}."),
        {"a": (2, 20), "b": (2, 9), "c": (2, 9), "d": (2, 20)},
    ),
    Template(
        "bags and boxes",
        3,
        "{A} has {a} bags with {b} {things} each and {c} boxes with {d} {things} each. "
        "How many {things} does {he} have?",
        ("x = a * b: " + _BAGS, "y = c * d: The boxes hold {y} {things}.", "z = x + y: {He} has {z} {things}."),
        {"a": (2, 9), "b": (2, 9), "c": (2, 9), "d": (2, 9)},
    ),
    Template(
        "half",
        3,
        "{A} has {a} {things}. {He} gives half of them to {B}. Then {he} buys {b} bags with {c} {things} each. "
        "How many {things} does {he} have now?",
        (
            "x = a / 2: {He} has {x} {things}.",
            "y = b * c: The bags hold {y} {things}.",
            "z = x + y: {He} has {z} {things}.",
        ),
        {"a": (4, 60), "b": (2, 9), "c": (2, 9)},
    ),
    Template(
        "two prices",
        4,
        "{A} buys {a} {things} for {b} dollars each and {c} bags for {d} dollars each. {He} pays with {e} dollars. "
        "How many dollars does {he} get back?",
        (
            "x = a * b: The {things} cost {x} dollars.",
            "y = c * d: The bags cost {y} dollars.",
            "z = x + y: {He} pays {z} dollars.",
            "w = e - z: {He} gets {w} dollars.",
        ),
        {"a": (2, 9), "b": (2, 9), "c": (2, 9), "d": (2, 9), "e": (20, 200)},
    ),
    Template(
        "more and times",
        4,
        "{A} has {a} {things}. {B} has {b} more {things} than {A}. A shop has {c} times as many as both together. "
        "How many {things} do {A}, {B} and the shop have?",
        (
            "x = a + b: {B} has {x} {things}.",
            "y = a + x: They have {y} {things}.",
            "z = y * c: The shop has {z} {things}.",
            "w = y + z: All have {w} {things}.",
        ),
        {"a": (2, 20), "b": (2, 20), "c": (2, 9)},
    ),
    Template(
        "bags of two",
        4,
        "{A} has {a} bags with {b} {things} each. {B} has {c} bags with {d} {things} each. "
        "They put all of them into {e} boxes, the same number in each. How many {things} are in each box?",
        (
            "x = a * b: {A} has {x} {things}.",
            "y = c * d: {B} has {y} {things}.",
            "z = x + y: They have {z} {things}.",
            "w = z / e: Each box holds {w} {things}.",
        ),
        {"a": (2, 9), "b": (2, 9), "c": (2, 9), "d": (2, 9), "e": (2, 9)},
    ),
)
"""What train, validation and test are made of."""

UNSEEN = (
    Template(
        "table",
        1,
        "There are {a} {things} on the table. {A} takes {b} of them. How many {things} are still on the table?",
        ("x = a - b: There are {x} {things}.",),
        {"a": (5, 30), "b": (2, 20)},
    ),
    Template(
        "pages",
        1,
        "{A} reads {a} pages each day. How many pages does {he} read in {b} days?",
        ("x = a * b: {He} reads {x} pages.",),
        {"a": (2, 12), "b": (2, 12)},
    ),
    Template(
        "table of two",
        2,
        "There are {a} {things} on the table. {A} takes {b} of them and {B} takes {c} of them. "
        "How many {things} are still on the table?",
        ("x = a - b: There are {x} {things}.", "y = x - c: There are {y} {things}."),
        {"a": (8, 40), "b": (2, 20), "c": (2, 20)},
    ),
    Template(
        "more pages",
        2,
        "{A} reads {a} pages each day for {b} days. The next day {he} reads {c} pages. "
        "How many pages does {he} read in all?",
        ("x = a * b: {He} reads {x} pages.", "y = x + c: {He} reads {y} pages."),
        {"a": (2, 9), "b": (2, 9), "c": (2, 20)},
    ),
    Template(
        "both find",
        2,
        "{A} finds {a} {things} and {B} finds {b} {things}. They put {c} of them into a box. "
        "How many {things} are not in the box?",
        ("x = a + b: They find {x} {things}.", "y = x - c: There are {y} {things}."),
        {"a": (2, 20), "b": (2, 20), "c": (2, 20)},
    ),
    Template(
        "readers",
        3,
        "{A} reads {a} pages each day for {b} days. {B} reads {c} more pages than {A}. "
        "How many pages do they read together?",
        ("x = a * b: {A} reads {x} pages.", "y = x + c: {B} reads {y} pages.", "z = x + y: They read {z} pages."),
        {"a": (2, 9), "b": (2, 9), "c": (2, 20)},
    ),
    Template(
        "chairs",
        4,
        "A room has {a} rows of {b} chairs. Another room has {c} rows of {d} chairs. {A} takes {e} chairs away. "
        "How many chairs are left in both rooms?",
        (
            "x = a * b: The room has {x} chairs.",
            "y = c * d: The other room has {y} chairs.",
            "z = x + y: Both have {z} chairs.",
            "w = z - e: There are {w} chairs.",
        ),
        {"a": (2, 9), "b": (2, 9), "c": (2, 9), "d": (2, 9), "e": (2, 20)},
    ),
)
"""What test_unseen is made of, and no other part."""
