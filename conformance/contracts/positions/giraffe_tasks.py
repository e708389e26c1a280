"""Contracts of Giraffe's tasks: what is read off an answer, and where a document is cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from attnspec.conformance.contract import Contract, Output

WITHOUT_CONTRACT = {
    "make_lines": "its answer is text drawn at random; the reference's tests cover it",
    "alter_number": "its answer is drawn at random; the reference's tests cover it",
    "alter_document": "its answer is text; the reference's tests cover it",
}
TEXTS = st.one_of(
    st.sampled_from(["42", "It is <0042>.", "line 7 is 42", "50,000", "-42", "none", "Paris", ""]),
    st.text("0123456789 ,-.x\u0663\u00b2", max_size=12),
)


def _windows(sizes: Mapping[str, int]) -> dict[str, st.SearchStrategy[Any]]:
    """An answer somewhere in a document, and windows that may be wider than that."""
    tokens = sizes["tokens"]
    ends = st.integers(0, tokens - 1)
    spans = st.tuples(ends, ends).map(lambda pair: (min(pair), min(min(pair) + 9, max(pair) + 1)))
    return {
        "doc": st.just(list(range(tokens))),
        "span": spans,
        "L": st.integers(9, 80),
        "where": st.sampled_from(["start", "random", "end"]),
    }


CONTRACTS = (
    Contract(
        operation="giraffe.first_integer",
        sizes={},
        arrays=(),
        outputs=(Output("number", "exact", plain=True),),
        parameters=lambda sizes: {"text": TEXTS},
        bad_inputs=(("a number", "text", lambda a: 42),),
    ),
    Contract(
        operation="giraffe.score_lines",
        sizes={},
        arrays=(),
        outputs=(Output("right", "exact", plain=True),),
        parameters=lambda sizes: {"output": TEXTS, "label": st.sampled_from([42, 7, 50, 50000])},
        bad_inputs=(
            ("a number", "output", lambda a: 42),
            ("a label that is text", "label", lambda a: "42"),
        ),
    ),
    Contract(
        operation="giraffe.place_answer",
        sizes={"tokens": (1, 70)},
        least={"tokens": 1},
        arrays=(),
        outputs=(Output("w0", "exact", plain=True), Output("w1", "exact", plain=True)),
        parameters=_windows,
        bad_inputs=(
            ("text", "doc", lambda a: "a document"),
            ("an empty answer", "span", lambda a: (0, 0)),
            ("an answer beyond the end", "span", lambda a: (0, 999)),
            ("a window of nothing", "L", lambda a: 0),
            ("an unknown place", "where", lambda a: "middle"),
        ),
    ),
    Contract(
        operation="giraffe.presence",
        sizes={},
        arrays=(),
        outputs=(Output("right", "exact", plain=True),),
        parameters=lambda sizes: {
            "output": st.sampled_from(["In Paris, 42.", "paris", "Paris", "421", " 42", "no", ""]),
            "ref": st.sampled_from([" 42 ", "42", "paris", "Paris\n", "7 is"]),
        },
        bad_inputs=(
            ("a number", "output", lambda a: 42),
            ("a blank answer", "ref", lambda a: " \n"),
        ),
    ),
)
