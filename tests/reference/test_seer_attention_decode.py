"""SeerAttention at decode: agreement with the pooled form, properties and bad inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.dense import attention as dense
from attnspec.reference.primitives.rope import rope
from attnspec.reference.primitives.softmax import softmax
from attnspec.reference.selection.seer_attention import (
    compress_step,
    decode_attend,
    decode_gate,
    decode_select,
    decode_target,
    pool_blocks,
    step,
)
from attnspec.reference.selection.seer_attention_decode import GateCache, init_cache, init_state

small = settings(max_examples=20, deadline=None, derandomize=True)
KINDS = ("max", "min", "avg")


def draw(seed: int, T: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, 4, T, 4))
    k, v = rng.standard_normal((2, 2, T, 4)), rng.standard_normal((2, 2, T, 3))
    Wq, Wk = rng.standard_normal((2, 2, 4, 6)), rng.standard_normal((2, 12, 6))
    return q, k, v, Wq, Wk


def compress(k: np.ndarray, Wk: np.ndarray, b: int, norm: np.ndarray | None = None) -> GateCache:
    cache = init_cache(k[..., 0, :], Wk)
    for t in range(k.shape[-2]):
        cache = compress_step(cache, k[..., t, :], Wk, b, KINDS, norm=norm)
    return cache


@small
@given(T=st.integers(1, 17), b=st.integers(1, 6), seed=st.integers(0, 99), normed=st.booleans())
def test_compressed_keys_equal_pooled_prefill(T: int, b: int, seed: int, normed: bool) -> None:
    _, k, _, _, Wk = draw(seed, T)
    norm = np.random.default_rng(seed).random(6) if normed else None
    cache = compress(k, Wk, b, norm)
    complete = T // b
    rows = pool_blocks(k, b, KINDS)[..., :complete, :] @ Wk
    if norm is not None:
        rows = rows / np.sqrt(np.mean(rows**2, axis=-1, keepdims=True) + 1e-6) * norm
    np.testing.assert_allclose(cache.gk, rope(rows, b * np.arange(complete)), atol=1e-12)
    np.testing.assert_array_equal(cache.rest, k[..., complete * b :, :])


def test_gate_modes() -> None:
    q, k, _, Wq, Wk = draw(1, 7)
    cache = compress(k, Wk, 3)
    q_t = q[..., -1, :]
    groups = q_t.reshape(2, 2, 2, 4)

    def scores(gq: np.ndarray) -> np.ndarray:
        rotated = rope(gq[..., None, :], np.array([6]))[..., 0, :]
        known = np.einsum("bhd,bhnd->bhn", rotated, cache.gk) / np.sqrt(6)
        return np.concatenate([known, np.zeros((2, 2, 1))], axis=-1)

    by_head = np.einsum("bhgd,hgdc->bhc", groups, Wq)
    np.testing.assert_allclose(decode_gate(q_t, cache, 6, Wq, "Qproj"), scores(by_head))
    mean = groups.mean(axis=2)
    projected = np.einsum("bhd,hdc->bhc", mean, Wq[:, 0])
    np.testing.assert_allclose(decode_gate(q_t, cache, 6, Wq[:, 0], "Qavgproj"), scores(projected))
    norm = np.full(6, 2.0)
    normed = 2 * by_head / np.sqrt(np.mean(by_head**2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(decode_gate(q_t, cache, 6, Wq, "Qproj", norm=norm), scores(normed))

    narrow = compress(k, Wk[..., :4], 3)
    rotated = rope(groups, np.array([6, 6]))
    each = np.einsum("bhgd,bhnd->bhgn", rotated, narrow.gk) / 2
    original = decode_gate(q_t, narrow, 6, None, "Qorig")
    np.testing.assert_allclose(original[..., :2], each.mean(axis=2), atol=1e-12)
    average = decode_gate(q_t, narrow, 6, None, "Qavg")
    np.testing.assert_allclose(average, original, atol=1e-12)


def test_incomplete_block_scores_zero_and_is_selected() -> None:
    q, k, _, Wq, Wk = draw(2, 8)
    scores = decode_gate(q[..., 6, :], compress(k[..., :7, :], Wk, 4), 6, Wq, "Qproj")
    assert scores.shape == (2, 2, 2)
    assert not np.any(scores[..., 1])
    assert decode_gate(q[..., 7, :], compress(k, Wk, 4), 7, Wq, "Qproj").shape == (2, 2, 2)
    assert np.all(decode_select(scores, 4, tau=1.0)[..., 1])


def test_selection_rules() -> None:
    scores = np.array([[5.0, 1.0, 1.0, 4.0, -9.0]])
    np.testing.assert_array_equal(
        decode_select(scores, 8, budget=24), [[True, True, False, True, True]]
    )
    np.testing.assert_array_equal(
        decode_select(scores, 8, tau=0.2), [[True, False, False, True, True]]
    )
    assert np.all(decode_select(scores, 8, budget=80))
    assert np.all(decode_select(scores, 8))
    best = decode_select(scores + 0.0, 8, budget=8)
    np.testing.assert_array_equal(best, [[True, False, False, False, True]])


@pytest.mark.parametrize("options", [{}, {"tau": -1.0}, {"budget": 12}])
def test_wide_budget_is_dense_attention(options: dict[str, Any]) -> None:
    q, k, v, Wq, Wk = draw(3, 11)
    positions = np.arange(11)
    expected, _ = dense.attend(rope(q, positions), rope(k, positions), v, causal=True)
    state = init_state(k[..., 0, :], v[..., 0, :], Wk)
    for t in range(11):
        now = (x[..., t, :] for x in (q, k, v))
        out, state = step(state, *now, Wq, Wk, b=4, **options)
        np.testing.assert_allclose(out, expected[..., t, :], atol=1e-12)


def test_step_is_its_stages_and_keeps_the_state() -> None:
    q, k, v, Wq, Wk = draw(4, 13)
    state = init_state(k[..., 0, :], v[..., 0, :], Wk)
    options: dict[str, Any] = {"q_norm": np.full(6, 1.5), "k_norm": np.full(6, 0.5)}
    for t in range(13):
        before = state
        kept = before.k.copy()
        now = (x[..., t, :] for x in (q, k, v))
        out, state = step(before, *now, Wq, Wk, b=4, budget=4, **options)
        np.testing.assert_array_equal(before.k, kept)
    scores = decode_gate(q[..., 12, :], state.cache, 12, Wq, "Qproj", norm=options["q_norm"])
    M = decode_select(scores, 4, budget=4)
    assert np.all(M.sum(axis=-1) <= 2)
    rotated = rope(q[..., 12:, :], np.array([12]))
    np.testing.assert_allclose(decode_attend(rotated, state.k, v, M, 4)[0][..., 0, :], out)
    keys = np.repeat(np.repeat(M, 2, axis=1), 4, axis=-1)[..., None, :13]
    expected, _ = dense.attend(rotated, rope(k, np.arange(13)), v, mask=keys)
    np.testing.assert_allclose(out, expected[..., 0, :], atol=1e-12)


def test_target() -> None:
    q, k, _, _, _ = draw(5, 10)
    P = softmax(dense.score(q, k), dense.visible(10, 10, causal=True))
    target = decode_target(q, k, 4)
    assert target.shape == (2, 2, 10, 3)
    best = P.reshape(2, 2, 2, 10, 10).max(axis=2)
    blocks = np.stack([best[..., i : i + 4].max(axis=-1) for i in (0, 4, 8)], axis=-1)
    np.testing.assert_allclose(target, blocks / (blocks.sum(axis=-1, keepdims=True) + 1e-9))
    assert not np.any(target[..., :4, 1:])


def test_float32_stays_float32() -> None:
    q, k, v, Wq, Wk = (x.astype(np.float32) for x in draw(6, 6))
    state = init_state(k[..., 0, :], v[..., 0, :], Wk)
    norm = np.ones(6, dtype=np.float32)
    for t in range(6):
        now = (x[..., t, :] for x in (q, k, v))
        out, state = step(state, *now, Wq, Wk, b=2, tau=0.3, q_norm=norm, k_norm=norm)
    results = (out, state.k, state.cache.gk, state.cache.rest, decode_target(q, k, 2))
    assert {x.dtype for x in results} == {np.dtype(np.float32)}


q, k, v, Wq, Wk = draw(0, 5)
q_t, k_t = q[..., 0, :], k[..., 0, :]
empty = init_cache(k_t, Wk)
full = compress(k, Wk, 2)
scores = np.zeros((2, 2, 3))
M = np.ones((2, 2, 3), dtype=bool)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: init_cache(k_t[0, 0], Wk), ValueError, "k_t"),
        (lambda: init_state(k_t, [1.0], Wk), TypeError, "v_t"),
        (lambda: compress_step(empty, k_t, Wk, 0, KINDS), ValueError, "b"),
        (lambda: compress_step(full, k_t, Wk, 1, KINDS), ValueError, "b"),
        (lambda: compress_step(empty, k_t[..., 1:], Wk, 2, KINDS), ValueError, "k_t"),
        (lambda: compress_step(empty, k_t[:1], Wk, 2, KINDS), ValueError, "k_t"),
        (lambda: compress_step(empty, k_t, Wk, 2, ("avg",)), ValueError, "Wk"),
        (lambda: compress_step(empty, k_t, Wk, 2, ("mean",)), ValueError, "kinds"),
        (lambda: compress_step(full, k_t, Wk, 2, KINDS, norm=np.ones(5)), ValueError, "norm"),
        (lambda: decode_gate(q_t, full, -1, Wq, "Qproj"), ValueError, "pos"),
        (lambda: decode_gate(q_t, full, 4, Wq, "Qmax"), ValueError, "mode"),
        (lambda: decode_gate(q_t, full, 4, Wq, "Qavg"), ValueError, "Wq"),
        (lambda: decode_gate(q_t, full, 4, Wq[1:], "Qproj"), ValueError, "Wq"),
        (lambda: decode_gate(q_t, full, 4, None, "Qproj"), TypeError, "Wq"),
        (lambda: decode_gate(q_t, full, 4, None, "Qavg"), ValueError, "q_t"),
        (lambda: decode_gate(q_t[:1], full, 4, Wq, "Qproj"), ValueError, "q_t"),
        (lambda: decode_select(scores, 2, tau=0.1, budget=4), ValueError, "tau"),
        (lambda: decode_select(scores, 2, tau="low"), TypeError, "tau"),
        (lambda: decode_select(scores, 2, budget=3), ValueError, "budget"),
        (lambda: decode_select(scores, 2, budget=0), ValueError, "budget"),
        (lambda: decode_select(scores, 0), ValueError, "b"),
        (lambda: decode_attend(q, k, v, M, 2), ValueError, "q_t"),
        (lambda: decode_attend(q[..., :1, :], k, v, M, 3), ValueError, "M"),
        (lambda: decode_attend(q[..., :1, :], k, v, M * 1, 2), TypeError, "M"),
        (lambda: decode_target(q, k[..., 1:, :], 2), ValueError, "q"),
        (lambda: decode_target(q, k, 0), ValueError, "b"),
    ],
)
def test_bad_inputs(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name}: got "):
        call()
