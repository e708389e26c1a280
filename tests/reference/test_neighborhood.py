"""Neighborhood attention against outside evidence, its own properties and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.dense import attention as dense
from attnspec.reference.patterns import neighborhood
from attnspec.reference.patterns.neighborhood import (
    axis_mask,
    axis_window,
    merge_attentions,
    na_attend,
    na_av,
    na_av_backward,
    na_backward,
    na_mask,
    na_qk,
    na_qk_backward,
    token_permute,
    token_unpermute,
)
from attnspec.reference.patterns.neighborhood_windows import window_tokens
from attnspec.reference.primitives.softmax import softmax

quick = settings(max_examples=25, deadline=None, derandomize=True)
AXES = st.tuples(
    st.integers(2, 19), st.integers(2, 19), st.integers(1, 6), st.integers(1, 4), st.booleans()
).map(lambda a: (max(a[0], a[1] * a[3]), a[1], min(a[2], a[1]), a[3], a[4]))


def tensors(
    tokens: int, extra: int = 0, kv_heads: int = 2, dv: int = 3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = (
        (2, 4, tokens, 4),
        (2, kv_heads, tokens + extra, 4),
        (2, kv_heads, tokens + extra, dv),
    )
    q, k, v = (random.standard_normal(shape) for shape in shapes)
    return q, k, v


def test_masks_are_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("neighborhood__masks")
    for i, about in enumerate(case["meta"]["cases"]):
        tokens = math.prod(about["shape"])
        expected = np.unpackbits(case[f"mask_{i}"], axis=-1)[:, :tokens].astype(bool)
        mask = na_mask(
            about["shape"], about["kernel_size"], stride=about["stride"],
            dilation=about["dilation"], causal=about["is_causal"],
        )  # fmt: skip
        np.testing.assert_array_equal(mask, expected, err_msg=str(about))


def test_outputs_and_gradients_are_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("neighborhood__na1d_even_stride")
    q, k, v = (case[n] for n in "qkv")
    out, lse = na_attend(q, k, v, (21,), 6, stride=2)
    np.testing.assert_allclose(out, case["out"], atol=1e-10)
    np.testing.assert_allclose(lse, case["lse"], atol=1e-10)
    gradients = na_backward(q, k, v, (21,), 6, case["dout"], stride=2)
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        np.testing.assert_allclose(gradient, case[name], atol=1e-10, err_msg=name)
    np.testing.assert_array_equal(na_mask((21,), 6, stride=2), case["mask"])


def test_a_window_of_all_is_dense_or_causal_attention() -> None:
    q, k, v = tensors(12)
    for got, expected in (
        (na_attend(q, k, v, (3, 4), (3, 4)), dense.attend(q, k, v)),
        (na_attend(q, k, v, (12,), 12, causal=True), dense.attend(q, k, v, causal=True)),
    ):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_window_of_all_of_one_axis_sees_all_along_it() -> None:
    mask = na_mask((3, 7), (3, 3)).reshape(3, 7, 3, 7)
    expected = np.broadcast_to(axis_mask(7, 3)[None, :, None], mask.shape)
    np.testing.assert_array_equal(mask, expected)


@quick
@given(AXES)
def test_key_counts(axis: tuple[int, int, int, int, bool]) -> None:
    X, k, s, dil, causal = axis
    x = np.arange(X)
    start, end, group = axis_window(x, X, k, s, dil, causal)
    mask = axis_mask(X, k, s, dil, causal)
    counts = mask.sum(axis=1)
    np.testing.assert_array_equal(counts, end - start)
    assert np.all(np.diag(mask))
    assert np.all(mask <= (x[:, None] % dil == x % dil))
    if causal:
        inside = x // dil
        leader = np.minimum(inside // s * s + s - 1, X // dil + (group < X % dil) - 1)
        np.testing.assert_array_equal(counts, np.minimum(k - (leader - inside), inside + 1))
        assert not np.any(np.triu(mask, 1))
    else:
        assert np.all(counts == k)


def test_key_counts_of_a_grid() -> None:
    """Windows that do not cut are products; the query is in its own, and in its dilation group."""
    mask = na_mask((7, 5, 4), (3, 2, 3), stride=(2, 1, 3), dilation=(2, 2, 1))
    assert np.all(mask.sum(axis=1) == 3 * 2 * 3)
    assert np.all(np.diag(mask))
    z, y, _ = np.unravel_index(np.arange(len(mask)), (7, 5, 4))
    for coordinate in (z, y):
        assert not np.any(mask & (coordinate[:, None] % 2 != coordinate % 2))


@quick
@given(AXES)
def test_dilation_is_one_attention_for_each_group(axis: tuple[int, int, int, int, bool]) -> None:
    X, k, s, dil, causal = axis
    mask = axis_mask(X, k, s, dil, causal)
    for g in range(dil):
        group = mask[g::dil, g::dil]
        np.testing.assert_array_equal(group, axis_mask(len(group), k, s, 1, causal))
        assert mask[g::dil].sum() == group.sum()


def test_dilated_attention_through_permuted_tokens() -> None:
    shape, dil = (5, 7), (2, 3)
    q, k, v = tensors(35)
    out, lse = na_attend(q, k, v, shape, 2, dilation=dil)
    parts = [token_permute(x, shape, dil)[0] for x in (q, k, v)]
    outs, lses, first = [], [], 0
    for grid in token_permute(q, shape, dil)[1]:
        rows = slice(first, first + math.prod(grid))
        part, part_lse = na_attend(*(x[..., rows, :] for x in parts), tuple(map(int, grid)), 2)
        outs.append(part)
        lses.append(part_lse)
        first = rows.stop
    np.testing.assert_allclose(
        token_unpermute(np.concatenate(outs, axis=-2), shape, dil), out, atol=1e-12
    )
    joined = np.concatenate(lses, axis=-1)[..., None]
    np.testing.assert_allclose(token_unpermute(joined, shape, dil)[..., 0], lse, atol=1e-12)


@pytest.mark.parametrize("X", [12, 14])
def test_stride_of_a_kernel_is_attention_in_blocks(X: int) -> None:
    """The last block, if it is not whole, is pushed into the one before it."""
    block = np.minimum(np.arange(X) // 4 * 4, X - 4)
    key = np.arange(X)
    expected = (key >= block[:, None]) & (key < block[:, None] + 4)
    np.testing.assert_array_equal(axis_mask(X, 4, 4), expected)


@pytest.mark.parametrize(("k", "s", "dil"), [(3, 1, 1), (4, 2, 1), (5, 3, 2)])
def test_translation_in_the_interior(k: int, s: int, dil: int) -> None:
    mask, step = axis_mask(60, k, s, dil), s * dil
    for x in range(20, 40):
        np.testing.assert_array_equal(mask[x, :-step], mask[x + step, step:])


def test_axes_are_independent_and_may_change_places() -> None:
    options: dict[str, Any] = {"stride": (1, 2), "dilation": (2, 1), "causal": (True, False)}
    flipped = {name: value[::-1] for name, value in options.items()}
    mask = na_mask((6, 5), (3, 4), **options).reshape(6, 5, 6, 5)
    other = na_mask((5, 6), (4, 3), **flipped).reshape(5, 6, 5, 6)
    np.testing.assert_array_equal(mask, other.transpose(1, 0, 3, 2))
    rows, columns = axis_mask(6, 3, 1, 2, True), axis_mask(5, 4, 2)
    np.testing.assert_array_equal(mask, rows[:, None, :, None] & columns[None, :, None])


def test_flipping_an_axis() -> None:
    """It changes nothing if kernel and stride are both odd or both even, and the stride divides the
    length of every dilation group.
    """
    for axis in ((12, 3), (12, 2, 2), (12, 5, 3), (14, 3, 1, 4), (12, 2, 2, 3)):
        np.testing.assert_array_equal(axis_mask(*axis)[::-1, ::-1], axis_mask(*axis))
    for axis in ((12, 4), (12, 3, 2), (13, 5, 3), (14, 2, 2, 2)):
        assert not np.array_equal(axis_mask(*axis)[::-1, ::-1], axis_mask(*axis))


@pytest.mark.parametrize("dil", [1, 2, 3])
def test_what_a_decoder_keeps(dil: int) -> None:
    """A causal axis of stride 1 may grow; with a larger stride the last windows move."""
    k, frames, whole = 3, 12, na_mask((12, 4), (3, 2), dilation=(dil, 1), causal=(True, False))
    for length in range(k * dil, frames):
        part = na_mask((length, 4), (k, 2), dilation=(dil, 1), causal=(True, False))
        np.testing.assert_array_equal(whole[: 4 * length, : 4 * length], part)
    seen = whole.reshape(frames, 4, frames, 4).any(axis=(1, 3))
    assert not np.any(np.tril(seen, -k * dil))
    assert np.any(axis_mask(12, k, 3, causal=True)[:7, :7] != axis_mask(7, k, 3, causal=True))


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_how_many_windows_hold_a_key(k: int) -> None:
    held = axis_mask(4 * k, k).sum(axis=0)
    x = np.zeros((1, 4 * k, 1))
    np.testing.assert_allclose(na_backward(x, x, x, (4 * k,), k, x + 1)[2].ravel(), held / k)
    assert held[0] == k // 2 + 1
    assert held[-1] == k - k // 2
    assert held[k - 1] == k + k // 2
    assert held[2 * k] == k


def test_larger_odd_windows_hold_smaller_ones() -> None:
    for k in (3, 5, 7):
        assert np.all(axis_mask(13, k) <= axis_mask(13, k + 2))


def test_extra_keys_are_a_merge() -> None:
    q, k, v = tensors(12, extra=5)
    whole = na_attend(q, k, v, (3, 4), (2, 3), extra=5)
    grid = na_attend(q, k[..., :12, :], v[..., :12, :], (3, 4), (2, 3))
    extra = dense.attend(q, k[..., 12:, :], v[..., 12:, :])
    merged = merge_attentions([grid[0], extra[0]], [grid[1], extra[1]])
    for got, expected in zip(merged, whole, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)


GRIDS: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((13,), {"kernel": 4, "stride": 3, "causal": True}),
    ((13,), {"kernel": 3, "stride": 2, "dilation": 3}),
    ((5, 6), {"kernel": (4, 3), "dilation": (1, 2), "causal": (False, True)}),
    ((3, 4, 4), {"kernel": (2, 3, 2), "stride": (1, 2, 2), "causal": (True, False, False)}),
)


@pytest.mark.parametrize(("shape", "options"), GRIDS)
def test_unfused_is_fused(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    q, k, v = tensors(math.prod(shape))
    s = na_qk(q, k, shape, **options)
    out, _ = na_attend(q, k, v, shape, **options)
    np.testing.assert_allclose(na_av(softmax(s), v, shape, **options), out, atol=1e-12)
    tokens, inside = window_tokens(shape, **options)
    np.testing.assert_array_equal(np.isneginf(s[0, 0]), ~inside)
    mask = na_mask(shape, **options)
    for n in range(len(mask)):
        np.testing.assert_array_equal(np.sort(tokens[n][inside[n]]), np.flatnonzero(mask[n]))


@pytest.mark.parametrize(("shape", "options"), GRIDS)
def test_gradients_are_finite_differences(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    random = np.random.default_rng(1)
    inputs = tensors(math.prod(shape), extra=2)
    q, k, v = inputs
    dout = random.standard_normal((*q.shape[:-1], 3))
    dlse = random.standard_normal(q.shape[:-1])

    def loss(*x: np.ndarray) -> float:
        out, lse = na_attend(*x, shape, extra=2, **options)
        return float(np.sum(dout * out) + np.sum(dlse * lse))

    gradients = na_backward(q, k, v, shape, **options, dout=dout, dlse=dlse, extra=2)
    assert_gradients(loss, inputs, gradients)
    k, v = k[..., :-2, :], v[..., :-2, :]
    s = na_qk(q, k, shape, **options)
    ds = random.standard_normal(s.shape)
    scored = na_qk_backward(q, k, shape, **options, dscores=ds)
    assert_gradients(
        lambda q, k: float(np.sum((ds * na_qk(q, k, shape, **options))[np.isfinite(s)])),
        (q, k),
        scored,
    )
    p = softmax(s)
    valued = na_av_backward(p, v, shape, **options, dout=dout)
    assert_gradients(
        lambda p, v: float(np.sum(dout * na_av(p, v, shape, **options))), (p, v), valued
    )


def assert_gradients(loss: Any, inputs: tuple[Any, ...], gradients: tuple[Any, ...]) -> None:
    random = np.random.default_rng(2)
    for n, gradient in enumerate(gradients):
        direction = random.standard_normal(gradient.shape)
        sides = [
            loss(*(x + s * 1e-6 * direction if i == n else x for i, x in enumerate(inputs)))
            for s in (1, -1)
        ]
        numeric = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(np.sum(gradient * direction), numeric, atol=1e-6)


def test_weights_behind_the_end_are_not_read() -> None:
    _, inside = window_tokens((6,), 4, causal=True)
    p = np.where(inside, 1.0, np.nan)[None]
    v = np.ones((1, 6, 1))
    np.testing.assert_array_equal(na_av(p, v, (6,), 4, causal=True)[0, :, 0], inside.sum(axis=1))
    dp, _ = na_av_backward(p, v, (6,), 4, v, causal=True)
    np.testing.assert_array_equal(dp[0], inside)


def test_leading_axes_are_free_and_float32_stays() -> None:
    q, k, v = (x.astype(np.float32) for x in tensors(12))
    out, lse = na_attend(q, k, v, (3, 4), 3)
    assert out.dtype == lse.dtype == na_qk(q, k, (3, 4), 3).dtype == np.float32
    np.testing.assert_array_equal(na_attend(q[0], k[0], v[0], (3, 4), 3)[0], out[0])
    merged = merge_attentions([out, out], [lse, lse])
    assert merged[0].dtype == merged[1].dtype == np.float32


X = np.zeros((2, 12, 4))
P = np.zeros((2, 12, 9))
BAD: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], type, str], ...] = (
    (axis_window, (12, 12, 3), {}, ValueError, "x"),
    (axis_window, (1.5, 12, 3), {}, TypeError, "x"),
    (axis_window, (np.ones(2), 12, 3), {}, TypeError, "x"),
    (axis_mask, (12, 1), {}, ValueError, "k"),
    (axis_mask, (12, 7, 1, 2), {}, ValueError, "k"),
    (axis_mask, (12, 3, 4), {}, ValueError, "s"),
    (axis_mask, (12, 3, 1, 0), {}, ValueError, "dil"),
    (axis_mask, (12, 3, 1, 1, 1), {}, TypeError, "causal"),
    (axis_mask, (12.0, 3), {}, TypeError, "X"),
    (na_mask, (12, 3), {}, TypeError, "shape"),
    (na_mask, ((2, 2, 2, 2), 2), {}, ValueError, "shape"),
    (na_mask, ((3, 4), (3, 3, 3)), {}, ValueError, "kernel"),
    (na_mask, ((3, 4), 4), {}, ValueError, "kernel"),
    (na_mask, ((1, 12), 2), {}, ValueError, "kernel"),
    (na_mask, ((3, 4), 3), {"stride": (1, 4)}, ValueError, "stride"),
    (na_mask, ((3, 4), 2), {"dilation": 2}, ValueError, "kernel"),
    (na_mask, ((3, 4), 2), {"causal": (True, None)}, TypeError, "causal"),
    (na_attend, (X, X, X, (3, 5), 3), {}, ValueError, "q"),
    (na_attend, (X, X, X, (3, 4), 3), {"extra": 1}, ValueError, "k"),
    (na_attend, (X, X, X, (3, 4), 3), {"extra": -1}, ValueError, "extra"),
    (na_attend, (X, X[..., :1], X, (3, 4), 3), {}, ValueError, "k"),
    (na_attend, (X, X, X.astype(np.float32), (3, 4), 3), {}, TypeError, "v"),
    (na_backward, (X, X, X, (3, 4), 3, None), {}, TypeError, "dout"),
    (na_qk, (X, X[:, :-1], (3, 4), 3), {}, ValueError, "k"),
    (na_qk, (X, X[None], (3, 4), 3), {}, ValueError, "k"),
    (na_qk, (X, np.zeros((3, 12, 4)), (3, 4), 3), {}, ValueError, "k"),
    (na_qk, (X.tolist(), X, (3, 4), 3), {}, TypeError, "q"),
    (na_qk_backward, (X, X, (3, 4), 3, X), {}, ValueError, "dscores"),
    (na_av, (P[..., :-1], X, (3, 4), 3), {}, ValueError, "p"),
    (na_av, (P, X.astype(np.float32), (3, 4), 3), {}, TypeError, "v"),
    (na_av_backward, (P, X, (3, 4), 3, None), {}, TypeError, "dout"),
    (token_permute, (X, (3, 5), 1), {}, ValueError, "x"),
    (token_permute, (X, (3, 4), 4), {}, ValueError, "dil"),
    (token_unpermute, (X[0, 0], (3, 4), 1), {}, ValueError, "x"),
    (merge_attentions, ([], []), {}, ValueError, "outs"),
    (merge_attentions, (X, [X]), {}, TypeError, "outs"),
    (merge_attentions, ([X], []), {}, ValueError, "lses"),
    (merge_attentions, ([X], [X]), {}, ValueError, "lses"),
    (merge_attentions, ([X, X[1:]], [X[..., 0]] * 2), {}, ValueError, "outs"),
)


@pytest.mark.parametrize(("function", "args", "options", "error", "name"), BAD)
def test_bad_input_is_named(
    function: Any, args: tuple[Any, ...], options: dict[str, Any], error: type, name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        function(*args, **options)


def test_inputs_stay_as_they_are() -> None:
    inputs = tensors(12)
    copies = [x.copy() for x in inputs]
    na_backward(*inputs, (3, 4), 3, np.ones((2, 4, 12, 3)))
    na_qk(*inputs[:2], (3, 4), 3)
    for x, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
    assert neighborhood.MECHANISM.slug == "neighborhood"
