"""Giraffe, the first task: look up the number of a line among many.

Definition
----------
S15. **Lines.** n lines ``line {id}: REGISTER_CONTENT is <{value}>`` with distinct ids and values
uniform in 1..50000, between a header and a question for the line of one id drawn uniformly. The
label is its value, and n sets the length of the prompt. Ids are the numbers 1..n ("plain"), letters
("letters"), UUIDs of version 4 ("uuid") or an adjective and a noun ("words").

S16. **Score.** The first maximal run of ASCII digits of an answer, taken as an integer, equals the
label; without a digit it is -1. Signs and separators are no part of it: ``50,000`` is 50.

S17. **Report.** For each n the share of right answers and the mean length of the prompts.

Paper and code
--------------
Lines come from LongChat, extended from 16000 to about 25000 tokens; answers have 5 to 35 tokens.
"line 7 is 42" scores as 7, which is a weakness of the task that is kept. There pairs of words may
repeat; that they do not here, and the wording of header and question, are ours.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_choice, check_integer, check_size

ID_STYLES = ("plain", "letters", "uuid", "words")
LARGEST = 50000
HEADER = (
    "Below is a record of lines. Each gives a REGISTER_CONTENT, a number in angle brackets. "
    "Keep the number of every line in mind: one of them is asked for at the end.\n"
)
ADJECTIVES = (
    "amber", "brisk", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly",
    "keen", "lively", "mellow", "narrow", "odd", "pale", "quiet", "rapid", "silent", "tidy",
    "upper", "vivid", "warm", "young", "ancient", "bitter", "clever", "dim", "early", "fierce",
    "grand", "humble", "inner", "late", "modest", "noble", "plain", "rough", "smooth", "tall",
)  # fmt: skip
NOUNS = (
    "anchor", "bridge", "canyon", "desert", "engine", "forest", "garden", "harbour", "island",
    "jacket", "kettle", "ladder", "meadow", "needle", "orchard", "pebble", "quarry", "river",
    "saddle", "temple", "umbrella", "valley", "window", "yard", "arrow", "basket", "candle",
    "drum", "feather", "glacier", "hammer", "lantern", "mirror", "oven", "pillar", "ribbon",
    "signal", "tunnel", "violin", "wagon",
)  # fmt: skip


def check_rng(rng: Any) -> None:
    """S15, K14: `rng` draws random numbers."""
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng: got {type(rng).__name__}, expected numpy.random.Generator")


def check_text(name: str, text: Any) -> None:
    """S16, K14: `text` is a string."""
    if not isinstance(text, str):
        raise TypeError(f"{name}: got {type(text).__name__}, expected str")


def make_ids(rng: np.random.Generator, n: int, id_style: str = "plain") -> list[str]:
    """S15: `n` distinct ids. ValueError for more of "words" than there are pairs, 1600.

    >>> make_ids(np.random.default_rng(0), 3)
    ['1', '2', '3']
    """
    check_rng(rng)
    check_integer("n", n, least=1)
    check_choice("id_style", id_style, ID_STYLES)
    if id_style == "plain":
        return [str(number + 1) for number in range(n)]
    if id_style == "uuid":
        found: dict[str, None] = {}
        while len(found) < n:
            found[str(uuid.UUID(bytes=rng.bytes(16), version=4))] = None
        return list(found)
    if id_style == "words":
        pairs = len(ADJECTIVES) * len(NOUNS)
        if n > pairs:
            raise ValueError(f"n: got {n}, expected at most {pairs} pairs of words")
        chosen = (divmod(int(c), len(NOUNS)) for c in rng.choice(pairs, n, replace=False))
        return [f"{ADJECTIVES[adjective]}-{NOUNS[noun]}" for adjective, noun in chosen]
    width = 2
    while 26**width < 4 * n:
        width += 1
    return [_letters(int(c), width) for c in rng.choice(26**width, n, replace=False)]


def make_lines(rng: np.random.Generator, n: int, id_style: str = "plain") -> tuple[str, int]:
    """S15: a prompt of `n` lines, and the label.

    >>> prompt, label = make_lines(np.random.default_rng(0), 2)
    >>> print(*prompt.splitlines()[1:], label, sep="; ")
    line 1: REGISTER_CONTENT is <42532>; line 2: REGISTER_CONTENT is <31849>; What is the \
REGISTER_CONTENT of line 2? Give the number alone.; 31849
    """
    ids = make_ids(rng, n, id_style)
    values = rng.integers(1, LARGEST + 1, n)
    asked = int(rng.integers(n))
    lines = [
        f"line {name}: REGISTER_CONTENT is <{value}>\n"
        for name, value in zip(ids, values, strict=True)
    ]
    question = f"What is the REGISTER_CONTENT of line {ids[asked]}? Give the number alone."
    return HEADER + "".join(lines) + question, int(values[asked])


def first_integer(text: str) -> int:
    """S16: the first maximal run of ASCII digits in `text` as an integer, or -1.

    >>> first_integer("It is <0042>."), first_integer("50,000"), first_integer("none")
    (42, 50, -1)
    """
    check_text("text", text)
    found = re.search("[0-9]+", text)
    return int(found[0]) if found else -1


def score_lines(output: str, label: int) -> bool:
    """S16: whether the first integer of an answer is the label.

    >>> score_lines("It is 42", 42), score_lines("line 7 is 42", 42)
    (True, False)
    """
    check_text("output", output)
    check_integer("label", label, least=0)
    return first_integer(output) == label


def accuracy_by_lines(
    n: np.ndarray, right: np.ndarray, length: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S17: the numbers of lines, ascending, with the accuracy and the mean length of each.

    `n` int (prompts), lines of a prompt; `right` bool (prompts); `length` int (prompts), tokens.

    >>> right = np.array([True, True, False])
    >>> accuracy_by_lines(np.array([9, 5, 9]), right, np.array([90, 50, 92]))
    (array([5, 9]), array([1. , 0.5]), array([50., 91.]))
    """
    for name, x, dtype in (("n", n, "int"), ("right", right, "bool"), ("length", length, "int")):
        check_array(name, x, ("prompts",), dtype=dtype)
        check_size(name, x.ndim, 1, "axes: prompts")
        check_size(name, len(x), len(n), "prompts, as in n")
    counts = np.unique(n)
    groups = [n == count for count in counts]
    accuracy = np.array([right[group].mean() for group in groups])
    return counts, accuracy, np.array([length[group].mean() for group in groups])


def _letters(code: int, width: int) -> str:
    """S15: `width` letters that spell `code` in base 26."""
    return "".join(chr(ord("a") + code // 26**place % 26) for place in reversed(range(width)))
