"""Giraffe's tasks: what a prompt must hold, where an answer may lie, what counts as right."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.positions.giraffe_lines import (
    ID_STYLES,
    accuracy_by_lines,
    first_integer,
    make_ids,
    make_lines,
    score_lines,
)
from attnspec.reference.positions.giraffe_questions import (
    PLACES,
    alter_document,
    alter_number,
    ask,
    place_answer,
    presence,
    variant,
)

quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 999)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@quick
@given(seeds, st.integers(1, 60), st.sampled_from(ID_STYLES))
def test_the_label_is_in_the_prompt(seed: int, n: int, id_style: str) -> None:
    prompt, label = make_lines(generator(seed), n, id_style)
    found = re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", prompt, re.MULTILINE)
    lines = dict(found)
    assert len(found) == len(lines) == n
    assert all(1 <= int(value) <= 50000 for value in lines.values())
    asked = re.search(r"of line (\S+)\?", prompt.splitlines()[-1])
    assert asked
    assert int(lines[asked[1]]) == label
    assert (prompt, label) == make_lines(generator(seed), n, id_style)


def test_ids() -> None:
    assert make_ids(generator(), 3) == ["1", "2", "3"]
    for style in ID_STYLES:
        assert len(set(make_ids(generator(), 1600, style))) == 1600
    assert re.fullmatch(
        r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", make_ids(generator(), 1, "uuid")[0]
    )
    asked = [make_lines(generator(seed), 4)[0].splitlines()[-1] for seed in range(40)]
    assert len(set(asked)) == 4


@quick
@given(st.integers(0, 50000), st.text(st.characters(exclude_categories=("Nd",)), max_size=9))
def test_the_first_integer_counts(label: int, prefix: str) -> None:
    assert score_lines(f"{prefix}{label} or 7", label)
    assert score_lines(f"{prefix}00{label}", label)
    assert first_integer(f"{prefix}-{label}") == label


def test_what_else_the_score_does() -> None:
    assert first_integer("line 7 is 42") == 7
    assert first_integer("50,000") == 50
    assert first_integer("\u0663 and \u00b2") == -1
    assert not score_lines("none", 1)
    counts, accuracy, length = accuracy_by_lines(
        np.array([20, 10, 20]), np.array([True, False, False]), np.array([5, 3, 6])
    )
    assert (counts.tolist(), accuracy.tolist(), length.tolist()) == ([10, 20], [0, 0.5], [3, 5.5])


@quick
@given(st.data(), st.sampled_from(PLACES))
def test_the_answer_is_in_the_window(data: st.DataObject, where: str) -> None:
    n = data.draw(st.integers(1, 80))
    a = data.draw(st.integers(0, n - 1))
    b = data.draw(st.integers(a + 1, n))
    L = data.draw(st.integers(b - a, 100))
    w0, w1 = place_answer([0] * n, (a, b), L, where)
    assert 0 <= w0 <= a
    assert b <= w1 <= n
    assert w1 - w0 == min(L, n)


@pytest.mark.parametrize("L", [200, 2048])
def test_the_answer_is_where_it_should_be(L: int) -> None:
    doc, a, b = range(10000), 5000, 5004
    for where, low, high in (("start", 0, 0.1), ("random", 0.45, 0.55), ("end", 0.9, 1)):
        w0, _ = place_answer(doc, (a, b), L, where)
        assert low * L <= a - w0
        assert b - w0 <= high * L
    assert place_answer(doc, (0, 5), 100, "end") == (0, 100)
    assert place_answer(doc, (9995, 10000), 100, "start") == (9900, 10000)
    assert place_answer(range(50), (3, 5), 100, "end") == (0, 50)


def test_variants() -> None:
    rows = [variant(r) for r in range(12)]
    assert [where for where, _ in rows] == [w for w in PLACES for _ in range(2)] * 2
    assert [place for _, place in rows] == ["end", "start"] * 6
    assert ask("doc", "why?") == "doc\n\nwhy?"
    assert ask("doc", "why?", "start") == "why?\n\ndoc"
    assert presence("It is 12 km.", "\n12 km ")
    assert not presence("it is 12 KM.", "12 km")


@quick
@given(seeds, st.one_of(st.integers(0, 99), st.integers(995, 2110), st.integers(0, 10**25)))
def test_altered_numbers(seed: int, a: int) -> None:
    doc = f"Of {a}, {a + 1} or x{a}x, not {a}0 or 5{a}; but {a}s, and 1,{a}."
    b = alter_number(generator(seed), a, doc)
    assert b not in (a, a + 1)
    assert abs(a - b) <= 10 if 1000 <= a <= 2100 else len(str(a)) == len(str(b))
    altered = alter_document(doc, a, b)
    assert str(a) not in re.findall("[0-9]+", altered)
    expected = [str(b) if run == str(a) else run for run in re.findall("[0-9]+", doc)]
    assert re.findall("[0-9]+", altered) == expected
    assert alter_document(altered, b, a) == doc


def test_altered_numbers_reach_all() -> None:
    years = {alter_number(generator(seed), 1003) for seed in range(400)}
    assert years == set(range(993, 1014)) - {1003}
    assert {alter_number(generator(seed), 7) for seed in range(200)} == set(range(10)) - {7}
    tens = {alter_number(generator(seed), 42) for seed in range(2000)}
    assert tens == set(range(10, 100)) - {42}
    assert alter_number(generator(), 5, "1 2 3 4 6 7 8 9") == 0


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: make_lines(0, 3), TypeError, "rng"),  # type: ignore[arg-type]
        (lambda: make_lines(generator(), 0), ValueError, "n"),
        (lambda: make_lines(generator(), 1601, "words"), ValueError, "n"),
        (lambda: make_lines(generator(), 3, "roman"), ValueError, "id_style"),
        (lambda: first_integer(3), TypeError, "text"),  # type: ignore[arg-type]
        (lambda: score_lines(3, 3), TypeError, "output"),  # type: ignore[arg-type]
        (lambda: score_lines("3", "3"), TypeError, "label"),  # type: ignore[arg-type]
        (lambda: accuracy_by_lines(*[np.arange(3)] * 3), TypeError, "right"),
        (lambda: place_answer("text", (0, 1), 3), TypeError, "doc"),
        (lambda: place_answer([1], 1, 3), TypeError, "span"),  # type: ignore[arg-type]
        (lambda: place_answer([1], (0, 1, 1), 3), ValueError, "span"),  # type: ignore[arg-type]
        (lambda: place_answer([1], (0, 0), 3), ValueError, "span"),
        (lambda: place_answer([1], (0, 2), 3), ValueError, "span"),
        (lambda: place_answer([1, 2], (0, 2), 1), ValueError, "L"),
        (lambda: place_answer([1, 2], (0, 2), 2, "middle"), ValueError, "where"),
        (lambda: variant(-1), ValueError, "r"),
        (lambda: ask("a", "b", "middle"), ValueError, "place"),
        (lambda: presence("a", " "), ValueError, "ref"),
        (lambda: presence(1, "a"), TypeError, "output"),  # type: ignore[arg-type]
        (lambda: alter_number(None, 3), TypeError, "rng"),  # type: ignore[arg-type]
        (lambda: alter_number(generator(), -3), ValueError, "a"),
        (lambda: alter_number(generator(), 3, "0 1 2 4 5 6 7 8 9"), ValueError, "doc"),
        (lambda: alter_number(generator(), 30, str(list(range(100)))), ValueError, "doc"),
        (lambda: alter_document(3, 3, 4), TypeError, "doc"),  # type: ignore[arg-type]
        (lambda: alter_document("3", 3, 4.0), TypeError, "a2"),  # type: ignore[arg-type]
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}: got .*expected"):
        call()
