"""Wrong readings of Giraffe's tasks: another number, a window that slips."""

from __future__ import annotations

import re
from typing import Any

from attnspec.conformance.mutants import right, spoiling
from attnspec.conformance.mutants.positions.giraffe_positions import step

FIRST_INTEGER = right("giraffe.first_integer")
PLACE_ANSWER = right("giraffe.place_answer")


def last_integer(text: str) -> int:
    digits = "".join(c if c in "0123456789" else " " for c in text).split()
    return int(digits[-1]) if digits else -1


def any_digit(text: str) -> int:
    """Digits of every script count."""
    found = re.search(r"\d+", text)
    return int(found[0]) if found else -1


def with_separators(text: str) -> int:
    return FIRST_INTEGER(text.replace(",", ""))


def contains(output: str, label: int) -> bool:
    return str(label) in output


def unclamped(doc: Any, span: Any, L: int, where: str = "random") -> Any:
    """The window starts where it is wanted, and loses what is outside."""
    n, (a, b) = len(doc), span
    length = min(L, n)
    edge = length // 20
    wanted = {"start": a - edge, "random": a - (length - (b - a)) // 2, "end": b + edge - length}
    w0 = min(max(wanted[where], 0), n)
    return w0, min(w0 + length, n)


def middle_by_start(doc: Any, span: Any, L: int, where: str = "random") -> Any:
    """Half a window before the answer, whatever its length."""
    w0, w1 = PLACE_ANSWER(doc, span, L, where)
    if where != "random":
        return w0, w1
    length = w1 - w0
    w0 = min(max(span[0] - length // 2, 0, span[1] - length), span[0], len(doc) - length)
    return w0, w0 + length


def any_case(output: str, ref: str) -> bool:
    return ref.strip().lower() in output.lower()


def unstripped(output: str, ref: str) -> bool:
    return ref in output


MUTANTS = (
    step("last-integer", "first_integer", "agreement", "the last number counts", last_integer),
    step("any-digit", "first_integer", "agreement", "digits of other scripts count", any_digit),
    step("separators", "first_integer", "agreement", "separators are dropped", with_separators),
    step("contains", "score_lines", "agreement", "a label anywhere is right", contains),
    step("unclamped", "place_answer", "agreement", "windows lose what is outside", unclamped),
    step("middle", "place_answer", "agreement", "the middle ignores the answer's length",
         middle_by_start),
    step("one-less", "place_answer", "agreement", "the window loses its last token",
         spoiling(PLACE_ANSWER, lambda window: (window[0], window[1] - 1))),
    step("any-case", "presence", "agreement", "upper and lower case are one", any_case),
    step("unstripped", "presence", "agreement", "blanks around the answer count", unstripped),
)  # fmt: skip
