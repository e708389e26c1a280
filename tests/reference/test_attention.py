"""Dense attention: outside evidence, the rules it keeps, finite differences and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from attnspec.reference.conventions import causal_mask, check_shaped, repeat_heads
from attnspec.reference.dense import attention as dense
from attnspec.reference.dense import attention_steps
from attnspec.reference.primitives.softmax import merge
from tests.differences import differences

quick = settings(max_examples=25, deadline=None, derandomize=True)


def tokens(
    Tq: int = 5, Tk: int = 9, H: int = 4, Hk: int = 2, d: int = 6, dv: int = 3, seed: int = 0
) -> Any:
    random = np.random.default_rng(seed)
    shapes = ((2, H, Tq, d), (2, Hk, Tk, d), (2, Hk, Tk, dv))
    return tuple(random.standard_normal(shape) for shape in shapes)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_weights_are_those_of_another_softmax(causal: bool, scale: float | None) -> None:
    """Head by head and row by row, over the keys a query sees, in SciPy's words."""
    q, k, v = tokens()
    out, lse = dense.attend(q, k, v, causal=causal, scale=scale)
    for b, h, i in np.ndindex(2, 4, 5):
        keys = slice(None, i + 5 if causal else None)
        scores = k[b, h // 2, keys] @ q[b, h, i] * (6**-0.5 if scale is None else scale)
        np.testing.assert_allclose(lse[b, h, i], special.logsumexp(scores), atol=1e-12)
        expected = special.softmax(scores) @ v[b, h // 2, keys]
        np.testing.assert_allclose(out[b, h, i], expected, atol=1e-12)


@quick
@given(Tq=st.integers(0, 7), Tk=st.integers(0, 7), causal=st.booleans())
def test_rows_that_see_nothing(Tq: int, Tk: int, causal: bool) -> None:
    q, k, v = tokens(Tq, Tk)
    out, lse = dense.attend(q, k, v, causal=causal)
    seen = np.arange(Tq) + Tk - Tq >= 0 if causal else np.full(Tq, Tk > 0)
    np.testing.assert_array_equal(np.isneginf(lse), np.broadcast_to(~seen, lse.shape))
    np.testing.assert_array_equal(out[..., ~seen, :], 0)
    dq, _, _ = dense.attend_backward(q, k, v, np.ones_like(out), np.ones_like(lse), causal=causal)
    np.testing.assert_array_equal(dq[..., ~seen, :], 0)


@quick
@given(cut=st.integers(0, 9), masked=st.booleans(), seed=st.integers(0, 9))
def test_two_sets_of_keys_merge_by_their_lse(cut: int, masked: bool, seed: int) -> None:
    q, k, v = tokens(seed=seed)
    mask = np.random.default_rng(seed).random((2, 1, 5, 9)) < (0.4 if masked else 2.0)
    parts = [
        dense.attend(q, k[..., keys, :], v[..., keys, :], mask=mask[..., keys])
        for keys in (slice(None, cut), slice(cut, None))
    ]
    for got, expected in zip(
        merge(*parts[0], *parts[1]), dense.attend(q, k, v, mask=mask), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_order_of_keys_shift_of_scores_and_large_ones() -> None:
    q, k, v = tokens()
    out, lse = dense.attend(q, k, v)
    order = np.random.default_rng(1).permutation(9)
    np.testing.assert_allclose(dense.attend(q, k[..., order, :], v[..., order, :])[0], out)
    wide_q, wide_k = (np.concatenate([x, np.full_like(x[..., :1], 2.0)], -1) for x in (q, k))
    shifted = dense.attend(wide_q, wide_k, v, scale=6**-0.5)
    np.testing.assert_allclose(shifted[0], out, atol=1e-12)
    np.testing.assert_allclose(shifted[1], lse + 4 * 6**-0.5, atol=1e-12)
    largest, _ = dense.attend(1e5 * q, k, v)
    best = np.argmax(dense.score(q, k), axis=-1)
    for b, h, i in np.ndindex(best.shape):
        np.testing.assert_allclose(largest[b, h, i], v[b, h // 2, best[b, h, i]], atol=1e-12)


def test_groups_share_a_kv_head_and_leading_axes_are_free() -> None:
    q, k, v = tokens()
    out, lse = dense.attend(q, k, v, causal=True)
    wide, _ = dense.attend(q, repeat_heads(k, 4), repeat_heads(v, 4), causal=True)
    np.testing.assert_array_equal(wide, out)
    np.testing.assert_array_equal(dense.attend(q[1], k[1], v[1], causal=True)[1], lse[1])
    twice = dense.attend(q[None], k[None], v[None], causal=True)
    np.testing.assert_array_equal(twice[0][0], out)


def test_padding_is_a_mask_and_what_it_hides_is_not_read() -> None:
    q, k, v = tokens()
    real = np.arange(9) < np.array([[9], [6]])
    mask = real[:, None, None, :]
    assert dense.visible(5, 9, mask=mask).shape == (2, 1, 5, 9)
    out, lse = dense.attend(q, k, v, mask=mask)
    short, _ = dense.attend(q[1], k[1, :, :6], v[1, :, :6])
    np.testing.assert_allclose(out[1], short, atol=1e-12)
    dout, dlse = np.ones_like(out), np.ones_like(lse)
    clean = dense.attend_backward(q, k, v, dout, dlse, mask=mask)
    k[1, :, 6:], v[1, :, 6:] = np.nan, np.inf
    np.testing.assert_array_equal(dense.attend(q, k, v, mask=mask)[0], out)
    for got, expected in zip(
        dense.attend_backward(q, k, v, dout, dlse, mask=mask), clean, strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("packed", [True, False])
def test_gradients(packed: bool) -> None:
    q, k, v = (x[0] for x in tokens(4, 5, H=2, Hk=1, d=2, dv=2))
    random = np.random.default_rng(1)
    dout, dlse = random.standard_normal((2, 4, 2)), random.standard_normal((2, 4))
    offsets = np.array([0, 1, 4]), np.array([0, 2, 5])
    mask = random.random((4, 5)) < 0.7
    mask[:, 0] = True

    def loss() -> float:
        if packed:
            out, lse = dense.attend_packed(q, k, v, *offsets, causal=True, scale=0.9)
        else:
            out, lse = dense.attend(q, k, v, mask=mask)
        return float((out * dout).sum() + (lse * dlse).sum())

    if packed:
        gradients = dense.attend_packed_backward(
            q, k, v, *offsets, dout, dlse, causal=True, scale=0.9
        )
    else:
        gradients = dense.attend_backward(q, k, v, dout, dlse, mask=mask)
    for x, gradient in zip((q, k, v), gradients, strict=True):
        np.testing.assert_allclose(gradient, differences(loss, x), atol=1e-8)


@quick
@given(
    q_cuts=st.lists(st.integers(0, 7), min_size=2, max_size=2).map(sorted),
    k_cuts=st.lists(st.integers(0, 9), min_size=2, max_size=2).map(sorted),
    causal=st.booleans(),
)
def test_packed_sequences_are_each_alone(
    q_cuts: list[int], k_cuts: list[int], causal: bool
) -> None:
    """Some of them without queries, some without keys; together they are one mask."""
    q, k, v = (x[0] for x in tokens(7, 9))
    q_offsets, k_offsets = np.array([0, *q_cuts, 7]), np.array([0, *k_cuts, 9])
    out, lse = dense.attend_packed(q, k, v, q_offsets, k_offsets, causal=causal)
    mask = np.zeros((7, 9), bool)
    for n in range(3):
        rows, keys = slice(*q_offsets[n : n + 2]), slice(*k_offsets[n : n + 2])
        inside = mask[rows, keys]
        mask[rows, keys] = causal_mask(*inside.shape) if causal else True
    expected = dense.attend(q, k, v, mask=mask)
    np.testing.assert_allclose(out, expected[0], atol=1e-12)
    np.testing.assert_allclose(lse, expected[1], atol=1e-12)
    dout, dlse = np.random.default_rng(2).standard_normal((2, 4, 7, 3))[0], np.ones((4, 7))
    for got, wanted in zip(
        dense.attend_packed_backward(q, k, v, q_offsets, k_offsets, dout, dlse, causal=causal),
        dense.attend_backward(q, k, v, dout, dlse, mask=mask),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("sizes", [[1] * 9, [4, 1, 4], [9]])
def test_decoding_is_the_prompt(sizes: list[int]) -> None:
    q, k, v = tokens(9, 9)
    state, outs, first = dense.init_state(k, v), [], 0
    for size in sizes:
        new = (x[..., first : first + size, :] for x in (q, k, v))
        before = state
        out, state = dense.step(state, *new)
        assert before.k.shape[-2] == first
        outs.append(out)
        first += size
    whole, _ = dense.attend(q, k, v, causal=True)
    np.testing.assert_allclose(np.concatenate(outs, axis=-2), whole, atol=1e-12)
    np.testing.assert_array_equal(state.k, k)
    np.testing.assert_array_equal(state.v, v)


def test_float32_stays_float32_and_inputs_stay_as_they_are() -> None:
    q, k, v = (x.astype(np.float32) for x in tokens())
    before = [x.copy() for x in (q, k, v)]
    out, lse = dense.attend(q, k, v, causal=True)
    gradients = dense.attend_backward(q, k, v, out, lse, causal=True)
    assert {x.dtype for x in (out, lse, *gradients)} == {np.dtype(np.float32)}
    for x, copy in zip((q, k, v), before, strict=True):
        np.testing.assert_array_equal(x, copy)


Q, K, V = tokens()
OUT, LSE = dense.attend(Q, K, V)
ENDS = np.array([0, 5]), np.array([0, 9])
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: dense.attend(Q.tolist(), K, V), TypeError, "q"),
    (lambda: dense.attend(Q[0, 0], K, V), ValueError, "q"),
    (lambda: dense.attend(Q, K.astype("f4"), V), TypeError, "k"),
    (lambda: dense.attend(Q, K[..., :3], V), ValueError, "k"),
    (lambda: dense.attend(Q[:, :3], K, V), ValueError, "k"),
    (lambda: dense.attend(Q, K, V[:1]), ValueError, "v"),
    (lambda: dense.attend(Q, K, V[..., :8, :]), ValueError, "v"),
    (lambda: dense.attend(Q, K, V, mask=np.ones((5, 9))), TypeError, "mask"),
    (lambda: dense.attend(Q, K, V, mask=np.ones((5, 8), bool)), ValueError, "mask"),
    (lambda: dense.attend(Q, K, V, mask=np.ones((4, 9), bool)), ValueError, "mask"),
    (lambda: dense.score(Q, K[..., :3]), ValueError, "k"),
    (lambda: dense.attend_backward(Q, K, V, OUT[..., :1]), ValueError, "dout"),
    (lambda: dense.attend_backward(Q, K, V, OUT, OUT), ValueError, "dlse"),
    (lambda: dense.attend_packed(Q[0], K[0], V[0], ENDS[0][:1], ENDS[1]), ValueError, "q_offsets"),
    (lambda: dense.attend_packed(Q[0], K[0], V[0], ENDS[0], ENDS[0]), ValueError, "k_offsets"),
    (
        lambda: dense.attend_packed(Q[0], K[0], V[0], np.array([0, 2, 5]), ENDS[1]),
        ValueError,
        "k_offsets",
    ),
    (
        lambda: dense.attend_packed(Q[0], K[0], V[0], np.array([0, 6, 2, 5]), ENDS[1]),
        ValueError,
        "q_offsets",
    ),
    (
        lambda: dense.attend_packed_backward(Q[0], K[0], V[0], *ENDS, OUT),
        ValueError,
        "dout",
    ),
    (
        lambda: dense.attend_packed_backward(Q[0], K[0], V[0], *ENDS, OUT[0], LSE),
        ValueError,
        "dlse",
    ),
    (lambda: dense.attend(Q, K, V, causal=1), TypeError, "causal"),
    (lambda: dense.attend(Q, K, V, scale=True), TypeError, "scale"),
    (lambda: dense.attend(Q, K, V, scale=float("nan")), ValueError, "scale"),
    (lambda: dense.init_state(K[0, 0], V), ValueError, "k"),
    (lambda: dense.step(dense.init_state(K, V), Q, K, V), ValueError, "k"),
    (lambda: dense.step(dense.init_state(K[..., :2], V), Q, K[..., :5, :], V[..., :5, :]),
     ValueError, "k"),
    (lambda: check_shaped("dout", 1.0, ()), TypeError, "dout"),
    (lambda: attention_steps.sequences(Q[0], K[0], V[0], ENDS[0] / 1, ENDS[1]), TypeError,
     "q_offsets"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}: got .*expected"):
        call()
