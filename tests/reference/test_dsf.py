"""The Dynamical Systems Framework against outside evidence, its identities and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.linear import (
    dsf,
    dsf_batches,
    dsf_layer,
    dsf_mixers,
    dsf_rnn,
    dsf_rnn_batches,
    dsf_ssm,
)
from attnspec.reference.linear.based import taylor_weights
from attnspec.reference.linear.dsf_mixers import feature_map
from attnspec.reference.linear.dsf_recurrence import (
    elementwise_scan_backward,
    sigmoid_power,
    softplus,
)
from attnspec.reference.linear.dsf_system import dsf_scan_backward

quick = settings(max_examples=15, deadline=None, derandomize=True)
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def numbers(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape) for shape in shapes]


def system(seed: int, T: int = 6, N: int = 5, dv: int = 3) -> list[np.ndarray]:
    """Lam, B, C, D; decays of 0, below 0 and above 1 among them."""
    made = numbers(seed, (2, T, N), (2, T, N, dv), (2, T, dv, N), (2, T, dv, dv))
    made[0] = np.where(np.random.default_rng(seed).random((2, T, N)) < 0.2, 0.0, 2 * made[0])
    return made


def s6_inputs(seed: int, T: int = 7, dv: int = 3, n: int = 4) -> dict[str, np.ndarray]:
    Delta, A, b, c, u, D = numbers(
        seed, (2, T, dv), (dv, n), (2, T, n), (2, T, n), (2, T, dv), (dv,)
    )
    return {"Delta": softplus(Delta), "A": np.exp(A), "b": b, "c": c, "u": u, "D": D}


def run(made: Any, u: np.ndarray) -> np.ndarray:
    return dsf.dsf_scan(*made, u)[0]


def test_attention_mixers_are_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("dsf__attention_mixers")
    q, k, v = (case[name] for name in "qkv")
    np.testing.assert_allclose(dsf.softmax_attention(q, k, v), case["out_softmax"], rtol=1e-10)
    np.testing.assert_allclose(dsf.linear_attention(q, k, v)[0], case["out_linear"], rtol=1e-10)
    out = dsf.normalised_attention(q, k, v, case["n"])[0]
    np.testing.assert_allclose(out, case["out_norm"], **CLOSE)


def test_qlstm_is_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("dsf__qlstm_plain")
    np.testing.assert_allclose(dsf_rnn.forget_gate(case["f"]), case["a"], **CLOSE)
    y, h = dsf.qlstm(case["f"], case["i"], case["o"], case["z"], float(case["alpha"]))
    np.testing.assert_allclose(y, sigmoid_power(case["o"]) * case["h"], **CLOSE)
    np.testing.assert_allclose(h, case["h"][:, -1], **CLOSE)
    weights = (case["p_input_weight"], case["p_conv_weight"][:, 0], case["p_conv_bias"],
               case["p_gates_weight"], case["p_gates_bias"], case["p_output_weight"])  # fmt: skip
    out, _ = dsf.qlstm_layer(case["x"], *weights, float(case["alpha"]))
    np.testing.assert_allclose(out, case["layer_out"], **CLOSE)
    first, state = dsf.qlstm_layer(case["x"][:, :2], *weights)
    rest, _ = dsf.qlstm_layer(case["x"][:, 2:], *weights, state=state)
    np.testing.assert_allclose(np.concatenate([first, rest], 1), out, **CLOSE)


@quick
@given(st.integers(0, 99), st.integers(0, 6))
def test_scan_is_the_matrix_and_keeps_its_gauge(seed: int, T: int) -> None:
    Lam, B, C, D = system(seed, T)
    u, gauges = numbers(seed + 1, (2, T, 3), (2, T, 5))
    y, _ = dsf.dsf_scan(Lam, B, C, D, u)
    Phi = dsf.dsf_matrix(Lam, B, C, D)
    np.testing.assert_allclose(y, np.einsum("bijvw,bjw->biv", Phi, u), rtol=1e-9, atol=1e-9)
    gauges = np.where(np.abs(gauges) < 0.2, 0.2, gauges)
    other = dsf.gauge(Lam, B, C, gauges)
    np.testing.assert_allclose(run((*other, D), u), y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", [1, 2])
def test_maps_of_attention(form: int) -> None:
    q, k, v, n = numbers(0, (2, 7, 4), (2, 7, 4), (2, 7, 3), (2, 7))
    phi, psi = feature_map(q), feature_map(k)
    eta = np.einsum("btn,btn->bt", phi, np.cumsum(psi, axis=1))
    made = dsf.from_attention(phi, psi, eta, 3, form)
    np.testing.assert_allclose(run(made, v), dsf.linear_attention(q, k, v)[0], **CLOSE)
    made = dsf.from_attention(q, k, np.exp(n), 3, form)
    direct = dsf.normalised_attention(q, k, v, n)[0]
    np.testing.assert_allclose(run(made, v), direct, **CLOSE)
    np.testing.assert_allclose(run(dsf.from_normalised_attention(q, k, n, 3), v), direct, **CLOSE)


def test_maps_of_state_spaces_and_rnns() -> None:
    given = s6_inputs(0)
    made = dsf.from_s6(*(given[name] for name in ("Delta", "A", "b", "c", "D")))
    np.testing.assert_allclose(run(made, given["u"]), dsf.s6_scan(**given)[0], **CLOSE)
    Delta, a = given["Delta"].swapaxes(1, 2), np.array([0.0, 0.5, 2.0])
    b, c = (np.repeat(given[x][:, None], 3, 1) for x in "bc")
    (u,) = numbers(1, (2, 3, 7, 2))
    ssd = dsf.ssd_scan(Delta, a, b, c, u)[0]
    np.testing.assert_allclose(run(dsf.from_ssd(Delta, a, b, c, 2), u), ssd, **CLOSE)
    one = dsf.from_ssd(Delta[0, 1], np.array(0.5), b[0, 1], c[0, 1], 2)
    np.testing.assert_allclose(run(one, u[0, 1]), ssd[0, 1], **CLOSE)
    f, i, o, z, lam = numbers(2, *4 * [(2, 7, 3)], (3,))
    for backwards in (False, True):
        made = dsf.from_qlstm(f, i, o, 1.7, backwards)
        np.testing.assert_allclose(run(made, z), dsf.qlstm(f, i, o, z, 1.7, backwards)[0], **CLOSE)
    made = dsf.from_rg_lru(f, i, lam)
    np.testing.assert_allclose(run(made, z), dsf.rg_lru(z, f, i, lam)[0], **CLOSE)


def test_taylor_features_tend_to_softmax() -> None:
    q, k, v = numbers(3, (1, 6, 3), (1, 6, 3), (1, 6, 2))
    s = (q @ k.swapaxes(1, 2)) / math.sqrt(3)
    for P in range(9):
        phi, psi = dsf.taylor_features(q, P), dsf.taylor_features(k, P)
        kernel = phi @ psi.swapaxes(1, 2)
        bound = np.exp(np.abs(s)) * np.abs(s) ** (P + 1) / math.factorial(P + 1)
        assert np.all(np.abs(kernel - np.exp(s)) <= bound + 1e-12)
        few = dsf.taylor_features(q, P, packed=True) @ dsf.taylor_features(
            k, P, packed=True
        ).swapaxes(1, 2)
        np.testing.assert_allclose(few, kernel, **CLOSE)
        if P == 2:
            np.testing.assert_allclose(kernel, taylor_weights(q, k), **CLOSE)
    weights = np.tril(kernel)
    out = dsf.softmax_attention(q, k, v)
    np.testing.assert_allclose(weights @ v / weights.sum(-1, keepdims=True), out, atol=1e-2)
    assert math.comb(3 + 8, 8) == dsf.taylor_features(q, 8, packed=True).shape[-1]


@quick
@given(st.floats(-50, 50), st.floats(0, 8, exclude_min=True))
def test_reversed_sigmoid(x: float, a: float) -> None:
    expected = -a * softplus(np.array(x))
    np.testing.assert_allclose(sigmoid_power(np.array(-x), a), np.exp(expected), rtol=1e-12)
    np.testing.assert_allclose((1 + math.exp(x)) ** -a, np.exp(expected), rtol=1e-8)


def test_a_gate_that_never_forgets_has_no_gradient() -> None:
    u, g, lam = numbers(31, (1, 4, 3), (1, 4, 3), (3,))
    r = np.full_like(u, -1e3)
    assert not dsf.rg_lru(u, r, g, lam)[0].any()
    for slope in dsf_rnn.rg_lru_backward(u, r, g, lam, np.ones_like(u), np.ones((1, 3)))[:4]:
        assert not slope.any()


def test_what_ssd_equals_and_what_it_does_not() -> None:
    given = s6_inputs(4)
    Delta, a = given["Delta"].swapaxes(1, 2), np.array([0.2, 0.5, 1.0])
    b, c = (np.repeat(given[x][:, None], 3, 1) for x in "bc")
    (u,) = numbers(5, (2, 3, 7, 2))
    y = dsf.ssd_scan(Delta, a, b, c, u)[0]
    q, k, v, log_decay = dsf.ssd_as_attention(Delta, a, b, c, u)
    total = np.cumsum(log_decay, -1)
    weights = np.tril(np.exp(total[..., :, None] - total[..., None, :]) * (q @ k.swapaxes(-1, -2)))
    np.testing.assert_allclose(weights @ v, y, **CLOSE)
    phi, psi, eta = dsf.ssd_as_normalised(Delta, a, b, c)
    separable = np.tril(phi @ psi.swapaxes(-1, -2)) / eta[..., None]
    np.testing.assert_allclose(separable @ u, y, **CLOSE)
    assert np.all(dsf.is_ssd(eta, psi))
    q, k = np.array([[1.0, 1.0], [0.1, 0.1]]), np.ones((2, 2))
    sums = np.cumsum(k, 0)
    assert not dsf.is_ssd(np.einsum("tn,tn->t", q, sums))
    assert dsf.is_ssd(np.einsum("n,tn->t", q[0], sums), k)
    assert not dsf.is_ssd(np.array([1.0, 1.0]), k)
    assert dsf.is_ssd(np.array([1.0, 1.0]), np.array([[1.0], [0.0]]))


def test_rows_sum_to_1_in_linear_but_not_in_normalised_attention() -> None:
    q, k, v, n = numbers(6, (1, 6, 4), (1, 6, 4), (1, 6, 2), (1, 6))
    phi, psi = feature_map(q), feature_map(k)
    eta = np.einsum("btn,btn->bt", phi, np.cumsum(psi, axis=1))
    for form in (1, 2):
        Phi = dsf.dsf_matrix(*dsf.from_attention(phi, psi, eta, 2, form))
        np.testing.assert_allclose(Phi.sum(2)[0], np.tile(np.eye(2), (6, 1, 1)), **CLOSE)
    y = dsf.linear_attention(q, k, v)[0]
    assert np.all(y <= np.maximum.accumulate(v, 1) + 1e-12)
    assert np.all(y >= np.minimum.accumulate(v, 1) - 1e-12)
    Phi = dsf.dsf_matrix(*dsf.from_normalised_attention(q, k, n, 2))
    assert np.abs(Phi.sum(2)[0] - np.eye(2)).max() > 0.1
    y = dsf.normalised_attention(q, k, v, n)[0]
    shifted = dsf.normalised_attention(q, k, v, n + 0.7)[0]
    np.testing.assert_allclose(shifted, math.exp(-0.7) * y, **CLOSE)


def test_limits_of_gates() -> None:
    (z,) = numbers(7, (2, 8, 3))
    wide = np.full_like(z, 1e3)
    np.testing.assert_allclose(dsf.qlstm(wide, wide, wide, z)[0], np.cumsum(z, 1), **CLOSE)
    np.testing.assert_allclose(dsf.qlstm(-wide, wide, wide, z)[0], z, **CLOSE)
    f, i, o = numbers(8, *3 * [z.shape])
    plain = dsf.qlstm(-f, i, o, z)[0]
    np.testing.assert_allclose(dsf.qlstm(f, i, o, z, 1.0, True)[0], plain, **CLOSE)
    np.testing.assert_allclose(dsf.qlstm(f, wide, wide, z, -2.0, True)[0], np.cumsum(z, 1), **CLOSE)
    given = s6_inputs(9)
    h0 = numbers(10, (2, 3, 4))[0]
    _, h = dsf.s6_scan(**{**given, "Delta": 0 * given["Delta"]}, h0=h0)
    np.testing.assert_array_equal(h, h0)
    fast = {**given, "Delta": np.full_like(given["Delta"], 1e6)}
    _, h = dsf.s6_scan(**fast, h0=h0)
    last = 1e6 * given["u"][:, -1, :, None] * given["b"][:, -1, None, :]
    np.testing.assert_allclose(h, last, **CLOSE)


def streams() -> dict[str, tuple[Any, dict[str, Any], str, str]]:
    """Each mixer with a state: function, arguments, the state's name, its tokens' axis."""
    q, k, v, n = numbers(11, (2, 7, 4), (2, 7, 4), (2, 7, 3), (2, 7))
    s6 = s6_inputs(12)
    f, i, o, z = numbers(13, *4 * [(2, 7, 3)])
    plain = dict(zip(("Lam", "B", "C", "D"), system(14, 7), strict=True))
    return {
        "dsf_scan": (dsf.dsf_scan, {**plain, "u": v}, "h0", ""),
        "linear": (dsf.linear_attention, {"q": q, "k": k, "v": v}, "state", ""),
        "normalised": (dsf.normalised_attention, {"q": q, "k": k, "v": v, "n": n}, "h0", ""),
        "s6": (dsf.s6_scan, s6, "h0", "A D"),
        "ssd": (
            dsf.ssd_scan,
            {"Delta": np.abs(n), "a": np.ones(2), "b": q, "c": k, "u": v}, "h0", "a"),
        "qlstm": (dsf.qlstm, {"f": f, "i": i, "o": o, "z": z, "reversed": True}, "h0", "reversed"),
        "rg_lru": (dsf.rg_lru, {"u": f, "r": i, "g": o, "lam": z[0, 0]}, "h0", "lam"),
    }  # fmt: skip


@pytest.mark.parametrize("name", streams())
@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_states_are_handed_over_and_nothing_looks_ahead(name: str, cut: int) -> None:
    function, arguments, state, whole_only = streams()[name]
    parts = []
    for rows in (slice(None, cut), slice(cut, None)):
        part = {key: x if key in whole_only.split() else x[:, rows] for key, x in arguments.items()}
        parts.append(part)
    y, last = function(**arguments)
    before, carried = function(**parts[0])
    after, end = function(**parts[1], **{state: carried})
    np.testing.assert_allclose(np.concatenate([before, after], 1), y, **CLOSE)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (end, last)), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def flat(result: Any) -> list[np.ndarray]:
    """The arrays of a result or of gradients, without those that are absent."""
    if isinstance(result, tuple):
        return [x for part in result for x in flat(part)]
    return [] if result is None else [result]


def differences(
    function: Callable[..., Any], inputs: list[np.ndarray], upstream: list[np.ndarray]
) -> Any:
    """Central finite differences of sum(upstream * function(*inputs)) in every input."""
    made = []
    for x in inputs:
        slope = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            kept, values = x[at], []
            for sign in (1, -1):
                x[at] = kept + sign * 1e-6
                outputs = flat(function(*inputs))
                values.append(sum(np.sum(g * y) for g, y in zip(upstream, outputs, strict=True)))
            x[at] = kept
            slope[at] = (values[0] - values[1]) / 2e-6
        made.append(slope)
    return made


def last_two_swapped(made: tuple[Any, ...]) -> tuple[Any, ...]:
    return *made[:-2], made[-1], made[-2]


def pairs(seed: int) -> list[np.ndarray]:
    """States of three sequences of linear attention."""
    h, z = numbers(seed, (3, 2, 2, 2), (3, 2, 2))
    return [h, 1 + np.abs(z)]


PACKED = ("linear_attention", "s6", "ssd", "qlstm", "rg_lru")


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("started", [False, True])
def test_packed_sequences_are_those_alone(name: str, started: bool) -> None:
    """Also without tokens, and beside NaN; leading axes are free."""
    ends = np.array([0, 3, 3, 7])
    q, k, v, h, z = numbers(31, *3 * [(2, 2, 7, 3)], (2, 3, 2, 3, 3), (2, 3, 2, 3))
    rates = np.abs(h[0, 0, 0])
    cells = {"f": q[0], "i": k[0], "o": v[0], "z": q[1]}
    given, shared, states = {
        "linear_attention": ({"q": q, "k": k, "v": v}, {}, {"state": (h, 1 + z * z)}),
        "s6": (
            {"Delta": np.abs(q[0]), "b": k[0], "c": v[0], "u": q[1]},
            {"A": rates, "D": rates[0]}, {"h0": h[:, :, 0]}),
        "ssd": (
            {"Delta": np.abs(q[..., 0]), "b": k, "c": q, "u": v}, {"a": rates[0, :2]}, {"h0": h}),
        "qlstm": (cells, {"reversed": True, "alpha": 1.5}, {"h0": z[:, :, 0]}),
        "rg_lru": (
            {"u": cells["z"], "r": cells["f"], "g": cells["i"]}, {"lam": rates[0]},
            {"h0": z[:, :, 0]}),
    }[name]  # fmt: skip
    alone = getattr(dsf, name if hasattr(dsf, name) else f"{name}_scan")
    packed = getattr(dsf, f"{name}_packed")
    states = states if started else {}
    y, *last = flat(packed(**given, **shared, offsets=ends, **states))
    for n, rows in enumerate(map(slice, ends[:-1], ends[1:])):
        axes = {key: -1 if key == "Delta" and x.ndim == 3 and name == "ssd" else -2
                for key, x in given.items()}  # fmt: skip
        own = {key: np.moveaxis(np.moveaxis(x, axes[key], 0)[rows], 0, axes[key])
               for key, x in given.items()}  # fmt: skip
        begun = {key: tuple(part[:, n] for part in x) if isinstance(x, tuple) else x[:, n]
                 for key, x in states.items()}  # fmt: skip
        want, *end = flat(alone(**own, **shared, **begun))
        np.testing.assert_array_equal(y[..., rows, :], want)
        for got, expected in zip(last, end, strict=True):
            np.testing.assert_array_equal(got[:, n], expected)


def gradient_cases() -> dict[str, tuple[Any, Any, list[np.ndarray]]]:
    q, k, v, n = numbers(20, (2, 3, 2), (2, 3, 2), (2, 3, 2), (2, 3))
    h, z = np.abs(numbers(21, (2, 2, 2))[0]), np.ones((2, 2))
    linear_back = dsf_mixers.linear_attention_backward
    s6 = s6_inputs(22, 3, 2, 2)
    s6_names = ("Delta", "A", "b", "c", "u", "D")
    f, i, o, x = numbers(23, *4 * [(2, 3, 2)])
    first = x[:, 0].copy()
    layer = numbers(25, (2, 3, 2), (4, 2), (2, 3), (2,), (6, 2), (6,), (2, 2))
    layer += [np.array(1.5), *numbers(26, (2, 2), (2, 2, 2))]
    ends = np.array([0, 2, 2, 3])
    h3 = numbers(27, (3, 2, 2))[0]
    return {
        "linear packed": (
            lambda q, k, v, h, z: dsf.linear_attention_packed(q, k, v, ends, (h, z)),
            lambda q, k, v, h, z, *d: dsf_batches.linear_attention_packed_backward(
                q, k, v, ends, (h, z), *d), [q, k, v, *pairs(28)]),
        "s6 packed": (
            lambda *a: dsf.s6_packed(*a[:5], ends, *a[5:]),
            lambda *a: dsf_batches.s6_packed_backward(*a[:5], ends, *a[5:]),
            [*(s6[x][0] if x not in "AD" else s6[x] for x in s6_names), h3]),
        "ssd packed": (
            lambda *a: dsf.ssd_packed(*a[:5], ends, a[5]),
            lambda *a: dsf_batches.ssd_packed_backward(*a[:5], ends, *a[5:]),
            [np.abs(n) + 0.1, np.array([0.3, 2.0]), q, k, v, pairs(29)[0]]),
        "qlstm packed": (
            lambda *a: dsf.qlstm_packed(*a[:4], ends, a[4], True, a[5]),
            lambda *a: dsf_rnn_batches.qlstm_packed_backward(
                *a[:4], ends, *a[5:], alpha=a[4], reversed=True),
            [f[0], i[0], o[0], x[0], np.array(1.5), h3[0].repeat(2, 0)[:3].copy()]),
        "rg_lru packed": (
            lambda *a: dsf.rg_lru_packed(*a[:4], ends, h0=a[4]),
            lambda *a: dsf_rnn_batches.rg_lru_packed_backward(
                *a[:4], ends, *a[5:], h0=a[4]),
            [x[0], f[0], i[0], first[0].copy(), h3[1].repeat(2, 0)[:3].copy()]),
        "dsf_scan": (dsf.dsf_scan, dsf_scan_backward, [*system(24, 3, 2, 2), v, first]),
        "softmax": (
            lambda *a: (dsf.softmax_attention(*a),),
            dsf_mixers.softmax_attention_backward, [q, k, v]),
        "linear": (
            lambda q, k, v, h, z: dsf.linear_attention(q, k, v, (h, z)),
            lambda q, k, v, h, z, *d: linear_back(q, k, v, (h, z), *d), [q, k, v, h, z]),
        "linear without a state": (
            dsf.linear_attention, lambda q, k, v, *d: linear_back(q, k, v, None, *d), [q, k, v]),
        "normalised": (
            dsf.normalised_attention, dsf_mixers.normalised_attention_backward, [q, k, v, n, h]),
        "s6": (dsf.s6_scan, dsf_ssm.s6_scan_backward, [*(s6[x] for x in s6_names), h]),
        "ssd": (
            dsf.ssd_scan, dsf_ssm.ssd_scan_backward,
            [np.abs(n) + 0.1, np.array([0.3, 2.0]), q, k, v, h]),
        "qlstm": (
            lambda *a: dsf.qlstm(*a[:4], a[5], False, a[4]),
            lambda *a: last_two_swapped(dsf_rnn.qlstm_backward(*a[:5], *a[6:], alpha=a[5])),
            [f, i, o, x, first, np.array(1.5)]),
        "qlstm reversed": (
            lambda *a: dsf.qlstm(*a, True),
            lambda *a: dsf_rnn.qlstm_backward(
                *a[:4], None, *a[5:], alpha=a[4], reversed=True),
            [f, i, o, x, np.array(1.5)]),
        "qlstm that grows": (
            lambda *a: dsf.qlstm(*a, True),
            lambda *a: dsf_rnn.qlstm_backward(
                *a[:4], None, *a[5:], alpha=a[4], reversed=True),
            [f, i, o, x, np.array(-1.5)]),
        "qlstm_layer": (
            lambda *a: dsf.qlstm_layer(*a[:8], True, (a[8], a[9])),
            lambda *a: dsf_layer.qlstm_layer_backward(
                *a[:7], (a[8], a[9]), *a[10:], alpha=a[7], reversed=True), layer),
        "qlstm_layer without a state": (
            dsf.qlstm_layer,
            lambda *a: dsf_layer.qlstm_layer_backward(*a[:7], None, *a[7:])[:7], layer[:7]),
        "rg_lru": (
            lambda *a: dsf.rg_lru(*a[:4], h0=a[4]),
            lambda *a: dsf_rnn.rg_lru_backward(*a[:4], *a[5:], h0=a[4]),
            [x, f, i, first[0].copy(), first]),
        "elementwise_scan": (
            dsf.elementwise_scan, elementwise_scan_backward, [2 * f, x, first]),
    }  # fmt: skip


@pytest.mark.parametrize("name", gradient_cases())
def test_gradients_are_finite_differences(name: str) -> None:
    function, backward, inputs = gradient_cases()[name]
    upstream = numbers(30, *(y.shape for y in flat(function(*inputs))))
    got = flat(backward(*inputs, *upstream))
    expected = differences(function, inputs, upstream)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@quick
@given(st.integers(0, 99), st.integers(1, 5), st.booleans())
def test_recall_task(seed: int, P: int, random_fill: bool) -> None:
    V, L = 64, 4 * P + 2
    inputs, labels = dsf.mqar_batch(np.random.default_rng(seed), V, L, P, 4, random_fill)
    for row, asked in zip(inputs, labels, strict=True):
        keys, values = row[0 : 2 * P : 2], row[1 : 2 * P : 2]
        assert len(set(keys)) == P
        assert len(set(values)) == P
        assert np.all((keys >= 1) & (keys < V // 2))
        assert np.all((values >= V // 2) & (values < V))
        places = np.flatnonzero(asked != -100)
        assert len(places) == P
        assert places[0] > 2 * P - 1
        bound = dict(zip(keys, values, strict=True))
        assert [bound[key] for key in row[places]] == asked[places].tolist()
        assert len(set(row[places])) == P
        assert random_fill or np.count_nonzero(row[2 * P :]) == P
    near = dsf.mqar_batch(np.random.default_rng(seed), 256, 128, 1, 200)[1]
    place = np.argmax(near != -100, axis=1)
    assert np.median(place) < 40
    hits = np.where(labels == -100, 0, labels)
    assert dsf.mqar_accuracy(np.eye(V)[hits], labels) == 1
    assert dsf.mqar_accuracy(np.eye(V)[(hits + 1) % V], labels) == 0
    assert np.isnan(dsf.mqar_accuracy(np.eye(V)[hits], np.full_like(labels, -100)))


one = np.ones((2, 3, 1))
mats = one[..., None]


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("dsf_scan", (one, mats, mats, None, one[:1]), ValueError, "u: got shape"),
        ("dsf_scan", ([1.0], mats, mats, None, one), TypeError, "Lam: got list"),
        ("dsf_scan", (one, mats, mats, None, one, one), ValueError, "h0: got shape"),
        ("dsf_matrix", (one, mats, mats[:1]), ValueError, "C: got shape"),
        ("dsf_matrix", (one, mats, mats, one), ValueError, "D: got shape"),
        ("gauge", (one, mats, mats, 0 * one), ValueError, "T: got a 0"),
        ("from_attention", (one, one, 0 * one[..., 0], 1), ValueError, "eta: got a value of 0"),
        ("from_attention", (one, one, one[..., 0], 0), ValueError, "dv: got 0"),
        ("from_attention", (one, one, one[..., 0], 1, 3), ValueError, "form: got 3"),
        ("from_normalised_attention", (one, one, one, 1), ValueError, "n: got shape"),
        ("from_s6", (-one, one[0, :1], one, one), ValueError, "Delta: got a value below 0"),
        ("from_ssd", (one[..., 0], one, one, one, 1), ValueError, "a: got shape"),
        ("from_qlstm", (one, one, one, "1"), TypeError, "alpha: got str"),
        ("from_rg_lru", (one, one, one), ValueError, "lam: got shape"),
        ("taylor_features", (one, -1), ValueError, "P: got -1"),
        ("taylor_features", (one, 1, 1), TypeError, "packed: got 1"),
        ("softmax_attention", (one, one[:1], one[:1]), ValueError, "k: got"),
        ("linear_attention", (one, one, one, one), TypeError, "state: got ndarray"),
        ("normalised_attention", (one, one, one, one), ValueError, "n: got shape"),
        ("s6_scan", (one, -one[0, :1], one, one, one), ValueError, "A: got a value below 0"),
        ("s6_scan", (one, one[0, :1], one, one, one, one), ValueError, "D: got shape"),
        ("ssd_scan", (one[..., 0], one[0, 0], one, one, one), ValueError, "a: got shape"),
        ("ssd_as_attention", (one[..., 0], -one[:, 0, 0], one, one, one), ValueError, "a: got a"),
        ("ssd_as_normalised", (one, one, one, one), ValueError, "a: got shape"),
        ("is_ssd", (0 * one,), ValueError, "eta: got a value"),
        ("qlstm", (one, one, one, one[:1]), ValueError, "z: got shape"),
        ("qlstm", (one, one, one, one, 1.0, 0), TypeError, "reversed: got 0"),
        ("qlstm", (one, one, one, one, float("nan")), ValueError, "alpha: got nan"),
        ("rg_lru", (one, one, one, one), ValueError, "lam: got shape"),
        ("qlstm_packed", (*4 * [one], np.array([0, 2])), ValueError, "offsets: got"),
        ("qlstm_packed", (*4 * [one], np.array([0, 3]), 1.0, False, one), ValueError, "h0: got"),
        ("s6_packed", (one, one[0, :1], *3 * [one], [0, 3]), TypeError, "offsets: got list"),
        ("linear_attention_packed", (*3 * [one], np.array([0, 3]), one), TypeError, "state: got"),
        ("elementwise_scan", (one, one[:1]), ValueError, "x: got shape"),
        ("mqar_batch", (0, 64, 16, 2, 1), TypeError, "rng: got int"),
        ("mqar_sequences", (one, one, one, 4), TypeError, "keys: got dtype"),
        ("mqar_accuracy", (one, one[..., 0]), TypeError, "labels: got dtype"),
    ],
)
def test_bad_input(
    name: str, arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(dsf, name)(*arguments)
