"""TempScale against outside evidence, its own properties and bad input."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.dense.attention import attend as dense
from attnspec.reference.scores import tempscale
from attnspec.reference.scores.tempscale_collapse import (
    attention_entropy,
    centre_distance,
    dc,
    filter_gain,
    gaussian_gain,
    hc,
    pairwise_cosine,
    retention,
    token_spectrum,
)

quick = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 999)
taus = st.sampled_from([0.1, 0.5, 0.8, 0.9, 1.0, 1.7, 5.0])
attention = tempscale.tempered_attention


def tokens(seed: int = 0, T: int = 6, S: int = 6, H: int = 4, Hk: int = 2, d: int = 4) -> Any:
    random = np.random.default_rng(seed)
    return tuple(
        random.standard_normal((2, *shape)) for shape in ((H, T, d), (Hk, S, d), (Hk, S, 3))
    )


def stochastic(seed: int, T: int, causal: bool = False) -> np.ndarray:
    z = 2 * np.random.default_rng(seed).standard_normal((1, T, T))
    return tempscale.softmax_rows(z, np.tri(T, dtype=bool) if causal else None)[0]


@pytest.mark.parametrize("name", ["bert_tau1", "bert_tau05"])
def test_outputs_are_those_of_the_authors(name: str, golden: Callable[[str], Any]) -> None:
    case = golden(f"tempscale__{name}")
    tau, mask = case["meta"]["temperature"], case["additive_mask"] == 0
    z = tempscale.temper(tempscale.scores(case["q"], case["k"]), tau)
    np.testing.assert_allclose(tempscale.softmax_rows(z, mask), case["probs"], atol=1e-10)
    out, _ = attention(case["q"], case["k"], case["v"], tau=tau, mask=mask)
    merged = np.swapaxes(out, 1, 2).reshape(case["out"].shape)
    np.testing.assert_allclose(merged, case["out"], atol=1e-10)


@quick
@given(seeds, taus, st.booleans())
def test_the_temperature_acts_through_the_scale_alone(seed: int, tau: float, causal: bool) -> None:
    q, k, v = tokens(seed)
    out, lse = attention(q, k, v, tau=tau, causal=causal)
    plain = dense(q, k, v, causal=causal, scale=0.5 / tau)
    for again in (
        plain,
        attention(q / tau, k, v, causal=causal),
        attention(q, k / tau, v, causal=causal),
        attention(q, k, v, tau=np.full(4, tau), causal=causal),
    ):
        np.testing.assert_allclose(again[0], out, atol=1e-12)
        np.testing.assert_allclose(again[1], lse, atol=1e-12)


def test_each_head_has_its_temperature() -> None:
    q, k, v = tokens()
    tau = np.array([0.5, 0.8, 1.0, 2.0])
    out, _ = attention(q, k, v, tau=tau)
    for h in range(4):
        alone, _ = attention(
            q[:, h : h + 1], k[:, h // 2 : h // 2 + 1], v[:, h // 2 : h // 2 + 1], tau=tau[h]
        )
        np.testing.assert_allclose(out[:, h], alone[:, 0], atol=1e-12)


def test_the_limits_of_the_temperature() -> None:
    z = np.array([[[1.0, 3.0, 3.0, -2.0]]])
    cold = tempscale.softmax_rows(tempscale.temper(z, 1e-3))
    np.testing.assert_allclose(cold, [[[0, 0.5, 0.5, 0]]], atol=1e-12)
    hot = tempscale.softmax_rows(tempscale.temper(z, 1e12), np.array([True, True, True, False]))
    np.testing.assert_allclose(hot, [[[1 / 3, 1 / 3, 1 / 3, 0]]], atol=1e-9)
    q, k, v = tokens()
    out, _ = attention(q, k, v, tau=1e12)
    np.testing.assert_allclose(hc(out), 0, atol=1e-9)
    hot = tempscale.softmax_rows(tempscale.temper(tempscale.scores(q, k), 1e12))
    np.testing.assert_allclose(filter_gain(hot), 0, atol=1e-9)


@quick
@given(seeds, st.booleans())
def test_rows_flatten_as_the_temperature_rises(seed: int, causal: bool) -> None:
    z = np.random.default_rng(seed).standard_normal((2, 5, 5))
    mask = np.tri(5, dtype=bool) if causal else None
    rows = [tempscale.softmax_rows(tempscale.temper(z, t), mask) for t in (0.1, 0.5, 1.0, 2.0, 9.0)]
    for cooler, warmer in itertools.pairwise(rows):
        assert np.all(attention_entropy(cooler) <= attention_entropy(warmer) + 1e-12)
        assert np.all(cooler.max(axis=-1) >= warmer.max(axis=-1) - 1e-12)
        assert np.all(attention_entropy(cooler)[:, -1] < attention_entropy(warmer)[:, -1])
    equal = np.full((1, 2, 5), 3.0)
    same = [attention_entropy(tempscale.softmax_rows(tempscale.temper(equal, t))) for t in (0.1, 9)]
    np.testing.assert_allclose(same[0], same[1], rtol=1e-12)


@quick
@given(seeds, taus)
def test_rows_sum_to_one_and_do_not_see_a_constant(seed: int, tau: float) -> None:
    random = np.random.default_rng(seed)
    z = random.standard_normal((2, 5, 5))
    P = tempscale.softmax_rows(tempscale.temper(z, tau))
    np.testing.assert_allclose(P.sum(axis=-1), 1)
    moved = tempscale.temper(z + random.standard_normal((2, 5, 1)), tau)
    np.testing.assert_allclose(tempscale.softmax_rows(moved), P, atol=1e-12)


def test_t5_without_bias_is_bert_and_its_bias_is_tempered() -> None:
    q, k, v = tokens()
    bias = np.random.default_rng(1).standard_normal((4, 6, 6))
    expected = attention(q, k, v, tau=0.5)[0]
    np.testing.assert_allclose(attention(q / 2, k, v, tau=0.5, scale=1.0)[0], expected, atol=1e-12)
    folded = attention(q, k, v, scale=0.5 / 0.8, bias=bias / 0.8)[0]
    np.testing.assert_allclose(attention(q, k, v, tau=0.8, bias=bias)[0], folded, atol=1e-12)


def test_decoding_is_the_last_row_and_causal() -> None:
    q, k, v = tokens()
    whole, _ = attention(q, k, v, tau=0.8, causal=True)
    for t in range(6):
        seen = (k[..., : t + 1, :], v[..., : t + 1, :])
        row, _ = attention(q[..., t : t + 1, :], *seen, tau=0.8, causal=True)
        np.testing.assert_allclose(row, whole[..., t : t + 1, :], atol=1e-12)


def test_keys_permuted_and_hidden_nan() -> None:
    q, k, v = tokens()
    order = np.array([3, 1, 5, 0, 2, 4])
    out, _ = attention(q, k, v, tau=0.8)
    again, _ = attention(q, k[..., order, :], v[..., order, :], tau=0.8)
    np.testing.assert_allclose(again, out, atol=1e-12)
    np.testing.assert_allclose(
        attention(q[..., order, :], k, v, tau=0.8)[0], out[..., order, :], atol=1e-12
    )
    k[..., 5, :], v[..., 5, :] = np.nan, np.nan
    mask = np.arange(6) < 5
    out, lse = attention(q, k, v, tau=0.8, mask=mask)
    assert np.all(np.isfinite(out))
    assert np.all(np.isfinite(lse))
    blind, lse = attention(q, k, v, tau=0.01, mask=np.zeros(6, bool))
    assert np.all(blind == 0)
    assert np.all(np.isneginf(lse))


@pytest.mark.parametrize("tau", [0.7, np.array([0.5, 0.8, 1.0, 2.0])], ids=["model", "head"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(tau: Any, causal: bool) -> None:
    q, k, v = inputs = tokens(T=4, S=5)
    random = np.random.default_rng(3)
    bias = random.standard_normal((4, 4, 5))
    options: dict[str, Any] = {"tau": tau, "causal": causal, "bias": bias, "scale": 0.6}
    out, lse = attention(q, k, v, **options)
    dout, dlse = random.standard_normal(out.shape), random.standard_normal(lse.shape)
    gradients = tempscale.tempered_attention_backward(q, k, v, dout, dlse, **options)
    step = 1e-6

    def loss(*qkv: np.ndarray, **changed: Any) -> Any:
        o, l_ = attention(*qkv, **{**options, **changed})
        return np.sum(o * dout) + np.sum(l_ * dlse)

    for n, gradient in enumerate(gradients):
        direction = random.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[n] = inputs[n] + sign * step * direction
            ends.append(loss(*moved))
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6)

    z = tempscale.scores(q, k, 0.6, bias)
    allowed = np.tri(4, 5, 1, dtype=bool) if causal else np.ones((4, 5), bool)
    P = tempscale.softmax_rows(tempscale.temper(z, tau), allowed)
    values = np.repeat(v, 2, axis=1)
    row = np.sum(dout * out, axis=-1) - dlse
    dtempered = P * (dout @ np.swapaxes(values, -1, -2) - row[..., None])
    dz, dtau = tempscale.temper_backward(z, tau, dtempered)
    np.testing.assert_allclose(0.6 * dz @ np.repeat(k, 2, axis=1), gradients[0], atol=1e-12)
    for h in range(np.size(tau)):
        nudge = np.zeros(np.shape(tau))
        nudge[(h,) * np.ndim(tau)] = step
        ends = [
            loss(q, k, v, tau=tau + s * nudge if np.ndim(tau) else tau + s * step) for s in (1, -1)
        ]
        np.testing.assert_allclose(
            dtau[(h,) * np.ndim(tau)], (ends[0] - ends[1]) / (2 * step), rtol=1e-6
        )


def test_hidden_scores_have_no_part_in_the_gradient_of_tau() -> None:
    z, dtempered = np.array([[[1.0, np.nan]]]), np.array([[[2.0, 0.0]]])
    _, dtau = tempscale.temper_backward(z, 0.5, dtempered)
    assert dtau == -8.0


@quick
@given(seeds, st.integers(1, 12), st.booleans())
def test_the_gain_bounds_what_a_filter_keeps(seed: int, T: int, causal: bool) -> None:
    A, B = stochastic(seed, T, causal), stochastic(seed + 1, T, causal)
    X = np.random.default_rng(seed).standard_normal((T, 4))
    gain = filter_gain(A)
    assert np.linalg.norm(hc(A @ X)) <= gain * np.linalg.norm(hc(X)) + 1e-12
    assert retention(A, X) <= gain + 1e-12
    assert 0 <= gain <= np.linalg.norm(A, 2) + 1e-12
    assert filter_gain(B @ A) <= filter_gain(B) * gain + 1e-12


def test_the_gain_of_known_filters() -> None:
    assert filter_gain(np.full((5, 5), 0.2)) < 1e-12
    assert filter_gain(np.eye(1)) == 0
    np.testing.assert_allclose(filter_gain(np.eye(5)), 1)
    assert filter_gain(np.eye(3, dtype=np.float16)).dtype == np.float16
    A = np.array([[1.0, 0.0], [0.9, 0.1]])
    assert not np.isclose(filter_gain(A), filter_gain(A.T))


@quick
@given(seeds, st.integers(1, 9))
def test_the_split_is_orthogonal(seed: int, T: int) -> None:
    random = np.random.default_rng(seed)
    X = random.standard_normal((2, T, 3))
    np.testing.assert_allclose(dc(hc(X)), 0, atol=1e-12)
    np.testing.assert_allclose(hc(hc(X)), hc(X), atol=1e-12)
    np.testing.assert_allclose(np.sum(X**2), np.sum(dc(X) ** 2) + np.sum(hc(X) ** 2))
    np.testing.assert_allclose(hc(X + random.standard_normal(3)), hc(X), atol=1e-12)


def test_constant_tokens_keep_nothing() -> None:
    assert retention(stochastic(0, 3), np.full((3, 2), 0.1)) == 0
    assert retention(np.eye(1), np.ones((1, 2))) == 0


@pytest.mark.parametrize("T", [1, 2, 5, 8])
def test_the_spectrum_is_a_fourier_transform(T: int) -> None:
    A = stochastic(T, T)
    s = np.abs(np.fft.rfft(A, axis=0)).mean(axis=1)
    np.testing.assert_allclose(token_spectrum(A), s / s[0], atol=1e-12)
    np.testing.assert_allclose(s[0], 1)
    assert np.all(token_spectrum(np.zeros((T, T))) == 0)


def test_a_lower_temperature_lets_more_through() -> None:
    q, k, _ = tokens(T=24, S=24)
    z = tempscale.scores(q, k)
    gains = [filter_gain(tempscale.softmax_rows(tempscale.temper(z, t))) for t in (0.5, 0.8, 1.0)]
    assert np.all(gains[0] > gains[1])
    assert np.all(gains[1] > gains[2])


def test_collapse_scores() -> None:
    E = np.random.default_rng(0).standard_normal((6, 4))
    unit = E / np.linalg.norm(E, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(6) for j in range(i + 1, 6)]
    np.testing.assert_allclose(pairwise_cosine(E), np.mean(pairs))
    np.testing.assert_allclose(pairwise_cosine(np.ones((3, 2))), 1)
    assert pairwise_cosine(np.array([[0.0, 0.0], [1.0, 0.0]])) == 0
    away = np.linalg.norm(E - E.mean(axis=0), axis=1)
    np.testing.assert_allclose(centre_distance(E), away.mean())
    assert gaussian_gain(512, 1.0) < gaussian_gain(64, 1.0)


def test_float32_stays_float32() -> None:
    q, k, v = (x.astype(np.float32) for x in tokens())
    for tau in (0.8, np.float64(0.8), np.full(4, 0.8, np.float32)):
        out, lse = attention(q, k, v, tau=tau, scale=np.float64(0.3))
        assert out.dtype == lse.dtype == np.float32
        grads = tempscale.tempered_attention_backward(q, k, v, out, lse, tau=tau)
        assert all(x.dtype == np.float32 for x in grads)
    A = stochastic(0, 5).astype(np.float32)
    X = q[0, 0, :5]
    results = (dc(X), hc(X), filter_gain(A), retention(A, X), token_spectrum(A))
    results = (*results, attention_entropy(A), pairwise_cosine(X), centre_distance(X))
    assert all(x.dtype == np.float32 for x in results)


Q, K, V = tokens()
Z, FILTER = np.zeros((2, 3, 3)), np.eye(3)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: attention(Q, K, V, tau=0.0), ValueError, "tau"),
        (lambda: attention(Q, K, V, tau=float("nan")), ValueError, "tau"),
        (lambda: attention(Q, K, V, tau="1"), TypeError, "tau"),
        (lambda: attention(Q, K, V, tau=True), TypeError, "tau"),
        (lambda: attention(Q, K, V, tau=np.ones(3)), ValueError, "tau"),
        (lambda: attention(Q, K, V, tau=np.zeros(4)), ValueError, "tau"),
        (lambda: attention(Q, K, V, tau=np.ones(4, np.float32)), TypeError, "tau"),
        (lambda: attention(Q, K, V, scale=-1.0), ValueError, "scale"),
        (lambda: attention(Q, K, V, bias=np.ones((3, 1))), ValueError, "bias"),
        (lambda: attention(Q, K, V, bias=np.ones((1, 1, 1, 1, 1))), ValueError, "bias"),
        (lambda: attention(Q, K, V, bias=np.ones(6, np.float32)), TypeError, "bias"),
        (lambda: attention(Q, K, V, mask=np.ones(6)), TypeError, "mask"),
        (lambda: attention(Q, K[..., :3], V), ValueError, "k"),
        (lambda: tempscale.scores(Q, K, scale=0.0), ValueError, "scale"),
        (lambda: tempscale.temper(Z[0], 0.5), ValueError, "scores"),
        (lambda: tempscale.temper(Z, np.ones(3)), ValueError, "tau"),
        (lambda: tempscale.temper_backward(Z, 1.0, Z[0]), ValueError, "dout"),
        (lambda: tempscale.temper_backward(Z, 1.0, Z[:1]), ValueError, "dout"),
        (lambda: tempscale.temper_backward(Z[0], 1.0, Z), ValueError, "scores"),
        (lambda: tempscale.softmax_rows([[[1.0]]]), TypeError, "scores"),  # type: ignore[arg-type]
        (lambda: tempscale.softmax_rows(Z, np.ones((2, 2), bool)), ValueError, "mask"),
        (lambda: tempscale.attend(Z, Z[:, :2]), ValueError, "v"),
        (lambda: tempscale.attend(Z, Z.astype(np.float32)), TypeError, "v"),
        (lambda: tempscale.attend(Z[None], Z), ValueError, "v"),
        (lambda: tempscale.attend(Z, np.zeros((3, 3, 3))), ValueError, "v"),
        (lambda: dc(np.zeros((0, 3))), ValueError, "X"),
        (lambda: hc(np.zeros(3)), ValueError, "X"),
        (lambda: filter_gain(np.zeros((2, 3))), ValueError, "A"),
        (lambda: retention(FILTER, np.ones((2, 3))), ValueError, "X"),
        (lambda: retention(FILTER, np.ones((1, 3, 3))), ValueError, "X"),
        (lambda: retention(FILTER, np.ones((3, 3), np.float32)), TypeError, "X"),
        (lambda: token_spectrum(np.ones((2, 2), int)), TypeError, "A"),
        (lambda: attention_entropy(-FILTER), ValueError, "P"),
        (lambda: pairwise_cosine(np.ones((1, 3))), ValueError, "E"),
        (lambda: centre_distance(np.ones((0, 3))), ValueError, "E"),
        (lambda: gaussian_gain(1, 1.0), ValueError, "T"),
        (lambda: gaussian_gain(8, -1.0), ValueError, "variance"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}: got .*expected"):
        call()
