"""DiffQKV attention against outside evidence, its own properties and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.dense import attention as dense
from attnspec.reference.heads import diffqkv
from attnspec.reference.heads.diffqkv import (
    attend,
    attend_selected,
    cache_bytes,
    contract_query,
    contract_query_backward,
    diffqkv_attend,
    diffqkv_backward,
    head_maps,
    scores,
    select_values,
    selective_attend,
    softmax_rows,
    step,
    union_indices,
)
from attnspec.reference.primitives.rope import rope

quick = settings(max_examples=20, deadline=None, derandomize=True)
HEADS = [(12, 4, 6), (12, 3, 6), (8, 1, 8), (6, 6, 2), (4, 4, 4), (4, 1, 1)]


def tensors(
    heads: tuple[int, int, int] = (12, 4, 6),
    T: int = 5,
    S: int = 7,
    d: int = 4,
    dv: int = 6,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    Hq, Hk, Hv = heads
    shapes = ((2, Hq, T, d), (2, Hk, S, d), (2, Hv, S, dv))
    q, k, v = (random.standard_normal(shape) for shape in shapes)
    return q, k, v


def weights(q: np.ndarray, k: np.ndarray, causal: bool = False) -> np.ndarray:
    hk, _ = head_maps(q.shape[-3], k.shape[-3], 1)
    allowed = dense.visible(q.shape[-2], k.shape[-2], causal=causal)
    return softmax_rows(scores(q, k, hk), allowed)[0]


@pytest.mark.parametrize("name", ["h12_k3_v6_dk_half", "h8_k1_v8"])
def test_outputs_and_gradients_are_those_of_the_authors(
    name: str, golden: Callable[[str], Any]
) -> None:
    case = golden(f"diffqkv__{name}")
    q, k, v = (case[n] for n in ("q", "k", "v"))
    np.testing.assert_allclose(diffqkv_attend(q, k, v, causal=True)[0], case["out"], atol=1e-10)
    gradients = diffqkv_backward(q, k, v, case["dout"], causal=True)
    for n, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        np.testing.assert_allclose(gradient, case[n], atol=1e-10, err_msg=n)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [False, True])
def test_repeated_heads_give_dense_attention(heads: tuple[int, int, int], causal: bool) -> None:
    """Output, lse and gradients; the gradients of a shared head are sums over its own group."""
    q, k, v = tensors(heads)
    Hq, Hk, Hv = heads
    K, V = np.repeat(k, Hq // Hk, axis=1), np.repeat(v, Hq // Hv, axis=1)
    for got, expected in zip(
        diffqkv_attend(q, k, v, causal=causal), dense.attend(q, K, V, causal=causal), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-12)
    random = np.random.default_rng(1)
    dout, dlse = random.standard_normal((2, Hq, 5, 6)), random.standard_normal((2, Hq, 5))
    dq, dk, dv = diffqkv_backward(q, k, v, dout, dlse, causal=causal)
    dQ, dK, dV = dense.attend_backward(q, K, V, dout, dlse, causal=causal)
    np.testing.assert_allclose(dq, dQ, atol=1e-12)
    np.testing.assert_allclose(dk, dK.reshape(2, Hk, -1, 7, 4).sum(axis=2), atol=1e-12)
    np.testing.assert_allclose(dv, dV.reshape(2, Hv, -1, 7, 6).sum(axis=2), atol=1e-12)


def test_equal_heads_are_grouped_attention() -> None:
    q, k, v = tensors((6, 2, 2), dv=4)
    for got, expected in zip(diffqkv_attend(q, k, v), dense.attend(q, k, v), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_zeros_in_new_channels_change_nothing_at_the_old_scale() -> None:
    q, k, v = tensors()
    wide = (np.concatenate([x, np.zeros_like(x)], axis=-1) for x in (q, k))
    np.testing.assert_allclose(
        diffqkv_attend(*wide, v, scale=4**-0.5)[0], diffqkv_attend(q, k, v)[0], atol=1e-12
    )


def test_contracting_the_query_is_expanding_the_key() -> None:
    _, k, v = tensors((4, 2, 4))
    random = np.random.default_rng(2)
    wide, E = random.standard_normal((2, 4, 5, 9)), random.standard_normal((2, 9, 4))
    per_head = np.repeat(E, 2, axis=0)
    qe = contract_query(wide, per_head)
    expected = diffqkv_attend(wide, k @ np.swapaxes(E, -1, -2), v, scale=4**-0.5)
    np.testing.assert_allclose(diffqkv_attend(qe, k, v)[0], expected[0], atol=1e-12)
    # Rotation after the contraction is a function of the distance, whatever E is.
    at = lambda x, first: rope(x, np.arange(first, first + x.shape[-2]))  # noqa: E731
    near, far = (diffqkv_attend(at(qe, n), at(k, n), v)[0] for n in (0, 40))
    np.testing.assert_allclose(near, far, atol=1e-9)


def test_positions_act_in_the_width_of_the_keys() -> None:
    """Expanding rotated keys is contracting the query; rotating expanded keys is another score."""
    _, k, v = tensors((4, 2, 4))
    random = np.random.default_rng(6)
    wide, E = random.standard_normal((2, 4, 1, 8)), random.standard_normal((2, 8, 4))
    at, place = np.arange(7), np.array([5])
    qe = contract_query(wide, np.repeat(E, 2, axis=0))
    expected, _ = diffqkv_attend(rope(qe, place), rope(k, at), v)
    to_wide = np.swapaxes(E, -1, -2)
    expanded = rope(k, at - place) @ to_wide
    got, _ = diffqkv_attend(wide, expanded, v, scale=4**-0.5)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    rotated, _ = diffqkv_attend(rope(wide, place), rope(k @ to_wide, at), v, scale=4**-0.5)
    assert not np.allclose(rotated, expected, atol=1e-3)


def test_contraction_gradients_are_finite_differences() -> None:
    random = np.random.default_rng(3)
    q, E, dqe = (random.standard_normal(s) for s in ((2, 2, 3, 4), (2, 4, 2), (2, 2, 3, 2)))
    dq, dE = contract_query_backward(q, E, dqe)
    for x, gradient in ((q, dq), (E, dE)):
        direction = random.standard_normal(x.shape)
        moved = [
            np.sum(
                dqe * contract_query(*(y + s * 1e-6 * direction if y is x else y for y in (q, E)))
            )
            for s in (1, -1)
        ]
        numeric = (moved[0] - moved[1]) / 2e-6
        np.testing.assert_allclose(np.sum(gradient * direction), numeric, atol=1e-7)


def test_gradients_are_finite_differences_and_lse_counts() -> None:
    inputs = list(tensors((4, 1, 2), T=4, S=3))
    random = np.random.default_rng(4)
    dout, dlse = random.standard_normal((2, 4, 4, 6)), random.standard_normal((2, 4, 4))
    mask = np.array([[True, True, False], [True, True, True]])

    def loss(*x: np.ndarray) -> float:
        out, lse = diffqkv_attend(*x, causal=True, key_mask=mask)
        return float(np.sum(dout * out) + np.sum((dlse * lse)[np.isfinite(lse)]))

    gradients = diffqkv_backward(*inputs, dout, dlse, causal=True, key_mask=mask)
    for n, gradient in enumerate(gradients):
        direction = random.standard_normal(gradient.shape)
        sides = [
            loss(*(x + s * 1e-6 * direction if i == n else x for i, x in enumerate(inputs)))
            for s in (1, -1)
        ]
        np.testing.assert_allclose(
            np.sum(gradient * direction), (sides[0] - sides[1]) / 2e-6, atol=1e-6
        )


def test_queries_that_share_both_heads_may_change_places() -> None:
    q, k, v = tensors((12, 2, 3))
    out, _ = diffqkv_attend(q, k, v)
    inside, across = np.arange(12), np.arange(12)
    inside[[0, 3]] = 3, 0
    across[[3, 4]] = 4, 3  # the same key head, another value head
    np.testing.assert_array_equal(diffqkv_attend(q[:, inside], k, v)[0], out[:, inside])
    assert not np.allclose(diffqkv_attend(q[:, across], k, v)[0], out[:, across])


def test_a_value_head_reaches_its_own_query_heads_only() -> None:
    q, k, v = tensors()
    _, hv = head_maps(12, 4, 6)
    before, _ = diffqkv_attend(q, k, v)
    v[:, 2] += 1
    changed = np.any(diffqkv_attend(q, k, v)[0] != before, axis=(0, 2, 3))
    np.testing.assert_array_equal(changed, hv == 2)


@quick
@given(c=st.integers(1, 9), causal=st.booleans(), heads=st.sampled_from(HEADS))
def test_selected_values_obey_the_error_bound(
    c: int, causal: bool, heads: tuple[int, int, int]
) -> None:
    q, k, v = tensors(heads, T=9)
    _, hv = head_maps(*heads)
    P = weights(q, k, causal)
    exact = attend(P, v, hv)
    idx, kept = select_values(P, c)
    out = attend_selected(P, idx, v, hv)
    assert idx.shape == (*P.shape[:-1], min(c, 7))
    assert np.all(np.diff(np.take_along_axis(P, idx, -1), axis=-1) <= 0)
    largest = np.linalg.norm(v, axis=-1).max(axis=-1)[:, hv]
    seen = P.sum(axis=-1) > 0.5
    error = np.linalg.norm(out - exact, axis=-1)
    assert np.all((error <= (1 - kept) * largest[..., None] + 1e-12)[seen])
    if c >= 7:
        np.testing.assert_allclose(out, exact, atol=1e-12)
    assert np.all(select_values(P, c + 1)[1] >= kept - 1e-12)
    convex = attend_selected(P, idx, v, hv, renormalise=True)
    rows = v[:, hv]
    assert np.all((convex <= rows.max(axis=-2, keepdims=True) + 1e-12)[seen])
    assert np.all((convex >= rows.min(axis=-2, keepdims=True) - 1e-12)[seen])
    assert np.all(convex[~seen] == 0)
    np.testing.assert_array_equal(selective_attend(q, k, v, c, causal=causal), out)


def test_ties_go_to_the_lower_index_and_padding_garbage_is_not_read() -> None:
    P = np.array([[[0.25, 0.25, 0.0, 0.5, 0.0]]])
    idx, kept = select_values(P, 4)
    np.testing.assert_array_equal(idx, [[[3, 0, 1, 2]]])
    np.testing.assert_array_equal(kept, [[1.0]])
    v = np.array([[[4.0], [8.0], [np.nan], [2.0], [np.nan]]])
    np.testing.assert_array_equal(attend_selected(P, idx, v, np.array([0])), [[[4.0]]])
    np.testing.assert_array_equal(attend(P, v, np.array([0])), [[[4.0]]])


def test_what_must_be_read() -> None:
    q, k, v = tensors((6, 2, 3))
    _, hv = head_maps(6, 2, 3)
    P = weights(q, k)
    idx, _ = select_values(P, 2)
    union = union_indices(idx, hv)
    assert [len(entry) for entry in union] == [3, 3]
    poisoned = v.copy()
    for b, g in np.ndindex(2, 3):
        unread = np.setdiff1d(np.arange(7), union[b][g])
        poisoned[b, g, unread] = np.nan
        assert np.array_equal(union[b][g], np.unique(idx[b, 2 * g : 2 * g + 2]))
    np.testing.assert_array_equal(
        attend_selected(P, idx, poisoned, hv), attend_selected(P, idx, v, hv)
    )


def test_the_cache_shrinks_by_the_formula() -> None:
    assert cache_bytes(4, 64, 16, 128, 2, 10) == 10 * 2 * (4 * 64 + 16 * 128)
    assert cache_bytes(4, 128, 16, 128, 2, 7) / cache_bytes(16, 128, 16, 128, 2, 7) == 0.625


@pytest.mark.parametrize("c", [None, 3])
def test_decoding_is_prefill(c: int | None) -> None:
    q, k, v = tensors(T=7)
    state = dense.init_state(k, v)
    outs = []
    for first, last in ((0, 1), (1, 4), (4, 5), (5, 7)):
        tokens = (x[..., first:last, :] for x in (q, k, v))
        out, state = step(state, *tokens, c=c)
        outs.append(out)
    expected = (
        diffqkv_attend(q, k, v, causal=True)[0]
        if c is None
        else selective_attend(q, k, v, c, causal=True)
    )
    np.testing.assert_allclose(np.concatenate(outs, axis=-2), expected, atol=1e-12)
    np.testing.assert_array_equal(state.v, v)


def test_rows_that_see_nothing_are_zero() -> None:
    q, k, v = tensors(T=9)
    mask = np.ones((2, 7), bool)
    mask[1] = False
    out, lse = diffqkv_attend(q, k, v, causal=True, key_mask=mask)
    empty = np.isneginf(lse)
    assert np.all(empty[0, :, :2])
    assert np.all(empty[1])
    assert np.all(out[empty] == 0)
    for renormalise in (False, True):
        selected = selective_attend(q, k, v, 3, causal=True, key_mask=mask, renormalise=renormalise)
        assert np.all(selected[empty] == 0)
    nothing = (x[..., :0, :] for x in (k, v))
    assert np.all(selective_attend(q, *nothing, 3, renormalise=True) == 0)


def test_later_keys_have_no_influence_and_order_does_not_matter() -> None:
    q, k, v = tensors(T=7)
    before, _ = diffqkv_attend(q, k, v, causal=True)
    order = np.random.default_rng(5).permutation(7)
    np.testing.assert_allclose(
        diffqkv_attend(q, k[:, :, order], v[:, :, order])[0], diffqkv_attend(q, k, v)[0]
    )
    k[..., 4:, :] *= 100
    np.testing.assert_array_equal(
        diffqkv_attend(q, k, v, causal=True)[0][..., :4, :], before[..., :4, :]
    )


def test_leading_axes_are_free_and_float32_stays() -> None:
    q, k, v = (x.astype(np.float32) for x in tensors())
    out, lse = diffqkv_attend(q, k, v)
    assert out.dtype == lse.dtype == selective_attend(q, k, v, 2).dtype == np.float32
    np.testing.assert_array_equal(diffqkv_attend(q[0], k[0], v[0])[0], out[0])
    np.testing.assert_array_equal(diffqkv_attend(*(x[:, None] for x in (q, k, v)))[0][:, 0], out)


X = np.zeros((4, 3, 2))
MAP = np.array([0, 0, 1, 1])
P0 = np.zeros((4, 3, 3))
IDX = np.zeros((4, 3, 1), int)
BAD: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], type, str], ...] = (
    (head_maps, (12, 5, 6), {}, ValueError, "Hk"),
    (head_maps, (12, 4, 8), {}, ValueError, "Hv"),
    (head_maps, (0, 1, 1), {}, ValueError, "Hq"),
    (head_maps, (4, 2.0, 1), {}, TypeError, "Hk"),
    (contract_query, (X, X), {}, ValueError, "E"),
    (contract_query, (X, None), {}, TypeError, "E"),
    (contract_query, (X, X.astype(np.float32)), {}, TypeError, "E"),
    (scores, (X, X[..., :1], MAP), {}, ValueError, "k"),
    (scores, (X, X[:1], MAP), {}, ValueError, "hk"),
    (scores, (X, X, MAP[:2]), {}, ValueError, "hk"),
    (scores, (X, X, MAP * 1.0), {}, TypeError, "hk"),
    (scores, (X, X.astype(np.float32), MAP), {}, TypeError, "k"),
    (softmax_rows, (X[0, 0],), {}, ValueError, "s"),
    (softmax_rows, (X, np.ones(2)), {}, TypeError, "mask"),
    (softmax_rows, (X, np.ones(3, bool)), {}, ValueError, "mask"),
    (attend, (P0, X[:, :2], MAP), {}, ValueError, "v"),
    (attend, (P0, X.astype(np.float32), MAP), {}, TypeError, "v"),
    (attend, (P0, X, MAP - 1), {}, ValueError, "hv"),
    (diffqkv_attend, (X, X[:3], X), {}, ValueError, "k"),
    (diffqkv_attend, (X, X, X[:3]), {}, ValueError, "v"),
    (diffqkv_attend, (X, X[:0], X), {}, ValueError, "k"),
    (diffqkv_attend, (X, X[..., :1], X), {}, ValueError, "k"),
    (diffqkv_attend, (X, X, X[:, :1]), {}, ValueError, "v"),
    (diffqkv_attend, (X, X, X[None]), {}, ValueError, "v"),
    (diffqkv_attend, (X.tolist(), X, X), {}, TypeError, "q"),
    (diffqkv_attend, (X, X, X.astype(np.float32)), {}, TypeError, "v"),
    (diffqkv_attend, (X, X, X), {"key_mask": np.ones(3)}, TypeError, "key_mask"),
    (diffqkv_attend, (X, X, X), {"key_mask": np.ones(4, bool)}, ValueError, "key_mask"),
    (diffqkv_backward, (X, X, X, None), {}, TypeError, "dout"),
    (select_values, (P0, 0), {}, ValueError, "c"),
    (select_values, (P0, True), {}, TypeError, "c"),
    (select_values, (None, 1), {}, TypeError, "P"),
    (attend_selected, (P0, IDX[:1], X, MAP), {}, ValueError, "idx"),
    (attend_selected, (P0, IDX + 3, X, MAP), {}, ValueError, "idx"),
    (attend_selected, (P0, IDX * 1.0, X, MAP), {}, TypeError, "idx"),
    (attend_selected, (P0, IDX, X[:1], MAP), {}, ValueError, "hv"),
    (attend_selected, (P0, IDX, X[:, :1], MAP), {}, ValueError, "v"),
    (attend_selected, (P0, IDX, X.astype(np.float32), MAP), {}, TypeError, "v"),
    (selective_attend, (X, X, X, 0), {}, ValueError, "c"),
    (union_indices, (IDX, MAP), {}, ValueError, "idx"),
    (union_indices, (IDX[None], MAP[:2]), {}, ValueError, "hv"),
    (cache_bytes, (4, 0, 1, 1, 1, 1), {}, ValueError, "dk"),
    (cache_bytes, (4, 1, 1, 1, 1, -1), {}, ValueError, "S"),
    (step, (dense.State(X, X), X, X[:, :1], X[:, :1]), {}, ValueError, "k"),
    (step, (dense.State(X[:2], X), X, X, X), {}, ValueError, "state.k"),
)


@pytest.mark.parametrize(("function", "args", "options", "error", "name"), BAD)
def test_bad_input_is_named(
    function: Any, args: tuple[Any, ...], options: dict[str, Any], error: type, name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        function(*args, **options)


def test_inputs_stay_as_they_are() -> None:
    inputs = tensors()
    copies = [x.copy() for x in inputs]
    diffqkv_backward(*inputs, np.ones((2, 12, 5, 6)), causal=True)
    selective_attend(*inputs, 2)
    for x, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
    assert diffqkv.MECHANISM.slug == "diffqkv"
