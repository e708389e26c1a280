"""Mixture-of-Head attention: the authors' numbers, the paper's properties, gradients, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.dense import attention as dense
from attnspec.reference.heads.moh import moh_attend, moh_backward, route
from attnspec.reference.heads.moh_heads import (
    head_outputs,
    head_outputs_backward,
    mix_heads,
    mix_heads_backward,
    step,
)
from attnspec.reference.heads.moh_routing import (
    combine_gates,
    combine_gates_backward,
    group_weights,
    group_weights_backward,
    routed_gates,
    routed_gates_backward,
    routed_probs,
    routed_probs_backward,
    shared_gates,
    shared_gates_backward,
    topk_mask,
)
from attnspec.reference.heads.moh_training import (
    load_balance_loss,
    load_balance_loss_backward,
    norm_probs,
    norm_probs_backward,
    norm_router,
    straight_through,
    straight_through_backward,
)
from attnspec.reference.primitives.rope import rope
from attnspec.reference.primitives.softmax import softmax

Golden = Callable[[str], dict[str, Any]]
quick = settings(max_examples=20, deadline=None, derandomize=True)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def heads_of(x: np.ndarray, W: np.ndarray, b: np.ndarray, dh: int) -> list[np.ndarray]:
    """q, k and v (B, H, T, dh) from one projection."""
    y = (x @ W.T + b).reshape(*x.shape[:2], 3, -1, dh)
    return list(np.transpose(y, (2, 0, 3, 1, 4)))


@pytest.mark.parametrize("name", ["moh__dit_h6_s2_r3", "moh__dit_all_shared_h4"])
def test_the_authors_numbers(golden: Golden, name: str) -> None:
    case = golden(name)
    meta, x = case["meta"], case["x"]
    k, Wr, Ws, W0 = meta["routed_head"], *(case.get(f"{w}_weight") for w in ("wg", "wg_1", "wg_0"))
    gates = route(x, Wr, Ws, W0, k)
    np.testing.assert_allclose(gates, case["gates"], atol=1e-12)
    q, key, v = heads_of(x, case["qkv_weight"], case["qkv_bias"], meta["head_dim"])
    h = head_outputs(q, key, v)
    np.testing.assert_allclose(np.swapaxes(h, 1, 2), case["head_out"], atol=1e-12)
    Wo, bo = case["proj_weight"], case["proj_bias"]
    np.testing.assert_allclose(moh_attend(q, key, v, gates, Wo, bo), case["out"], atol=1e-12)

    dout = case["dout"]
    *dqkv, dgates, dWo, dbo = moh_backward(q, key, v, gates, Wo, bo, dout)
    np.testing.assert_allclose(dWo, case["grad_proj_weight"], atol=1e-12)
    np.testing.assert_allclose(dbo, case["grad_proj_bias"], atol=1e-12)
    dy = np.transpose(np.stack(dqkv), (1, 3, 0, 2, 4)).reshape(*x.shape[:2], -1)
    np.testing.assert_allclose(np.einsum("bto,btd->od", dy, x), case["grad_qkv_weight"], atol=1e-12)
    np.testing.assert_allclose(dy.sum((0, 1)), case["grad_qkv_bias"], atol=1e-12)
    dx, routers = route_backward(x, Wr, Ws, W0, k, dgates)
    np.testing.assert_allclose(dx + dy @ case["qkv_weight"], case["grad_x"], atol=1e-12)
    for weight, gradient in routers.items():
        np.testing.assert_allclose(gradient, case[f"grad_{weight}_weight"], atol=1e-12)


def route_backward(
    x: np.ndarray, Wr: Any, Ws: Any, W0: Any, k: int, dgates: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The steps' gradients one after the other."""
    if Wr is None:
        dx, dWs = shared_gates_backward(x, Ws, dgates)
        return dx, {"wg_1": dWs}
    p = routed_probs(x, Wr)
    mask = topk_mask(p, k)
    gs, gr, a = shared_gates(x, Ws), routed_gates(p, mask, k), group_weights(x, W0)
    dgs, dgr, da = combine_gates_backward(gs, gr, a, dgates)
    parts = {
        "wg": routed_probs_backward(x, Wr, routed_gates_backward(p, mask, k, dgr)),
        "wg_1": shared_gates_backward(x, Ws, dgs),
        "wg_0": group_weights_backward(x, W0, da),
    }
    return sum(dx for dx, _ in parts.values()), {name: dW for name, (_, dW) in parts.items()}


def test_the_authors_balance(golden: Golden) -> None:
    case = golden("moh__dit_h6_s2_r3")
    p = routed_probs(case["x"], case["wg_weight"])
    mask = topk_mask(p, 3)
    np.testing.assert_allclose(load_balance_loss(p, mask), case["aux_loss"], atol=1e-12)
    dp = load_balance_loss_backward(p, mask, np.array(1.0))
    _, dWr = routed_probs_backward(case["x"], case["wg_weight"], dp)
    np.testing.assert_allclose(dWr, case["aux_loss_dwg"], atol=1e-12)


def test_the_authors_routing_by_norms(golden: Golden) -> None:
    case = golden("moh__llama_h4_kv4")
    x = case["x"]
    q, k, v = (
        np.swapaxes((x @ case[f"{name}_proj_weight"].T).reshape(1, 6, 4, 4), 1, 2) for name in "qkv"
    )
    np.testing.assert_allclose(np.swapaxes(q, 1, 2), case["q_unrotated"], atol=2e-6)
    gates = norm_router(q, 2, 1)
    np.testing.assert_array_equal(gates, case["head_mask"])
    at = np.arange(6)
    q, k = rope(q, at).astype(q.dtype), rope(k, at).astype(k.dtype)
    np.testing.assert_array_equal(norm_router(q, 2, 1), gates)
    weights = softmax(dense.score(q, k), dense.visible(6, 6, causal=True))
    np.testing.assert_allclose(weights, case["attn_weights"], atol=2e-6)
    h = head_outputs(q, k, v, causal=True)
    np.testing.assert_allclose(np.swapaxes(h, 1, 2), case["head_out"], atol=2e-6)
    out = moh_attend(q, k, v, gates, case["o_proj_weight"], causal=True)
    np.testing.assert_allclose(out, case["out"], atol=2e-6)


def test_zero_routers_and_all_heads_are_dense_attention() -> None:
    x, q, k, v, Wo = draw(2, 5, 4), *(draw(2, 6, 5, 3, seed=s) for s in range(3)), draw(4, 18)
    zero = np.zeros((4, 4))
    gates = route(x, zero, zero[:2], zero[:2], 4)
    np.testing.assert_allclose(gates, 1, atol=1e-15)
    np.testing.assert_array_equal(norm_router(q, 2, 4), 1)
    expected = np.swapaxes(dense.attend(q, k, v, causal=True)[0], 1, 2).reshape(2, 5, 18) @ Wo.T
    for g in (gates, norm_router(q, 2, 4)):
        np.testing.assert_allclose(moh_attend(q, k, v, g, Wo, causal=True), expected, atol=1e-12)


@quick
@given(hs=st.integers(0, 3), hr=st.integers(0, 5), k=st.integers(0, 5), seed=st.integers(0, 99))
def test_how_many_gates_and_how_large(hs: int, hr: int, k: int, seed: int) -> None:
    k = min(k, hr)
    if hs + k == 0:
        return
    x = draw(2, 7, 4, seed=seed)
    Wr = draw(hr, 4, seed=seed) if hr else None
    Ws = draw(hs, 4, seed=seed) if hs > 1 else None
    W0 = draw(2, 4, seed=seed) if hs else None
    gates = route(x, Wr, Ws, W0, k)
    assert gates.shape == (2, 7, hs + hr)
    np.testing.assert_array_equal((gates > 0).sum(-1), hs + k)
    total = gates.sum(-1)
    if hs and k:
        assert W0 is not None
        a = group_weights(x, W0)
        np.testing.assert_allclose(total, a @ np.array([hs, k]), atol=1e-12)
        assert np.all((total > 2 * min(hs, k) - 1e-9) & (total < 2 * max(hs, k) + 1e-9))
    else:
        np.testing.assert_allclose(total, hs + k, atol=1e-12)
    order = np.random.default_rng(seed).permutation(7)
    np.testing.assert_allclose(route(x[:, order], Wr, Ws, W0, k), gates[:, order], atol=1e-12)
    np.testing.assert_allclose(route(x[:, 3:4], Wr, Ws, W0, k), gates[:, 3:4], atol=1e-12)
    if hr:
        norms = norm_router(np.swapaxes(draw(2, 7, hs + hr, 3, seed=seed), 1, 2), hs, k)
        np.testing.assert_array_equal(norms.sum(-1), hs + k)
        np.testing.assert_array_equal(norms[..., :hs], 1)


def test_groups_that_are_switched_off() -> None:
    x, Wr, Ws, W0 = draw(5, 4), draw(4, 4), draw(2, 4), draw(2, 4, seed=1)
    p = routed_probs(x, Wr)
    routed = routed_gates(p, topk_mask(p, 3), 3)
    np.testing.assert_array_equal(route(x, Wr, None, None, 3), routed)
    np.testing.assert_array_equal(route(x, None, Ws, None, 0), shared_gates(x, Ws))
    first = route(x, Wr, Ws, None, 0)
    np.testing.assert_array_equal(first[:, :2], shared_gates(x, Ws))
    np.testing.assert_array_equal(first[:, 2:], 0)
    a = group_weights(x, W0)
    single = route(x, Wr, None, W0, 3)
    np.testing.assert_array_equal(single, route(x, Wr, Ws[:1], W0, 3))
    np.testing.assert_array_equal(single, np.concatenate([a[:, :1], a[:, 1:] * routed], axis=-1))
    np.testing.assert_array_equal(route(x, None, None, W0, 0), 1)


def test_a_probability_that_underflows_switches_its_head_off() -> None:
    Wr = np.array([[0.0], [1.0], [2.0]])
    gates = route(np.array([[1000.0], [1.0]]), Wr, None, None, 2)
    np.testing.assert_array_equal(gates != 0, [[False, False, True], [False, True, True]])
    np.testing.assert_allclose(gates.sum(-1), 2)
    tiny = np.array([[0.0, 1e-30]])
    gates = routed_gates(tiny, np.array([[False, True]]), 1)
    np.testing.assert_allclose(gates, tiny / np.finfo(float).eps)


def test_without_rescaling_gates_are_the_probabilities() -> None:
    x, Wr, Ws, W0 = draw(5, 4), draw(4, 4), draw(2, 4), draw(2, 4, seed=1)
    gates = route(x, Wr, Ws, W0, 2, rescale=False)
    p, a = routed_probs(x, Wr), group_weights(x, W0, rescale=False)
    np.testing.assert_allclose(a.sum(-1), 1)
    np.testing.assert_allclose(gates[:, 2:], np.where(topk_mask(p, 2), a[:, 1:] * p, 0))
    np.testing.assert_allclose(gates[:, :2].sum(-1), a[:, 0])
    mask = topk_mask(p, 2)
    np.testing.assert_allclose(
        4 * load_balance_loss(p, mask, rescale=False), load_balance_loss(p, mask)
    )


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    x = np.concatenate([draw(5, 3), np.ones((5, 1))], axis=-1)
    W = draw(4, 4)
    moved = W + np.array([0, 0, 0, 3.0])
    np.testing.assert_allclose(routed_probs(x, moved), routed_probs(x, W), atol=1e-12)
    np.testing.assert_allclose(shared_gates(x, moved), shared_gates(x, W), atol=1e-12)
    np.testing.assert_allclose(group_weights(x, moved[:2]), group_weights(x, W[:2]), atol=1e-12)


def test_only_the_order_of_norms_counts() -> None:
    q = draw(2, 6, 5, 4)
    c = np.exp(draw(2, 1, 5, 1))
    scaled = np.concatenate([q[:, :2], c * q[:, 2:]], axis=1)
    np.testing.assert_array_equal(norm_router(scaled, 2, 2), norm_router(q, 2, 2))
    g = norm_probs(q, 2)
    np.testing.assert_allclose(norm_probs(scaled, 2), g, atol=1e-12)
    np.testing.assert_array_equal(topk_mask(g, 2), norm_router(q, 2, 2)[..., 2:] == 1)
    same = np.repeat(q[:, :1], 6, axis=1)
    np.testing.assert_array_equal(norm_router(same, 2, 2)[..., 2:], [[[1, 1, 0, 0]] * 5] * 2)
    np.testing.assert_allclose(norm_probs(same, 2), 0.25)
    np.testing.assert_array_equal(norm_probs(q, 5), 1)


def test_unselected_values_reach_nothing() -> None:
    q, k, v = (draw(1, 4, 5, 3, seed=s) for s in range(3))
    active = norm_router(q, 1, 1) != 0
    before = head_outputs(q, k, v, active)
    assert np.all(before[~np.swapaxes(active, 1, 2)] == 0)
    full = head_outputs(q, k, v)
    rows = np.swapaxes(active, 1, 2)[..., None]
    np.testing.assert_allclose(before, np.where(rows, full, 0), atol=1e-12)
    v[:, 2] += 1
    changed = np.any(head_outputs(q, k, v, active) != before, axis=-1)
    np.testing.assert_array_equal(changed[:, 2], active[..., 2])
    assert not changed[:, [0, 1, 3]].any()
    q[~np.swapaxes(active, 1, 2)] = np.nan
    dout = np.ones_like(before)
    assert all(np.isfinite(x).all() for x in head_outputs_backward(q, k, v, active, dout))


def test_routed_heads_may_change_places() -> None:
    x, Wr, Ws, W0 = draw(1, 5, 4), draw(4, 4), draw(2, 4), draw(2, 4, seed=1)
    q, k, v = (draw(1, 6, 5, 3, seed=s) for s in range(3))
    Wo = draw(4, 18)
    order = np.array([2, 0, 3, 1])
    heads = np.concatenate([[0, 1], 2 + order])
    columns = Wo.reshape(4, 6, 3)[:, heads].reshape(4, 18)
    moved = moh_attend(
        q[:, heads], k[:, heads], v[:, heads], route(x, Wr[order], Ws, W0, 2), columns
    )
    np.testing.assert_allclose(moved, moh_attend(q, k, v, route(x, Wr, Ws, W0, 2), Wo), atol=1e-12)


@quick
@given(hr=st.integers(1, 6), k=st.integers(0, 6), seed=st.integers(0, 99))
def test_balance(hr: int, k: int, seed: int) -> None:
    k = min(k, hr)
    p = routed_probs(draw(2, 5, 4, seed=seed), draw(hr, 4, seed=seed))
    mask = topk_mask(p, k)
    loss = load_balance_loss(p, mask)
    assert -1e-12 <= loss <= hr * min(1, k) + 1e-12
    random = np.random.default_rng(seed)
    order, tokens = random.permutation(hr), random.permutation(5)
    moved = [y[..., order][:, tokens] for y in (p, mask)]
    np.testing.assert_allclose(load_balance_loss(*moved), loss, atol=1e-12)
    uniform = np.full_like(p, 1 / hr)
    np.testing.assert_allclose(load_balance_loss(uniform, mask), k, atol=1e-12)
    one = np.zeros_like(p)
    one[..., 0] = 1
    np.testing.assert_allclose(load_balance_loss(one, one > 0), hr)
    valid = random.random((2, 5)) < 0.7
    padded = np.where(valid[..., None], p, np.nan)
    expected = load_balance_loss(p[valid][None], mask[valid][None])
    np.testing.assert_allclose(load_balance_loss(padded, mask, valid=valid), expected, atol=1e-12)
    assert load_balance_loss(p, mask, valid=np.zeros((2, 5), bool)) == 0


X, W, M = draw(2, 3, 4), draw(3, 4), np.array([True, True, False])
P = routed_probs(X, W)
QKV = (draw(2, 4, 3, 2), draw(2, 2, 5, 2), draw(2, 2, 5, 3))
ACTIVE = np.random.default_rng(6).random((2, 3, 4)) < 0.6
MASK = {"causal": True, "key_mask": np.random.default_rng(7).random((2, 5)) < 0.7}
GATES = np.where(ACTIVE, np.exp(draw(2, 3, 4)), 0)
MASKED = np.broadcast_to(M, P.shape)
DIFFERENTIABLE: tuple[tuple[Any, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], ...] = (
    (routed_probs, routed_probs_backward, (0, 1), (X, W), {}),
    (routed_gates, routed_gates_backward, (0,), (P, MASKED, 2), {}),
    (routed_gates, routed_gates_backward, (0,), (P, MASKED, 2), {"rescale": False}),
    (shared_gates, shared_gates_backward, (0, 1), (X, W), {}),
    (shared_gates, shared_gates_backward, (0, 1), (X, W), {"rescale": False}),
    (group_weights, group_weights_backward, (0, 1), (X, W[:2]), {}),
    (combine_gates, combine_gates_backward, (0, 1, 2), (P, X, X[..., :2]), {}),
    (head_outputs, head_outputs_backward, (0, 1, 2), (*QKV, ACTIVE), MASK),
    (head_outputs, head_outputs_backward, (0, 1, 2), (*QKV, None), {}),
    (
        mix_heads,
        mix_heads_backward,
        (0, 1, 2, 3),
        (GATES, draw(2, 4, 3, 3), draw(5, 12), draw(5)),
        {},
    ),
    (moh_attend, moh_backward, (0, 1, 2, 4, 5), (*QKV, GATES, draw(5, 12), draw(5)), MASK),
    (norm_probs, norm_probs_backward, (0,), (draw(2, 5, 3, 2), 1), {}),
    (
        load_balance_loss,
        load_balance_loss_backward,
        (0,),
        (P, MASKED),
        {"valid": np.array([[True, False, True], [True, True, False]])},
    ),
)


@pytest.mark.parametrize(("function", "gradient", "places", "args", "options"), DIFFERENTIABLE)
def test_gradients_are_finite_differences(
    function: Any,
    gradient: Any,
    places: tuple[int, ...],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    dout = np.asarray(draw(*np.shape(function(*args, **options)), seed=9))
    got = gradient(*args, dout, **options)
    got = got if isinstance(got, tuple) else (got,)
    if len(got) > len(places):
        # A gate that is 0 switches its head off: only the others move by a little.
        got = tuple(g for n, g in enumerate(got) if n in places)
    for place, dx in zip(places, got, strict=True):
        direction = draw(*args[place].shape, seed=8)
        sides = [
            np.sum(
                dout
                * function(
                    *(x + s * 1e-6 * direction if n == place else x for n, x in enumerate(args)),
                    **options,
                )
            )
            for s in (1, -1)
        ]
        np.testing.assert_allclose(np.sum(dx * direction), (sides[0] - sides[1]) / 2e-6, atol=1e-6)


def test_the_gradient_of_gates_is_that_of_the_active_ones() -> None:
    Wo, dout = draw(5, 12), draw(2, 3, 5, seed=3)
    dgates = moh_backward(*QKV, GATES, Wo, None, dout, **MASK)[3]
    assert np.all(dgates[~ACTIVE] == 0)
    direction = np.where(ACTIVE, draw(2, 3, 4, seed=4), 0)
    sides = [
        np.sum(dout * moh_attend(*QKV, GATES + s * 1e-6 * direction, Wo, **MASK)) for s in (1, -1)
    ]
    np.testing.assert_allclose(np.sum(dgates * direction), (sides[0] - sides[1]) / 2e-6, atol=1e-6)


def test_the_straight_through_gate_hands_its_gradient_on() -> None:
    gates = straight_through(P, MASKED)
    np.testing.assert_array_equal(gates, MASKED * 1.0)
    np.testing.assert_array_equal(straight_through_backward(P, MASKED, X[..., :3]), X[..., :3])


def test_decoding_is_prefill() -> None:
    q, k, v = (draw(2, h, 7, 3, seed=h) for h in (4, 2, 2))
    active = norm_router(q, 1, 1) != 0
    state = dense.init_state(k, v)
    outs = []
    for first, last in ((0, 1), (1, 4), (4, 7)):
        new = (x[:, :, first:last] for x in (q, k, v))
        h, state = step(state, *new, active[:, first:last])
        outs.append(h)
    np.testing.assert_allclose(
        np.concatenate(outs, axis=2), head_outputs(q, k, v, active, causal=True), atol=1e-12
    )
    np.testing.assert_array_equal(state.k, k)


def test_leading_axes_are_free_float32_stays_and_inputs_too() -> None:
    args = [x.astype(np.float32) for x in (*QKV, GATES, draw(5, 12), draw(5))]
    copies = [x.copy() for x in args]
    out = moh_attend(*args)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(moh_attend(*(x[0] for x in args[:4]), *args[4:]), out[0])
    assert all(g.dtype == np.float32 for g in moh_backward(*args, out))
    for x, copy in zip(args, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
    x, W32 = X.astype(np.float32), W.astype(np.float32)
    gates = route(x, W32, W32, W32[:2], 2)
    assert gates.dtype == norm_probs(args[0], 1).dtype == np.float32
    np.testing.assert_array_equal(route(x[:, None], W32, W32, W32[:2], 2)[:, 0], gates)


Q, B3 = np.zeros((4, 3, 2)), np.ones((3, 4), bool)
BAD: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], type, str], ...] = (
    (routed_probs, (X, W[:, :3]), {}, ValueError, "Wr"),
    (routed_probs, (X, W[None]), {}, ValueError, "Wr"),
    (routed_probs, (X, W[:0]), {}, ValueError, "Wr"),
    (routed_probs, (X.astype(int), W), {}, TypeError, "x"),
    (routed_probs, (X, W.astype(np.float32)), {}, TypeError, "Wr"),
    (shared_gates, (X, W[0]), {}, ValueError, "Ws"),
    (group_weights, (X, W), {}, ValueError, "W0"),
    (topk_mask, (P, 4), {}, ValueError, "k"),
    (topk_mask, (P, 1.0), {}, TypeError, "k"),
    (topk_mask, (None, 1), {}, TypeError, "p"),
    (routed_gates, (P, MASKED, -1), {}, ValueError, "k"),
    (routed_gates, (P, M, 1), {}, ValueError, "mask"),
    (routed_gates, (P, P, 1), {}, TypeError, "mask"),
    (combine_gates, (None, None, None), {}, ValueError, "gs"),
    (combine_gates, (P, P, None), {}, TypeError, "a"),
    (combine_gates, (P, P[:1], P[..., :2]), {}, ValueError, "gr"),
    (combine_gates, (P, P, P), {}, ValueError, "a"),
    (combine_gates, (P, P.astype(np.float32), P[..., :2]), {}, TypeError, "gr"),
    (route, (X, None, W, None, 1), {}, ValueError, "k"),
    (route, (X, W, None, None, 0), {}, ValueError, "k"),
    (route, (X, W, W, None, 1), {}, ValueError, "W0"),
    (head_outputs, (Q, Q[:3], Q[:3]), {}, ValueError, "k"),
    (head_outputs, (Q, Q, Q, B3.T), {}, ValueError, "active"),
    (head_outputs, (Q, Q, Q, B3 * 1.0), {}, TypeError, "active"),
    (head_outputs, (Q, Q, Q), {"key_mask": np.ones(3)}, TypeError, "key_mask"),
    (head_outputs, (Q, Q, Q), {"key_mask": np.ones(4, bool)}, ValueError, "key_mask"),
    (head_outputs_backward, (Q, Q, Q, None, None), {}, TypeError, "dout"),
    (mix_heads, (B3.T * 1.0, Q, np.zeros((1, 8))), {}, ValueError, "gates"),
    (mix_heads, (B3 * 1.0, Q, np.zeros((1, 7))), {}, ValueError, "Wo"),
    (mix_heads, (B3 * 1.0, Q, np.zeros((1, 1, 8))), {}, ValueError, "Wo"),
    (mix_heads, (B3 * 1.0, Q, np.zeros((1, 8)), np.zeros(2)), {}, ValueError, "bo"),
    (mix_heads, (B3 * 1.0, Q, np.zeros((1, 8)), np.zeros(1, int)), {}, TypeError, "bo"),
    (mix_heads, (B3, Q, np.zeros((1, 8))), {}, TypeError, "gates"),
    (moh_attend, (Q, Q, Q, B3, np.zeros((1, 8))), {}, TypeError, "gates"),
    (moh_backward, (Q, Q, Q, None, np.zeros((1, 8)), None, Q[0]), {}, TypeError, "gates"),
    (norm_probs, (Q, 4), {}, ValueError, "hs"),
    (norm_router, (Q, -1, 1), {}, ValueError, "hs"),
    (norm_router, (Q, True, 1), {}, TypeError, "hs"),
    (norm_router, (Q, 2, 3), {}, ValueError, "k"),
    (norm_router, (Q, 0, 0), {}, ValueError, "k"),
    (norm_router, (Q[0], 0, 1), {}, ValueError, "q_unrot"),
    (straight_through, (P, M), {}, ValueError, "mask"),
    (load_balance_loss, (P, MASKED[0]), {}, ValueError, "mask"),
    (load_balance_loss, (P, MASKED), {"valid": M}, ValueError, "valid"),
    (load_balance_loss, (P, MASKED), {"valid": P}, TypeError, "valid"),
    (step, (dense.State(Q, Q), Q, Q[:, :1], Q[:, :1]), {}, ValueError, "k"),
    (step, (dense.State(Q[:2], Q), Q, Q, Q), {}, ValueError, "state.k"),
    (step, (dense.State(Q, Q), Q, Q, Q, B3.T), {}, ValueError, "active"),
)


@pytest.mark.parametrize(("function", "args", "options", "error", "name"), BAD)
def test_bad_input_is_named(
    function: Any, args: tuple[Any, ...], options: dict[str, Any], error: type, name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        function(*args, **options)
