"""LightNet over packed sequences, and gradients of its rule and its encodings."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from attnspec.reference.linear.lightnet import (
    additive_gates,
    additive_rule,
    additive_rule_backward,
    lightnet_causal,
    lightnet_causal_backward,
    lightnet_packed,
    lightnet_packed_backward,
    md_lrpe,
    md_lrpe_backward,
    md_tpe,
    md_tpe_backward,
    tpe,
    tpe_backward,
    vector_decay_attend,
    vector_decay_backward,
    vector_decay_packed,
    vector_decay_packed_backward,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
OFFSETS = np.array([0, 0, 4, 5, 9, 9])
SEQUENCES = [slice(first, last) for first, last in pairwise(OFFSETS)]


def tensors(H: int = 4, Hk: int = 2, seed: int = 0) -> tuple[np.ndarray, ...]:
    """q, k, v of all sequences; a token that is none."""
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal(shape) for shape in ((H, 9, 3), (Hk, 9, 3), (Hk, 9, 2)))
    k[:, 4] = -np.inf
    return q, k, v


def states(H: int = 4) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    z = random.standard_normal((5, H, 3))
    z[0, 0, 0] = z[3, 1, 1] = -np.inf
    return np.where(np.isneginf(z)[..., None], 0, random.standard_normal((5, H, 3, 2))), z


def same(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("started", [False, True])
def test_packed_sequences_are_alone(started: bool) -> None:
    q, k, v = tensors()
    state = states() if started else None
    o, (S, z) = lightnet_packed(q, k, v, OFFSETS, state, scale=0.5)
    random = np.random.default_rng(2)
    do, dS, dz = (random.standard_normal(x.shape) for x in (o, S, z))
    *tokens, before = lightnet_packed_backward(q, k, v, OFFSETS, state, do, dS, dz, scale=0.5)
    for n, rows in enumerate(SEQUENCES):
        own = [x[:, rows] for x in (q, k, v)]
        first = None if state is None else (state[0][n], state[1][n])
        one, after = lightnet_causal(*own, first, scale=0.5)
        same((o[:, rows], S[n], z[n]), (one, *after))
        *gradients, start = lightnet_causal_backward(
            *own, first, do[:, rows], dS[n], dz[n], scale=0.5
        )
        same([x[:, rows] for x in tokens], gradients)
        same([x[n] for x in before], start)


@pytest.mark.parametrize("started", [False, True])
def test_packed_scans_are_alone(started: bool) -> None:
    q, k, v = tensors(2)
    kbar, log_decay, _ = additive_gates(k)
    S0 = states(2)[0] if started else None
    o, S = vector_decay_packed(q, kbar, v, log_decay, OFFSETS, S0, scale=0.5)
    random = np.random.default_rng(2)
    do, dS = random.standard_normal(o.shape), random.standard_normal(S.shape)
    inputs = (q, kbar, v, log_decay)
    *tokens, dS0 = vector_decay_packed_backward(*inputs, OFFSETS, S0, do, dS, scale=0.5)
    for n, rows in enumerate(SEQUENCES):
        own = [x[:, rows] for x in inputs]
        first = None if S0 is None else S0[n]
        same((o[:, rows], S[n]), vector_decay_attend(*own, first, scale=0.5))
        *gradients, start = vector_decay_backward(*own, first, do[:, rows], dS[n], scale=0.5)
        same([*(x[:, rows] for x in tokens), dS0[n]], [*gradients, start])


def differences(f: Any, inputs: list[np.ndarray]) -> Any:
    """Central finite differences of f, a number; 0 for what is infinite."""
    for x in inputs:
        got = np.zeros_like(x)
        for place in np.ndindex(x.shape):
            kept = x[place]
            if np.isfinite(kept):
                x[place] = kept + 1e-6
                above = f(*inputs)
                x[place] = kept - 1e-6
                got[place] = (above - f(*inputs)) / 2e-6
                x[place] = kept
        yield got


def compare(gradients: Any, f: Any, inputs: list[np.ndarray]) -> None:
    for got, expected in zip(gradients, differences(f, inputs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("started", [False, True])
def test_gradients_of_the_rule(started: bool) -> None:
    """What does not depend on the point of reference m has them: o, e^m s and e^m Delta."""
    random = np.random.default_rng(0)
    q, k, g = random.standard_normal((3, 1, 2, 5, 2))
    v = random.standard_normal((1, 2, 5, 3))
    g[:, :, 2, 0] = -np.inf
    inputs = [q, k, v, g]
    if started:
        m, Delta = random.standard_normal((1, 2, 2)), 1 + random.exponential(2.0, (1, 2, 2))
        inputs += [random.standard_normal((1, 2, 2, 3)), Delta, m]
    state = tuple(inputs[4:]) or None
    o, (s, Delta, fixed) = additive_rule(*inputs[:4], state)
    do, ds, dDelta = (random.standard_normal(x.shape) for x in (o, s, Delta))

    def f(*x: np.ndarray) -> float:
        o, (s, Delta, m) = additive_rule(*x[:4], x[4:] or None)  # type: ignore[arg-type]
        rise = np.exp(m - fixed)
        states = np.sum(rise[..., None] * s * ds) + np.sum(rise * Delta * dDelta)
        return float(np.sum(o * do) + states)

    *tokens, before = additive_rule_backward(*inputs[:4], state, do, ds, dDelta)
    compare([*tokens, *(before if started else ())], f, inputs)


def test_a_gradient_of_the_rule_without_a_state_or_a_gate() -> None:
    one = np.ones((1, 2, 1))
    nothing = (np.zeros((1, 1, 1)), np.zeros((1, 1)), np.full((1, 1), -np.inf))
    gradients = additive_rule_backward(one, one, one, -np.inf * one, nothing, one, one[:, :1])
    assert not any(np.any(x) for x in (*gradients[:4], *gradients[4]))


@pytest.mark.parametrize("carried", [False, True])
def test_gradients_of_filters(carried: bool) -> None:
    random = np.random.default_rng(3)
    x, state = random.standard_normal((2, 2, 5, 3)), random.standard_normal((2, 2, 4, 3))
    qp, kp = random.standard_normal((2, 2, 4))
    inputs = [x, qp, kp, np.array([0.7, 0.3]), *([state] if carried else [])]
    dy, dstate = random.standard_normal(x.shape), random.standard_normal(state.shape)

    def f(*x: np.ndarray) -> float:
        y, last = tpe(*x)
        return float(np.sum(y * dy) + np.sum(last * dstate))

    gradients = tpe_backward(*inputs[:4], state if carried else None, dy, dstate)
    compare(gradients[: len(inputs)], f, inputs)
    grid = random.standard_normal((2, 3, 4, 4))
    params = [(*random.standard_normal((2, 2, 3)), random.uniform(0.2, 0.8, 2)) for _ in range(2)]
    up = random.standard_normal(grid.shape)
    dx, of_params = md_tpe_backward(grid, params, (1, 0), up)

    def g(x: np.ndarray, *flat: np.ndarray) -> float:
        return float(np.sum(md_tpe(x, [flat[:3], flat[3:]], (1, 0)) * up))

    compare([dx, *of_params[0], *of_params[1]], g, [grid, *params[0], *params[1]])


@pytest.mark.parametrize(("lrpe_type", "d"), [("cosine", 5), ("rotary", 6)])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 2)])
def test_gradients_of_lifts(lrpe_type: str, d: int, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(4)
    x = random.standard_normal((2, 1, 2 + int(np.prod(shape)), d))
    width = d if lrpe_type == "cosine" else d // 2
    theta = random.uniform(0, 1, (1, -(-width // len(shape))))
    up = random.standard_normal(md_lrpe(x, theta, shape, 2, lrpe_type=lrpe_type).shape)

    def f(x: np.ndarray, theta: np.ndarray) -> float:
        return float(np.sum(md_lrpe(x, theta, shape, 2, lrpe_type=lrpe_type) * up))

    compare(md_lrpe_backward(x, theta, shape, 2, up, lrpe_type=lrpe_type), f, [x, theta])


q0, k0, v0 = tensors()
w0 = np.zeros_like(q0[:2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lightnet_packed(q0, k0, v0, OFFSETS + 1), ValueError, "offsets"),
        (lambda: lightnet_packed(q0, k0, v0, OFFSETS, 3), TypeError, "state: got int"),  # type: ignore[arg-type]
        (lambda: lightnet_packed(q0, k0, v0, OFFSETS, states(2)), ValueError, "state: got shape"),
        (lambda: lightnet_packed(q0, k0, v0, OFFSETS, scale=0), ValueError, "scale"),
        (lambda: lightnet_packed(q0[:, :8], k0, v0, OFFSETS), ValueError, "k: got 9"),
        (lambda: lightnet_packed_backward(q0, k0, v0, OFFSETS, None, q0), ValueError, "do"),
        (
            lambda: vector_decay_packed(w0, k0, v0, w0, OFFSETS, states(4)[0]),
            ValueError,
            "S0: got shape",
        ),
        (lambda: vector_decay_packed(w0, k0, v0, w0 + 1, OFFSETS), ValueError, "log_decay"),
        (
            lambda: vector_decay_packed_backward(w0, k0, v0, w0, OFFSETS, None, v0, v0),
            ValueError,
            "dS: got shape",
        ),
    ],
)
def test_wrong_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
