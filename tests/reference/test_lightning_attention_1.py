"""TransNormerLLM's layers against outside evidence, their own properties and bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.linear import lightning_attention_1 as tnl
from attnspec.reference.linear.lightning_attention_1 import (
    decay_attend,
    decay_attend_backward,
    decay_attend_tiled,
    layer_slopes,
    lrpe,
    lrpe_frequencies,
    norm_attention,
    sglu,
    slopes,
    srms_norm,
    srms_norm_backward,
    tnl_block,
    tnl_gla,
    tnl_gla_packed,
    tnl_gla_padded,
)
from tests.differences import differences

quick = settings(max_examples=15, deadline=None, derandomize=True)
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
FLAGS: tuple[dict[str, Any], ...] = (
    {},
    {"eps": 0.0},
    {"v_activation": True, "gate": "sigmoid", "norm": "layer", "eps": 1e-5},
)


def weights(D: int = 8, H: int = 2, F: int = 5, *, theta: bool = True, seed: int = 0) -> Any:
    """Parameters of a block of model width D."""
    random = np.random.default_rng(seed)
    shapes = {"Wqkvu": (D, 4 * D), "Wo": (D, D), "Wv": (D, F), "Wu": (D, F), "Wd": (F, D)}
    made: dict[str, Any] = {n: random.standard_normal(s) / s[0] ** 0.5 for n, s in shapes.items()}
    made["slopes"] = layer_slopes(H, 1, 4)
    made["theta"] = lrpe_frequencies(H, D // H, 100.0) if theta else None
    return made


def rows(T: int = 9, D: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, T, D))


def qkv(T: int, d: int = 3, e: int = 4, H: int = 2, seed: int = 0) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal((2, H, T, width)) for width in (d, d, e))


def test_authors_attention_with_lrpe(golden: Callable[[str], Any]) -> None:
    case = golden("lightning_attention_1__lrpe_d")
    meta = case["meta"]
    H = case["q"].shape[1]
    np.testing.assert_allclose(lrpe_frequencies(H, case["q"].shape[-1]), case["theta"], rtol=1e-5)
    np.testing.assert_allclose(
        layer_slopes(H, meta["layer"], meta["num_layers"]), case["slopes"], rtol=1e-5
    )
    q, k = lrpe(case["q"], case["theta"]), lrpe(case["k"], case["theta"])
    moved = lrpe(case["q"], case["theta"], 7)
    for got, name in ((q, "q_lrpe"), (k, "k_lrpe"), (moved, "q_lrpe_offset7")):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, case[name], atol=2e-6)
    s = case["slopes"].astype(np.float32)
    for o, S in (decay_attend(q, k, case["v"], s), decay_attend_tiled(q, k, case["v"], s, 4)):
        np.testing.assert_allclose(o, case["out"], atol=1e-4)
        np.testing.assert_allclose(S, case["final_kv"], atol=1e-4)


@quick
@given(a=st.integers(0, 40), b=st.integers(0, 40), seed=st.integers(0, 9))
def test_lrpe_is_relative_and_keeps_lengths(a: int, b: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    theta = lrpe_frequencies(2, 4, 30.0)
    q, k = random.standard_normal((2, 2, 1, 4))
    lifted = np.sum(lrpe(q, theta, a) * lrpe(k, theta, b), axis=-1)
    np.testing.assert_allclose(
        lifted, np.sum(q * k * np.cos((a - b) * theta)[:, None], -1), **CLOSE
    )
    halves = lrpe(q, theta, a).reshape(2, 1, 2, 4)
    np.testing.assert_allclose(np.sum(halves**2, axis=2), q**2, **CLOSE)


@pytest.mark.parametrize("flags", FLAGS)
def test_a_common_offset_changes_nothing(flags: dict[str, Any]) -> None:
    x, params = rows(), weights()
    y, state = tnl_gla(x, params, **flags)
    moved, other = tnl_gla(x, params, None, 11, **flags)
    np.testing.assert_allclose(moved, y, **CLOSE)
    assert not np.allclose(other, state), "the state's phases are absolute"
    rest = rows(3, seed=1)
    at_home = tnl_gla(rest, params, state, 9, **flags)[0]
    np.testing.assert_allclose(tnl_gla(rest, params, other, 20, **flags)[0], at_home, **CLOSE)


def left_product(q: Any, k: Any, v: Any, s: np.ndarray) -> np.ndarray:
    T = q.shape[-2]
    gap = np.arange(T)[:, None] - np.arange(T)
    M = np.where(gap >= 0, np.exp(-s[:, None, None] * np.maximum(gap, 0)), 0.0)
    return ((q @ np.swapaxes(k, -1, -2)) * M) @ v


@quick
@given(T=st.integers(1, 14), block=st.integers(1, 20), cut=st.integers(0, 14), H=st.integers(1, 3))
def test_all_forms_and_any_split(T: int, block: int, cut: int, H: int) -> None:
    q, k, v = qkv(T, H=H, seed=T)
    s = layer_slopes(H, 0, 1)
    expected = left_product(q, k, v, s)
    o, S = decay_attend(q, k, v, s)
    tiled, last = decay_attend_tiled(q, k, v, s, block)
    cut = min(cut, T)
    head, middle = decay_attend_tiled(*(x[..., :cut, :] for x in (q, k, v)), s, block)
    tail, end = decay_attend(*(x[..., cut:, :] for x in (q, k, v)), s, middle)
    for got in (o, tiled, np.concatenate([head, tail], axis=-2)):
        np.testing.assert_allclose(got, expected, **CLOSE)
    for got in (last, end):
        np.testing.assert_allclose(got, S, **CLOSE)


def test_no_decay_is_norm_attention() -> None:
    q, k, v = qkv(9)
    np.testing.assert_allclose(norm_attention(q, k, v), left_product(q, k, v, np.zeros(2)), **CLOSE)
    np.testing.assert_allclose(
        norm_attention(q, k, v), decay_attend_tiled(q, k, v, np.zeros(2), 4)[0], **CLOSE
    )


@quick
@given(cuts=st.lists(st.integers(0, 9), max_size=3), lifted=st.booleans())
def test_layers_continue_from_a_state(cuts: list[int], lifted: bool) -> None:
    x, params = rows(), weights(theta=lifted)
    for layer in (tnl_gla, tnl_block):
        whole, last = layer(x, params)
        state, parts, places = None, [], [0, *sorted(cuts), 9]
        for first, end in itertools.pairwise(places):
            y, state = layer(x[:, first:end], params, state, first)
            parts.append(y)
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, **CLOSE)
        np.testing.assert_allclose(state, last, **CLOSE)


def test_packed_sequences_are_those_alone() -> None:
    x, params = rows()[0], weights()
    offsets, starts = np.array([0, 4, 4, 9]), np.array([0, 5, 2])
    states = np.random.default_rng(1).standard_normal((3, 2, 8, 4))
    y, last = tnl_gla_packed(x, params, offsets, states, starts)
    for n in range(3):
        part = x[offsets[n] : offsets[n + 1]]
        alone, state = tnl_gla(part, params, states[n], int(starts[n]))
        np.testing.assert_array_equal(y[offsets[n] : offsets[n + 1]], alone)
        np.testing.assert_array_equal(last[n], state)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sequences_are_those_alone(side: str) -> None:
    x, params = rows(), weights()
    lengths = (4, 7)
    valid = np.zeros((2, 9), bool)
    for b, n in enumerate(lengths):
        valid[b, slice(9 - n, 9) if side == "left" else slice(0, n)] = True
    y, state = tnl_gla_padded(np.where(valid[..., None], x, np.nan), params, valid)
    assert not y[~valid].any()
    for b, n in enumerate(lengths):
        start = 9 - n if side == "left" else 0
        alone, last = tnl_gla(x[b][valid[b]], params, None, start)
        np.testing.assert_allclose(y[b][valid[b]], alone, **CLOSE)
        np.testing.assert_allclose(state[b], last, **CLOSE)


@quick
@given(c=st.floats(0.1, 50.0), eps=st.sampled_from([1e-6, 0.1, 0.0]), seed=st.integers(0, 9))
def test_srms_norm(c: float, eps: float, seed: int) -> None:
    x = rows(seed=seed)
    y, ms = srms_norm(x, eps), np.mean(x**2, axis=-1)
    np.testing.assert_allclose(np.mean(y**2, axis=-1), ms / (ms + eps), rtol=1e-12)
    np.testing.assert_allclose(srms_norm(c * x, 0.0), srms_norm(x, 0.0), rtol=1e-12)
    dx = srms_norm_backward(x, 0.0, rows(seed=seed + 1))
    np.testing.assert_allclose(np.sum(x * dx, axis=-1), 0.0, atol=1e-12)
    assert not srms_norm_backward(np.zeros((1, 3)), 0.0, np.ones((1, 3))).any()


def test_scaling_all_heads_is_normed_away_but_one_head_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, params = rows(), weights()
    y = tnl_gla(x, params, eps=0.0)[0]
    scaled = {**params, "Wqkvu": params["Wqkvu"].copy()}
    scaled["Wqkvu"][:, 16:24] *= 3.0
    np.testing.assert_allclose(tnl_gla(x, scaled, eps=0.0)[0], y, **CLOSE)
    one = {**params, "Wqkvu": params["Wqkvu"].copy()}
    one["Wqkvu"][:, 16:20] *= 3.0
    assert not np.allclose(tnl_gla(x, one, eps=0.0)[0], y)
    factors = np.random.default_rng(3).uniform(0.5, 2.0, (2, 1, 9, 1))

    def rescaled(q: Any, k: Any, v: Any, s: Any, state: Any) -> Any:
        return decay_attend(q * factors, k, v, s, state)

    layers = "attnspec.reference.linear.lightning_attention_1_layers"
    monkeypatch.setattr(f"{layers}.decay_attend", rescaled)
    np.testing.assert_allclose(tnl_gla(x, params, eps=0.0)[0], y, **CLOSE)


def test_sglu_is_homogeneous_of_degree_two() -> None:
    x, p = rows(), weights()
    channels = [p[name] for name in ("Wv", "Wu", "Wd")]
    np.testing.assert_allclose(sglu(-3 * x, *channels), 9 * sglu(x, *channels), **CLOSE)


def test_slopes() -> None:
    for H in (1, 2, 8, 16):
        s = slopes(H)
        np.testing.assert_allclose(s, 2.0 ** (-8 * np.arange(1, H + 1) / H), rtol=1e-14)
    assert slopes(5).shape == (5,)
    np.testing.assert_array_equal(slopes(5), [*slopes(4), slopes(8)[0]])
    layers = np.stack([layer_slopes(6, layer, 5) for layer in range(5)])
    assert np.all(np.diff(layers, axis=0) < 0)
    np.testing.assert_allclose(layers[-1], slopes(6) * 1e-5)
    np.testing.assert_allclose(layer_slopes(6, 0, 1), slopes(6) * (1 + 1e-5))
    np.testing.assert_allclose(layer_slopes(4, 1, 4, decay_rule="linear"), [1.5, 3, 4.5, 6])


def test_causal_and_a_silent_token() -> None:
    x, params = rows(), weights()
    y = tnl_block(x, params)[0]
    later = x.copy()
    later[:, 5:] += 1.0
    np.testing.assert_array_equal(tnl_block(later, params)[0][:, :5], y[:, :5])
    q, k, v = qkv(9)
    v[:, :, 3] = 0
    s = slopes(2)
    other = k.copy()
    other[:, :, 3] += 7.0
    np.testing.assert_array_equal(decay_attend(q, other, v, s)[0], decay_attend(q, k, v, s)[0])


def agree(got: Any, loss: Callable[[], Any], x: np.ndarray) -> None:
    np.testing.assert_allclose(got, differences(loss, x, 1e-6), rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", ["tnl_gla", "tnl_block"])
def test_gradients_of_layers(name: str, flags: dict[str, Any]) -> None:
    x, params = rows(4, 4)[:1], weights(4, 2, 3)
    state = 0.5 * np.random.default_rng(5).standard_normal((1, 2, 4, 2))
    layer, backward = getattr(tnl, name), getattr(tnl, f"{name}_backward")
    if name == "tnl_gla":
        params = {n: params[n] for n in ("Wqkvu", "Wo", "slopes", "theta")}
    y, last = layer(x, params, state, 3, **flags)
    random = np.random.default_rng(6)
    dy, dstate = random.standard_normal(y.shape), random.standard_normal(last.shape)

    def loss() -> Any:
        y, last = layer(x, params, state, 3, **flags)
        return np.sum(dy * y) + np.sum(dstate * last)

    dx, dparams, dS0 = backward(x, params, state, 3, dy, dstate, **flags)
    agree(dx, loss, x)
    agree(dS0, loss, state)
    assert list(dparams) == list(params)
    for weight, value in params.items():
        agree(dparams[weight], loss, value)
    bare = {**params, "theta": None}
    short = backward(x, bare, None, 0, dy, **flags)
    assert short[1]["theta"] is None


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", ["tnl_gla_packed", "tnl_gla_padded"])
def test_gradients_of_batches(name: str, flags: dict[str, Any]) -> None:
    """Those of the losses, through every state and weight; padding gets nothing."""
    random = np.random.default_rng(7)
    params = {n: w for n, w in weights(4, 2).items() if n in ("Wqkvu", "Wo", "slopes", "theta")}
    if name == "tnl_gla_packed":
        x, place = rows(5, 4)[0], np.array([0, 2, 2, 5])
        state, start = random.standard_normal((3, 2, 4, 2)), np.array([4, 0, 1])
        places: tuple[Any, ...] = (place, state, start)
    else:
        x, place = rows(4, 4), np.array([[False, True, True, False], [True, False, True, True]])
        state = random.standard_normal((2, 2, 4, 2))
        places = (place, state, 3)
    layer, backward = getattr(tnl, name), getattr(tnl, f"{name}_backward")
    ups = [random.standard_normal(out.shape) for out in layer(x, params, *places, **flags)]

    def loss() -> Any:
        outs = layer(x, params, *places, **flags)
        return sum(np.sum(up * out) for up, out in zip(ups, outs, strict=True))

    dx, dparams, dS0 = backward(x, params, *places, *ups, **flags)
    agree(dx, loss, x)
    agree(dS0, loss, state)
    assert list(dparams) == list(params)
    for weight, value in params.items():
        agree(dparams[weight], loss, value)
    if name == "tnl_gla_padded":
        assert not dx[~place].any()
        unread = np.where(place[..., None], x, np.nan)
        np.testing.assert_array_equal(backward(unread, params, *places, *ups, **flags)[0], dx)


def test_gradients_of_steps() -> None:
    x, dy = rows(3, 4), rows(3, 4, seed=1)
    agree(srms_norm_backward(x, 0.1, dy), lambda: np.sum(dy * srms_norm(x, 0.1)), x)
    p = weights(4, 2, 3)
    channels = [p[name] for name in ("Wv", "Wu", "Wd")]
    for got, at in zip(tnl.sglu_backward(x, *channels, dy), [x, *channels], strict=True):
        agree(got, lambda: np.sum(dy * sglu(x, *channels)), at)
    q, k, v = qkv(4)
    theta = lrpe_frequencies(2, 3, 20.0)
    up = np.random.default_rng(2).standard_normal((2, 2, 4, 6))
    for got, at in zip(tnl.lrpe_backward(q, theta, 3, up), (q, theta), strict=True):
        agree(got, lambda: np.sum(up * lrpe(q, theta, 3)), at)
    do, s = v[..., ::-1].copy(), slopes(2)
    for got, at in zip(decay_attend_backward(q, k, v, s, do, 3), (q, k, v), strict=True):
        agree(got, lambda: np.sum(do * decay_attend_tiled(q, k, v, s, 3)[0]), at)
    for got, at in zip(tnl.norm_attention_backward(q, k, v, do), (q, k, v), strict=True):
        agree(got, lambda: np.sum(do * norm_attention(q, k, v)), at)


def test_no_tokens_and_dtypes() -> None:
    params = weights()
    y, state = tnl_block(rows(0), params)
    assert y.shape == (2, 0, 8)
    assert not state.any()
    single = {n: None if w is None else w.astype(np.float32) for n, w in params.items()}
    y, state = tnl_block(rows().astype(np.float32), single)
    assert (y.dtype, state.dtype) == (np.float32, np.float32)


X, P = rows(), weights()
Q = qkv(3)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "argument"),
    [
        ("slopes", (0,), ValueError, "H"),
        ("layer_slopes", (2, 3, 3), ValueError, "l"),
        ("layer_slopes", (2, 0, 2.5), TypeError, "L"),
        ("srms_norm", (X, -1.0), ValueError, "eps"),
        ("srms_norm", (5,), TypeError, "x"),
        ("srms_norm_backward", (X, 0.0, X[:1]), ValueError, "dy"),
        ("sglu", (X, P["Wv"], P["Wv"][:, 1:], P["Wd"]), ValueError, "Wu"),
        ("sglu_backward", (X, P["Wv"], P["Wu"], P["Wd"], X[:1]), ValueError, "dy"),
        ("lrpe_frequencies", (2, 2, 1.0), ValueError, "base"),
        ("lrpe_frequencies", (2, 2, "ten"), TypeError, "base"),
        ("lrpe", (Q[0], np.ones((2, 4))), ValueError, "theta"),
        ("lrpe", (Q[0], np.ones((2, 3)), -1), ValueError, "offset"),
        ("lrpe_backward", (Q[0], np.ones((2, 3)), 0, Q[0]), ValueError, "dy"),
        ("decay_attend", (*Q, -slopes(2)), ValueError, "slopes"),
        ("decay_attend", (Q[0], Q[1][:, :1], Q[2][:, :1], slopes(2)), ValueError, "k"),
        ("decay_attend_tiled", (*Q, slopes(2), 0), ValueError, "block"),
        ("decay_attend_backward", (*Q, slopes(2), Q[0], 2), ValueError, "do"),
        ("norm_attention", (Q[0][..., 1:, :], *Q[1:]), ValueError, "q"),
        ("tnl_gla", (X, {}), ValueError, "params"),
        ("tnl_gla", (X, {**P, "slopes": slopes(3)}), ValueError, "slopes"),
        ("tnl_gla", (X, {**P, "Wo": P["Wo"][1:]}), ValueError, "Wo"),
        ("tnl_gla", (X, {**P, "Wo": P["Wo"].astype(np.float32)}), TypeError, "Wo"),
        ("tnl_gla", (X, P, np.zeros((2, 2, 4, 4))), ValueError, "state"),
        ("tnl_gla", (X, P, None, -1), ValueError, "offset"),
        ("tnl_gla_packed", (X, P, np.array([0, 3])), ValueError, "offsets"),
        ("tnl_gla_packed", (X, P, np.array([0, 9]), None, np.array([-1])), ValueError, "starts"),
        ("tnl_gla_packed", (X, P, np.array([0, 9]), np.zeros((2, 2))), ValueError, "states"),
        ("tnl_gla_padded", (X, P, np.ones((2, 3), bool)), ValueError, "valid"),
        ("tnl_block", (X, {**P, "Wd": P["Wv"]}), ValueError, "Wd"),
    ],
)
def test_bad_inputs(name: str, arguments: Any, error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=rf"^{argument}: got "):
        getattr(tnl, name)(*arguments)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("gate", "tanh", ValueError),
        ("norm", None, ValueError),
        ("v_activation", 1, TypeError),
        ("eps", float("nan"), ValueError),
    ],
)
def test_bad_options(option: str, value: Any, error: type[Exception]) -> None:
    for layer in (tnl_gla, tnl_block):
        with pytest.raises(error, match=rf"^{option}: got "):
            layer(X, P, **{option: value})
