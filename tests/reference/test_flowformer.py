"""Flowformer against outside evidence, its own properties and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.linear import flowformer
from attnspec.reference.linear.flowformer import (
    allocation,
    competition,
    competition_causal,
    conserved_flows,
    conserved_flows_causal,
    flow_attend,
    flow_attend_causal,
    flow_backward,
    flow_causal_backward,
    flow_decode_step,
    flow_features,
    flows,
    flows_causal,
)
from attnspec.reference.linear.flowformer_causal import FlowState, empty_state

quick = settings(max_examples=20, deadline=None, derandomize=True)
EXACT = 1e-10
GATE = 1 / (1 + np.exp(-1))


def tensors(
    n: int = 6, m: int = 9, d: int = 4, dv: int = 3, H: int = 4, Hk: int = 2, seed: int = 0
) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    shapes = ((2, H, n, d), (2, Hk, m, d), (2, Hk, m, dv))
    return tuple(random.standard_normal(shape) for shape in shapes)


def stages(a: np.ndarray, b: np.ndarray, causal: bool = False) -> tuple[np.ndarray, ...]:
    first, second = (flows_causal, conserved_flows_causal) if causal else (flows, conserved_flows)
    I, O = first(a, b, 0.0)
    return I, O, *second(a, b, I, O, 0.0)


@pytest.mark.parametrize("name", ["causal", "normal_cross"])
def test_it_is_the_authors(name: str, golden: Callable[[str], Any]) -> None:
    case = golden(f"flowformer__{name}")
    q, k, v, do = (case[x] for x in ("q", "k", "v", "do"))
    a, b = flow_features(q), flow_features(k)
    if name == "causal":
        got = [*flows_causal(a, b)]
        got += conserved_flows_causal(a, b, *got)
        got += [competition_causal(got[3]), allocation(got[2], 1, 1)]
        out = flow_attend_causal(q, k, v)[0]
        gradients: tuple[Any, ...] = flow_causal_backward(q, k, v, None, do)[:3]
    else:
        got = [*flows(a, b)]
        got += conserved_flows(a, b, *got)
        got += [competition(got[3]), allocation(got[2], q.shape[2], k.shape[2])]
        out, gradients = flow_attend(q, k, v), flow_backward(q, k, v, do)
    names = ("incoming", "outgoing", "conserved_incoming", "conserved_outgoing", "competition")
    for value, field in zip(got, (*names, "allocation"), strict=True):
        np.testing.assert_allclose(value, case[field], atol=EXACT, err_msg=field)
    np.testing.assert_allclose(out, case["out"], atol=EXACT)
    for gradient, field in zip(gradients, ("dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(gradient, case[field], atol=EXACT)


@quick
@given(n=st.integers(1, 7), m=st.integers(1, 7), seed=st.integers(0, 9))
def test_flows_are_conserved(n: int, m: int, seed: int) -> None:
    q, k, _ = tensors(n, m, H=2, seed=seed)
    a, b = flow_features(q), flow_features(k)
    I, O, Ih, Oh = stages(a, b)
    capacity = a @ np.swapaxes(b, -1, -2)
    np.testing.assert_allclose((capacity / O[..., None, :]).sum(-2), 1, rtol=1e-12)
    np.testing.assert_allclose((capacity / I[..., None]).sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(Ih.sum(-1), m, rtol=1e-12)
    np.testing.assert_allclose(Oh.sum(-1), n, rtol=1e-12)
    c = competition(Oh)
    np.testing.assert_allclose(c.mean(-1), 1, rtol=1e-12)
    assert np.all((c >= np.exp(-1) - 1e-12) & (c <= np.exp(1) + 1e-12))


@quick
@given(T=st.integers(1, 8), seed=st.integers(0, 9))
def test_causal_weights_and_outputs_are_bounded(T: int, seed: int) -> None:
    q, k, v = tensors(T, T, H=2, seed=seed)
    c = competition_causal(stages(flow_features(q), flow_features(k), causal=True)[3])
    assert np.all((c >= np.exp(-1) - 1e-12) & (c <= np.exp(1) + 1e-12))
    for out in (flow_attend(q, k, v, eps=0.0), flow_attend_causal(q, k, v, eps=0.0)[0]):
        assert np.abs(out).max() < np.e * np.abs(v).max()


def test_equal_tokens_give_the_mean_and_one_token_itself() -> None:
    q, k, v = tensors(H=2)
    same = flow_attend(q[:, :, :1].repeat(6, 2), k[:, :, :1].repeat(9, 2), v, eps=0.0)
    mean = np.broadcast_to(v.mean(axis=2, keepdims=True), same.shape)
    np.testing.assert_allclose(same, GATE * mean, atol=1e-12)
    first = flow_attend_causal(q, k[:, :, :6], v[:, :, :6], eps=0.0)[0][:, :, 0]
    np.testing.assert_allclose(first, GATE * v[:, :, 0], atol=1e-12)
    alone = flow_attend(q[:, :, :1], k[:, :, :1], v[:, :, :1], eps=0.0)
    np.testing.assert_allclose(alone[:, :, 0], GATE * v[:, :, 0], atol=1e-12)


def test_what_order_and_other_queries_do() -> None:
    q, k, v = tensors()
    random = np.random.default_rng(1)
    rows, keys = random.permutation(6), random.permutation(9)
    expected = flow_attend(q, k, v)
    np.testing.assert_allclose(flow_attend(q[:, :, rows], k, v), expected[:, :, rows], atol=EXACT)
    np.testing.assert_allclose(flow_attend(q, k[:, :, keys], v[:, :, keys]), expected, atol=EXACT)
    np.testing.assert_allclose(flow_attend(q, k, 3 * v), 3 * expected, atol=EXACT)
    assert np.abs(flow_attend(q[:, :, :5], k, v) - expected[:, :, :5]).max() > 1e-6


def test_causal_is_steps_and_any_split_and_not_the_other_form() -> None:
    q, k, v = tensors(9, 9)
    whole, last = flow_attend_causal(q, k, v)
    for cut in range(10):
        head, state = flow_attend_causal(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut])
        tail, end = flow_attend_causal(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], state)
        np.testing.assert_allclose(np.concatenate([head, tail], 2), whole, atol=EXACT)
        for a, b in zip(end, last, strict=True):
            np.testing.assert_allclose(a, b, atol=EXACT)
    later = (np.concatenate([x[:, :, :5], -2 * x[:, :, 5:]], 2) for x in (q, k, v))
    np.testing.assert_array_equal(flow_attend_causal(*later)[0][:, :, :5], whole[:, :, :5])
    assert np.abs(flow_attend(q, k, v)[:, :, -1] - whole[:, :, -1]).max() > 1e-4


def test_the_causal_stages_make_the_recurrence() -> None:
    q, k, v = tensors(8, 8, H=2)
    a, b = flow_features(q), flow_features(k)
    I, _, Ih, Oh = stages(a, b, causal=True)
    u = competition_causal(Oh)[..., None] * v
    scores = np.tril(a @ np.swapaxes(b, -1, -2)) / I[..., None]
    expected = allocation(Ih, 8, 8)[..., None] * (scores @ u)
    np.testing.assert_allclose(flow_attend_causal(q, k, v, eps=0.0)[0], expected, atol=EXACT)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("clamp", [(-1.0, 1.0), None])
def test_padding_changes_nothing(eps: float, clamp: Any) -> None:
    q, k, v = tensors()
    keys, rows = np.arange(9) % 3 != 1, np.arange(6) % 2 == 0
    options: dict[str, Any] = {"eps": eps, "clamp": clamp}
    real = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
    expected = flow_attend(*real, **options)
    do = np.random.default_rng(2).standard_normal((2, 4, 6, 3))
    alone = flow_backward(*real, do[:, :, rows], **options)
    q = np.where(rows[:, None], q, np.nan)
    k, v = (np.where(keys[:, None], x, np.nan) for x in (k, v))
    options |= {"key_mask": np.stack([keys] * 2), "query_mask": np.stack([rows] * 2)}
    got = flow_attend(q, k, v, **options)
    np.testing.assert_allclose(got[:, :, rows], expected, atol=EXACT)
    assert np.all(got[:, :, ~rows] == 0)
    for gradient, other, kept in zip(
        flow_backward(q, k, v, do, **options), alone, (rows, keys, keys), strict=True
    ):
        np.testing.assert_allclose(gradient[:, :, kept], other, atol=EXACT)
        assert np.all(gradient[:, :, ~kept] == 0)
    nothing = flow_attend(q, k, v, eps=eps, key_mask=np.zeros((2, 9), bool))
    assert np.all(nothing[:, :, rows] == 0)


def test_doubling_the_sources() -> None:
    q, k, v = tensors(H=2)
    a, b = flow_features(q), flow_features(k)
    I, O, Ih, Oh = stages(a, b)
    I2, O2, Ih2, Oh2 = stages(a, np.concatenate([b, b], 2))
    np.testing.assert_allclose(I2, 2 * I)
    np.testing.assert_allclose(O2[..., :9], O)
    np.testing.assert_allclose(Ih2, 2 * Ih)
    np.testing.assert_allclose(Oh2[..., :9], Oh / 2)
    np.testing.assert_allclose(allocation(Ih2, 6, 18), allocation(Ih, 6, 9), rtol=1e-12)
    twice = flow_attend(q, np.concatenate([k, k], 2), np.concatenate([v, v], 2))
    assert np.abs(twice - flow_attend(q, k, v)).max() > 1e-4
    one = (q, k[:, :, :1], v[:, :, :1])
    copies = (q, *(np.repeat(x, 5, axis=2) for x in one[1:]))
    once, often = (flow_attend(*x, eps=0.0) for x in (one, copies))
    np.testing.assert_allclose(often, once, atol=1e-12)


def test_one_channel_gives_all_sinks_the_same_share() -> None:
    q, k, v = tensors(d=1, H=2)
    a, b = flow_features(q), flow_features(k)
    _, _, Ih, Oh = stages(a, b)
    share = np.swapaxes(b / b.sum(axis=2, keepdims=True), -1, -2)
    expected = allocation(Ih, 6, 9)[..., None] * (share @ (competition(Oh)[..., None] * v))
    np.testing.assert_allclose(flow_attend(q, k, v, eps=0.0), expected, atol=1e-12)


def numerical(function: Callable[..., np.ndarray], x: np.ndarray, do: np.ndarray) -> np.ndarray:
    gradient, h = np.zeros_like(x), 1e-6
    for place in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[place] = h
        gradient[place] = np.sum(do * (function(x + step) - function(x - step))) / (2 * h)
    return gradient


@pytest.mark.parametrize("kind", ["sigmoid", "relu"])
@pytest.mark.parametrize("clamp", [(-1.0, 1.0), (-1.0, 0.6), None])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_slopes(kind: str, clamp: Any, causal: bool) -> None:
    inputs = [x[:1] for x in tensors(3, 3, d=3, dv=2, H=2, Hk=1)]
    options: dict[str, Any] = {"kind": kind, "clamp": clamp, "eps": 0.05}
    do = np.random.default_rng(5).standard_normal((1, 2, 3, 2))
    if causal:
        past = [x[:1] for x in tensors(2, 2, d=3, dv=2, H=2, Hk=1, seed=1)]
        _, state = flow_attend_causal(*past, **options)
        gradients: tuple[Any, ...] = flow_causal_backward(*inputs, state, do, **options)[:3]
    else:
        gradients = flow_backward(*inputs, do, **options)
    for n, got in enumerate(gradients):

        def along(x: np.ndarray, n: int = n) -> np.ndarray:
            given = (*inputs[:n], x, *inputs[n + 1 :])
            if causal:
                return flow_attend_causal(*given, state, **options)[0]
            return flow_attend(*given, **options)

        np.testing.assert_allclose(got, numerical(along, inputs[n], do), atol=1e-6)


@pytest.mark.parametrize("kind", ["sigmoid", "relu"])
@pytest.mark.parametrize("clamp", [(-1.0, 0.6), None])
@pytest.mark.parametrize("T", [0, 1, 3])
def test_gradients_through_states_are_slopes(T: int, clamp: Any, kind: str) -> None:
    """Every part of the state before has one, from every part of the state behind."""
    options: dict[str, Any] = {"kind": kind, "clamp": clamp, "eps": 0.05}
    past = [x[:1] for x in tensors(2, 2, d=3, dv=2, H=2, Hk=1, seed=1)]
    state = flow_attend_causal(*past, **options)[1]
    inputs = [*(x[:1] for x in tensors(T, T, d=3, dv=2, H=2, Hk=1)), *state]
    out, last = flow_attend_causal(*inputs[:3], state, **options)
    random = np.random.default_rng(5)
    ups = [random.standard_normal(x.shape) for x in (out, *last)]

    def total(*given: np.ndarray) -> np.ndarray:
        out, last = flow_attend_causal(*given[:3], FlowState(*given[3:]), **options)
        pairs = zip(ups, (out, *last), strict=True)
        return np.array(sum(np.sum(up * x) for up, x in pairs))

    *tokens, before = flow_causal_backward(*inputs[:3], state, *ups, **options)
    for n, got in enumerate((*tokens, *before)):

        def along(x: np.ndarray, n: int = n) -> np.ndarray:
            return total(*inputs[:n], x, *inputs[n + 1 :])

        expected = numerical(along, inputs[n], np.ones(()))
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_no_tokens() -> None:
    q, k, v = tensors(0, 3)
    assert flow_attend(q, k, v).shape == (2, 4, 0, 3)
    q, k, v = tensors(3, 0)
    assert np.all(flow_attend(q, k, v) == 0)
    out, state = flow_attend_causal(q[:, :, :0], k, v)
    assert out.shape == (2, 4, 0, 3)
    assert np.all(state.N == 0)


def test_float32_stays_float32() -> None:
    q, k, v = (x.astype(np.float32) for x in tensors(9, 9))
    out, state = flow_attend_causal(q, k, v)
    *tokens, before = flow_causal_backward(q, k, v, state, out, *state)
    every = (out, *state, flow_attend(q, k, v), *flow_backward(q, k, v, out), *tokens, *before)
    assert {x.dtype for x in every} == {np.dtype(np.float32)}


q0, k0, v0 = tensors(9, 9)
a0 = flow_features(q0)
state0 = empty_state(q0, v0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: flow_attend(q0, k0[..., :2], v0), "k"),
        (lambda: flow_attend(q0, k0, v0, kind="elu"), "kind"),
        (lambda: flow_attend(q0, k0, v0, clamp=1.0), "clamp"),
        (lambda: flow_attend(q0, k0, v0, clamp=(1.0, -1.0)), "clamp"),
        (lambda: flow_attend(q0, k0, v0, eps=-1.0), "eps"),
        (lambda: flow_attend(q0, k0, v0, key_mask=np.ones((2, 9))), "key_mask"),
        (lambda: flow_attend(q0, k0, v0, query_mask=np.ones((2, 3), bool)), "query_mask"),
        (lambda: flow_backward(q0, k0, v0, v0), "dout"),
        (lambda: flow_causal_backward(q0, k0, v0, None, q0, dN=q0), "dN"),
        (lambda: flow_attend_causal(q0[:, :, :2], k0, v0), "q"),
        (lambda: flow_attend_causal(q0, k0, v0, (1, 2)), "state"),
        (lambda: flow_attend_causal(q0, k0, v0, state0._replace(N=None)), "state.N"),
        (lambda: flow_decode_step(state0, q0, k0, v0), "q"),
        (lambda: flow_features(1.0), "x"),
        (lambda: flows(a0, a0[..., :2]), "b"),
        (lambda: flows_causal(a0, a0[:, :, :2]), "b"),
        (lambda: conserved_flows(a0, a0, a0, a0), "I"),
        (lambda: competition(q0[..., 0], mask=np.ones((2, 3), bool)), "mask"),
        (lambda: allocation(q0[..., 0], -1, 2), "n"),
        (lambda: allocation(q0[..., 0], 1, 2.5), "m"),
    ],
)
def test_bad_input_is_refused_by_name(call: Callable[[], Any], name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
        call()


def test_the_record() -> None:
    assert flowformer.MECHANISM.slug == "flowformer"
