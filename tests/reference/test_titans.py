"""Titans: golden cases, the rule against its chunk forms, properties, gradients, bad inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec.reference.linear.lightning_attention_2 import attend_recurrent
from attnspec.reference.linear.titans import (
    decode_step,
    gate,
    mac_segment,
    mag,
    mal,
    memory_grad,
    mlp_memory,
    persistent_prefix,
    titans_chunk_granular,
    titans_chunk_linear,
    titans_chunk_linear_backward,
    titans_chunk_mlp,
    titans_chunk_mlp_backward,
    titans_coefficients,
    titans_coefficients_backward,
    titans_mask_mac,
    titans_mask_mag,
    titans_sequential,
    token_inputs,
    token_step_sizes,
)
from attnspec.reference.linear.titans_coefficients import coefficients
from attnspec.reference.linear.titans_sequential import MemoryState

Layers = tuple[np.ndarray, ...]


def draw(
    seed: int, T: int, depth: int = 1, *, batch: int = 2, kv_heads: int = 2, group: int = 2,
    d: int = 3, hidden: int = 5, dv: int = 4,
) -> tuple[Layers, Layers, np.ndarray, np.ndarray, np.ndarray, Layers]:  # fmt: skip
    rng = np.random.default_rng(seed)
    widths = [d, *[hidden] * (depth - 1), dv]
    W = tuple(
        0.5 * rng.standard_normal((batch, kv_heads, a, b)) for a, b in itertools.pairwise(widths)
    )
    S = tuple(0.1 * rng.standard_normal(w.shape) for w in W)
    k = 0.5 * rng.standard_normal((batch, kv_heads, T, d))
    v = rng.standard_normal((batch, kv_heads, T, dv))
    q = rng.standard_normal((batch, kv_heads * group, T, d))
    rates = tuple(rng.uniform(0, top, (batch, kv_heads, T)) for top in (0.3, 1.0, 0.5))
    return W, S, k, v, q, rates


def close(got: Any, expected: Any, atol: float = 1e-10) -> None:
    for x, y in zip(_leaves(got), _leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


def _leaves(x: Any) -> list[np.ndarray]:
    return [leaf for item in x for leaf in _leaves(item)] if isinstance(x, tuple) else [x]


def numeric_gradient(f: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    gradient, h = np.zeros_like(x), 1e-6
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        gradient[index] = (f(x + step) - f(x - step)) / (2 * h)
    return gradient


def test_golden_coefficients(golden: Callable[[str], dict[str, Any]]) -> None:
    g = golden("titans__chunk_coefficients")
    of = titans_coefficients(g["theta"], g["eta"], g["alpha"])
    close((of.beta, of.G, of.G[..., -1, :]), (g["beta"], g["G"], g["g"]))
    close((of.m[..., -1], of.n[..., -1, :]), (g["m_T"], g["n_T"]))
    close((of.beta[..., -1], of.f[..., -1]), (g["beta_T"], g["f_T"]), atol=2e-7)
    close(of.f, g["f"], atol=2e-7)


@pytest.mark.parametrize("case", ["linear_chunk4", "mlp2_nomomentum"])
def test_golden_granular(case: str, golden: Callable[[str], dict[str, Any]]) -> None:
    g = golden(f"titans__lucidrains_{case}")
    layers = range(g["meta"]["depth"])
    k, v, q, theta, alpha = (g[name][:, None] for name in ("k", "v", "q", "theta", "alpha"))
    eta = g["eta"][:, None] if "eta" in g else 0 * alpha
    first = tuple(g[f"W{i}_init"][0] if g[f"W{i}_init"].ndim == 3 else g[f"W{i}_init"]
                  for i in layers)  # fmt: skip
    y, W, S, path = titans_chunk_granular(
        first, None, k, v, q, theta, eta, alpha, g["meta"]["chunk"], loss_scale=2 / k.shape[-1]
    )
    close(y[:, 0], g["out"])
    close(tuple(p[:, 0] for p in path), tuple(g[f"W{i}_after_each_chunk"] for i in layers))
    close(W, tuple(p[:, :, -1] for p in path), atol=0)
    if "S0_final" in g:
        close(S[0][:, 0], g["S0_final"])


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("T", "b"), [(7, 3), (5, 5), (4, 1), (6, 8), (0, 2)])
@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
def test_chunks_equal_the_rule(depth: int, T: int, b: int, read: str) -> None:
    inputs = draw(depth, T, depth)
    for valid in (None, np.random.default_rng(T).random((2, T)) < 0.6):
        options: dict[str, Any] = {"read": read, "loss_scale": 1.3, "valid": valid}
        expected = titans_sequential(*inputs, b, **options)
        close(titans_chunk_mlp(*inputs, b, **options), expected)
        if depth == 1:
            W, S, *rest = inputs
            y, last_W, last_S = titans_chunk_linear(W[0], S[0], *rest, b, **options)
            close((y, (last_W,), (last_S,)), expected)


def test_limits_of_the_coefficients() -> None:
    rng = np.random.default_rng(0)
    theta, eta, alpha = rng.uniform(0.1, 0.9, (3, 6))
    lower = np.tri(6)
    of = titans_coefficients(theta, 0 * eta, alpha)
    close((of.m, of.f, of.n), (0 * eta, 0 * eta, np.diag(theta)))
    close(of.G, lower * theta * of.beta[:, None] / of.beta)
    of = titans_coefficients(theta, eta, 0 * alpha)
    rates = [[sum(np.prod(eta[j + 1 : i + 1]) for i in range(j, t + 1)) for j in range(6)]
             for t in range(6)]  # fmt: skip
    close(of.G, lower * theta * np.array(rates))
    of = titans_coefficients(theta, 0 * eta, 0 * alpha)
    close(of.G, lower * theta)


def test_decayed_linear_attention() -> None:
    W, _, k, v, q, (theta, _, _) = draw(1, 9)
    alpha = np.full((2, 2, 9), 0.2)
    first = 0 * W[0]
    y, _, _ = titans_chunk_linear(first, None, k, v, q, (theta, 0.0, alpha), 9, loss_scale=1.5)
    slopes = np.full(4, -np.log(0.8))
    expected, _ = attend_recurrent(q, k, 1.5 * theta[..., None] * v, slopes)
    close(y, expected)
    rates = (theta, np.full((2, 2, 9), 0.5), alpha)
    of = titans_coefficients(*rates)
    y, _, _ = titans_chunk_linear(first, None, k, v, q, rates, 99, loss_scale=1.5)
    kernel = 1.5 * np.repeat(of.G, 2, axis=1) * (q @ np.swapaxes(np.repeat(k, 2, 1), -1, -2))
    close(y, kernel @ np.repeat(v, 2, axis=1))


def delta_rule(W: np.ndarray, k: np.ndarray, v: np.ndarray, step: np.ndarray) -> np.ndarray:
    for t in range(k.shape[-2]):
        key, value = k[..., t : t + 1, :], v[..., t : t + 1, :]
        W = W + step[..., t, None, None] * np.swapaxes(key, -1, -2) * (value - key @ W)
    return W


def test_delta_rule_and_recall() -> None:
    W, _, k, v, q, (theta, _, alpha) = draw(2, 6)
    _, got, _ = titans_chunk_linear(W[0], None, k, v, q, (theta, 0.0, 0.0), 1)
    close(got, delta_rule(W[0], k, v, 2 * theta))
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    _, got, _ = titans_chunk_linear(W[0], None, unit, v, q, (0.5, 0.0, 0.0), 1)
    close(unit[..., -1:, :] @ got, v[..., -1:, :])
    gated = W[0]
    for t in range(6):
        gated = (1 - alpha[..., t, None, None]) * gated
        gated = delta_rule(gated, k[..., t : t + 1, :], v[..., t : t + 1, :],
                           2 * theta[..., t : t + 1])  # fmt: skip
    _, got, _ = titans_chunk_linear(W[0], None, k, v, q, (theta, 0.0, alpha), 1)
    assert np.abs(got - gated).max() > 1e-3


def test_orthonormal_keys_are_all_recalled() -> None:
    _, _, _, v, q, _ = draw(3, 3)
    k = np.broadcast_to(np.eye(3), (2, 2, 3, 3)).copy()
    _, W, _ = titans_chunk_linear(np.zeros((3, 4)), None, k, v, q, (0.5, 0.0, 0.0), 1)
    close(k @ W, v)


def test_one_step_shrinks_the_residual() -> None:
    W, _, k, v, q, _ = draw(4, 1)
    for theta in (0.01, 0.3):
        _, got, _ = titans_chunk_linear(W[0], None, k, v, q, (theta, 0.0, 0.0), 1)
        shrink = 1 - 2 * theta * np.sum(k * k, axis=-1)[..., None]
        close(v - k @ got, shrink * (v - k @ W[0]))


def test_nothing_learned_and_everything_forgotten() -> None:
    W, _, k, v, q, (theta, eta, alpha) = draw(5, 5)
    _, got, S = titans_chunk_linear(W[0], None, k, v, q, (0.0, eta, alpha), 2)
    close((got, S), (titans_coefficients(theta, eta, alpha).beta[..., -1, None, None] * W[0],
                     0 * W[0]))  # fmt: skip
    alpha = alpha.copy()
    alpha[..., -1] = 1
    last_eta = eta.copy()
    last_eta[..., -1] = 0
    _, got, _ = titans_chunk_linear(W[0], None, k, v, q, (theta, last_eta, alpha), 5)
    (H,), (Delta,) = memory_grad(W, k[..., -1:, :], v[..., -1:, :])
    close(got, -theta[..., -1, None, None] * np.swapaxes(H, -1, -2) * Delta)


def test_chunks_matter_but_not_how_calls_are_cut() -> None:
    W, S, k, v, q, rates = draw(6, 8, 2)
    one, whole = (titans_chunk_mlp(W, S, k, v, q, rates, b)[0] for b in (1, 8))
    close(one[..., 0, :], whole[..., 0, :])
    assert np.abs(one[..., 1:, :] - whole[..., 1:, :]).max() > 1e-3
    expected = titans_chunk_mlp(W, S, k, v, q, rates, 4)
    first = titans_chunk_mlp(W, S, *(x[..., :4, :] for x in (k, v, q)),
                             tuple(x[..., :4] for x in rates), 4)  # fmt: skip
    second = titans_chunk_mlp(*first[1:], *(x[..., 4:, :] for x in (k, v, q)),
                              tuple(x[..., 4:] for x in rates), 4)  # fmt: skip
    close((np.concatenate([first[0], second[0]], axis=-2), *second[1:]), expected)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("period", [1, 3, 4, None])
def test_granules_of_one_token_are_the_rule(depth: int, period: int | None) -> None:
    W, S, k, v, q, rates = draw(20, 7, depth)
    got = titans_chunk_granular(W, S, k, v, q, *rates, 1, period, 1.3)
    close(got[:3], titans_sequential(W, S, k, v, q, rates, period or 7, loss_scale=1.3))
    assert [p.shape[-3] for p in got[3]] == [8] * depth


@pytest.mark.parametrize("period", [2, 6, None])
def test_granules_step_by_step(period: int | None) -> None:
    """S10 in so many words: 7 tokens are three chunks of 2 and one token left."""
    W, S, k, v, q, (theta, eta, alpha) = draw(21, 7, 2, group=1)
    eta, alpha = eta[..., :3], alpha[..., :3]
    y, last, momentum, _ = titans_chunk_granular(W, S, k, v, q, theta, eta, alpha, 2, period)
    base, rows = W, []
    for t in range(7):
        if t < 6 and t % (period or 7) == 0:
            base = W
        if t % 2:
            pair = slice(t - 1, t + 1)
            H, Delta = memory_grad(base, k[..., pair, :], v[..., pair, :])
            g = tuple(
                sum(theta[..., i, None, None] * h[..., j, :, None] * e[..., j, None, :]
                    for j, i in enumerate((t - 1, t)))
                for h, e in zip(H, Delta, strict=True)
            )  # fmt: skip
            carried, kept = eta[..., t // 2, None, None], 1 - alpha[..., t // 2, None, None]
            S = tuple(carried * s - x for s, x in zip(S, g, strict=True))
            W = tuple(kept * w + s for w, s in zip(W, S, strict=True))
        rows.append(mlp_memory(W, q[..., t : t + 1, :]))
    close((y, last, momentum), (np.concatenate(rows, axis=-2), W, S))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_is_known_teaches_nothing(depth: int) -> None:
    W, _, k, _, q, (theta, eta, _) = draw(7, 6, depth)
    v = mlp_memory(W, k)
    y, got, S = titans_chunk_mlp(W, None, k, v, q, (theta, eta, 0.0), 2)
    close((got, S), (W, tuple(0 * w for w in W)))
    repeated = tuple(np.repeat(w, 2, axis=1) for w in W)
    close(y, mlp_memory(repeated, q))


def test_causal_and_exclusive_reads() -> None:
    W, S, k, v, q, rates = draw(8, 7, 2)
    y = titans_chunk_mlp(W, S, k, v, q, rates, 3)[0]
    later = k.copy()
    later[..., 5:, :] += 1
    close(titans_chunk_mlp(W, S, later, v, q, rates, 3)[0][..., :5, :], y[..., :5, :], atol=0)
    late = np.concatenate([q[..., 1:, :], q[..., :1, :]], axis=-2)
    behind = titans_chunk_mlp(W, S, k, v, late, rates, 3)[0]
    before = titans_chunk_mlp(W, S, k, v, q, rates, 3, read="exclusive")[0]
    close(before[..., 1:, :], behind[..., :-1, :])


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
def test_decoding_is_the_rule(b: int, read: str) -> None:
    W, S, k, v, q, rates = draw(9, 8, 2)
    expected = titans_sequential(W, S, k, v, q, rates, b, read=read)
    state, rows = MemoryState(W, W, S), []
    for t in range(8):
        now = [x[..., t : t + 1, :] for x in (q, k, v)]
        y, state = decode_step(state, *now, tuple(x[..., t : t + 1] for x in rates), b, read=read)
        rows.append(y)
    close((np.concatenate(rows, axis=-2), state.W, state.S), expected)


def test_padding_is_as_if_cut_out() -> None:
    W, S, k, v, q, rates = draw(10, 8, 2, batch=1)
    valid = np.array([[True, False, True, True, False, False, True, True]])
    real = valid[0]
    short = titans_sequential(W, S, *(x[..., real, :] for x in (k, v, q)),
                              tuple(x[..., real] for x in rates), 2)  # fmt: skip
    for x in (k, v, q):
        x[..., ~real, :] = np.nan
    for x in rates:
        x[..., ~real] = np.nan
    for form in (titans_sequential, titans_chunk_mlp):
        y, *states = form(W, S, k, v, q, rates, 2, valid=valid)
        close((y[..., real, :], *states), short)
        assert not np.any(y[..., ~real, :])


@pytest.mark.parametrize(
    ("depth", "b", "read", "padded"),
    [(1, 3, "inclusive", False), (2, 3, "exclusive", False), (3, 2, "inclusive", True)],
)
def test_gradients_match_finite_differences(depth: int, b: int, read: str, padded: bool) -> None:
    W, S, k, v, q, rates = draw(11, 5, depth, batch=1, kv_heads=1, d=2, hidden=3, dv=2)
    valid = np.array([[True, False, True, True, True]]) if padded else None
    options: dict[str, Any] = {"loss_scale": 1.3, "read": read, "valid": valid}
    rng = np.random.default_rng(12)
    up = [tuple(rng.standard_normal(x.shape) for x in _leaves(part))
          for part in titans_chunk_mlp(W, S, k, v, q, rates, b, **options)]  # fmt: skip
    dy, dW, dS = up[0][0], up[1], up[2]
    gradients = titans_chunk_mlp_backward(W, S, k, v, q, rates, b, dy, dW, dS, **options)
    leaves = _leaves((W, S, k, v, q, rates))

    def loss(n: int, x: np.ndarray) -> float:
        all_of = [*leaves[:n], x, *leaves[n + 1 :]]
        first, momentum = tuple(all_of[:depth]), tuple(all_of[depth : 2 * depth])
        key, value, query, *three = all_of[2 * depth :]
        result = titans_chunk_mlp(first, momentum, key, value, query, tuple(three), b, **options)
        return sum(float(np.sum(a * c)) for a, c in
                   zip(_leaves(result), _leaves((dy, dW, dS)), strict=True))  # fmt: skip

    for n, got in enumerate(_leaves(gradients)):
        expected = numeric_gradient(lambda x, n=n: loss(n, x), leaves[n])
        np.testing.assert_allclose(got, expected, atol=1e-7)
    if depth == 1:
        linear = titans_chunk_linear_backward(
            W[0], S[0], k, v, q, rates, b, dy, dW[0], dS[0], **options
        )
        close(linear, (gradients[0][0], gradients[1][0], *gradients[2:]), atol=0)


def test_gradient_of_shared_first_weights_is_summed() -> None:
    W, _, k, v, q, rates = draw(13, 4, 2)
    shared = tuple(w[0, 0] for w in W)
    full = tuple(np.broadcast_to(s, w.shape) for s, w in zip(shared, W, strict=True))
    dy = np.random.default_rng(14).standard_normal((2, 4, 4, 4))
    got = titans_chunk_mlp_backward(shared, None, k, v, q, rates, 2, dy)[0]
    each = titans_chunk_mlp_backward(full, None, k, v, q, rates, 2, dy)[0]
    close(got, tuple(np.sum(x, axis=(0, 1)) for x in each))


def test_gradient_of_coefficients() -> None:
    rng = np.random.default_rng(15)
    rates = list(rng.uniform(0, 1, (3, 2, 5)))
    for stored in (None, rng.random((2, 5)) < 0.7):
        up = [rng.standard_normal(x.shape) for x in coefficients(*rates, stored)]
        gradients = titans_coefficients_backward(*rates, *up, stored=stored)
        for n, got in enumerate(gradients):

            def loss(x: np.ndarray, n: int = n, stored: Any = stored, up: Any = up) -> float:
                of = coefficients(*[*rates[:n], x, *rates[n + 1 :]], stored)
                return sum(float(np.sum(a * c)) for a, c in zip(of, up, strict=True))

            np.testing.assert_allclose(got, numeric_gradient(loss, rates[n]), atol=1e-7)


def layout(T: int, seed: int = 16, N_p: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    D, d = 4, 3
    return {
        "P": 0.3 * rng.standard_normal((N_p, D)),
        "W": tuple(0.5 * rng.standard_normal(s) for s in ((d, 5), (5, D))),
        "S": None,
        "attn": tuple(rng.standard_normal((D, n)) for n in (d, d, D)),
        "mem": tuple(rng.standard_normal((D, n)) for n in (d, d, D)),
        "gains": (rng.standard_normal(D), rng.standard_normal(D)),
        "b": 2,
        "x": 0.3 * rng.standard_normal((2, T, D)),
        "rates": (0.05, 0.5, 0.1),
    }


def mac(case: dict[str, Any], C: int, **options: Any) -> np.ndarray:
    W, S = case["W"], case["S"]
    names = ("attn", "mem", "rates", "gains", "b")
    outputs = []
    for start in range(0, case["x"].shape[1], C):
        seg = case["x"][:, start : start + C]
        o, W, S = mac_segment(seg, case["P"], W, S, *(case[n] for n in names), **options)
        outputs.append(o)
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize("tokenwise", [False, True])
def test_mac_is_causal_between_segments(tokenwise: bool) -> None:
    case = layout(9)
    before = mac(case, 3, tokenwise=tokenwise)
    case["x"] = case["x"].copy()
    case["x"][:, 5] += 1
    after = mac(case, 3, tokenwise=tokenwise)
    close(after[:, :3], before[:, :3], atol=0)
    assert np.any(after[:, 6:] != before[:, 6:])
    assert np.any(after[:, 3:5] != before[:, 3:5]) != tokenwise
    case["rates"] = (0.0, 0.5, 0.0)
    still = mac(case, 3, tokenwise=tokenwise)
    case["x"][:, 5] -= 1
    close(mac(case, 3, tokenwise=tokenwise)[:, 6:], still[:, 6:], atol=0)


def test_masks() -> None:
    T, C, N_p = 6, 3, 2
    for tokenwise in (False, True):
        mask = titans_mask_mac(T, C, N_p, tokenwise)
        for t in range(T):
            for j in range(T):
                together = t // C == j // C
                assert mask[t, N_p + j] == (together and (j <= t or not tokenwise))
                assert mask[t, N_p + T + j] == (together and j <= t)
        assert mask[:, :N_p].all()
    mask = titans_mask_mag(6, 2, 2)
    for t in range(8):
        seen = [j for j in range(8) if mask[t, j]]
        assert seen == sorted({*range(min(2, t + 1)), *range(max(0, t - 1), t + 1)})


def test_mag_and_mal_without_a_prefix_or_memory() -> None:
    case = layout(5, N_p=0)
    names = ("x", "P", "W", "S", "attn", "mem", "rates")
    o, _, _ = mag(*(case[n] for n in names), case["gains"], 3, 2)
    q, k, v = ((case["x"] @ m)[:, None] for m in case["mem"])
    h, W, S = titans_chunk_mlp(case["W"], None, k, v, q, case["rates"], 2)
    assert o.shape == (2, 5, 4)
    silent = tuple(0 * w for w in case["W"])
    case["W"], case["rates"] = silent, (0.0, 0.0, 0.0)
    alone, _, _ = mag(*(case[n] for n in names), (case["gains"][0], 0 * case["gains"][1]), 3, 2)
    nothing, *_ = mal(*(case[n] for n in names), 3, 2)
    assert not np.any(nothing)
    one = tuple(x[0] for x in (case["x"],))
    case["x"] = one[0]
    close(mag(*(case[n] for n in names), (case["gains"][0], 0 * case["gains"][1]), 3, 2)[0],
          alone[0])  # fmt: skip
    assert h.shape[-2] == 5
    assert len(W) == len(S) == 2


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def gated(y: np.ndarray, h: np.ndarray, gains: Any) -> np.ndarray:
    return rms(y) * gains[0] / (1 + np.exp(-rms(h) * gains[1]))


def looked_up(x: np.ndarray, z: np.ndarray, attn: Any, mask: np.ndarray) -> np.ndarray:
    """Softmax attention of rows x to rows z."""
    q, k, v = x @ attn[0], z @ attn[1], z @ attn[2]
    weights = np.where(mask, np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])), 0.0)
    return weights / weights.sum(axis=-1, keepdims=True) @ v


@pytest.mark.parametrize("normalise", [False, True])
def test_layouts_are_attention_and_memory(normalise: bool) -> None:
    """S14 to S17 from their parts, the memory token by token."""
    case = layout(5)
    x, P, W, attn, mem, gains = (case[n] for n in ("x", "P", "W", "attn", "mem", "gains"))
    given = (P, W, None, attn, mem, case["rates"])
    options: dict[str, Any] = {"normalise": normalise}

    def asked(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        rows = rows @ matrix
        if normalise:
            rows = rows / np.sqrt(np.sum(rows * rows, axis=-1, keepdims=True) + 1e-6)
        return rows

    def remember(rows: np.ndarray) -> tuple[np.ndarray, Layers, Layers]:
        q, k, v = asked(rows, mem[0]), asked(rows, mem[1]), rows @ mem[2]
        k, v, q = (y[:, None] for y in (k, v, q))
        y, *states = titans_sequential(W, None, k, v, q, case["rates"], 2)
        last, momentum = (tuple(w[:, 0] for w in layers) for layers in states)
        return y[:, 0], last, momentum

    prefix = np.broadcast_to(P, (2, *P.shape))
    z = np.concatenate([prefix, mlp_memory(W, asked(x, mem[0])), x], axis=1)
    for tokenwise in (False, True):
        y = looked_up(x, z, attn, titans_mask_mac(5, 5, 2, tokenwise))
        read, *states = remember(y)
        if not tokenwise:
            read = mlp_memory(states[0], asked(y, mem[0]))
        got = mac_segment(x, *given, gains, 2, tokenwise=tokenwise, **options)
        close(got, (gated(y, read, gains), *states))
    xt = np.concatenate([prefix, x], axis=1)
    read, *states = remember(xt)
    y = looked_up(xt, xt, attn, titans_mask_mag(5, 3, 2))
    close(mag(x, *given, gains, 3, 2, **options), (gated(y, read, gains)[:, 2:], *states))
    y = looked_up(read, read, attn, titans_mask_mag(7, 3, 0))
    close(mal(x, *given, 3, 2, **options), (y[:, 2:], *states))


def test_inputs_and_rates() -> None:
    rng = np.random.default_rng(17)
    x, W, filters = (rng.standard_normal(s) for s in ((2, 6, 3), (3, 4), (4, 4)))
    y = token_inputs(x, W, filters)
    close(np.sum(y * y, axis=-1), np.ones((2, 6)), atol=1e-3)
    pre = x @ W
    pre = pre / (1 + np.exp(-pre))
    expected = sum(filters[3 - i] * pre[:, 4 - i] for i in range(4))
    close(token_inputs(x, W, filters, normalise=False)[:, 4], expected)
    theta, eta, alpha = token_step_sizes(x, *rng.standard_normal((3, 3, 2)), theta_max=0.1)
    assert theta.shape == eta.shape == alpha.shape == (2, 2, 6)
    assert np.all((theta > 0) & (theta < 0.1))


def test_float32_stays_float32_and_inputs_stay_unchanged() -> None:
    W, S, k, v, q, rates = draw(18, 5, 2)
    inputs = tuple(x.astype(np.float32) for x in _leaves((W, S, k, v, q, rates)))
    copies = [x.copy() for x in inputs]
    first, momentum, (key, value, query), three = inputs[:2], inputs[2:4], inputs[4:7], inputs[7:]
    result = titans_chunk_mlp(first, momentum, key, value, query, three, 2)
    again = titans_sequential(first, momentum, key, value, query, three, 2)
    gradients = titans_chunk_mlp_backward(first, momentum, key, value, query, three, 2, *result)
    assert {x.dtype for x in _leaves((result, again, gradients))} == {np.dtype(np.float32)}
    for x, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(x, copy)


W, S, k, v, q, rates = draw(19, 4, 2)
first = W[0][..., :4]
state = MemoryState(W, W, S)
one = [x[..., :1, :] for x in (q, k, v)]
now = tuple(x[..., :1] for x in rates)
case = layout(4)
three = (case["x"], case["P"], case["W"], None, case["attn"], case["mem"], case["rates"])


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: mlp_memory((), k), ValueError, "W"),
        (lambda: mlp_memory(W[0], k), TypeError, "W"),
        (lambda: mlp_memory(W[::-1], k), ValueError, "W"),
        (lambda: memory_grad(W, k, v[..., 1:, :]), ValueError, "v"),
        (lambda: memory_grad(W, k, v, 0.0), ValueError, "loss_scale"),
        (lambda: titans_coefficients(-rates[0], rates[1], rates[2]), ValueError, "theta"),
        (lambda: titans_coefficients(rates[0], 2 + rates[1], rates[2]), ValueError, "eta"),
        (lambda: titans_chunk_mlp(W, S, k, v, q, rates, 0), ValueError, "b"),
        (lambda: titans_chunk_mlp(W, S[:1], k, v, q, rates, 2), ValueError, "S0"),
        (lambda: titans_chunk_mlp(W, S, k, v, q, rates[:2], 2), ValueError, "rates"),
        (lambda: titans_chunk_mlp(W, S, k, v, q, 0.5, 2), TypeError, "rates"),
        (lambda: titans_chunk_mlp(W, S, k, v, q, rates, 2, read="now"), ValueError, "read"),
        (lambda: titans_chunk_mlp(W, S, k, v, q, rates, 2, valid=k > 0), ValueError, "valid"),
        (lambda: titans_chunk_linear(W, None, k, v, q, rates, 2), TypeError, "W0"),
        (lambda: titans_chunk_linear(first, None, k, v, q[:, :3], rates, 2), ValueError, "k"),
        (lambda: titans_chunk_mlp_backward(W, S, k, v, q, rates, 2, v), ValueError, "dy"),
        (lambda: decode_step(state, q, k, v, rates, 2), ValueError, "q"),
        (lambda: decode_step(state._replace(pos=3), *one, now, 2), ValueError, "state.pos"),
        (lambda: decode_step(None, *one, now, 2), TypeError, "state"),
        (lambda: titans_chunk_granular(W, S, k, v, q, *rates, 2), ValueError, "eta"),
        (lambda: titans_chunk_granular(W, S, k, v, q, *rates, 1, 2.5), TypeError, "batch_size"),
        (lambda: titans_chunk_granular(W, S, k, v, q, *rates, 2, 3), ValueError, "batch_size"),
        (lambda: persistent_prefix(k, k), ValueError, "P"),
        (lambda: titans_mask_mac(4, 0, 1), ValueError, "C"),
        (lambda: titans_mask_mag(4, 0, 1), ValueError, "w"),
        (lambda: gate(k, k, (k,)), ValueError, "gains"),
        (lambda: token_inputs(k, W[0]), ValueError, "W"),
        (lambda: token_inputs(k, W[0][0, 0], k), ValueError, "filters"),
        (lambda: token_step_sizes(k, *[W[0][0, 0]] * 3, theta_max=0.0), ValueError, "theta_max"),
        (lambda: mac_segment(*three, case["gains"], 0), ValueError, "b"),
        (lambda: mag(*three, case["gains"], 0, 2), ValueError, "w"),
        (lambda: mal(*three[:4], None, *three[5:], 2, 2), TypeError, "attn"),
    ],
)  # fmt: skip
def test_bad_inputs(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name}: got "):
        call()
