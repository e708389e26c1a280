"""LightNet against outside evidence, its own properties and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.linear import lightnet
from attnspec.reference.linear.lightnet import (
    additive_gates,
    additive_rule,
    decode_step,
    lightnet_causal,
    lightnet_causal_backward,
    lightnet_noncausal,
    lightnet_noncausal_backward,
    md_angles,
    md_lrpe,
    md_tpe,
    tpe,
    vector_decay_attend,
    vector_decay_backward,
)

quick = settings(max_examples=15, deadline=None, derandomize=True)
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def tensors(
    T: int = 9, d: int = 4, e: int = 3, H: int = 4, Hk: int = 2, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """q, k, v."""
    random = np.random.default_rng(seed)
    shapes = ((2, H, T, d), (2, Hk, T, d), (2, Hk, T, e))
    return tuple(random.standard_normal(shape) for shape in shapes)


def filters(H: int = 2, m: int = 3, seed: int = 0) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    return (*random.standard_normal((2, H, m)), random.uniform(0.1, 0.9, H))


def unrolled(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """S2, S3 in so many words."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    out = []
    for t in range(k.shape[2]):
        weights = np.exp(k[:, :, : t + 1])
        weights /= weights.sum(axis=2, keepdims=True)
        out.append(np.einsum("bhc,bhsc,bhse->bhe", q[:, :, t], weights, v[:, :, : t + 1]))
    return np.stack(out, axis=2)


def test_additive_rule_is_that_of_the_first_author(golden: Callable[[str], Any]) -> None:
    case = golden("lightnet__additive_rule")
    o, (s, Delta, m) = additive_rule(*(case[name] for name in "qkvg"))
    assert o.dtype == np.float32
    for got, name in ((o, "out"), (o, "out_stable"), (s, "fs_s")):
        np.testing.assert_allclose(got, case[name], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(Delta, case["fs_denom"][..., 0], rtol=1e-5)
    np.testing.assert_allclose(m, case["fs_m"][..., 0], rtol=1e-6)


def test_md_lrpe_is_that_of_the_first_author(golden: Callable[[str], Any]) -> None:
    case = golden("lightnet__mdlrpe_2d")
    out = md_lrpe(case["x"], case["theta"], (3, 4), 1)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, case["out"], rtol=1e-5, atol=1e-6)


@quick
@given(T=st.integers(1, 12), seed=st.integers(0, 9), spread=st.sampled_from([0.1, 1.0, 20.0]))
def test_recurrence_is_the_unrolled_form(T: int, seed: int, spread: float) -> None:
    q, k, v = tensors(T, seed=seed)
    k = spread * k
    o, (S, z) = lightnet_causal(q, k, v)
    np.testing.assert_allclose(o, unrolled(q, k, v), **CLOSE)
    sums = np.log(np.exp(k.repeat(2, 1) - 50).sum(axis=2)) + 50
    np.testing.assert_allclose(z, sums, **CLOSE)
    one = np.ones_like(v.repeat(2, 1)[..., :1]).repeat(4, -1)
    keys, values = k.repeat(2, 1), v.repeat(2, 1)
    rule, (s, Delta, _) = additive_rule(q, one, values, keys)
    np.testing.assert_allclose(rule, o, **CLOSE)
    np.testing.assert_allclose(s / Delta[..., None], S, **CLOSE)


def in_chunks(q: np.ndarray, k: np.ndarray, v: np.ndarray, size: int) -> np.ndarray:
    """S5 by products: a chunk reads the state before it and, by the decay between, itself."""
    kbar, log_decay, _ = additive_gates(k)
    S, rows = np.zeros((*k.shape[:2], k.shape[3], v.shape[3])), []
    for start in range(0, k.shape[2], size):
        part = slice(start, start + size)
        Q, keys, values = q[:, :, part], kbar[:, :, part], v[:, :, part]
        W = np.cumsum(log_decay[:, :, part], axis=2)
        between = np.minimum(W[:, :, :, None] - W[:, :, None], 0)
        scores = np.einsum("bhtc,bhsc,bhtsc->bhts", Q, keys, np.exp(between))
        rows.append((Q * np.exp(W)) @ S + np.tril(scores) @ values)
        left = keys * np.exp(W[:, :, -1:] - W)
        S = np.exp(W[:, :, -1])[..., None] * S + left.swapaxes(2, 3) @ values
    return np.concatenate(rows, axis=2)


def test_recurrence_is_the_chunk_form() -> None:
    q, k, v = tensors(H=2)
    o, _ = lightnet_causal(q, k, v)
    for size in range(1, 11):
        np.testing.assert_allclose(in_chunks(q, k, v, size), o, **CLOSE)


def test_gates_are_a_moving_average() -> None:
    k = tensors(20)[1]
    k[0, 0, :4] = -np.inf
    k[0, 0, 7] = -np.inf
    kbar, log_decay, _ = additive_gates(k)
    assert np.all(log_decay <= 0)
    first = np.zeros(k.shape, bool)
    first[:, :, 0] = True
    first[0, 0, 0], first[0, 0, 4] = False, True
    valid = np.isfinite(k)
    np.testing.assert_array_equal(kbar[first], 1)
    np.testing.assert_array_equal(log_decay[first | ~valid], 0)
    np.testing.assert_array_equal(kbar[~valid], 0)
    later = valid & ~first
    np.testing.assert_allclose((kbar + np.exp(log_decay))[later], 1, rtol=1e-14)


def test_states_are_convex_combinations() -> None:
    q, k, v = tensors(12)
    for t in range(1, 13):
        S = lightnet_causal(q[:, :, :t], k[:, :, :t], v[:, :, :t])[1][0]
        past = v[:, :, :t].repeat(2, 1)
        assert np.all(past.min(axis=2)[:, :, None] - 1e-12 <= S)
        assert np.all(past.max(axis=2)[:, :, None] + 1e-12 >= S)
    o = lightnet_causal(q, k, np.full_like(v, 2.5))[0]
    np.testing.assert_allclose(o, np.broadcast_to(2.5 * q.sum(-1, keepdims=True), o.shape), **CLOSE)


def test_shift_scale_and_order() -> None:
    q, k, v = tensors()
    o, _ = lightnet_causal(q, k, v)
    shift = np.random.default_rng(1).standard_normal((2, 2, 1, 4))
    np.testing.assert_allclose(lightnet_causal(q, k + shift, v)[0], o, **CLOSE)
    np.testing.assert_allclose(lightnet_causal(3 * q, k, v, scale=0.5)[0], 1.5 * o, **CLOSE)
    whole = lightnet_noncausal(q, k, v)
    np.testing.assert_allclose(whole[:, :, -1], o[:, :, -1], **CLOSE)
    order = np.random.default_rng(2).permutation(9)
    np.testing.assert_allclose(
        lightnet_noncausal(q, k[:, :, order], v[:, :, order]), whole, **CLOSE
    )


def test_large_common_offset_costs_no_digits() -> None:
    q, k, v = (x.astype(np.float32) for x in tensors(40))
    k = np.round(k * 64) / 64
    near = lightnet_causal(q, k, v)[0]
    far = lightnet_causal(q, k + np.float32(1e4), v)[0]
    np.testing.assert_allclose(near, far, atol=1e-5)


def test_constant_keys_and_a_dominating_key() -> None:
    q, k, v = tensors(30)
    _kbar, log_decay, _ = additive_gates(0 * k)
    t = np.arange(2, 31)
    np.testing.assert_allclose(log_decay[0, 0, 1:, 0], np.log((t - 1) / t), rtol=1e-12)
    S = lightnet_causal(q, 0 * k, v)[1][0]
    mean = v.mean(axis=2).repeat(2, 1)
    np.testing.assert_allclose(S, np.repeat(mean[:, :, None], 4, 2), **CLOSE)
    running = (np.cumsum(v, axis=2) / np.arange(1, 31)[:, None]).repeat(2, 1)
    expected = q.sum(-1, keepdims=True) * running
    np.testing.assert_allclose(lightnet_causal(q, 0 * k, v)[0], expected, **CLOSE)
    k[:, :, 5] = k.max() + 50
    o = lightnet_causal(q, k, v)[0]
    expected = q.sum(-1)[:, :, 5:, None] * v[:, :, 5:6].repeat(2, 1)
    np.testing.assert_allclose(o[:, :, 5:], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("split", [0, 1, 4, 9])
def test_hand_over_and_decode(split: int) -> None:
    q, k, v = tensors()
    whole, (S, z) = lightnet_causal(q, k, v)
    _, state = lightnet_causal(q[:, :, :split], k[:, :, :split], v[:, :, :split])
    rest, (S1, z1) = lightnet_causal(q[:, :, split:], k[:, :, split:], v[:, :, split:], state)
    np.testing.assert_allclose(rest, whole[:, :, split:], **CLOSE)
    for t in range(split, 9):
        o, state = decode_step(state, *(x[:, :, t : t + 1] for x in (q, k, v)))
        np.testing.assert_allclose(o[:, :, 0], whole[:, :, t], **CLOSE)
    for got, expected in ((S1, S), (z1, z), (state[0], S), (state[1], z)):
        np.testing.assert_allclose(got, expected, **CLOSE)


def test_a_state_of_zeros_is_a_key_of_logit_0() -> None:
    """What the first author's later layer begins with."""
    q, k, v = tensors()
    o, (S, z) = lightnet_causal(q, k, v, (np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4))))
    q, k, v = (np.concatenate([np.zeros_like(x[:, :, :1]), x], axis=2) for x in (q, k, v))
    expected, (S1, z1) = lightnet_causal(q, k, v)
    for got, wanted in ((o, expected[:, :, 1:]), (S, S1), (z, z1)):
        np.testing.assert_allclose(got, wanted, **CLOSE)


def test_general_rule_hands_over() -> None:
    q, k, v = tensors(H=2)
    g = tensors(H=2, seed=3)[1]
    whole, last = additive_rule(q, k, v, g)
    parts = [slice(0, 4), slice(4, 9)]
    first, state = additive_rule(*(x[:, :, parts[0]] for x in (q, k, v, g)))
    second, state = additive_rule(*(x[:, :, parts[1]] for x in (q, k, v, g)), state)
    np.testing.assert_allclose(np.concatenate([first, second], 2), whole, **CLOSE)
    for got, expected in zip(state, last, strict=True):
        np.testing.assert_allclose(got, expected, **CLOSE)


def test_padded_tokens_are_not_there() -> None:
    q, k, v = tensors(10)
    real = np.array([0, 0, 1, 1, 0, 1, 1, 1, 0, 0], bool)
    k[:, :, ~real], v[:, :, ~real] = -np.inf, 0
    o, (S, z) = lightnet_causal(q, k, v)
    short, (S1, z1) = lightnet_causal(q[:, :, real], k[:, :, real], v[:, :, real])
    np.testing.assert_allclose(o[:, :, real], short, **CLOSE)
    np.testing.assert_allclose(S, S1, **CLOSE)
    np.testing.assert_allclose(z, z1, **CLOSE)
    np.testing.assert_array_equal(o[:, :, :2], 0)
    np.testing.assert_allclose(
        lightnet_noncausal(q, k, v), lightnet_noncausal(q, k[:, :, real], v[:, :, real]), **CLOSE
    )
    nothing, (_, z) = lightnet_causal(q, np.full_like(k, -np.inf), 0 * v)
    assert np.all(nothing == 0)
    assert np.all(np.isneginf(z))
    assert np.all(lightnet_noncausal(q, k[:, :, :2], v[:, :, :2]) == 0)


def differences(f: Callable[..., np.ndarray], inputs: list[np.ndarray], up: np.ndarray) -> Any:
    """Central finite differences of sum(f * up)."""
    step = 1e-6
    for x in inputs:
        got = np.zeros_like(x)
        for place in np.ndindex(x.shape):
            kept = x[place]
            x[place] = kept + step
            above = np.sum(f(*inputs) * up)
            x[place] = kept - step
            got[place] = (above - np.sum(f(*inputs) * up)) / (2 * step)
            x[place] = kept
        yield got


@pytest.mark.parametrize("started", [False, True])
def test_gradients(started: bool) -> None:
    q, k, v = (x[:1] for x in tensors(5, d=2, e=2, H=2, Hk=1))
    random = np.random.default_rng(5)
    do, dS, dz = (
        random.standard_normal(shape) for shape in ((1, 2, 5, 2), (1, 2, 2, 2), (1, 2, 2))
    )
    state = lightnet_causal(q, k[::-1], v)[1] if started else None
    first = [] if state is None else list(state)

    def every(q: np.ndarray, k: np.ndarray, v: np.ndarray, *before: np.ndarray) -> np.ndarray:
        o, (S, z) = lightnet_causal(q, k, v, before or None, scale=0.7)  # type: ignore[arg-type]
        return np.array(np.sum(o * do) + np.sum(S * dS) + np.sum(z * dz))

    *tokens, before = lightnet_causal_backward(q, k, v, state, do, dS, dz, scale=0.7)
    expected = differences(every, [q, k, v, *first], np.ones(()))
    for got, wanted in zip([*tokens, *before][: 3 + len(first)], expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)
    of_output = lightnet_causal_backward(q, k, v, state, do, scale=0.7)
    zeros = lightnet_causal_backward(q, k, v, state, do, 0 * dS, 0 * dz, scale=0.7)
    for got, wanted in zip(of_output[:3], zeros[:3], strict=True):
        np.testing.assert_array_equal(got, wanted)
    expected = differences(lambda *x: lightnet_noncausal(*x, scale=0.7), [q, k, v], do)
    gradient = lightnet_noncausal_backward(q, k, v, do, scale=0.7)
    for got, wanted in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)
    w = -np.abs(tensors(5, d=2, H=2, seed=7)[0][:1]) - 1e-3
    inputs = [q, k.repeat(2, 1), v.repeat(2, 1), w, *first[:1]]

    def scanned(*x: np.ndarray) -> np.ndarray:
        o, S = vector_decay_attend(*x, scale=0.7)
        return np.array(np.sum(o * do) + np.sum(S * dS))

    gradients = vector_decay_backward(*inputs[:4], first[0] if first else None, do, dS, scale=0.7)
    expected = differences(scanned, inputs, np.ones(()))
    for got, wanted in zip(gradients[: len(inputs)], expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)


def test_a_gradient_through_channels_without_a_key() -> None:
    """z stays -inf there, and what it gets goes nowhere."""
    q, k, v = tensors(4)
    k[..., 0] = -np.inf
    state = np.zeros((2, 4, 4, 3)), np.full((2, 4, 4), -np.inf)
    do, dS, dz = np.ones((2, 4, 4, 3)), np.ones((2, 4, 4, 3)), np.ones((2, 4, 4))
    dq, dk, dv, (dS0, dz0) = lightnet_causal_backward(q, k, v, state, do, dS, dz)
    assert all(np.all(np.isfinite(x)) for x in (dq, dk, dv, dS0))
    assert not dk[..., 0].any()
    assert not dz0.any()


@pytest.mark.parametrize(("lrpe_type", "d"), [("cosine", 6), ("cosine", 5), ("rotary", 6)])
def test_md_lrpe_tells_differences_of_coordinates(lrpe_type: str, d: int) -> None:
    random = np.random.default_rng(0)
    shape = (4, 5)
    width = d if lrpe_type == "cosine" else d // 2
    theta = random.uniform(0, 1, (1, -(-width // 2)))
    q, k = random.standard_normal((2, d))
    lifted = [
        md_lrpe(np.tile(x, (1, 22, 1)), theta, shape, 2, lrpe_type=lrpe_type)[0] for x in (q, k)
    ]
    scores = (lifted[0][2:] @ lifted[1][2:].T).reshape(4, 5, 4, 5)
    np.testing.assert_allclose(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], **CLOSE)
    np.testing.assert_allclose(np.linalg.norm(lifted[0], axis=-1), np.linalg.norm(q), **CLOSE)
    leading = np.concatenate([q, 0 * q]) if lrpe_type == "cosine" else q
    np.testing.assert_array_equal(lifted[0][:2], [leading, leading])
    line = md_angles((20,), random.uniform(0, 1, (1, width)), width)
    np.testing.assert_allclose(line[0], np.arange(20)[:, None] * line[0, 1], **CLOSE)


def test_lifted_channels_keep_their_decay() -> None:
    """q and kbar are encoded behind their gates; both halves then decay alike."""
    q, k, v = tensors(6, H=2)
    theta = np.random.default_rng(3).uniform(0, 1, (2, 2))
    kbar, log_decay, _ = additive_gates(k)
    lifted = [md_lrpe(x, theta, (2, 3)) for x in (q, kbar)]
    o, _ = vector_decay_attend(*lifted, v, np.concatenate([log_decay] * 2, axis=-1))
    angles, W = md_angles((2, 3), theta, 4), np.cumsum(log_decay, axis=2)
    for t in range(6):
        left = np.exp(W[:, :, t, None] - W[:, :, : t + 1])
        turned = np.cos(angles[:, t, None] - angles[:, : t + 1])
        weights = np.sum(q[:, :, t, None] * kbar[:, :, : t + 1] * left * turned, axis=-1)
        expected = np.einsum("bhs,bhse->bhe", weights, v[:, :, : t + 1])
        np.testing.assert_allclose(o[:, :, t], expected, **CLOSE)


def test_tpe_impulse_hand_over_and_axes() -> None:
    qp, kp, lam = filters()
    x = np.zeros((1, 2, 6, 2))
    x[:, :, 1] = 1
    y, _ = tpe(x, qp, kp, lam)
    response = np.sum(qp * kp, 1)[:, None] * lam[:, None] ** np.arange(5)
    np.testing.assert_allclose(y[0, :, 1:, 0], response, **CLOSE)
    x = np.random.default_rng(0).standard_normal((2, 2, 7, 3))
    whole, last = tpe(x, qp, kp, lam)
    _, state = tpe(x[:, :, :3], qp, kp, lam)
    rest, state = tpe(x[:, :, 3:], qp, kp, lam, state)
    np.testing.assert_allclose(rest, whole[:, :, 3:], **CLOSE)
    np.testing.assert_allclose(state, last, **CLOSE)

    grid = np.random.default_rng(1).standard_normal((2, 3, 4, 6))
    a, b = filters(seed=1), filters(3, seed=2)
    row = grid[:, 1].reshape(2, 4, 2, 3).swapaxes(1, 2)
    one = md_tpe(grid, [a], [1])
    np.testing.assert_allclose(one[:, 1], tpe(row, *a)[0].swapaxes(1, 2).reshape(2, 4, 6), **CLOSE)
    both = md_tpe(grid, [a, b], [0, 1])
    swapped = md_tpe(grid.swapaxes(1, 2), [b, a], (0, 1)).swapaxes(1, 2)
    np.testing.assert_allclose(both, swapped, **CLOSE)
    np.testing.assert_allclose(both, md_tpe(grid, [a], [0]) + md_tpe(grid, [b], [1]), **CLOSE)


one = np.ones((1, 2, 1))


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        ("additive_gates", {"k": [1.0]}, TypeError, "k: got list"),
        ("additive_gates", {"k": one, "z0": one}, ValueError, "z0: got shape"),
        ("additive_rule", {"q": one, "k": one, "v": one, "g": one[:, :1]}, ValueError, "g: got"),
        (
            "additive_rule",
            {"q": one, "k": one, "v": one, "g": one, "state": (one, one)},
            TypeError,
            "state: got tuple",
        ),
        (
            "vector_decay_attend",
            {"q": one, "kbar": one, "v": one, "log_decay": one},
            ValueError,
            "log_decay: got a value above 0",
        ),
        (
            "vector_decay_attend",
            {"q": one, "kbar": one, "v": one, "log_decay": -one, "S0": one},
            ValueError,
            "S0: got shape",
        ),
        (
            "lightnet_causal",
            {"q": one, "k": one, "v": one, "state": 3},
            TypeError,
            "state: got int",
        ),
        ("lightnet_causal", {"q": one, "k": one, "v": one, "scale": "x"}, TypeError, "scale: got"),
        ("lightnet_causal", {"q": one[:, :1], "k": one, "v": one}, ValueError, "q: got 1"),
        (
            "lightnet_noncausal",
            {"q": one, "k": one, "v": one, "scale": 0},
            ValueError,
            "scale: got",
        ),
        (
            "decode_step",
            {"state": (one, one[0]), "q": one, "k": one, "v": one},
            ValueError,
            "q: got 2",
        ),
        ("md_angles", {"shape": 3, "theta": one[0], "d": 1}, TypeError, "shape: got int"),
        ("md_angles", {"shape": (3,), "theta": one[0], "d": 9}, ValueError, "theta: got shape"),
        ("md_angles", {"shape": (3,), "theta": one[0], "d": 0}, ValueError, "d: got 0"),
        ("md_lrpe", {"x": one, "theta": one[0, :1], "shape": (3,)}, ValueError, "x: got 2"),
        (
            "md_lrpe",
            {"x": one, "theta": one[0, :1], "shape": (2,), "lrpe_type": "rotary"},
            ValueError,
            "x: got 1 channels",
        ),
        (
            "tpe",
            {"x": one, "qp": one[0, :1], "kp": one[0, :1], "lam": np.array([1.5])},
            ValueError,
            "lam: got a value",
        ),
        ("md_tpe", {"x": one, "params": [], "axes": []}, ValueError, "axes: got"),
        ("md_tpe", {"x": one, "params": [1], "axes": [1]}, ValueError, "axes: got 1"),
    ],
)
def test_bad_input(
    function: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(lightnet, function)(**arguments)
