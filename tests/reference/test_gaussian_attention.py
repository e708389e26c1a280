"""The chapter on Gaussian attention: outside evidence, its properties, its gradients."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec.reference.scores.gaussian_attention import (
    apply,
    axis_stats,
    block,
    block_backward,
    collapse,
    importance_factor,
    log_density,
    multi_head,
    multi_head_backward,
    normalise,
    split_chunks,
)

Params = tuple[np.ndarray, np.ndarray]


def layer(seed: int, heads: int = 2, K: int = 2, width: float = 1.0) -> Params:
    rng = np.random.default_rng(seed)
    c = width * (0.5 + rng.random((heads, K))) * rng.choice([-1.0, 1.0], (heads, K))
    return 0.5 * rng.standard_normal((heads, K)), c


def entries(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed + 100).standard_normal(shape or (2, 9, 3))


@pytest.mark.parametrize("name", ["2d_h3", "axis_last_h2_k1"])
def test_authors_code(golden: Callable[[str], dict[str, Any]], name: str) -> None:
    case = golden(f"gaussian_attention__{name}")
    x, axis = case["x"], case["meta"]["norm_axis"]
    params = case["layer0_mean_offsets"], case["layer0_c"]
    out, w = multi_head(x, axis, params)
    np.testing.assert_allclose(out, case["layer0_no_residual"], atol=1e-10)
    np.testing.assert_allclose(w, case["layer0_weights"], atol=1e-10)
    np.testing.assert_allclose(block(x, [(axis, params)])[0], case["out"], atol=1e-10)
    dx = block_backward(x, [(axis, params)], case["dout"])
    np.testing.assert_allclose(dx, case["dx"], atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_unclamped_weights_are_the_softmax_of_one_gaussian(seed: int) -> None:
    x, (delta, c) = entries(seed), layer(seed, heads=1, K=3)
    w = multi_head(x, 1, (delta, c), clamp="none")[1]
    assert np.all(w >= 0)
    np.testing.assert_allclose(w.sum(axis=1), 1)
    centre, lam = collapse(delta[0], c[0])
    var = x.var(axis=1, keepdims=True, ddof=1) + 1e-8
    E = np.exp(-lam * (x - x.mean(axis=1, keepdims=True) - centre) ** 2 / (2 * var))
    np.testing.assert_allclose(w, E / E.sum(axis=1, keepdims=True), rtol=1e-9)
    mu, var = axis_stats(x, axis=1)
    logw = log_density(x, mu, var, delta[0], c[0])
    raw = np.exp(logw).sum(axis=1, keepdims=True)
    assert np.all(raw > 1e-8)
    np.testing.assert_allclose(multi_head(x, 1, (delta, c))[1], w, rtol=1e-12)
    clamped = normalise(logw, eps=0.5, axis=1)
    np.testing.assert_allclose(clamped, w * np.minimum(raw / 0.5, 1), rtol=1e-9)
    one = multi_head(x, 1, (np.array([[centre]]), np.array([[lam**-0.5]])), clamp="none")[1]
    np.testing.assert_allclose(one, w, rtol=1e-9)


@pytest.mark.parametrize("combine", ["product", "sum"])
def test_order_and_signs_of_the_gaussians_do_not_matter(combine: str) -> None:
    x, (delta, c) = entries(1), layer(1, K=4)
    w = multi_head(x, 1, (delta, c), combine=combine)[1]
    again = multi_head(x, 1, (delta[:, ::-1], -c[:, ::-1]), combine=combine)[1]
    np.testing.assert_allclose(again, w, rtol=1e-12)


def test_without_offsets_the_nearest_to_the_mean_weighs_most() -> None:
    params = np.zeros((1, 2)), layer(2, 1)[1]
    w = multi_head(np.array([[-1.0, 1.0, 3.0, -3.0, 0.0]]), 1, params)[1][0]
    np.testing.assert_allclose(w[[0, 2]], w[[1, 3]])
    assert w.argmax() == 4


@pytest.mark.parametrize("seed", range(4))
def test_shift_and_scale(seed: int) -> None:
    x, (delta, c) = 10 * entries(seed), layer(seed)
    w = multi_head(x, 1, (delta, c))[1]
    np.testing.assert_allclose(multi_head(x + 7, 1, (delta, c))[1], w, rtol=1e-7)
    np.testing.assert_allclose(multi_head(3 * x, 1, (3 * delta, c))[1], w, rtol=1e-6)
    centred = multi_head(x, 1, (0 * delta, c))[1]
    np.testing.assert_allclose(multi_head(-2 * x, 1, (0 * delta, c))[1], centred, rtol=1e-6)


def test_wide_gaussians_weigh_alike_unless_clamped() -> None:
    x, wide = entries(3, 1, 4), (np.zeros((1, 3)), np.full((1, 3), 1000.0))
    out, w = multi_head(x, 1, wide, clamp="none")
    np.testing.assert_allclose(w, 0.25, rtol=1e-5)
    np.testing.assert_allclose(out, x / 4, rtol=1e-5)
    assert multi_head(x, 1, wide)[1].sum() == pytest.approx(0.025, rel=0.05)
    once = multi_head(x, 1, (np.zeros((1, 1)), np.full((1, 1), 1e6)))[1]
    np.testing.assert_allclose(once, 0.25, rtol=1e-5)


def test_narrow_gaussians_vanish_and_leave_the_residual() -> None:
    x, params = entries(4, 2, 6), (np.full((1, 5), 5.0), np.full((1, 5), 0.05))
    w = multi_head(x, 1, params)[1]
    assert np.all(w == 0)
    assert np.all(block(x, [(1, params)])[0] == x)
    np.testing.assert_allclose(multi_head(x, 1, params, clamp="none")[1].sum(axis=1), 1)


def test_a_constant_fibre_has_no_weight_with_offsets() -> None:
    params = np.full((1, 1), 0.5), np.ones((1, 1))
    assert np.all(multi_head(np.ones((1, 4)), 1, params)[1] == 0)


def test_fibres_and_entries() -> None:
    x, params = entries(5), layer(5)
    out, w = multi_head(x, 1, params)
    other = x.copy()
    other[:, :, 1] += np.arange(9)
    np.testing.assert_array_equal(multi_head(other, 1, params)[1][:, :, 0], w[:, :, 0])
    order = np.array([3, 0, 2, 1, 8, 6, 5, 4, 7])  # inside the chunks (0, 4) and (4, 9)
    np.testing.assert_allclose(multi_head(x[:, order], 1, params)[1], w[:, order], rtol=1e-12)
    np.testing.assert_array_equal(multi_head(x, -2, params)[0], out)
    moved = multi_head(np.moveaxis(x, 1, 0), 0, params)[0]
    np.testing.assert_allclose(np.moveaxis(moved, 0, 1), out, rtol=1e-12)


def test_heads_are_single_heads_on_their_chunks() -> None:
    x, (delta, c) = entries(6, 2, 11), layer(6, heads=3)
    w = multi_head(x, 1, (delta, c))[1]
    assert split_chunks(11, 3) == [(0, 3), (3, 6), (6, 11)]
    for head, (start, stop) in enumerate(split_chunks(11, 3)):
        one = delta[head : head + 1], c[head : head + 1]
        np.testing.assert_array_equal(multi_head(x[:, start:stop], 1, one)[1], w[:, start:stop])


def test_padding_counts_as_zeros_unless_exact() -> None:
    x, params = entries(7, 1, 8), layer(7, heads=1)
    mask = np.arange(8) < 5
    out, w = multi_head(x, 1, params, mask)
    np.testing.assert_array_equal(out[:, 5:], x[:, 5:])
    deleted = multi_head(x[:, :5], 1, params)
    assert not np.allclose(w[:, :5], deleted[1])
    out, w = multi_head(x, 1, params, mask, exact_mask=True)
    np.testing.assert_allclose(w[:, :5], deleted[1], rtol=1e-12)
    np.testing.assert_allclose(out[:, :5], deleted[0], rtol=1e-12)
    assert np.all(w[:, 5:] == 0)
    np.testing.assert_array_equal(out[:, 5:], x[:, 5:])
    mu, var = axis_stats(x, np.arange(8) < 1, exact_mask=True)
    assert (mu.item(), var.item()) == (x[0, 0], 1e-8)
    out, w = multi_head(x, 1, params, np.zeros(8, bool), exact_mask=True)
    np.testing.assert_array_equal(out, x)
    assert np.all(w == 0)


def test_a_block_looks_for_padding_in_each_layer() -> None:
    params = layer(8, heads=1)
    x = np.array([[1.0, 2.0, 4.0, 0.0]])
    assert block(x, [(1, params)] * 2, 0.0)[0][0, 3] == 0
    x = np.array([[1.0, 2.0, 4.0, 9.0]])
    once, _ = block(x, [(1, params)], 9.0)
    assert once[0, 3] == 18
    twice, _ = block(x, [(1, params)] * 2, 9.0)
    np.testing.assert_array_equal(twice, once + multi_head(once, 1, params, once != 9)[0])


@pytest.mark.parametrize("combine", ["product", "sum"])
@pytest.mark.parametrize("clamp", ["source", "none"])
@pytest.mark.parametrize("padding", ["none", "zeros", "exact"])
@pytest.mark.parametrize("width", [1.0, 0.3])
def test_gradients(combine: str, clamp: str, padding: str, width: float) -> None:
    x, params = entries(9, 2, 7, 2), layer(9, heads=2, width=width)
    dout, dw = entries(10, 2, *x.shape)
    mask = None if padding == "none" else entries(11, *x.shape) > -0.5
    options: dict[str, Any] = {"clamp": clamp, "combine": combine, "exact_mask": padding == "exact"}
    options["eps"] = 1e-3

    def loss(x: np.ndarray, delta: np.ndarray, c: np.ndarray) -> float:
        out, w = multi_head(x, 1, (delta, c), mask, **options)
        return float(np.sum(out * dout) + np.sum(w * dw))

    dx, gaussians = multi_head_backward(x, 1, params, dout, dw, mask, **options)
    arguments = (x, *params)
    for place, gradient in enumerate((dx, *gaussians)):
        direction = entries(place, *gradient.shape)
        ends = []
        for side in (1e-6, -1e-6):
            moved = list(arguments)
            moved[place] = moved[place] + side * direction
            ends.append(loss(*moved))
        slope = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-5, atol=1e-7)
    flipped = multi_head_backward(x, 1, (params[0], -params[1]), dout, dw, mask, **options)
    np.testing.assert_allclose(flipped[1][1], -gaussians[1], rtol=1e-9)


def test_gradient_of_a_block() -> None:
    x = np.where(entries(12, 2, 6, 5) > -0.7, entries(12, 2, 6, 5), 0.0)
    layers = ((1, layer(12)), (-1, layer(13)))
    dout, step = entries(14, 2, *x.shape) * np.where(x == 0, 0.0, 1.0)
    ends = [block(x + side * step, layers, 0.0)[0] for side in (1e-6, -1e-6)]
    slope = np.sum((ends[0] - ends[1]) * dout) / 2e-6
    dx = block_backward(x, layers, dout, 0.0)
    np.testing.assert_allclose(np.sum(dx * step), slope, rtol=1e-6)


def test_importance() -> None:
    w = multi_head(entries(15, 4, 5, 6), 2, layer(15))[1]
    g = w.mean(axis=(0, 1))
    expected = (g - g.min()) / (g.max() - g.min())
    np.testing.assert_allclose(importance_factor(w, (0, 1)), expected)
    assert np.all(importance_factor(np.ones((3, 2)), 0) == 0)


def test_float32_stays_float32() -> None:
    x, params = entries(16).astype(np.float32), tuple(p.astype(np.float32) for p in layer(16))
    mask = x > -1
    for exact in (False, True):
        results = multi_head(x, 1, (params[0], params[1]), mask, exact_mask=exact)
        dx, gaussians = multi_head_backward(x, 1, params, x, x, mask, exact_mask=exact)  # type: ignore[arg-type]
        stats = axis_stats(x, mask, exact_mask=exact)
        assert all(a.dtype == np.float32 for a in (*results, dx, *gaussians, *stats))
    assert all(a.dtype == np.float32 for a in collapse(*params))
    assert importance_factor(x, (0, 1)).dtype == np.float32


X, P = entries(0), layer(0)
ONE = np.ones((1, 1))


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: split_chunks(0, 1), ValueError, "n"),
        (lambda: split_chunks(3, 4), ValueError, "h"),
        (lambda: split_chunks(3, 1.0), TypeError, "h"),  # type: ignore[arg-type]
        (lambda: axis_stats([1.0]), TypeError, "z"),  # type: ignore[arg-type]
        (lambda: axis_stats(np.ones((3, 1))), ValueError, "z"),
        (lambda: axis_stats(X, axis=3), ValueError, "axis"),
        (lambda: axis_stats(X, eps=0.0), ValueError, "eps"),
        (lambda: axis_stats(X, np.ones(3)), TypeError, "mask"),
        (lambda: axis_stats(X, exact_mask=1), TypeError, "exact_mask"),  # type: ignore[arg-type]
        (lambda: log_density(X, X[0, 0, :2], X, P[0][0], P[1][0]), ValueError, "mu"),
        (lambda: log_density(X, X, X.astype("f"), P[0][0], P[1][0]), TypeError, "var"),
        (lambda: log_density(X, X, X**2, P[0], P[1]), ValueError, "delta"),
        (lambda: log_density(X, X, X**2, P[0][0], 0 * P[1][0]), ValueError, "c"),
        (lambda: log_density(X, X, X**2, P[0][0], P[1][0], combine="max"), ValueError, "combine"),
        (lambda: normalise(X, clamp="soft"), ValueError, "clamp"),
        (lambda: normalise(X, mask=np.ones((4, 1), bool)), ValueError, "mask"),
        (lambda: apply(X, X[0]), ValueError, "w"),
        (lambda: apply(X, X.astype("f")), TypeError, "w"),
        (lambda: collapse(P[0], P[1][:, :1]), ValueError, "c"),
        (lambda: multi_head(X[0, 0], 0, P), ValueError, "x"),
        (lambda: multi_head(X, 2, P), ValueError, "params"),
        (lambda: multi_head(X, 1, P[0]), TypeError, "params"),  # type: ignore[arg-type]
        (lambda: multi_head(X, 1, (P[0], np.inf * P[1])), ValueError, "params"),
        (lambda: multi_head(X, 1.0, P), TypeError, "axis"),  # type: ignore[arg-type]
        (lambda: multi_head_backward(X, 1, P, X[0]), ValueError, "dout"),
        (lambda: multi_head_backward(X, 1, P, X, X[0]), ValueError, "dw"),
        (lambda: block(X, ()), TypeError, "layers"),
        (lambda: block(X, ((2, P),)), ValueError, "layers"),
        (lambda: block(X, ((1, P),), "0"), TypeError, "padding_value"),  # type: ignore[arg-type]
        (lambda: block(X, ((1, P),), np.nan), ValueError, "padding_value"),
        (lambda: block_backward(X, (), X), TypeError, "layers"),
        (lambda: block_backward(X, ((1, P),), X[0]), ValueError, "dout"),
        (lambda: multi_head_backward(X, 1, P, None), TypeError, "dout"),  # type: ignore[arg-type]
        (lambda: multi_head_backward(X, 3, P, X), ValueError, "axis"),
        (lambda: importance_factor(X, 0), ValueError, "axes"),
        (lambda: importance_factor(X, (0, 3)), ValueError, "axes"),
        (lambda: importance_factor(X[:0], (0, 1)), ValueError, "w"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"(?s)^{re.escape(name)}: (got|in layer) .*expected"):
        call()
