r"""Giraffe, the tasks on documents: an answer placed in a window, and a number no one remembers.

Definition
----------
S18. **Window.** FreeFormQA asks for a literal piece of a document, cut to L tokens (2k, 4k, 8k or
16k) that hold the answer [a, b) near the start, in the middle ("random") or near the end. In a
document of n tokens, with :math:`L' = \min(L, n)` and the edge :math:`\lfloor L'/20 \rfloor`, the
window :math:`[w, w + L')` is wanted at a - edge, at :math:`a - \lfloor (L' - (b - a)) / 2 \rfloor`
or at b + edge - L'; then :math:`w = \max(w, 0, b - L')` and :math:`w = \min(w, a, n - L')`. So the
answer is always inside, and in the first or last tenth where the document allows it.

S19. **Variants.** Six for each item, in the order of rows r: r mod 6 is 0 or 1 for the start, 2 or
3 for the middle, 4 or 5 for the end; the question follows the document in even rows and precedes
it in odd ones.

S20. **Presence.** An answer is right if the reference, stripped of blanks around it, is a substring
of the output, upper and lower case apart. Outputs have 50 tokens.

S21. **Alter.** AlteredNumericQA asks for a whole number a >= 0, and changes it in the document. A
year, 1000..2100, becomes another uniform in a - 10..a + 10; any other number a uniform one with as
many digits, the first not 0 but for one digit, and never a itself. Every maximal run of ASCII
digits that is a is replaced: in ``1950s``, and in ``1,950`` for 950, not in ``11950``. The label is
the new number: who answers from memory fails.

Paper and code
--------------
The data and their scores are published, the construction is not: placements and replacement follow
the authors' description, with L nominal (means of 1937 to 15001 tokens). The formulas of S18, the
maximal runs of S21, and that a number is drawn again if the document has it already are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_choice, check_integer, check_size
from attnspec.reference.positions.giraffe_lines import check_rng, check_text

PLACES = ("start", "random", "end")
YEARS = range(1000, 2101)


def place_answer(
    doc: Sequence[Any], span: tuple[int, int], L: int, where: str = "random"
) -> tuple[int, int]:
    """S18: the window (w0, w1), half open, of at most `L` tokens around the answer `span` (a, b).

    `doc` is a list of tokens, `where` "start", "random" or "end". ValueError if the answer is
    longer than the window.

    >>> [place_answer(range(1000), (500, 510), 100, where) for where in PLACES]
    [(495, 595), (455, 555), (415, 515)]
    """
    if not isinstance(doc, Sequence) or isinstance(doc, str):
        raise TypeError(f"doc: got {type(doc).__name__}, expected a list of tokens")
    if not isinstance(span, Sequence):
        raise TypeError(f"span: got {type(span).__name__}, expected a pair (a, b)")
    check_size("span", len(span), 2, "a and b")
    a, b = span
    check_integer("span", a, least=0)
    check_integer("span", b, least=int(a) + 1)
    check_integer("L", L, least=1)
    check_choice("where", where, PLACES)
    n, length = len(doc), min(L, len(doc))
    if b > n:
        raise ValueError(f"span: got ({a}, {b}), expected a span within {n} tokens")
    if b - a > length:
        raise ValueError(f"L: got {L}, expected at least the {b - a} tokens of the answer")
    edge = length // 20
    wanted = {"start": a - edge, "random": a - (length - (b - a)) // 2, "end": b + edge - length}
    w0 = min(max(wanted[where], 0, b - length), a, n - length)
    return w0, w0 + length


def variant(r: int) -> tuple[str, str]:
    """S19: where the answer of row `r` lies, and where its question stands, "start" or "end".

    >>> [variant(r) for r in (0, 3, 11)]
    [('start', 'end'), ('random', 'start'), ('end', 'start')]
    """
    check_integer("r", r, least=0)
    return PLACES[r % 6 // 2], "start" if r % 2 else "end"


def ask(document: str, question: str, place: str = "end") -> str:
    """S19: the prompt, with the question at the "start" or the "end".

    >>> ask("It rained.", "Did it rain?", "start")
    'Did it rain?\\n\\nIt rained.'
    """
    check_text("document", document)
    check_text("question", question)
    check_choice("place", place, ("start", "end"))
    parts = (question, document) if place == "start" else (document, question)
    return "\n\n".join(parts)


def presence(output: str, ref: str) -> bool:
    """S20: whether `output` holds `ref`, which must not be blank.

    >>> presence("In Paris, I think.", " Paris "), presence("paris", "Paris")
    (True, False)
    """
    check_text("output", output)
    check_text("ref", ref)
    if not ref.strip():
        raise ValueError(f"ref: got {ref!r}, expected an answer that is not blank")
    return ref.strip() in output


def alter_number(rng: np.random.Generator, a: int, doc: str = "") -> int:
    """S21: another number in place of `a`, one that `doc` does not have.

    ValueError if the document has them all.

    >>> alter_number(np.random.default_rng(0), 1984)
    1992
    """
    check_rng(rng)
    check_integer("a", a, least=0)
    check_text("doc", doc)
    taken = {*re.findall("[0-9]+", doc), str(a)}
    digits = len(str(a))
    if a in YEARS or digits == 1:
        near = range(a - 10, a + 11) if a in YEARS else range(10)
        free = [number for number in near if str(number) not in taken]
        if not free:
            raise ValueError(f"doc: got one with every number near {a}, expected a free one")
        return free[int(rng.integers(len(free)))]
    if sum(len(run) == digits and run[0] != "0" for run in taken) == 9 * 10 ** (digits - 1):
        raise ValueError(f"doc: got every number of {digits} digits, expected a free one")
    while True:
        drawn = [rng.integers(1, 10), *rng.integers(0, 10, digits - 1)]
        number = "".join(str(digit) for digit in drawn)
        if number not in taken:
            return int(number)


def alter_document(doc: str, a: int, a2: int) -> str:
    """S21: `doc` with the number `a2` wherever it has the number `a`.

    >>> alter_document("In 950, or 1,950? Not 1950.", 950, 951)
    'In 951, or 1,951? Not 1950.'
    """
    check_text("doc", doc)
    check_integer("a", a, least=0)
    check_integer("a2", a2, least=0)
    return re.sub(f"(?<![0-9]){int(a)}(?![0-9])", str(int(a2)), doc)
