"""SnapKV, the selection: its properties and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.cache import snapkv

quick = settings(max_examples=20, deadline=None, derandomize=True)


def tokens(T: int = 20, H: int = 4, Hk: int = 2, d: int = 6, dv: int = 5, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    shapes = ((2, H, T, d), (2, Hk, T, d), (2, Hk, T, dv))
    return tuple(random.standard_normal(shape) for shape in shapes)


@quick
@given(w=st.integers(1, 6), seed=st.integers(0, 9))
def test_the_window_gives_away_all_its_weight(w: int, seed: int) -> None:
    q, k, _ = tokens(seed=seed)
    A = snapkv.window_attention(q, k, w)
    s = snapkv.prefix_scores(A, w)
    np.testing.assert_allclose(s.sum(-1) + A[..., 20 - w :].sum((-1, -2)), w)
    assert np.all((s >= 0) & (s <= w))
    assert np.all(np.triu(A[..., 20 - w :], 1) == 0)


@quick
@given(p=st.sampled_from([1, 3, 5, 9]), seed=st.integers(0, 9), place=st.integers(0, 6))
def test_pooling(p: int, seed: int, place: int) -> None:
    a, b = np.random.default_rng(seed).random((2, 3, 7))
    avg, largest = (snapkv.pool_scores(a, p, mode) for mode in ("avg", "max"))
    np.testing.assert_allclose(
        snapkv.pool_scores(2 * a - b, p, "avg"),
        2 * avg - snapkv.pool_scores(b, p, "avg"),
        atol=1e-14,
    )
    assert np.all(largest >= a)
    for j in range(7):
        near = a[:, max(0, j - p // 2) : j + p // 2 + 1]
        np.testing.assert_allclose(avg[:, j], near.sum(-1) / p)
        np.testing.assert_array_equal(largest[:, j], near.max(-1))
    raised = a.copy()
    raised[:, place] += 1
    assert np.all(snapkv.pool_scores(raised, p, "max") >= largest)
    assert np.all(snapkv.pool_scores(raised, p, "avg") >= avg - 1e-15)
    if p == 1:
        np.testing.assert_array_equal(avg, a)
        np.testing.assert_array_equal(largest, a)


def test_reduction_comes_after_pooling() -> None:
    s = np.array([[[4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]])
    pooled = snapkv.pool_scores(s, 3, "max")
    np.testing.assert_array_equal(snapkv.reduce_groups(pooled, 1), [[[2.0, 2.0, 1.0, 1.0]]])
    np.testing.assert_array_equal(
        snapkv.reduce_groups(pooled, 1, "group_max"), [[[4.0, 4.0, 2.0, 2.0]]]
    )
    np.testing.assert_array_equal(snapkv.reduce_groups(pooled, 1, "per_query_head"), pooled)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_set_retains_more(seed: int) -> None:
    q, k, _ = tokens(T=10, seed=seed)
    s = snapkv.prefix_scores(snapkv.window_attention(q, k, 3), 3)
    idx = snapkv.select(snapkv.reduce_groups(snapkv.pool_scores(s, 1), 2, "per_query_head"), 3)
    kept = np.take_along_axis(s, idx, -1).sum(-1)
    for other in combinations(range(7), 3):
        assert np.all(s[..., other].sum(-1) <= kept + 1e-12)


def test_padding_is_chosen_last() -> None:
    m = np.array([[0.0, 9.0, 0.0, 0.0]])
    mask = np.array([False, False, True, True])
    np.testing.assert_array_equal(snapkv.select(m, 2, mask), [[2, 3]])
    np.testing.assert_array_equal(snapkv.select(m, 3, mask), [[0, 2, 3]])
    np.testing.assert_array_equal(snapkv.select(m, 9, mask), [[0, 1, 2, 3]])


Q, K, _ = tokens(T=6)
MASK = np.ones((2, 6), bool)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: snapkv.window_attention(Q[0], K, 2), ValueError, "k"),
    (lambda: snapkv.window_scores(Q, K, 2, lse=Q[..., 0]), ValueError, "lse"),
    (lambda: snapkv.window_attention(Q, K, 0), ValueError, "w"),
    (lambda: snapkv.window_attention(Q, K, 6), ValueError, "w"),
    (lambda: snapkv.window_attention(Q[..., :1, :], K, 2), ValueError, "w"),
    (lambda: snapkv.window_attention(Q, K, 2, MASK[0]), ValueError, "mask"),
    (lambda: snapkv.window_attention(Q, K, 2, MASK * 1), TypeError, "mask"),
    (lambda: snapkv.window_attention(Q, K, 2, np.arange(6) < MASK * 3), ValueError, "mask"),
    (lambda: snapkv.prefix_scores(np.ones(3), 1), ValueError, "A"),
    (lambda: snapkv.prefix_scores(np.ones((1, 2, 5)), 1), ValueError, "A"),
    (lambda: snapkv.prefix_scores(np.ones((1, 2, 5)), 3), ValueError, "w"),
    (lambda: snapkv.pool_scores([1.0]), TypeError, "s"),  # type: ignore[arg-type]
    (lambda: snapkv.pool_scores(np.ones(3), 2), ValueError, "p"),
    (lambda: snapkv.pool_scores(np.ones(3), 1.0), TypeError, "p"),  # type: ignore[arg-type]
    (lambda: snapkv.pool_scores(np.ones(3), 1, "min"), ValueError, "mode"),
    (lambda: snapkv.reduce_groups(np.ones(3), 1), ValueError, "m"),
    (lambda: snapkv.reduce_groups(np.ones((3, 5)), 2), ValueError, "Hk"),
    (lambda: snapkv.reduce_groups(np.ones((3, 5)), 3, "mean"), ValueError, "mode"),
    (lambda: snapkv.select(np.ones(3), 1), ValueError, "m"),
    (lambda: snapkv.select(np.ones((1, 3)), 0), ValueError, "n"),
    (lambda: snapkv.select(np.ones((1, 3)), 1, np.ones(3)), TypeError, "mask"),
    (lambda: snapkv.select(np.ones((1, 3)), 1, np.ones(2, bool)), ValueError, "mask"),
    (lambda: snapkv.select(np.ones((1, 3)), 1, np.ones((1, 1, 3), bool)), ValueError, "mask"),
]


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}: got .*expected"):
        call()
