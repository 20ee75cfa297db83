"""The built-in text: what a small model reads before it is asked anything.

Stories, talk, facts and open questions from the world of the word problems, with its people, things and numbers. They
tell what happens and what sums are, and hold no worked solution: where the question of a problem stands, it is one of
the train part, and nothing in the document answers it.

Sentences are written with words left open, as in templates (`{A}`, `{he}`, `{things}`), and filled in at the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tasks.word_templates import SEEN
from tasks.word_world import HE_OF, PEOPLE, THINGS, draw_problem, draw_words

_MOST = 120
"""Nobody comes to own more things than this, or fewer than two."""
_DAYS = ("Monday", "Tuesday", "Friday", "Sunday")


def story(example_idx: int, seed: int = 0) -> str:
    """One document of text, some 30 to 90 words; a pure function of its two arguments."""
    rng = random.Random(f"story/{seed}/{example_idx}")
    (tell,) = rng.choices([_life, _facts, _talk, _questions, _day], weights=[7, 4, 3, 4, 2])
    return tell(rng)


def _life(rng: random.Random) -> str:
    """Somebody comes by things and gives them away, and the story keeps count."""
    num = rng.randint(2, 20)
    told = [rng.choice((f"{{A}} has {num} {{things}}.", f"On {rng.choice(_DAYS)} {{A}} has {num} {{things}}."))]
    while len(told) < 6:
        now, happening, sum_of_it = rng.choice(_HAPPENINGS)(rng, num)
        if not 2 <= now <= _MOST:
            continue
        told.append(happening)
        if sum_of_it and rng.random() < 0.6:
            told.append(
                rng.choice((f"Now {{he}} has {now} {{things}}.", f"{sum_of_it} = {now}. {{He}} has {now} {{things}}."))
            )
        num = now
    told.append(f"At the end {{he}} has {num} {{things}}.")
    return " ".join(told).format_map(draw_words(rng))


def _finds(rng: random.Random, num: int) -> tuple[int, str, str]:
    more = rng.randint(2, 20)
    return num + more, f"{{He}} finds {more} more {{things}}.", f"{num}+{more}"


def _gives(rng: random.Random, num: int) -> tuple[int, str, str]:
    fewer = rng.randint(2, 20)
    return num - fewer, f"{{He}} gives {fewer} {{things}} to {{B}}.", f"{num}-{fewer}"


def _halves(rng: random.Random, num: int) -> tuple[int, str, str]:
    return (0 if num % 2 else num // 2), "{He} gives half of them to {B}.", f"{num}/2"


def _buys(rng: random.Random, num: int) -> tuple[int, str, str]:
    bags, each = rng.randint(2, 9), rng.randint(2, 9)
    hold = rng.choice(("", f"{bags}*{each} = ")) + str(bags * each)
    happening = f"{{He}} buys {bags} bags with {each} {{things}} each. The bags hold {hold} {{things}}."
    return num + bags * each, happening, f"{num}+{bags * each}"


def _boxes(rng: random.Random, num: int) -> tuple[int, str, str]:
    boxes = rng.randint(2, 9)
    hold = rng.choice(("", f"{num}/{boxes} = ")) + str(num // boxes)
    happening = f"{{He}} puts the {num} {{things}} into {boxes} boxes. Each box holds {hold} {{things}}."
    return (num if num % boxes == 0 and num > boxes else 0), happening, ""


_HAPPENINGS: tuple[Callable[[random.Random, int], tuple[int, str, str]], ...] = (_finds, _gives, _buys, _boxes, _halves)
"""Each gives what somebody with `num` things has afterwards (0 where it cannot be), the sentence, and the sum in it."""


def _facts(rng: random.Random) -> str:
    """What sums are, in words and signs."""
    facts = []
    for _ in range(rng.randint(5, 9)):
        a, b, c, things = rng.randint(2, 40), rng.randint(2, 20), rng.randint(2, 9), rng.choice(THINGS)
        small = rng.randint(2, 12)
        facts.append(
            rng.choice(
                (
                    f"{a}+{b} = {a + b}.",
                    f"{a + b}-{b} = {a}.",
                    f"{small}*{c} = {small * c}.",
                    f"{small * c}/{c} = {small}.",
                    f"{a} {things} and {b} {things} are {a + b} {things}.",
                    f"{b} more than {a} is {a + b}.",
                    f"{c} times as many as {a} is {a * c}.",
                    f"Half of {2 * b} is {b}.",
                    f"{small} bags with {c} {things} each hold {small * c} {things}.",
                    f"{small * c} {things} in {c} boxes are {small} in each box.",
                    f"{small} {things} for {c} dollars each cost {small * c} dollars.",
                    f"{a + b} {things} without {b} of them are {a} {things}.",
                )
            )
        )
    return " ".join(facts)


def _talk(rng: random.Random) -> str:
    """Two people talk about what they have, or one buys from the other."""
    a, b, c = rng.randint(2, 20), rng.randint(2, 20), rng.randint(2, 9)
    cost, pays = a * c, a * c + b
    told = rng.choice(
        (
            f'{{A}} says, "I have {a} {{things}}." {{B}} says, "You have {a} {{things}}, and I have {b} more '
            f'{{things}} than you." {{A}} says, "So you have {a + b}, and together we have {a + a + b} {{things}}."',
            f'{{A}} says, "I have {a} {{things}}." {{B}} says, "I have {c} times as many." {{A}} says, '
            f'"{c} times {a} is {a * c}, so you have {a * c} {{things}}."',
            f'{{B}} says, "Each {{thing}} costs {c} dollars." {{A}} buys {a} {{things}}. {{B}} says, "They cost '
            f'{a}*{c} = {cost} dollars." {{A}} pays with {pays} dollars and gets {b} dollars back.',
            f'{{A}} says, "I have {a} {{things}}, and I want {a + b} {{things}}." {{B}} says, "Then you must find '
            f'{b} more." {{He}} finds {b} more {{things}}, and now {{he}} has {a + b} {{things}}.',
            f'{{A}} says, "Take {b} of my {a + b} {{things}}." {{B}} takes {b} {{things}}. {{A}} has {a} {{things}} '
            f"left, and together they still have {a + b} {{things}}.",
        )
    )
    return told.format_map(draw_words(rng))


def _questions(rng: random.Random) -> str:
    """Problems as they are asked, one a line, without a word of the answers."""
    templates = [template for template in SEEN if template.level <= 2]
    return "\n".join(draw_problem(rng, templates, "train").question for _ in range(rng.randint(2, 3)))


def _day(rng: random.Random) -> str:
    """What people do all day: reading, rooms, rows of chairs, things on a table."""
    told = []
    for person in rng.sample(PEOPLE, rng.randint(3, 4)):
        a, b, things = rng.randint(2, 30), rng.randint(2, 9), rng.choice(THINGS)
        told.append(
            rng.choice(
                (
                    f"On {rng.choice(_DAYS)} {person} reads {a} pages of a book.",
                    f"{person} reads each day, and on {rng.choice(_DAYS)} {HE_OF[person]} reads {a} pages.",
                    f"There is a table in the room, and {person} puts {a} {things} on the table.",
                    f"{person} finds {a} {things} and takes {b} of them to the other room.",
                    f"The room of {person} has {b} rows of chairs, and a table with {a} {things}.",
                    f"{person} puts some of the {things} away, but {a} {things} are still there in the box.",
                    f"{person} and {{B}} read for {b} days, and then both are at the last page.",
                )
            )
        )
    return " ".join(told).format_map(draw_words(rng))
