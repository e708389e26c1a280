"""Lightning Attention-2: golden cases, properties, gradients and bad inputs."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.linear import (
    lightning_attention_2,
    lightning_attention_2_batches,
    lightning_attention_2_chunks,
)
from attnspec.reference.linear.lightning_attention_2 import (
    attend,
    attend_backward,
    attend_left,
    attend_packed,
    attend_packed_backward,
    attend_padded,
    attend_padded_backward,
    attend_recurrent,
    backward_chunk,
    backward_left,
    chunk_output,
    chunk_states,
    decay_mask,
    decode_step,
    layer_slopes,
    slopes,
)

small = settings(max_examples=25, deadline=None, derandomize=True)


def draw(
    seed: int, T: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, d: int = 3, e: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, heads, T, d))
    k = rng.standard_normal((batch, kv_heads, T, d))
    v = rng.standard_normal((batch, kv_heads, T, e))
    return q, k, v, rng.uniform(0.05, 1.0, heads), rng.standard_normal((batch, heads, d, e))


def numeric_gradient(f: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    gradient, h = np.zeros_like(x), 1e-5
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        gradient[index] = (f(x + step) - f(x - step)) / (2 * h)
    return gradient


@pytest.mark.parametrize(
    "module",
    [lightning_attention_2, lightning_attention_2_batches, lightning_attention_2_chunks],
)
def test_doctests(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("case", ["decay_blk", "decay_short"])
def test_golden(case: str, golden: Callable[[str], dict[str, Any]]) -> None:
    g = golden(f"lightning_attention_2__{case}")
    q, k, v, s, do = (g[name] for name in ("q", "k", "v", "slopes", "do"))
    o, S = attend(q, k, v, s, block=32)
    np.testing.assert_allclose(o, g["out"], atol=2e-6)
    np.testing.assert_allclose(S, g["final_kv"], atol=2e-6)
    np.testing.assert_allclose(attend_left(q, k, v, s), g["out"], atol=2e-6)
    for gradients in (backward_left(q, k, v, s, do), attend_backward(q, k, v, s, None, do)):
        for got, name in zip(gradients, ("dq", "dk", "dv"), strict=False):
            np.testing.assert_allclose(got, g[name], atol=1e-5)
    if "mask_head0" in g:
        np.testing.assert_allclose(decay_mask(5, s)[0], g["mask_head0"], atol=2e-6)


@small
@given(T=st.integers(0, 37), seed=st.integers(0, 99), carried=st.booleans())
def test_left_recurrent_and_blocks_agree(T: int, seed: int, carried: bool) -> None:
    q, k, v, s, S0 = draw(seed, T)
    first = S0 if carried else None
    o, S = attend_recurrent(q, k, v, s, first)
    if not carried:
        np.testing.assert_allclose(attend_left(q, k, v, s), o, atol=1e-10)
    for block in (1, 2, 7, 16, 64, max(T, 1), T + 5):
        got, last = attend(q, k, v, s, first, block=block)
        np.testing.assert_allclose(got, o, atol=1e-10)
        np.testing.assert_allclose(last, S, atol=1e-10)


@small
@given(T=st.integers(1, 20), lead=st.integers(-5, 5), seed=st.integers(0, 99))
def test_unequal_lengths_align_at_the_end(T: int, lead: int, seed: int) -> None:
    q, k, v, s, S0 = draw(seed, T + 5)
    queries = q[..., 5 - min(lead, 0) :, :]
    keys, values = (x[..., 5 - max(lead, 0) :, :] for x in (k, v))
    if not keys.shape[-2] or not queries.shape[-2]:
        return
    o, S = attend(queries, keys, values, s, S0, block=4)
    rows = min(queries.shape[-2], keys.shape[-2])
    unseen = queries.shape[-2] - rows
    zeros = np.zeros((2, 4, unseen, 5))
    without_state, _ = attend(queries, keys, values, s, block=4)
    np.testing.assert_array_equal(without_state[..., :unseen, :], zeros)
    if not unseen:
        before = keys.shape[-2] - rows
        head, tail = np.split(keys, [before], axis=-2), np.split(values, [before], axis=-2)
        _, middle = attend(np.zeros((2, 4, before, 3)), head[0], tail[0], s, S0)
        expected, end = attend_recurrent(queries, head[1], tail[1], s, middle)
        np.testing.assert_allclose(o, expected, atol=1e-10)
        np.testing.assert_allclose(S, end, atol=1e-10)


@small
@given(T=st.integers(1, 12), seed=st.integers(0, 99))
def test_state_hand_over(T: int, seed: int) -> None:
    q, k, v, s, S0 = draw(seed, T)
    o, S = attend(q, k, v, s, S0, block=5)
    for t in range(T + 1):
        first, middle = attend(q[..., :t, :], k[..., :t, :], v[..., :t, :], s, S0, block=5)
        second, last = attend(q[..., t:, :], k[..., t:, :], v[..., t:, :], s, middle, block=5)
        np.testing.assert_allclose(np.concatenate([first, second], axis=-2), o, atol=1e-10)
        np.testing.assert_allclose(last, S, atol=1e-10)


def test_decode_continues_prefill() -> None:
    q, k, v, s, _ = draw(1, 9)
    o, S = attend(q[..., :8, :], k[..., :8, :], v[..., :8, :], s)
    row, last = decode_step(S, q[..., 8:, :], k[..., 8:, :], v[..., 8:, :], s)
    whole, end = attend(q, k, v, s)
    np.testing.assert_allclose(np.concatenate([o, row], axis=-2), whole, atol=1e-12)
    np.testing.assert_allclose(last, end, atol=1e-12)


@pytest.mark.parametrize("block", [1, 3, 8])
def test_gradients_match_finite_differences(block: int) -> None:
    arguments = draw(3, 5, batch=1, heads=2, kv_heads=1, d=2, e=2)
    rng = np.random.default_rng(4)
    do, dS = rng.standard_normal((1, 2, 5, 2)), rng.standard_normal((1, 2, 2, 2))

    def loss(*inputs: np.ndarray) -> float:
        o, S = attend(*inputs, block=block)
        return float(np.sum(o * do) + np.sum(S * dS))

    gradients = attend_backward(*arguments, do, dS, block=block)
    for n, gradient in enumerate(gradients):
        expected = numeric_gradient(
            lambda x, n=n: loss(*arguments[:n], x, *arguments[n + 1 :]), arguments[n]
        )
        np.testing.assert_allclose(gradient, expected, atol=1e-8)


@pytest.mark.parametrize(("q_tokens", "k_tokens"), [(2, 4), (4, 2)])
def test_gradients_of_unequal_lengths(q_tokens: int, k_tokens: int) -> None:
    q, k, v, s, S0 = draw(3, 4, batch=1, heads=2, kv_heads=1, d=2, e=2)
    arguments = (q[..., :q_tokens, :], k[..., :k_tokens, :], v[..., :k_tokens, :], s, S0)
    do = np.random.default_rng(4).standard_normal((1, 2, q_tokens, 2))
    gradients = attend_backward(*arguments, do, block=3)
    for n, gradient in enumerate(gradients):
        expected = numeric_gradient(
            lambda x, n=n: np.sum(do * attend(*arguments[:n], x, *arguments[n + 1 :])[0]),
            arguments[n],
        )
        np.testing.assert_allclose(gradient, expected, atol=1e-8)


def test_gradient_of_varying_log_decays() -> None:
    q, k, v, _, S0 = draw(5, 7, batch=1, heads=2, kv_heads=2, d=2, e=3)
    rng = np.random.default_rng(6)
    g = -rng.uniform(0.1, 1.0, (1, 2, 7))
    do, dS = rng.standard_normal((1, 2, 7, 3)), rng.standard_normal((1, 2, 2, 3))

    def loss(decays: np.ndarray) -> float:
        entering, S = chunk_states(k, v, decays, 3, S0)
        return float(np.sum(do * chunk_output(q, k, v, decays, entering, 3)) + np.sum(S * dS))

    dg = backward_chunk(q, k, v, g, do, dS, 3, S0)[3]
    np.testing.assert_allclose(dg, numeric_gradient(loss, g), atol=1e-8)


def test_backward_left_equals_backward_by_block() -> None:
    q, k, v, s, _ = draw(7, 13)
    do = np.random.default_rng(8).standard_normal((2, 4, 13, 5))
    by_block = attend_backward(q, k, v, s, None, do, block=4)
    for left, block in zip(backward_left(q, k, v, s, do), by_block, strict=False):
        np.testing.assert_allclose(left, block, atol=1e-10)


def test_value_free_prefix_changes_nothing() -> None:
    q, k, v, s, _ = draw(9, 8)
    silent = v.copy()
    silent[..., :3, :] = 0
    o, _ = attend(q, k, silent, s, block=4)
    np.testing.assert_allclose(
        o[..., 3:, :],
        attend(q[..., 3:, :], k[..., 3:, :], v[..., 3:, :], s, block=4)[0],
        atol=1e-12,
    )


@pytest.mark.parametrize("linear_in", [0, 1, 2])
def test_linear_in_each_input(linear_in: int) -> None:
    one, two = draw(10, 9), draw(11, 9)
    inputs = [list(one[:3]) for _ in range(3)]
    inputs[1][linear_in] = two[linear_in]
    inputs[2][linear_in] = 2.5 * one[linear_in] + two[linear_in]
    first, second, both = (attend(*x, one[3], block=4)[0] for x in inputs)
    np.testing.assert_allclose(both, 2.5 * first + second, atol=1e-10)


def test_limits_of_the_decay() -> None:
    q, k, v, s, _ = draw(12, 6, heads=2, kv_heads=2)
    sums = np.cumsum(k[..., :, None] * v[..., None, :], axis=-3)
    undecayed = np.einsum("...td,...tde->...te", q, sums)
    np.testing.assert_allclose(attend(q, k, v, 0 * s, block=4)[0], undecayed, atol=1e-12)
    forgetful = np.sum(q * k, axis=-1, keepdims=True) * v
    np.testing.assert_allclose(attend(q, k, v, 0 * s + 1e4, block=4)[0], forgetful, atol=1e-12)


def test_two_tokens() -> None:
    q, k, v, s, _ = draw(13, 2, batch=1, heads=1, kv_heads=1)
    (q1, q2), (k1, k2), (v1, v2) = (x[0, 0] for x in (q, k, v))
    o, _ = attend(q, k, v, s, block=1)
    np.testing.assert_allclose(o[0, 0, 0], (q1 @ k1) * v1)
    np.testing.assert_allclose(o[0, 0, 1], (q2 @ k2) * v2 + np.exp(-s[0]) * (q2 @ k1) * v1)


def test_dv_is_attention_on_reversed_time() -> None:
    q, k, v, s, _ = draw(14, 11, heads=2, kv_heads=2)
    do = np.random.default_rng(15).standard_normal(v.shape)
    reverse = [np.flip(x, axis=-2) for x in (k, q, do)]
    expected = np.flip(attend(*reverse, s, block=4)[0], axis=-2)
    np.testing.assert_allclose(attend_backward(q, k, v, s, None, do)[2], expected, atol=1e-12)


@pytest.mark.parametrize("slope", [50.0, 1e-8])
def test_extreme_slopes_stay_finite(slope: float) -> None:
    q, k, v, _, _ = draw(16, 512, batch=1, heads=1, kv_heads=1)
    s = np.array([slope])
    o, S = attend(q, k, v, s)
    np.testing.assert_allclose(o, attend_left(q, k, v, s), rtol=1e-9, atol=1e-9)
    assert np.all(np.isfinite(S))
    assert all(np.all(np.isfinite(x)) for x in attend_backward(q, k, v, s, None, o))


@pytest.mark.parametrize("slope", [50.0, 1e-8])
def test_extreme_slopes_stay_right_on_long_sequences(slope: float) -> None:
    q, k, v, _, _ = draw(16, 4096, batch=1, heads=1, kv_heads=1)
    s = np.array([slope])
    o, S = attend(q, k, v, s)
    expected, last = attend_recurrent(q, k, v, s)
    np.testing.assert_allclose(o, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(S, last, rtol=1e-9, atol=1e-9)


def test_heads_are_independent_and_time_is_causal() -> None:
    q, k, v, s, _ = draw(17, 10, heads=3, kv_heads=3)
    o, _ = attend(q, k, v, s, block=4)
    order = [2, 0, 1]
    np.testing.assert_array_equal(
        attend(q[:, order], k[:, order], v[:, order], s[order], block=4)[0], o[:, order]
    )
    later = k.copy()
    later[..., 6:, :] += 1
    np.testing.assert_array_equal(attend(q, later, v, s, block=4)[0][..., :6, :], o[..., :6, :])


def test_grouped_heads_equal_repeated_ones() -> None:
    q, k, v, s, _ = draw(18, 9, heads=6, kv_heads=2)
    do = np.random.default_rng(19).standard_normal((2, 6, 9, 5))
    keys, values = (np.repeat(x, 3, axis=1) for x in (k, v))
    np.testing.assert_array_equal(attend(q, k, v, s)[0], attend(q, keys, values, s)[0])
    _, dk, dv, _, _ = attend_backward(q, k, v, s, None, do)
    _, each_dk, each_dv, _, _ = attend_backward(q, keys, values, s, None, do)
    np.testing.assert_allclose(dk, each_dk.reshape(2, 2, 3, 9, 3).sum(axis=2), atol=1e-12)
    np.testing.assert_allclose(dv, each_dv.reshape(2, 2, 3, 9, 5).sum(axis=2), atol=1e-12)


class Counting(np.ndarray):
    """Counts the multiply-adds of the matrix products it takes part in."""

    total = 0
    __array_priority__ = 1.0

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [x.view(np.ndarray) if isinstance(x, Counting) else x for x in inputs]
        result = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Counting.total += result.size * plain[0].shape[-1]
        return result.view(Counting) if isinstance(result, np.ndarray) else result


def test_cost_is_linear_in_tokens() -> None:
    def cost(T: int) -> int:
        q, k, v, s, _ = draw(20, T)
        Counting.total = 0
        attend(q.view(Counting), k.view(Counting), v.view(Counting), s, block=8)
        return Counting.total

    assert cost(32) > 0
    assert cost(128) == 2 * cost(64) == 4 * cost(32)


@pytest.mark.parametrize("carried", [False, True])
def test_packed_equals_each_sequence_alone(carried: bool) -> None:
    q, k, v, s, _ = draw(21, 11)
    offsets = np.array([0, 4, 4, 5, 11])
    rng = np.random.default_rng(22)
    S0 = rng.standard_normal((2, 4, 4, 3, 5)) if carried else None
    do, dS = rng.standard_normal((2, 4, 11, 5)), rng.standard_normal((2, 4, 4, 3, 5))
    o, S = attend_packed(q, k, v, s, offsets, S0, block=3)
    dq, dk, dv, ds, dS0 = attend_packed_backward(q, k, v, s, offsets, S0, do, dS, block=3)
    total = np.zeros(4)
    for n in range(4):
        rows = slice(offsets[n], offsets[n + 1])
        Q, K, V, dO = (x[..., rows, :] for x in (q, k, v, do))
        first = S0[:, n] if S0 is not None else None
        alone, last = attend_recurrent(Q, K, V, s, first)
        np.testing.assert_allclose(o[..., rows, :], alone, atol=1e-12)
        np.testing.assert_allclose(S[:, n], last, atol=1e-12)
        gradients = attend_backward(Q, K, V, s, first, dO, dS[:, n])
        for got, expected in zip((dq, dk, dv), gradients, strict=False):
            np.testing.assert_allclose(got[..., rows, :], expected, atol=1e-12)
        np.testing.assert_allclose(dS0[:, n], gradients[4], atol=1e-12)
        total += gradients[3]
    np.testing.assert_allclose(ds, total, atol=1e-10)


@small
@given(valid=st.lists(st.booleans(), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_padding_is_as_if_cut_out(valid: list[bool], seed: int) -> None:
    q, k, v, s, S0 = draw(seed, len(valid), batch=1)
    real = np.array([valid])
    for x in (q, k, v):
        x[..., ~real[0], :] = np.nan
    o, S = attend_padded(q, k, v, s, real, S0, block=4)
    Q, K, V = (x[..., real[0], :] for x in (q, k, v))
    expected, last = attend(Q, K, V, s, S0)
    np.testing.assert_allclose(o[..., real[0], :], expected, atol=1e-10)
    np.testing.assert_allclose(S, last, atol=1e-10)
    assert not np.any(o[..., ~real[0], :])


def test_gradients_of_padded_sequences() -> None:
    q, k, v, s, S0 = draw(25, 6)
    real = np.array([[True, False, True, True, False, False], [False, False, True] * 2])
    rng = np.random.default_rng(26)
    do, dS = rng.standard_normal((2, 4, 6, 5)), rng.standard_normal(S0.shape)
    total = np.zeros(4)
    padded = [np.where(real[:, None, :, None], x, np.nan) for x in (q, k, v)]
    dq, dk, dv, ds, dS0 = attend_padded_backward(*padded, s, real, S0, do, dS, block=4)
    for n in range(2):
        rows = [x[n : n + 1, :, real[n]] for x in (q, k, v, do)]
        alone = attend_backward(*rows[:3], s, S0[n : n + 1], rows[3], dS[n : n + 1], block=4)
        for got, expected in zip((dq, dk, dv), alone, strict=False):
            np.testing.assert_allclose(got[n : n + 1, :, real[n]], expected, atol=1e-10)
            assert not np.any(got[n, :, ~real[n]])
        np.testing.assert_allclose(dS0[n : n + 1], alone[4], atol=1e-10)
        total += alone[3]
    np.testing.assert_allclose(ds, total, atol=1e-10)


def test_slopes() -> None:
    np.testing.assert_array_equal(slopes(8), 2.0 ** -np.arange(1, 9))
    twelve = np.concatenate([slopes(8), 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5])])
    np.testing.assert_allclose(slopes(12), twelve)
    np.testing.assert_allclose(slopes(1), [2.0**-8])
    np.testing.assert_allclose(layer_slopes(4, 0, 3), slopes(4) * (1 + 1e-5))
    np.testing.assert_allclose(layer_slopes(4, 2, 3), slopes(4) * 1e-5)
    np.testing.assert_allclose(layer_slopes(4, 0, 1), slopes(4) * (1 + 1e-5))


def test_float32_stays_float32_and_inputs_stay_unchanged() -> None:
    wide = draw(23, 9)
    inputs = tuple(x.astype(np.float32) for x in wide)
    copies = [x.copy() for x in inputs]
    o, S = attend(*inputs, block=4)
    gradients = attend_backward(*inputs, o, S, block=4)
    left = attend_left(*inputs[:4])
    results = (o, S, *gradients, left, *attend_recurrent(*inputs), decay_mask(3, inputs[3]))
    assert {x.dtype for x in results} == {np.dtype(np.float32)}
    assert attend(*inputs[:3], wide[3])[0].dtype == np.float32
    for x, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(x, copy)


def test_leading_axes_are_free() -> None:
    q, k, v, s, S0 = draw(24, 6)
    o, S = attend(q, k, v, s, S0, block=4)
    single, last = attend(q[0], k[0], v[0], s, S0[0], block=4)
    np.testing.assert_array_equal(single, o[0])
    np.testing.assert_array_equal(last, S[0])
    np.testing.assert_array_equal(attend(q[None], k[None], v[None], s, S0[None], block=4)[0][0], o)


q, k, v, s, S0 = draw(0, 4)
g = np.zeros((2, 4, 4)) - 0.5
ends = np.array([0, 4])
entering = np.zeros((2, 4, 2, 3, 5))
one = [x[..., :1, :] for x in (q, k, v)]
do = np.zeros((2, 4, 4, 5))
all_real = np.ones((2, 4), bool)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: slopes(0), ValueError, "n_heads"),
        (lambda: slopes(2.0), TypeError, "n_heads"),
        (lambda: layer_slopes(2, 2, 2), ValueError, "layer"),
        (lambda: layer_slopes(2, 0, 0), ValueError, "n_layers"),
        (lambda: decay_mask(-1, s), ValueError, "T"),
        (lambda: decay_mask(2, -s), ValueError, "s"),
        (lambda: decay_mask(2, s[None]), ValueError, "s"),
        (lambda: attend_left(q[..., 1:, :], k, v, s), ValueError, "q"),
        (lambda: attend_left(q, k, v, s[:3]), ValueError, "s"),
        (lambda: attend_left(q, k, v, [1.0] * 4), TypeError, "s"),
        (lambda: backward_left(q, k, v, s, do[..., 1:]), ValueError, "do"),
        (lambda: attend_recurrent(q, k, v, s, S0[..., 1:]), ValueError, "S0"),
        (lambda: attend_recurrent(q, k, v, s + np.inf), ValueError, "s"),
        (lambda: chunk_states(k, v, -g, 2), ValueError, "g"),
        (lambda: chunk_states(k, v, g[..., 1:], 2), ValueError, "g"),
        (lambda: chunk_states(k, v, g[:, :3], 2), ValueError, "k"),
        (lambda: chunk_states(k, v, g, 0), ValueError, "block"),
        (lambda: chunk_output(q[:, :2], k, v, g, entering, 2), ValueError, "q"),
        (lambda: chunk_output(q, k, v, g, entering, 4), ValueError, "S_entering"),
        (lambda: backward_chunk(q, k, v, g, do[1:]), ValueError, "do"),
        (lambda: backward_chunk(q, k, v, g, do, S0[1:]), ValueError, "dS_final"),
        (lambda: attend(q[..., 1:], k, v, s), ValueError, "k"),
        (lambda: attend(q, k, v, s, block=2.0), TypeError, "block"),
        (lambda: attend(q, k, v, s, S0.astype(np.float32)), TypeError, "S0"),
        (lambda: attend_backward(q, k, v, s, None, do[..., 1:, :]), ValueError, "do"),
        (lambda: attend_backward(q, k, v, s, None, do, S0[1:]), ValueError, "dS"),
        (lambda: attend_packed(q, k, v, s, ends + 1), ValueError, "offsets"),
        (lambda: attend_packed(q, k, v, s, ends, S0), ValueError, "S0"),
        (lambda: attend_packed(q, k[..., :2, :], v[..., :2, :], s, ends), ValueError, "q"),
        (lambda: attend_packed_backward(q, k, v, s, ends, None, do[1:]), ValueError, "do"),
        (lambda: attend_packed_backward(q, k, v, s, ends, None, do, S0), ValueError, "dS"),
        (lambda: attend_padded(q, k, v, s, np.ones((2, 4))), TypeError, "valid"),
        (lambda: attend_padded(q, k, v, s, np.ones((4,), bool)), ValueError, "valid"),
        (lambda: attend_padded_backward(q, k, v, s, all_real, None, do[1:]), ValueError, "do"),
        (lambda: attend_padded_backward(q, k, v, s, all_real, None, do, S0[1:]), ValueError, "dS"),
        (lambda: decode_step(S0, q, k, v, s), ValueError, "q"),
        (lambda: decode_step(S0[..., 1:], *one, s), ValueError, "S"),
    ],
)
def test_bad_inputs(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name}: got "):
        call()
