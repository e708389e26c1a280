"""MoA's masks, caches and influence against outside evidence, their properties and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.conventions import causal_mask
from attnspec.reference.dense.attention import attend, score
from attnspec.reference.patterns import moa
from attnspec.reference.patterns.moa_cache import Cache, init_cache, starts
from attnspec.reference.primitives.softmax import softmax, softmax_lse

quick = settings(max_examples=25, deadline=None, derandomize=True)


def tokens(T: int = 12, H: int = 4, Hk: int = 2, d: int = 6, dv: int = 5, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    shapes = ((2, H, T, d), (2, Hk, T, d), (2, Hk, T, dv))
    return tuple(random.standard_normal(shape) for shape in shapes)


def numbered(T: int, heads: int) -> np.ndarray:
    """Keys (1, heads, T, 1) that say which token they belong to, counted from 1."""
    return np.tile(1.0 + np.arange(T)[:, None], (1, heads, 1, 1))


@pytest.mark.parametrize(("name", "prefill"), [("short_prefill", 2), ("left_pad", 10)])
def test_slots_are_those_of_the_authors_cache(
    golden: Callable[[str], Any], name: str, prefill: int
) -> None:
    case = golden(f"moa__cache_{name}")
    params = case["meta"]["params"]
    C, s = np.array(params["cache_size"]), np.array(params["static_size"])
    batch = case["slots"].shape[1]
    x = np.repeat(numbered(params["T"] + 1, 2), batch, axis=0)
    mask = case["attention_mask"] > 0 if "attention_mask" in case else np.ones((batch, prefill)) > 0
    cache, at, w = init_cache(x, x, s, C - s), 0, prefill
    for slots, valid in zip(case["slots"], case["valid"], strict=True):
        new = x[:, :, at : at + w]
        cache = moa.cache_update(cache, new, new, s, C - s, mask if at == 0 else None)
        for b in range(batch):
            for h, start in enumerate(starts(s, C - s)):
                written = min(int(cache.seen[b]), C[h])
                assert written == valid[b, h]
                got = cache.k[b, start : start + C[h], 0] - 1
                expected = slots[b, start : start + C[h]]
                np.testing.assert_array_equal(np.sort(got[:written]), np.sort(expected[:written]))
                if at > 0:
                    np.testing.assert_array_equal(got[:written], expected[:written])
        at, w = at + w, 1


def test_sizes_are_those_of_the_authors(golden: Callable[[str], Any]) -> None:
    alpha, beta = np.array([0.0, 64, -128, 300]), np.array([1.0, 0.25, 0.5, 0])
    calls = ((100, 20), (1000, 24), (37, 5), (512, 512))
    for row, call in zip(golden("moa__cache_left_pad")["cache_sizes"], calls, strict=True):
        C, s, c = moa.cache_sizes(alpha, beta, *call)
        np.testing.assert_array_equal(row, np.concatenate([C, s]))
        np.testing.assert_array_equal(c, C - s)


def test_influence_is_that_of_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("moa__influence_b")
    q, k, v, g = (case[name] for name in ("q", "k", "v", "dout"))
    P, _ = softmax_lse(score(q, k), causal_mask(12, 12))
    E = moa.influence(P, v, g)
    lower = causal_mask(12, 12)
    np.testing.assert_allclose(E[..., lower], case["effect"][..., lower], rtol=1e-5, atol=1e-5)
    blocks = moa.block_influence(q, k, v, g, 3)
    np.testing.assert_allclose(blocks, case["block_effect"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(blocks, moa.block_sum(np.abs(E), 3))


def test_a_span_over_all_of_the_text_is_dense() -> None:
    q, k, v = tokens()
    dense, _ = attend(q, k, v, causal=True)
    C, s, c = moa.cache_sizes(np.zeros(2), np.ones(2), 10, 2, sink=2, minimum=4, split=2)
    for options in ({}, {"granularity": "block", "block": 2}):
        out, _ = moa.moa_attend(q, k, v, s, c, **options)
        np.testing.assert_allclose(out, dense, atol=1e-12)
    assert (C == 12).all()


@quick
@given(st.integers(0, 3), st.integers(1, 3), st.integers(0, 14), st.sampled_from([1, 2, 3]))
def test_masks_are_causal_nested_and_show_the_sinks(s: int, c: int, T: int, b: int) -> None:
    token = moa.moa_token_mask(T, [s * b], [c * b])[0]
    block = moa.moa_block_mask(T, [s * b], [c * b], b)[0]
    for mask, wider in (
        (token, moa.moa_token_mask(T, [s * b], [(c + 1) * b])[0]),
        (block, moa.moa_block_mask(T, [s * b], [(c + 1) * b], b)[0]),
    ):
        assert not np.triu(mask, 1).any()
        assert (mask <= wider).all()
        assert np.diag(mask).all()
        assert (mask[:, : s * b] == causal_mask(T, T)[:, : s * b]).all()
    assert (block <= token).all()
    local = block & (np.arange(T) >= s * b)
    full = np.arange(T) >= (s + c) * b
    assert ((local.sum(axis=1)[full] > (c - 1) * b) & (local.sum(axis=1)[full] <= c * b)).all()
    if b == 1:
        np.testing.assert_array_equal(token, block)


def test_heads_with_their_rules_may_be_permuted() -> None:
    q, k, v = tokens(H=6, Hk=3)
    s, c = (0, 2, 1), (5, 1, 3)
    out, _ = moa.moa_attend(q, k, v, s, c)
    order = [2, 0, 1]
    heads = [2 * h + i for h in order for i in range(2)]
    turned, _ = moa.moa_attend(
        q[:, heads], k[:, order], v[:, order], [s[h] for h in order], [c[h] for h in order]
    )
    np.testing.assert_array_equal(turned, out[:, heads])


@quick
@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 13))
def test_decoding_is_a_row_of_the_token_mask(s: int, c: int, T: int) -> None:
    q, k, v = tokens(T)
    sizes = (s, 2), (c, 4)
    out, lse = moa.moa_attend(q, k, v, *sizes)
    steps = moa.decode_step(q, k, v, init_cache(k, v, *sizes), *sizes)
    np.testing.assert_allclose(steps[0], out, atol=1e-12)
    np.testing.assert_allclose(steps[1], lse, atol=1e-12)
    x = np.repeat(numbered(T, 2), 2, axis=0)
    cache = moa.cache_update(init_cache(x, x, *sizes), x, x, *sizes)
    assert (cache.seen == T).all()
    for h, start in enumerate(starts(*sizes)):
        kept = {*range(min(sizes[0][h], T)), *range(max(0, T - sizes[1][h]), T)}
        size = sizes[0][h] + sizes[1][h]
        got = cache.k[1, start : start + min(size, T), 0] - 1
        assert set(got.astype(int)) == kept
        assert len(got) == min(T, size) == len(kept)


def test_the_order_of_slots_does_not_matter_and_bulk_writes_are_single_ones() -> None:
    q, k, v = tokens()
    sizes = (1, 2), (4, 6)
    cache = moa.cache_update(init_cache(k, v, *sizes), k, v, *sizes)
    single = init_cache(k, v, *sizes)
    for i in range(12):
        single = moa.cache_update(single, k[:, :, i : i + 1], v[:, :, i : i + 1], *sizes)
    for one, other in zip(cache, single, strict=True):
        np.testing.assert_array_equal(one, other)
    out, lse = moa.decode(q[:, :, -1:], cache, *sizes)
    order = [2, 0, 1, 4, 3, *range(12, 4, -1)]
    turned = cache._replace(k=cache.k[:, order], v=cache.v[:, order])
    np.testing.assert_allclose(moa.decode(q[:, :, -1:], turned, *sizes)[0], out, atol=1e-12)
    np.testing.assert_allclose(moa.decode(q[:, :, -1:], turned, *sizes)[1], lse, atol=1e-12)


def test_padding_and_slots_not_written_are_not_read() -> None:
    q, k, v = tokens(T=4)
    sizes = (1, 1), (2, 4)
    empty = init_cache(k, v, *sizes)
    stale = empty._replace(k=np.full_like(empty.k, np.nan), v=np.full_like(empty.v, np.nan))
    real = np.array([[False, True, False, True], [True, True, True, True]])
    bad = k.copy()
    bad[~np.repeat(real[:, None], 2, axis=1)] = np.nan
    cache = moa.cache_update(stale, bad, v, *sizes, real)
    np.testing.assert_array_equal(cache.seen, [2, 4])
    out, _ = moa.decode(q[:, :, -1:], cache, *sizes)
    first = moa.moa_attend(q[:1, :, 1::2], k[:1, :, 1::2], v[:1, :, 1::2], *sizes)[0]
    np.testing.assert_allclose(out[:1], first[:, :, 1:], atol=1e-12)
    out, lse = moa.decode(q[:, :, :1], stale, *sizes)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


def test_influence_is_exact_for_a_loss_linear_in_the_output() -> None:
    q, k, v = tokens(T=6)
    g = np.random.default_rng(1).standard_normal((2, 4, 6, 5))
    P, _ = softmax_lse(score(q, k), causal_mask(6, 6))
    E = moa.influence(P, v, g, eps=0.0)
    whole = np.einsum("bhtd,bhtd->bht", g, P @ np.repeat(v, 2, axis=1))
    for t, u in ((1, 0), (5, 5), (4, 2)):
        cut = P.copy()
        cut[..., t, u] = 0
        cut /= cut.sum(axis=-1, keepdims=True)
        changed = np.einsum("bhtd,bhtd->bht", g, cut @ np.repeat(v, 2, axis=1))
        np.testing.assert_allclose((changed - whole)[..., t], E[..., t, u], atol=1e-12)
    balance = (E * (1 - P)).sum(axis=-1)
    np.testing.assert_allclose(balance[..., 1:], 0, atol=1e-12)
    assert (E[..., ~causal_mask(6, 6)] == 0).all()
    shifted = moa.influence(P, v + np.arange(5.0), g, eps=0.0)
    np.testing.assert_allclose(shifted[..., 1:, :], E[..., 1:, :], atol=1e-11)


def test_a_weight_of_one_has_a_finite_influence() -> None:
    P, V = np.eye(3)[None], np.arange(3.0).reshape(1, 3, 1)
    for eps in (0.0, 2.0**-23):
        E = moa.influence(P, V, np.ones((1, 3, 1)), eps)
        assert np.isfinite(E).all()


def test_groups_are_neighbours_or_interleaved() -> None:
    I = np.arange(6.0).reshape(6, 1, 1)
    assert moa.group_influence(I, 3).ravel().tolist() == [1, 3, 5]
    assert moa.group_influence(I, 3, interleaved=True).ravel().tolist() == [3, 4, 5]


@pytest.mark.parametrize("options", [{}, {"granularity": "block", "block": 2}])
def test_gradients_are_finite_differences(options: dict[str, Any]) -> None:
    q, k, v = tokens(T=7)
    sizes = (0, 2), (4, 2)
    random = np.random.default_rng(2)
    dout, dlse = random.standard_normal((2, 4, 7, 5)), random.standard_normal((2, 4, 7))

    def loss(*inputs: np.ndarray) -> float:
        out, lse = moa.moa_attend(*inputs, *sizes, **options)
        return float((out * dout).sum() + (lse * dlse).sum())

    gradients = moa.moa_attend_backward(q, k, v, *sizes, dout, dlse, **options)
    for n, gradient in enumerate(gradients):
        direction = random.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [x + sign * 1e-6 * direction if i == n else x for i, x in enumerate((q, k, v))]
            ends.append(loss(*moved))
        slope = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-6)


def test_float32_stays_float32() -> None:
    q, k, v = (x.astype(np.float32) for x in tokens())
    g = softmax(np.ones((2, 4, 12, 5), np.float32))
    sizes = (1, 1), (2, 4)
    assert moa.moa_attend(q, k, v, *sizes)[0].dtype == np.float32
    assert all(x.dtype == np.float32 for x in moa.moa_attend_backward(q, k, v, *sizes, g))
    assert moa.decode_step(q, k, v, init_cache(k, v, *sizes), *sizes)[0].dtype == np.float32
    assert moa.block_influence(q, k, v, g, 3).dtype == np.float32


Q, K, V = tokens(T=4)
ONE = (1, 1)
CACHE = init_cache(K, V, ONE, ONE)
REAL = np.ones((2, 4), bool)
SHORT = Cache(K[:, 0, :3], *CACHE[1:])
P = np.full((2, 4, 4, 4), 0.25)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: moa.span("1", 0.5, 10), TypeError, "alpha"),  # type: ignore[arg-type]
    (lambda: moa.span(np.inf, 0.5, 10), ValueError, "alpha"),
    (lambda: moa.span(np.ones(2), 0.5, 10), ValueError, "beta"),
    (lambda: moa.span(0.0, 0.5, -1), ValueError, "N"),
    (lambda: moa.cache_sizes(0.0, 1.0, -1, 0), ValueError, "prompt"),
    (lambda: moa.cache_sizes(0.0, 1.0, 1, 0.5), TypeError, "max_new"),  # type: ignore[arg-type]
    (lambda: moa.cache_sizes(0.0, 1.0, 1, 1, sink=128), ValueError, "sink"),
    (lambda: moa.cache_sizes(0.0, 1.0, 1, 1, split=0), ValueError, "split"),
    (lambda: moa.cache_sizes(0.0, 1.0, 1, 1, minimum=0), ValueError, "minimum"),
    (lambda: moa.moa_token_mask(-1, ONE, ONE), ValueError, "T"),
    (lambda: moa.moa_token_mask(4, 1, ONE), TypeError, "s"),  # type: ignore[arg-type]
    (lambda: moa.moa_token_mask(4, ONE, (1, 0)), ValueError, "c"),
    (lambda: moa.moa_token_mask(4, ONE, (1,)), ValueError, "c"),
    (lambda: moa.moa_token_mask(4, (1, 0.5), ONE), TypeError, "s"),  # type: ignore[arg-type]
    (lambda: moa.moa_block_mask(4, ONE, ONE, 2), ValueError, "s"),
    (lambda: moa.moa_block_mask(4, ONE, ONE, 0), ValueError, "block"),
    (lambda: moa.moa_attend(Q, K, V, (1,), (1,)), ValueError, "s"),
    (lambda: moa.moa_attend(Q, K[:, :, :3], V[:, :, :3], ONE, ONE), ValueError, "k"),
    (lambda: moa.moa_attend(Q, K, V, ONE, ONE, granularity="row"), ValueError, "granularity"),
    (lambda: moa.circular_slots(np.array(-1), 1, 1), ValueError, "count"),
    (lambda: moa.circular_slots(np.array(0.5), 1, 1), TypeError, "count"),
    (lambda: moa.circular_slots(np.array(1), 1, 0), ValueError, "c"),
    (lambda: init_cache(K, V, (1,), (1,)), ValueError, "s"),
    (lambda: moa.cache_update(CACHE, K[:, :1], V, ONE, ONE), ValueError, "k"),
    (lambda: moa.cache_update(CACHE, K, V[..., :2], ONE, ONE), ValueError, "v"),
    (
        lambda: moa.cache_update(CACHE, K, V, ONE, ONE, REAL[:, :3]),
        ValueError,
        "valid_mask",
    ),
    (lambda: moa.cache_update(CACHE, K, V, ONE, ONE, np.ones((2, 4))), TypeError, "valid_mask"),
    (lambda: moa.cache_update((K, V), K, V, ONE, ONE), TypeError, "cache"),  # type: ignore[arg-type]
    (lambda: moa.decode(Q, CACHE, ONE, ONE), ValueError, "q"),
    (lambda: moa.decode(Q[:, :3, :1], CACHE, ONE, ONE), ValueError, "q"),
    (lambda: moa.decode(Q[:1, :, :1], CACHE, ONE, ONE), ValueError, "q"),
    (
        lambda: moa.decode(Q[:, :, :1], SHORT, ONE, ONE),
        ValueError,
        "cache.k",
    ),
    (lambda: moa.decode_step(Q, K[:, :, :3], V[:, :, :3], CACHE, ONE, ONE), ValueError, "k"),
    (lambda: moa.decode(Q[:, :, :1], CACHE, ONE, (1, 2)), ValueError, "cache.k"),
    (lambda: moa.influence(P[..., :3], V, Q), ValueError, "P"),
    (lambda: moa.influence(P, V[:, :, :3], Q), ValueError, "V"),
    (lambda: moa.influence(P, V, Q), ValueError, "g"),
    (lambda: moa.influence(P, V, Q[..., :5], -1.0), ValueError, "eps"),
    (lambda: moa.block_sum(P, 3), ValueError, "E"),
    (lambda: moa.block_sum(P, 0), ValueError, "b"),
    (lambda: moa.block_influence(Q, K, V, Q[..., :5], 3), ValueError, "q"),
    (lambda: moa.block_influence(Q, K, V, Q, 2), ValueError, "g"),
    (lambda: moa.group_influence(P, 3), ValueError, "kv_heads"),
]


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}: got .*expected"):
        call()
