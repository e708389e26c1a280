"""The rows of StreamingLLM's cache: the authors' policy, its properties and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.cache import streaming_llm_rows as rows

quick = settings(max_examples=25, deadline=None, derandomize=True)
small = st.integers(0, 5)


def test_evicted_rows_are_those_of_the_authors_cache(golden: Callable[[str], Any]) -> None:
    case = golden("streaming_llm__cache_policy")
    for n, params in enumerate(case["meta"]["cases"]):
        T, S, R = params["T"], params["start_size"], params["recent_size"]
        room = rows.evict_rows_for_space(T, params["num_coming"], S, R)
        np.testing.assert_array_equal(rows.evict_rows(T, S, R), case[f"kept_{n}"])
        np.testing.assert_array_equal(room, case[f"kept_for_space_{n}"])
        np.testing.assert_array_equal(rows.evict_rows_range(T, 2, 5), case[f"kept_range_{n}"])


@quick
@given(T=st.integers(0, 20), S=small, R=small)
def test_distances_are_true_in_the_window_and_bounded_for_sinks(T: int, S: int, R: int) -> None:
    mask, distance = rows.sink_window_mask(T, S, R), rows.sink_window_distances(T, S, R)
    np.testing.assert_array_equal(distance >= 0, mask)
    for t, j in np.argwhere(mask):
        assert distance[t, j] == (min(t, S + R) if j < S else t) - j


@quick
@given(T=st.integers(0, 20), more=small, S=small, R=small)
def test_kept_rows_are_the_sinks_and_the_last(T: int, more: int, S: int, R: int) -> None:
    kept = rows.evict_rows(T, S, R)
    assert kept.tolist() == sorted({*range(min(S, T)), *range(max(0, T - R), T)})
    assert len(kept) == min(T, S + R)
    np.testing.assert_array_equal(rows.evict_rows(len(kept), S, R), np.arange(len(kept)))
    grown = np.concatenate([kept, np.arange(T, T + more)])
    expected = rows.evict_rows(T + more, S, R)
    np.testing.assert_array_equal(grown[rows.evict_rows(len(grown), S, R)], expected)


@quick
@given(T=st.integers(0, 20), m=st.integers(0, 12), S=small, R=small)
def test_room_made_is_enough_where_sinks_allow_it(T: int, m: int, S: int, R: int) -> None:
    kept = rows.evict_rows_for_space(T, m, S, R)
    assert len(set(kept)) == len(kept)
    assert len(kept) + min(m, R) <= S + R
    assert set(range(min(S, T))) <= set(kept.tolist())


ZERO = np.zeros(4)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: rows.evict_rows(-1), ValueError, "T"),
    (lambda: rows.evict_rows(3, 1.0), TypeError, "S"),  # type: ignore[arg-type]
    (lambda: rows.evict_rows(3, 1, -1), ValueError, "R"),
    (lambda: rows.evict_rows_for_space(3, True), TypeError, "m"),
    (lambda: rows.evict_rows_range(5, -1, 2), ValueError, "a"),
    (lambda: rows.evict_rows_range(5, 3, 2), ValueError, "b"),
    (lambda: rows.evict_rows_range(5, 3, 6), ValueError, "b"),
    (lambda: rows.cache_positions(-1, 1), ValueError, "n"),
    (lambda: rows.cache_positions(1, None), TypeError, "w"),  # type: ignore[arg-type]
    (lambda: rows.rope([1.0], np.arange(1)), TypeError, "x"),  # type: ignore[arg-type]
    (lambda: rows.rope(np.ones((2, 3)), np.arange(2)), ValueError, "x"),
    (lambda: rows.rope(np.ones((2, 2)), np.arange(3)), ValueError, "pos"),
    (lambda: rows.rope(np.ones((2, 2)), np.ones(2)), TypeError, "pos"),
    (lambda: rows.rope(np.ones((2, 2)), np.arange(2), 0.0), ValueError, "base"),
    (lambda: rows.rope(np.ones((2, 3)), np.arange(2), 9.0, 3), ValueError, "rotary_dims"),
    (lambda: rows.rope(np.ones((2, 3)), np.arange(2), 9.0, 4), ValueError, "rotary_dims"),
    (lambda: rows.rope(np.ones((2, 3)), np.arange(2), 9.0, 0), ValueError, "rotary_dims"),
    (lambda: rows.rope(np.ones((2, 3)), np.arange(2), 9.0, True), TypeError, "rotary_dims"),
    (lambda: rows.rope(np.ones((2, 2)), np.arange(2), "1"), TypeError, "base"),  # type: ignore[arg-type]
    (lambda: rows.alibi_bias(ZERO, np.arange(1), np.arange(1)), ValueError, "alibi_slopes"),
    (lambda: rows.alibi_bias(ZERO + 1, np.ones(1), np.arange(1)), TypeError, "p_q"),
    (lambda: rows.alibi_bias(ZERO + 1, np.arange(1), np.ones(1)), TypeError, "p_k"),
    (lambda: rows.sink_window_mask(-1), ValueError, "T"),
    (lambda: rows.sink_window_distances(3, -1), ValueError, "S"),
    (lambda: rows.call_sizes(-1, 2), ValueError, "T"),
]


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}: got .*expected"):
        call()
