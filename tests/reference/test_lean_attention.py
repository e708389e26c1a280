"""Lean attention: equality with dense attention, the schedule's invariants, bad inputs."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.dense import attention as dense
from attnspec.reference.parallel import lean_attention, lean_attention_schedule
from attnspec.reference.parallel.lean_attention import (
    Triple,
    attend,
    finalize,
    grid_size,
    helpers,
    lean_schedule,
    line_order,
    merge,
    partial,
    segments,
    split_bound,
    tile_size,
    tiles_per_output,
)

small = settings(max_examples=30, deadline=None, derandomize=True)


def draw(
    seed: int, Tq: int, Tk: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, heads, Tq, 4))
    k = rng.standard_normal((batch, kv_heads, Tk, 4))
    return q, k, rng.standard_normal((batch, kv_heads, Tk, 3))


def by_dense(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: np.ndarray, causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    outs, lses = zip(
        *(
            dense.attend(q[b], k[b, :, :n], v[b, :, :n], causal=causal)
            for b, n in enumerate(lengths)
        ),
        strict=True,
    )
    return np.stack(outs), np.stack(lses)


@pytest.mark.parametrize("module", [lean_attention, lean_attention_schedule])
def test_doctests(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


@small
@given(
    Tq=st.integers(1, 6),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    N=st.integers(1, 9),
    G=st.integers(1, 40),
    M=st.sampled_from([None, 1, 2, 4]),
    causal=st.booleans(),
    order=st.sampled_from(["natural", "paired"]),
    seed=st.integers(0, 99),
)
def test_equals_dense_attention(
    Tq: int,
    lengths: list[int],
    N: int,
    G: int,
    M: int | None,
    causal: bool,
    order: str,
    seed: int,
) -> None:
    q, k, v = draw(seed, Tq, 12, batch=len(lengths))
    for entry, length in enumerate(lengths):
        k[entry, :, length:], v[entry, :, length:] = np.nan, np.inf
    sizes = np.array(lengths)
    out, lse = attend(q, k, v, sizes, N, G, causal=causal, M=M, order=order)
    expected, expected_lse = by_dense(q, k, v, sizes, causal)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-12)
    again, _ = attend(q, k, v, sizes, N, G, causal=causal, M=M, order=order)
    np.testing.assert_array_equal(again, out)


tiles = st.lists(st.integers(0, 7), min_size=1, max_size=6).map(np.array)


@small
@given(n=tiles, G=st.integers(1, 50))
def test_schedule_invariants(n: np.ndarray, G: int) -> None:
    start, end = lean_schedule(n, G)
    W = int(n.sum())
    assert len(start) == min(G, W)
    covered = [x for a, b in zip(start, end, strict=True) for x in range(a, b)]
    assert covered == list(range(W))
    if W:
        assert np.ptp(end - start) <= 1
    found = segments(n, start, end)
    assert [s.g for s in found] == sorted(s.g for s in found)
    stores = [s.g for s in found if not s.host]
    assert len(stores) == len(set(stores))
    for u in range(len(n)):
        mine = [s for s in found if s.u == u]
        assert sum(s.hi_tile - s.lo_tile for s in mine) == n[u]
        assert sum(s.host for s in mine) == sum(s.finishing for s in mine) == int(n[u] > 0)
        assert list(helpers(n, start, end, u)) == [s.g for s in mine[1:]]
        assert len(mine) <= split_bound(n, G)


@pytest.mark.parametrize(("n", "G"), [([1, 8, 3], 6), ([2, 9, 2], 4), ([5, 7], 5), ([4], 4)])
def test_split_bound_is_tight(n: list[int], G: int) -> None:
    """By some place of the longest output on the line, so that no smaller bound would do."""
    most = 0
    for order in set(permutations(n)):
        tiles = np.array(order)
        start, end = lean_schedule(tiles, G)
        pieces = [len(helpers(tiles, start, end, u)) + 1 for u in range(len(n))]
        most = max(most, *pieces)
    assert most == split_bound(np.array(n), G)


def test_split_bound_is_reached_and_a_single_tile_each_divides() -> None:
    assert split_bound(np.array([4]), 4) == 4
    assert split_bound(np.array([0, 0]), 4) == 0
    n = np.array([3, 4])
    start, end = lean_schedule(n, 3)
    assert max(len(helpers(n, start, end, u)) + 1 for u in range(2)) <= split_bound(n, 3)


@small
@given(n=tiles, slots=st.integers(1, 30), rule=st.sampled_from(["authors", "port"]))
def test_grid_size(n: np.ndarray, slots: int, rule: str) -> None:
    G, W = grid_size(n, slots, rule), int(n.sum())
    assert min(W, 1) <= G <= min(slots, W)


def test_grid_size_rules() -> None:
    assert grid_size(np.array([12]), 6) == 6
    assert grid_size(np.array([12]), 6, "port") == 6
    assert grid_size(np.array([5]), 6, "port") == 3
    assert grid_size(np.array([1]), 6) == 1
    assert grid_size(np.array([200]), 100) == 32
    assert grid_size(np.array([201]), 100) == 32
    assert grid_size(np.array([201]), 100, "port") == 100
    assert grid_size(np.array([100, 100, 1]), 100) == 96
    assert grid_size(np.array([100, 100, 1]), 201, "port") == 65


@small
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 10), min_size=2, max_size=2))
def test_merge_is_the_triple_of_the_union(seed: int, cuts: list[int]) -> None:
    q, k, v = (x[0, 0] for x in draw(seed, 3, 10))
    lo, hi = sorted(cuts)
    mask = np.random.default_rng(seed).random((3, 10)) < 0.7
    a, b, c = (partial(q, k, v, *edges, mask=mask) for edges in ((0, lo), (lo, hi), (hi, 10)))
    whole = partial(q, k, v, 0, 10, mask=mask)
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))):
        for got, expected in zip(merged, whole, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-12)
    unit = Triple(np.full(3, -np.inf), np.zeros(3), np.zeros((3, 3)))
    for merged in (merge(unit, whole), merge(whole, unit)):
        for got, expected in zip(merged, whole, strict=True):
            np.testing.assert_array_equal(got, expected)
    lse = finalize(*whole)[1]
    parts = [finalize(*x)[1] for x in (a, b, c)]
    np.testing.assert_allclose(np.logaddexp.reduce(parts, axis=0), lse, atol=1e-12)
    seen = np.isfinite(lse)
    weights = sum(np.exp(part[seen] - lse[seen]) for part in parts)
    np.testing.assert_allclose(weights, 1.0, atol=1e-12)


def test_reference_of_a_triple_is_free() -> None:
    q, k, v = (x[0, 0] for x in draw(1, 3, 10))
    a, b = partial(q, k, v, 0, 4), partial(q, k, v, 4, 10)
    moved = Triple(b.m + 5.0, b.l * np.exp(-5.0), b.o * np.exp(-5.0))
    np.testing.assert_allclose(finalize(*merge(a, moved))[0], finalize(*merge(a, b))[0])


def test_shift_of_the_logits_and_huge_ones() -> None:
    q, k, v = draw(2, 1, 9)
    lengths = np.array([9, 6])
    out, lse = attend(q, k, v, lengths, 2, 3)
    wide_q = np.concatenate([q, np.full_like(q[..., :1], 2.0)], axis=-1)
    wide_k = np.concatenate([k, np.full_like(k[..., :1], 3.0)], axis=-1)
    shifted, shifted_lse = attend(wide_q, wide_k, v, lengths, 2, 3, scale=0.5)
    np.testing.assert_allclose(shifted, out, atol=1e-12)
    np.testing.assert_allclose(shifted_lse, lse + 3.0, atol=1e-12)
    for factor in (1e4, -1e4):
        huge, _ = attend(q * factor, k, v, lengths, 2, 3)
        assert np.all(np.isfinite(huge))


def test_key_order_and_grouped_heads() -> None:
    q, k, v = draw(3, 1, 9)
    lengths = np.array([9, 9])
    out, _ = attend(q, k, v, lengths, 2, 5)
    order = np.random.default_rng(0).permutation(9)
    np.testing.assert_allclose(attend(q, k[:, :, order], v[:, :, order], lengths, 2, 5)[0], out)
    keys, values = (np.repeat(x, 2, axis=1) for x in (k, v))
    np.testing.assert_allclose(attend(q, keys, values, lengths, 2, 7)[0], out)
    one, each = attend(q, k[:, :1], v[:, :1], lengths, 2, 5), np.repeat(k[:, :1], 4, axis=1)
    np.testing.assert_allclose(
        attend(q, each, np.repeat(v[:, :1], 4, axis=1), lengths, 2, 5)[0], one[0]
    )


def test_decode_equals_the_last_row_of_causal_prefill() -> None:
    q, k, v = draw(4, 7, 7)
    lengths = np.array([7, 7])
    out, _ = attend(q, k, v, lengths, 2, 6, causal=True, M=2, order="paired")
    row, _ = attend(q[..., -1:, :], k, v, lengths, 3, 4)
    np.testing.assert_allclose(row, out[..., -1:, :], atol=1e-12)


def test_leading_axes_are_free_and_float32_stays() -> None:
    q, k, v = (x.astype(np.float32) for x in draw(5, 2, 8))
    copies = [x.copy() for x in (q, k, v)]
    out, lse = attend(q, k, v, np.array([8, 5]), 3, 4)
    assert out.dtype == lse.dtype == np.float32
    np.testing.assert_array_equal(attend(q[1], k[1], v[1], np.array(5), 8, 1)[0].shape, (4, 2, 3))
    twice = attend(q[None], k[None], v[None], np.array([[8, 5]]), 3, 4)
    np.testing.assert_array_equal(twice[0][0], out)
    for x, copy in zip((q, k, v), copies, strict=True):
        np.testing.assert_array_equal(x, copy)
    empty, empty_lse = attend(q, k[..., :0, :], v[..., :0, :], np.array([0, 0]), 3, 4)
    assert not np.any(empty)
    assert np.all(np.isneginf(empty_lse))


def test_paired_order() -> None:
    assert [i for _, _, i in line_order(1, 1, 5, "paired")] == [0, 4, 1, 3, 2]
    n = tiles_per_output(np.array([8]), 1, Tq=8, M=1, causal=True, order="paired")
    assert set(n[0::2] + n[1::2]) == {9}


q, k, v = draw(0, 2, 6)
lengths = np.array([6, 3])
n = np.array([2, 1])
edge = np.array([0, 1]), np.array([1, 3])
row = q[0, 0], k[0, 0], v[0, 0]
unit = Triple(np.zeros(1), np.zeros(1), np.zeros((1, 1)))


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: partial(*row, 0, 7), ValueError, "hi"),
        (lambda: partial(*row, 3, 2), ValueError, "hi"),
        (lambda: partial(*row, -1, 2), ValueError, "lo"),
        (lambda: partial(row[0], row[1][:, 1:], row[2], 0, 2), ValueError, "k"),
        (lambda: partial(row[0], row[1], row[2][1:], 0, 2), ValueError, "v"),
        (lambda: partial(*row, 0, 2, mask=np.ones((2, 5), bool)), ValueError, "mask"),
        (lambda: partial(*row, 0, 2, mask=np.ones((2, 6))), TypeError, "mask"),
        (lambda: partial(*row, 0, 2, mask=np.ones((3, 6), bool)), ValueError, "mask"),
        (lambda: merge(unit, Triple(np.zeros(1), 0.0, unit.o)), TypeError, "b.l"),
        (lambda: merge(unit, unit._replace(l=np.zeros(2))), ValueError, "b.l"),
        (lambda: merge(unit._replace(o=np.zeros((2, 1))), unit), ValueError, "a.o"),
        (lambda: merge(unit, unit._replace(o=np.zeros((1, 2)))), ValueError, "b.o"),
        (lambda: finalize(unit.m, np.zeros(2), unit.o), ValueError, "l"),
        (lambda: finalize(unit.m, unit.l, np.zeros((2, 1))), ValueError, "o"),
        (lambda: finalize(unit.m, unit.l, np.zeros(1)), ValueError, "o"),
        (lambda: tile_size(0), ValueError, "d"),
        (lambda: tile_size(64, "theirs"), ValueError, "rule"),
        (lambda: line_order(1, 1, 1, "random"), ValueError, "order"),
        (lambda: line_order(0, 1, 1), ValueError, "Hkv"),
        (lambda: tiles_per_output(lengths, 0), ValueError, "N"),
        (lambda: tiles_per_output(lengths, 2, Tq=-1), ValueError, "Tq"),
        (lambda: tiles_per_output(lengths, 2, M=0), ValueError, "M"),
        (lambda: tiles_per_output(-lengths, 2), ValueError, "lengths"),
        (lambda: tiles_per_output(lengths / 2, 2), TypeError, "lengths"),
        (lambda: grid_size(n, 0), ValueError, "slots"),
        (lambda: grid_size(n, 1, "theirs"), ValueError, "rule"),
        (lambda: lean_schedule(n, 0), ValueError, "G"),
        (lambda: lean_schedule([2], 1), TypeError, "n"),
        (lambda: split_bound(n, 1.0), TypeError, "G"),
        (lambda: segments(n, edge[0], edge[1][:1]), ValueError, "end"),
        (lambda: helpers(n, *edge, 2), ValueError, "u"),
        (lambda: attend(q, k, v, np.array(6), 2, 2), ValueError, "lengths"),
        (lambda: attend(q, k, v, np.array([7, 1]), 2, 2), ValueError, "lengths"),
        (lambda: attend(q, k, v, lengths, 2, 0), ValueError, "G"),
        (lambda: attend(q, k, v, lengths, 0, 2), ValueError, "N"),
        (lambda: attend(q[:, :3], k, v, lengths, 2, 2), ValueError, "k"),
    ],
)
def test_bad_inputs(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name}: got "):
        call()
