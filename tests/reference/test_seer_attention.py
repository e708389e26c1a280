"""SeerAttention, prefill and training: golden case, properties, gradients and bad inputs."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.dense import attention as dense
from attnspec.reference.primitives.rope import rope
from attnspec.reference.primitives.softmax import merge, softmax
from attnspec.reference.selection import (
    seer_attention,
    seer_attention_decode,
    seer_attention_gate,
    seer_attention_selection,
    seer_attention_training,
)
from attnspec.reference.selection.seer_attention import (
    attend,
    attend_with_block_max,
    block_sparse_attend,
    block_sparse_attend_backward,
    distill_loss,
    distill_loss_backward,
    gate_rope,
    gate_scores,
    gate_scores_backward,
    normalise_gt,
    pool_blocks,
    ratio_to_k,
    select_blocks,
    select_ratio,
    select_threshold,
)
from attnspec.reference.selection.seer_attention_gate import gate_kinds

small = settings(max_examples=20, deadline=None, derandomize=True)


def draw(seed: int, T: int, *, heads: int = 4, kv_heads: int = 2) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, heads, T, 4))
    k = rng.standard_normal((2, kv_heads, T, 4))
    return q, k, rng.standard_normal((2, kv_heads, T, 3))


def draw_mask(seed: int, nb: int) -> np.ndarray:
    mask: np.ndarray = np.random.default_rng(seed).random((2, 4, nb, nb)) < 0.5
    return mask


def draw_gate(seed: int, nb: int, dg: int = 4) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    pq, pk = rng.standard_normal((2, 4, nb, 8)), rng.standard_normal((2, 2, nb, 12))
    return pq, pk, rng.standard_normal((4, 8, dg)), rng.standard_normal((2, 12, dg))


def numeric_gradient(f: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    gradient, h = np.zeros_like(x), 1e-5
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        gradient[index] = (f(x + step) - f(x - step)) / (2 * h)
    return gradient


@pytest.mark.parametrize(
    "module",
    [
        seer_attention,
        seer_attention_decode,
        seer_attention_gate,
        seer_attention_selection,
        seer_attention_training,
    ],
)
def test_doctests(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


def test_golden(golden: Callable[[str], dict[str, Any]]) -> None:
    case = golden("seer_attention__avg_maxmin_gqa")
    q, k, v = (np.swapaxes(case[name], 1, 2) for name in ("q", "k", "v"))
    Wk, b = case["mask_linear_k_weight"], 16
    q_kinds, k_kinds = gate_kinds(case["meta"]["params"]["gate_type"])
    cos, sin = gate_rope(4, b, 8)
    pooled = pool_blocks(q, b, q_kinds), pool_blocks(k, b, k_kinds)
    G = gate_scores(*pooled, None, Wk, cos, sin)
    np.testing.assert_allclose(G, case["gate_logits"], atol=2e-6)
    np.testing.assert_allclose(softmax(G), case["gate_scores"], atol=2e-6)
    for last_dense, suffix in ((False, ""), (True, "_lastdense")):
        by_threshold = select_threshold(softmax(G), 0.12, last_dense)
        np.testing.assert_array_equal(by_threshold, case[f"mask_threshold{suffix}"])
        by_ratio = select_ratio(G, 0.8, last_dense)
        np.testing.assert_array_equal(by_ratio, case[f"mask_nz{suffix}"])

    options = {"b": b, "q_kinds": q_kinds, "k_kinds": k_kinds}
    for rule, name in (({"tau": 0.12}, "thr"), ({"rho": 0.8}, "nz")):
        out, _, _ = attend(q, k, v, None, Wk, **options, **rule)
        expected = case[f"attn_out_{name}_lastdense"]
        empty = np.isnan(expected)
        np.testing.assert_allclose(out[~empty], expected[~empty], atol=2e-6)
        assert not np.any(out[empty])

    rotated = rope(q, np.arange(64)), rope(k, np.arange(64))
    GT = normalise_gt(attend_with_block_max(*rotated, v, b)[1])
    np.testing.assert_allclose(GT, case["block_gt"], atol=2e-6)
    np.testing.assert_allclose(distill_loss(G, GT), case["kl_loss"], atol=2e-6)


def test_gate_kinds() -> None:
    assert gate_kinds("Qmaxminavg_Kavg") == (("max", "min", "avg"), ("avg",))
    for wrong in ("Qavg", "Q_Kavg", "Qavg_K", "Qavgmax_Kavg", "qavg_kavg"):
        with pytest.raises(ValueError, match=r"^name: got"):
            gate_kinds(wrong)


@small
@given(T=st.integers(1, 23), b=st.integers(1, 8), seed=st.integers(0, 99))
def test_everything_selected_is_dense_attention(T: int, b: int, seed: int) -> None:
    q, k, v = draw(seed, T)
    rng = np.random.default_rng(seed)
    Wq, Wk = rng.standard_normal((4, 4, 6)), rng.standard_normal((2, 12, 6))
    positions = np.arange(T)
    expected, expected_lse = dense.attend(rope(q, positions), rope(k, positions), v, causal=True)
    for rule in ({"tau": -1.0}, {"rho": 1.0}):
        out, lse, M = attend(q, k, v, Wq, Wk, b=b, last_dense=False, **rule)
        assert np.array_equal(M, np.broadcast_to(np.tri(M.shape[-1], dtype=bool), M.shape))
        np.testing.assert_allclose(out, expected, atol=1e-12)
        np.testing.assert_allclose(lse, expected_lse, atol=1e-12)


@small
@given(T=st.integers(1, 20), b=st.integers(1, 7), seed=st.integers(0, 99))
def test_block_max(T: int, b: int, seed: int) -> None:
    q, k, v = draw(seed, T)
    out, A = attend_with_block_max(q, k, v, b)
    np.testing.assert_allclose(out, dense.attend(q, k, v, causal=True)[0], atol=1e-12)
    P = softmax(dense.score(q, k), dense.visible(T, T, causal=True))
    nb = -(-T // b)
    for R in range(nb):
        for C in range(nb):
            pair = P[..., R * b : R * b + b, C * b : C * b + b]
            np.testing.assert_array_equal(A[..., R, C], pair.max(axis=(-1, -2)))
    lower = np.tri(nb, dtype=bool)
    assert np.all((A[..., lower] > 0) & (A[..., lower] <= 1))
    assert not np.any(A[..., ~lower])
    np.testing.assert_allclose(normalise_gt(A).sum(axis=-1), 1.0)
    np.testing.assert_array_equal(attend_with_block_max(q, k, v, 1)[1], P)


def test_loss_is_zero_at_the_target_and_its_gradient_is_exact() -> None:
    rng = np.random.default_rng(1)
    lower = np.tri(8, dtype=bool)
    G = np.where(lower, rng.standard_normal((2, 3, 8, 8)), -1e9)
    GT = normalise_gt(np.where(lower, rng.random((2, 3, 8, 8)), 0.0))
    assert distill_loss(G, GT) > 0
    np.testing.assert_allclose(distill_loss(G, softmax(G)), 0.0, atol=1e-15)
    unnormalised = 1.5 * GT
    dG = distill_loss_backward(G, unnormalised, 2.0)
    assert not np.any(dG[..., :2, :])
    some = (1, 2)
    expected = numeric_gradient(
        lambda x: (
            2.0
            * distill_loss(np.concatenate([G[:1], np.stack([*G[1, :2], x])[None]]), unnormalised)
        ),
        G[some],
    )
    np.testing.assert_allclose(dG[some][lower], expected[lower], atol=1e-9)


def test_gate_is_causal_by_block() -> None:
    q, k, _ = draw(2, 24)
    rng = np.random.default_rng(3)
    Wq, Wk = rng.standard_normal((4, 4, 4)), rng.standard_normal((2, 12, 4))
    kinds = ("max", "min", "avg")

    def gate(tokens: int) -> np.ndarray:
        pq, pk = (
            pool_blocks(q[..., :tokens, :], 4, ("avg",)),
            pool_blocks(k[..., :tokens, :], 4, kinds),
        )
        cos, sin = gate_rope(tokens // 4, 4, 4)
        return gate_scores(pq, pk, Wq, Wk, cos, sin)

    whole = gate(24)
    np.testing.assert_allclose(gate(16), whole[..., :4, :4], atol=1e-12)
    masks = [
        select_blocks(q[..., :T, :], k[..., :T, :], Wq, Wk, b=4, tau=0.2, last_dense=False)
        for T in (16, 24)
    ]
    np.testing.assert_array_equal(masks[0], masks[1][..., :4, :4])
    moved = k.copy()
    moved[..., 8:12, :] += 1.0
    pq, pk = pool_blocks(q, 4, ("avg",)), pool_blocks(moved, 4, kinds)
    changed = gate_scores(pq, pk, Wq, Wk, *gate_rope(6, 4, 4)) != whole
    assert np.all(changed[..., 2:, 2])
    assert not np.any(np.delete(changed, 2, axis=-1))


def test_selection_is_not_causal_by_token() -> None:
    """A row's blocks depend on later tokens of its own block, and some rules on the length."""
    q, k, _ = draw(2, 24)
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((4, 4, 4)), rng.standard_normal((2, 12, 4))

    def rows(q: np.ndarray, T: int, **rule: Any) -> np.ndarray:
        return select_blocks(q[..., :T, :], k[..., :T, :], *weights, b=4, **rule)[..., :4, :4]

    moved = q.copy()
    moved[..., 15, :] *= -5.0
    plain: dict[str, Any] = {"last_dense": False}
    assert not np.array_equal(rows(q, 16, tau=0.2, **plain), rows(moved, 16, tau=0.2, **plain))
    for rule in ({"rho": 0.75, **plain}, {"tau": 0.2}):
        assert not np.array_equal(rows(q, 16, **rule), rows(q, 24, **rule))


def test_gate_rotation_sees_only_the_distance_of_blocks() -> None:
    one = np.ones((1, 6, 4))
    G = gate_scores(one, one, None, np.eye(4)[None], *gate_rope(6, 64, 4))[0]
    for distance in range(6):
        diagonal = np.diagonal(G, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-12)
    assert not np.allclose(G[1, 0], G[0, 0])


def test_grouped_gate_equals_repeated_keys() -> None:
    pq, pk, Wq, Wk = draw_gate(4, 5)
    cos, sin = gate_rope(5, 8, 4)
    repeated = gate_scores(pq, np.repeat(pk, 2, axis=1), Wq, np.repeat(Wk, 2, axis=0), cos, sin)
    np.testing.assert_allclose(gate_scores(pq, pk, Wq, Wk, cos, sin), repeated, atol=1e-12)


def test_pooling() -> None:
    x = np.random.default_rng(5).standard_normal((2, 3, 11, 4))
    y = x[..., ::-1, :] * 2
    combined = pool_blocks(x + y, 4, ("avg",))
    separate = pool_blocks(x, 4, ("avg",)) + pool_blocks(y, 4, ("avg",))
    np.testing.assert_allclose(combined, separate, atol=1e-12)
    np.testing.assert_array_equal(pool_blocks(x, 4, ("min",)), -pool_blocks(-x, 4, ("max",)))
    shuffled = x[..., [2, 0, 3, 1, 7, 6, 5, 4, 10, 9, 8], :]
    kinds = ("max", "min", "avg")
    np.testing.assert_allclose(pool_blocks(shuffled, 4, kinds), pool_blocks(x, 4, kinds))
    np.testing.assert_allclose(pool_blocks(x, 4, kinds)[..., 2, 8:], x[..., 8:, :].mean(axis=-2))


def test_ratio_and_threshold_are_monotone() -> None:
    nb = 40
    shares = [0.01, 0.1, 0.3, 0.5, 0.9, 1.0]
    counts = [ratio_to_k(rho, nb) for rho in shares]
    assert counts == sorted(counts)
    for rho, k in zip(shares, counts, strict=True):
        kept = sum(min(R + 1, k) for R in range(nb)) / (nb * (nb + 1) / 2)
        assert abs(kept - rho) <= 3 / nb
    weights = softmax(np.random.default_rng(6).standard_normal((2, 8, 8)))
    masks = [select_threshold(weights, tau, last_dense=False) for tau in (0.0, 0.05, 0.1, 0.2)]
    for more, fewer in pairwise(masks):
        assert np.all(more | ~fewer)


def test_ties_go_to_the_first_block_and_the_diagonal_can_be_forced() -> None:
    G = np.where(np.tri(6, dtype=bool), 0.0, -1e9)[None]
    k = ratio_to_k(0.5, 6)
    M = select_ratio(G, 0.5, last_dense=False)
    np.testing.assert_array_equal(M[0], np.tri(6, dtype=bool) & (np.arange(6) < k))
    forced = select_ratio(G, 0.5, last_dense=False, force_diagonal=True)
    np.testing.assert_array_equal(forced[0], M[0] | np.eye(6, dtype=bool))
    assert not np.any(select_threshold(np.full((1, 6, 6), 1 / 6), 1 / 6, last_dense=False))


def test_last_two_block_rows_are_dense() -> None:
    q, k, v = draw(7, 18)
    M = select_threshold(np.zeros((2, 4, 5, 5)), 0.5)
    out, lse = block_sparse_attend(q, k, v, M, 4)
    expected, expected_lse = dense.attend(q, k, v, causal=True)
    np.testing.assert_allclose(out[..., 12:, :], expected[..., 12:, :], atol=1e-12)
    np.testing.assert_allclose(lse[..., 12:], expected_lse[..., 12:], atol=1e-12)
    assert not np.any(out[..., :12, :])
    assert np.all(np.isneginf(lse[..., :12]))


@small
@given(T=st.integers(1, 20), b=st.integers(1, 7), seed=st.integers(0, 99))
def test_complement_merges_to_dense_attention(T: int, b: int, seed: int) -> None:
    q, k, v = draw(seed, T)
    M = draw_mask(seed, -(-T // b))
    both = merge(*block_sparse_attend(q, k, v, M, b), *block_sparse_attend(q, k, v, ~M, b))
    for got, expected in zip(both, dense.attend(q, k, v, causal=True), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_ragged_tail_equals_padded_blocks() -> None:
    q, k, v = draw(8, 14)
    M = draw_mask(8, 4)
    padded = (np.concatenate([x, np.ones_like(x[..., :2, :])], axis=-2) for x in (q, k, v))
    out, lse = block_sparse_attend(q, k, v, M, 4)
    longer, longer_lse = block_sparse_attend(*padded, M, 4)
    np.testing.assert_allclose(out, longer[..., :14, :], atol=1e-12)
    np.testing.assert_allclose(lse, longer_lse[..., :14], atol=1e-12)


@pytest.mark.parametrize("rule", [{"tau": 0.2}, {"rho": 0.4}, {"rho": 0.4, "last_dense": False}])
def test_ragged_tail_equals_a_tail_that_pools_alike(rule: dict[str, Any]) -> None:
    """The mean of a short block behind it moves neither its largest, its least nor its mean."""
    q, k, v = draw(8, 14)
    rng = np.random.default_rng(8)
    Wq, Wk = rng.standard_normal((4, 4, 6)), rng.standard_normal((2, 12, 6))
    padded = [np.concatenate([x, x[..., [12, 13], :].mean(-2, keepdims=True).repeat(2, -2)], -2)
              for x in (q, k, v)]  # fmt: skip
    out, lse, M = attend(q, k, v, Wq, Wk, b=4, **rule)
    longer, longer_lse, longer_M = attend(*padded, Wq, Wk, b=4, **rule)
    np.testing.assert_array_equal(M, longer_M)
    np.testing.assert_allclose(out, longer[..., :14, :], atol=1e-12)
    np.testing.assert_allclose(lse, longer_lse[..., :14], atol=1e-12)


def test_outputs_are_causal_in_values() -> None:
    q, k, v = draw(9, 12)
    M = draw_mask(9, 3)
    later = v.copy()
    later[..., 7:, :] += 1.0
    out, _ = block_sparse_attend(q, k, v, M, 4)
    np.testing.assert_allclose(
        block_sparse_attend(q, k, later, M, 4)[0][..., :7, :], out[..., :7, :], atol=1e-12
    )


def test_unselected_nan_never_reaches_an_output() -> None:
    q, k, v = draw(10, 12)
    M = np.tri(3, dtype=bool) & np.ones((2, 4, 1, 1), dtype=bool)
    M[..., 1] = False
    k[..., 4:8, :], v[..., 4:8, :] = np.nan, np.inf
    assert np.all(np.isfinite(block_sparse_attend(q, k, v, M, 4)[0]))


def test_sparse_attention_gradients() -> None:
    q, k, v = (x[:1, :, :5] for x in draw(11, 5, heads=2, kv_heads=1))
    M = np.array([[[[False, False, False], [True, False, False], [True, False, True]]] * 2])
    rng = np.random.default_rng(12)
    dout, dlse = rng.standard_normal((1, 2, 5, 3)), rng.standard_normal((1, 2, 5))
    arguments = (q, k, v)

    def loss(*inputs: np.ndarray) -> float:
        out, lse = block_sparse_attend(*inputs, M, 2)
        seen = np.isfinite(lse)
        return float(np.sum(out * dout) + np.sum(np.where(seen, lse, 0.0) * dlse))

    gradients = block_sparse_attend_backward(*arguments, M, 2, dout, dlse)
    for n, gradient in enumerate(gradients):
        expected = numeric_gradient(
            lambda x, n=n: loss(*arguments[:n], x, *arguments[n + 1 :]), arguments[n]
        )
        np.testing.assert_allclose(gradient, expected, atol=1e-8)


@pytest.mark.parametrize("projected", [True, False])
def test_gate_gradients(projected: bool) -> None:
    pq, pk, Wq, Wk = draw_gate(13, 3, dg=8)
    if not projected:
        Wq, Wk = None, np.repeat(Wk, 2, axis=0)
    tables = gate_rope(3, 4, 8)
    dG = np.random.default_rng(14).standard_normal((2, 4, 3, 3))
    lower = np.tri(3, dtype=bool)

    def loss(Wq: np.ndarray | None, Wk: np.ndarray) -> float:
        return float(np.sum(np.where(lower, gate_scores(pq, pk, Wq, Wk, *tables), 0.0) * dG))

    dWq, dWk = gate_scores_backward(pq, pk, Wq, Wk, *tables, dG)
    np.testing.assert_allclose(dWk, numeric_gradient(lambda x: loss(Wq, x), Wk), atol=1e-8)
    if projected:
        np.testing.assert_allclose(dWq, numeric_gradient(lambda x: loss(x, Wk), Wq), atol=1e-8)
    else:
        assert dWq is None


def test_float32_stays_float32_and_leading_axes_are_free() -> None:
    q, k, v = (x.astype(np.float32) for x in draw(15, 13))
    rng = np.random.default_rng(16)
    Wq = rng.standard_normal((4, 4, 6)).astype(np.float32)
    Wk = rng.standard_normal((2, 12, 6)).astype(np.float32)
    copies = [x.copy() for x in (q, k, v, Wq, Wk)]
    out, lse, M = attend(q, k, v, Wq, Wk, b=4, rho=0.5)
    single, _, mask = attend(q[1], k[1], v[1], Wq, Wk, b=4, rho=0.5)
    np.testing.assert_array_equal(mask, M[1])
    np.testing.assert_allclose(single, out[1], rtol=1e-5)
    A = attend_with_block_max(q, k, v, 4)[1]
    G = gate_scores(
        pool_blocks(q, 4, ("avg",)),
        pool_blocks(k, 4, ("max", "min", "avg")),
        Wq,
        Wk,
        *gate_rope(4, 4, 6),
    )
    loss = distill_loss(G, normalise_gt(A))
    results = (out, lse, A, G, loss, distill_loss_backward(G, A, 1.0))
    assert {np.asarray(x).dtype for x in results} == {np.dtype(np.float32)}
    for x, copy in zip((q, k, v, Wq, Wk), copies, strict=True):
        np.testing.assert_array_equal(x, copy)


q, k, v = draw(0, 8)
pq, pk, Wq, Wk = draw_gate(0, 2)
tables = gate_rope(2, 4, 4)
M = np.ones((2, 4, 2, 2), dtype=bool)
weights = np.zeros((4, 2, 2))


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: pool_blocks(q, 0, ("avg",)), ValueError, "b"),
        (lambda: pool_blocks(q, 4, ()), ValueError, "kinds"),
        (lambda: pool_blocks(q, 4, ("avg", "avg")), ValueError, "kinds"),
        (lambda: pool_blocks(q, 4, ("median",)), ValueError, "kinds"),
        (lambda: gate_rope(2, 4, 5), ValueError, "dg"),
        (lambda: gate_rope(2, 0, 4), ValueError, "b"),
        (lambda: gate_scores(pq, pk[:, :, 1:], Wq, Wk, *tables), ValueError, "pk"),
        (lambda: gate_scores(pq, pk, Wq[1:], Wk, *tables), ValueError, "Wq"),
        (lambda: gate_scores(pq, pk, Wq, Wk[:, 1:], *tables), ValueError, "Wk"),
        (lambda: gate_scores(pq, pk, None, Wk, *tables), ValueError, "pq"),
        (lambda: gate_scores(pq[..., :4], pk, None, Wk, *tables), ValueError, "Wk"),
        (lambda: gate_scores(pq, pk, Wq, Wk, tables[0][:1], tables[1]), ValueError, "cos"),
        (lambda: gate_scores_backward(pq, pk, Wq, Wk, *tables, pq), ValueError, "dG"),
        (lambda: select_threshold(weights[..., 1:]), ValueError, "softmaxed"),
        (lambda: select_threshold(weights, "high"), TypeError, "tau"),
        (lambda: select_threshold(weights, np.nan), ValueError, "tau"),
        (lambda: select_ratio(weights, 0.0), ValueError, "rho"),
        (lambda: select_ratio(weights, True), TypeError, "rho"),
        (lambda: select_ratio(weights[..., 1:], 0.5), ValueError, "G"),
        (lambda: ratio_to_k(1.5, 4), ValueError, "rho"),
        (lambda: ratio_to_k(0.5, -1), ValueError, "nb"),
        (lambda: select_blocks(q, k, Wq, Wk, tau=0.1, rho=0.1), ValueError, "tau"),
        (lambda: select_blocks(q, k[..., 1:, :], Wq, Wk), ValueError, "k"),
        (lambda: attend(q, k, v[..., 1:, :], Wq, Wk), ValueError, "v"),
        (lambda: attend(q, k, v, Wq, Wk), ValueError, "Wq"),
        (lambda: block_sparse_attend(q, k, v, M[..., 1:], 4), ValueError, "M"),
        (lambda: block_sparse_attend(q, k, v, M * 1.0, 4), TypeError, "M"),
        (lambda: block_sparse_attend(q, k, v, M, 0), ValueError, "b"),
        (lambda: block_sparse_attend(q[..., 1:, :], k, v, M, 4), ValueError, "q"),
        (lambda: block_sparse_attend_backward(q, k, v, M, 4, 1.0), TypeError, "dout"),
        (lambda: attend_with_block_max(q, k, v, 0), ValueError, "b"),
        (lambda: attend_with_block_max(q[..., 1:, :], k, v, 2), ValueError, "q"),
        (lambda: normalise_gt(np.zeros(3)), ValueError, "A"),
        (lambda: distill_loss(weights, weights[..., 1:]), ValueError, "GT"),
        (lambda: distill_loss(weights[:, :0], weights[:, :0]), ValueError, "GT"),
        (lambda: distill_loss_backward(weights, [1.0], 1.0), TypeError, "GT"),
    ],
)
def test_bad_inputs(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name}: got "):
        call()
