"""Softplus attention against outside evidence, its own properties and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.conventions import causal_mask, repeat_heads
from attnspec.reference.dense.attention import State, init_state
from attnspec.reference.primitives.softmax import softmax
from attnspec.reference.scores.softplus_attention import (
    attend,
    log_weights,
    lssa,
    lssa_logits,
    lssa_scores,
    lssa_weights,
    lssar,
    reweight,
    row_sum,
    step,
    unit,
    unit_backward,
    visible_counts,
)
from attnspec.reference.scores.softplus_attention_gradients import lssa_backward, lssar_backward

quick = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 999)


def tokens(seed: int = 0, T: int = 7, S: int = 7, H: int = 4, Hk: int = 2, d: int = 5) -> Any:
    random = np.random.default_rng(seed)
    shapes = ((2, H, T, d), (2, Hk, S, d), (2, Hk, S, 3))
    return tuple(random.standard_normal(shape) for shape in shapes)


def stages(seed: int, causal: bool = True, T: int = 9, **options: Any) -> Any:
    """Logits, visible pairs, counts and weights of LSSA."""
    q, k, _ = tokens(seed, T, T)
    seen = causal_mask(T, T) if causal else np.ones((T, T), bool)
    n = visible_counts(seen)
    logits = lssa_logits(q, k, n)
    scores = lssa_scores(logits, seen)
    return logits, seen, n, lssa_weights(scores, row_sum(scores), **options)


@pytest.mark.parametrize("name", ["n17_p15", "large_norm_n24"])
def test_weights_outputs_and_gradients_are_those_of_the_independent_code(
    name: str, golden: Callable[[str], Any]
) -> None:
    case = golden(f"softplus_attention__{name}")
    q, k, v = (case[n] for n in "qkv")
    seen = causal_mask(q.shape[-2], q.shape[-2])
    scores = lssa_scores(lssa_logits(q, k, visible_counts(seen)), seen)
    weights = lssa_weights(scores, row_sum(scores))
    np.testing.assert_allclose(weights, case["lssa_weights"], atol=1e-12)
    sharp, _ = reweight(weights, visible_counts(seen))
    np.testing.assert_allclose(sharp, case["lssar_weights"], atol=1e-12)
    for form, forward, backward in (
        ("lssa", lssa, lssa_backward),
        ("lssar", lssar, lssar_backward),
    ):
        out = forward(q, k, v, causal=True)
        np.testing.assert_allclose(out, case[f"{form}_out"], atol=1e-12)
        gradients = backward(q, k, v, case["dout"], causal=True)
        for n, gradient in zip("qkv", gradients, strict=True):
            np.testing.assert_allclose(gradient, case[f"{form}_d{n}"], atol=1e-10, err_msg=n)


@quick
@given(seeds, st.booleans())
def test_lssa_is_a_softmax_of_log_softplus(seed: int, causal: bool) -> None:
    logits, seen, _, weights = stages(seed, causal)
    expected = softmax(np.log(np.logaddexp(0, logits)), seen)
    np.testing.assert_allclose(weights, expected, rtol=1e-7)


@quick
@given(seeds)
def test_lengths_of_queries_and_keys_do_not_matter(seed: int) -> None:
    q, k, v = tokens(seed)
    random = np.random.default_rng(seed)
    scaled_q = q * random.uniform(0.1, 9, (*q.shape[:-1], 1))
    scaled_k = k * random.uniform(0.1, 9, (*k.shape[:-1], 1))
    for form in (lssa, lssar):
        got = form(scaled_q, scaled_k, v, causal=True)
        np.testing.assert_allclose(got, form(q, k, v, causal=True), atol=1e-9)


@quick
@given(seeds)
def test_weights_are_bounded_and_visible_ones_positive(seed: int) -> None:
    _, seen, n, weights = stages(seed)
    X = math.log(5) * np.log(n)[:, None]
    low, high = np.logaddexp(0, -X), np.logaddexp(0, X)
    visible = np.broadcast_to(seen, weights.shape)
    assert np.all(weights[visible] > 0)
    assert np.all((weights >= low / (n[:, None] * high) * (1 - 1e-6))[visible])
    assert np.all((weights <= high / (n[:, None] * low) * (1 + 1e-6))[visible])


@quick
@given(seeds, st.sampled_from([1, 2, 15]))
def test_sharpened_rows_are_sparse_and_keep_the_order(seed: int, p: float) -> None:
    logits, seen, n, weights = stages(seed)
    sharp, dead = reweight(weights, n, p)
    late = n > 3
    below = weights <= 1 / n[:, None]
    assert np.all(sharp[:, :, late][below[:, :, late]] == 0)
    assert not np.any(dead)
    best = np.argmax(np.where(seen, logits, -np.inf), axis=-1)
    np.testing.assert_array_equal(np.argmax(weights, axis=-1), best)
    np.testing.assert_array_equal(np.argmax(sharp, axis=-1), best)
    by_logit = np.argsort(np.where(seen, logits, -np.inf), axis=-1)
    assert np.all(np.diff(np.take_along_axis(weights, by_logit, axis=-1), axis=-1) >= 0)
    order = np.argsort(weights, axis=-1)
    assert np.all(np.diff(np.take_along_axis(sharp, order, axis=-1), axis=-1) >= 0)
    above = np.any(weights > 1 / n[:, None] * (1 + 1e-6), axis=-1) & late
    assert np.all(np.any((weights < 1 / n[:, None]) & seen, axis=-1)[above])


def test_row_sums_follow_the_eps() -> None:
    logits, seen, n, weights = stages(3, eps=0.5)
    total = row_sum(lssa_scores(logits, seen))
    np.testing.assert_allclose(weights.sum(-1), total / (total + 0.5))
    _, _, _, weights = stages(3)
    excess = np.maximum(n[:, None] * weights - (n > 3)[:, None], 0) ** 15
    mass = excess.sum(-1)
    np.testing.assert_allclose(reweight(weights, n)[0].sum(-1), mass / (mass + 1e-8))
    logs, dead = log_weights(weights, n)
    np.testing.assert_allclose(np.exp(logs).sum(-1), np.where(dead, 0, 1))
    heavy = mass > 1e-5
    np.testing.assert_allclose(np.exp(logs)[heavy], reweight(weights, n)[0][heavy], rtol=2e-3)


def test_equal_scores_are_dead_rows_and_weak_rows_lose_mass() -> None:
    q, k, v = np.ones((1, 1, 6, 4)), np.ones((1, 1, 6, 4)), np.ones((1, 1, 6, 2))
    for mode in ("additive", "logspace"):
        out = lssar(q, k, v, causal=True, eps_mode=mode)
        np.testing.assert_allclose(out[0, 0, :3], 1, atol=1e-6)
        assert np.all(out[0, 0, 3:] == 0)
    weights = np.full((1, 1, 4), 0.25)
    _, dead = reweight(weights, np.array([4]))
    assert dead.item()
    weak = np.array([[[1.3 / 8, *[6.7 / 56] * 7]]])
    sharp, dead = reweight(weak, np.array([8]))
    assert not dead.item()
    assert 0.3 < sharp.sum() < 0.7
    assert log_weights(weak, np.array([8]))[0].max() == 0


def test_limits_of_the_power() -> None:
    logits, seen, n, weights = stages(5)
    logs, _ = log_weights(weights, n, 100000)
    best = np.argmax(np.where(seen, logits, -np.inf), axis=-1)[..., None]
    np.testing.assert_allclose(np.take_along_axis(np.exp(logs), best, axis=-1), 1, atol=1e-3)
    np.testing.assert_allclose(reweight(weights, n, 1, warm=99)[0], weights, atol=1e-7)


def test_log_domain_of_the_map() -> None:
    x = np.array([[[-1e4, -20.0, 0.0, 1e4]]])
    expected = [0, math.log1p(math.exp(-20)), math.log(2), 1e4]
    np.testing.assert_allclose(lssa_scores(x)[0, 0], expected, rtol=1e-14)
    hidden = np.array([[[True, False, True, True]]])
    scores = lssa_scores(np.where(hidden, x, -np.inf))
    np.testing.assert_array_equal(scores, lssa_scores(x, hidden))


def test_counts_and_the_first_row() -> None:
    np.testing.assert_array_equal(visible_counts(True, 3, 2), [0, 1, 2])
    np.testing.assert_array_equal(visible_counts(True, 2, 9, 3), [4, 5])
    np.testing.assert_array_equal(visible_counts(False, 2, 9), [9, 9])
    q, k, v = tokens(T=1, S=1)
    np.testing.assert_allclose(lssa(q, k, v), repeat_heads(v, 4), rtol=1e-7)
    x = np.random.default_rng(0).standard_normal((1, 3, 1))
    uniform = lssa(x, x, np.eye(3)[None])
    np.testing.assert_allclose(uniform, 1 / 3, rtol=1e-7)


@pytest.mark.parametrize("p", [None, 15])
def test_decoding_is_prefill_and_later_keys_have_no_influence(p: float | None) -> None:
    q, k, v = tokens(T=8, S=8)
    whole = lssa(q, k, v, causal=True) if p is None else lssar(q, k, v, p=p, causal=True)
    state, outs = init_state(k, v), []
    for first, last in ((0, 1), (1, 4), (4, 5), (5, 8)):
        out, state = step(state, *(x[..., first:last, :] for x in (q, k, v)), p=p)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=-2), whole, atol=1e-12)
    form: Any = lssa if p is None else lssar
    later = [np.where(np.arange(8)[:, None] < 5, x, x + 3) for x in (q, k, v)]
    np.testing.assert_allclose(form(*later, causal=True)[..., :5, :], whole[..., :5, :])


def test_order_of_keys_and_copies_of_keys() -> None:
    q, k, v = tokens()
    order = np.random.default_rng(1).permutation(7)
    twice = [np.concatenate([x, x], axis=-2) for x in (k, v)]
    for form in (lssa, lssar):
        out = form(q, k, v)
        np.testing.assert_allclose(form(q, k[:, :, order], v[:, :, order]), out, atol=1e-12)
        assert not np.allclose(form(q, *twice), out, atol=1e-3)


@pytest.mark.parametrize("form", ["lssa", "additive", "logspace", "p1", "raw"])
def test_gradients_are_finite_differences(form: str) -> None:
    inputs = tokens(11)
    random = np.random.default_rng(4)
    options: dict[str, Any] = {"causal": True, "mask": random.random((2, 7, 7)) < 0.8}
    forward, backward = (lssa, lssa_backward) if form == "lssa" else (lssar, lssar_backward)
    extra = {
        "logspace": {"eps_mode": "logspace", "p": 3},
        "additive": {"p": 3},
        "p1": {"p": 1},
        "raw": {"p": 2, "normalise_qk": False},
    }
    options |= extra.get(form, {})
    dout = random.standard_normal((2, 4, 7, 3))
    for n, gradient in enumerate(backward(*inputs, dout, **options)):
        direction = random.standard_normal(gradient.shape)
        sides = [
            np.sum(
                dout
                * forward(
                    *(x + s * 1e-6 * direction if i == n else x for i, x in enumerate(inputs)),
                    **options,
                )
            )
            for s in (1, -1)
        ]
        numeric = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(np.sum(gradient * direction), numeric, rtol=1e-4, atol=1e-6)


def test_gradients_stay_finite() -> None:
    q, k, v = (1e4 * x for x in tokens())
    for backward in (lssa_backward, lssar_backward):
        for gradient in backward(q, k, v, np.ones((2, 4, 7, 3)), normalise_qk=False):
            assert np.all(np.isfinite(gradient))


def test_clipped_keys_have_a_gradient_through_the_normaliser_alone() -> None:
    """One query without unit vectors: dk = ln d ln N / sqrt(d) dx q, and dx = ds sigmoid(x)."""
    q, k, v = (x[0] for x in tokens(T=1, S=9, H=1, Hk=1))
    dout = np.ones((1, 1, 3))
    logits = lssa_logits(q, k, np.array([9]), normalise_qk=False)
    scores = lssa_scores(logits)
    sharp, _ = reweight(lssa_weights(scores, row_sum(scores)), np.array([9]), 2)
    clipped = sharp[0, 0] == 0
    assert 2 <= clipped.sum() <= 7
    _, dk, dv = lssar_backward(q, k, v, dout, p=2, normalise_qk=False)
    assert np.all(dv[0, clipped] == 0)
    assert np.all(dv[0, ~clipped] != 0)
    ds = (dk[0] / q[0])[:, 0] * (1 + np.exp(-logits[0, 0]))
    np.testing.assert_allclose(ds[clipped], ds[clipped][0], rtol=1e-9)
    assert np.all(np.abs(ds[~clipped] / ds[clipped][0] - 1) > 1e-3)


def test_a_unit_vector_passes_on_what_is_across_it() -> None:
    x = np.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit_backward(x, x)[0], 0, atol=1e-15)
    np.testing.assert_allclose(np.linalg.norm(unit(x), axis=-1), [1, 0])


def test_rows_that_see_nothing_are_zero_and_hidden_nan_is_not_read() -> None:
    q, k, v = tokens()
    mask = np.ones((7, 7), bool)
    mask[2], mask[:, 4] = False, False
    poisoned = [x.copy() for x in (k, v)]
    for x in poisoned:
        x[..., 4, :] = np.nan
    for form, backward in ((lssa, lssa_backward), (lssar, lssar_backward)):
        out = form(q, *poisoned, mask=mask)
        np.testing.assert_array_equal(out, form(q, k, v, mask=mask))
        assert np.all(out[:, :, 2] == 0)
        gradients = backward(q, *poisoned, np.ones(out.shape), mask=mask)
        for gradient in gradients:
            assert np.all(np.isfinite(gradient))
        assert np.all(gradients[0][:, :, 2] == 0)
        for gradient in gradients[1:]:
            assert np.all(gradient[:, :, 4] == 0)
    assert np.all(reweight(np.zeros((1, 2, 3)), np.array([0, 4]))[1])
    nothing = [x[..., :0, :] for x in (k, v)]
    assert np.all(lssar(q, *nothing) == 0)


def test_leading_axes_are_free_float32_stays_and_inputs_too() -> None:
    q, k, v = (x.astype(np.float32) for x in tokens())
    copies = [x.copy() for x in (q, k, v)]
    out = lssar(q, k, v, causal=True)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(lssar(q[0], k[0], v[0], causal=True), out[0])
    for x in lssar_backward(q, k, v, out):
        assert x.dtype == np.float32
    for x, copy in zip((q, k, v), copies, strict=True):
        np.testing.assert_array_equal(x, copy)


X = np.zeros((2, 3, 2))
A = np.zeros((2, 3, 3))
N = np.array([1, 2, 3])
BAD: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], type, str], ...] = (
    (visible_counts, (1,), {}, TypeError, "visible"),
    (visible_counts, (np.ones((2, 2)),), {}, TypeError, "visible"),
    (visible_counts, (True, -1, 2), {}, ValueError, "q_tokens"),
    (visible_counts, (True, 1, 2, -1), {}, ValueError, "offset"),
    (unit, ([1.0],), {}, TypeError, "x"),
    (lssa_logits, (X, X[..., :1], N), {}, ValueError, "k"),
    (lssa_logits, (X, X.astype(np.float32), N), {}, TypeError, "k"),
    (lssa_logits, (X, X, N[:2]), {}, ValueError, "n"),
    (lssa_logits, (X, X, [1, 2, 3]), {}, TypeError, "n"),
    (lssa_scores, (A, np.ones(3)), {}, TypeError, "mask"),
    (lssa_scores, (A, np.ones(2, bool)), {}, ValueError, "mask"),
    (row_sum, (A[0],), {}, ValueError, "scores"),
    (lssa_weights, (A, A[0]), {}, ValueError, "row_sum"),
    (lssa_weights, (A, A[..., 0]), {"eps": -1.0}, ValueError, "eps"),
    (reweight, (A, N, 0.5), {}, ValueError, "p"),
    (reweight, (A, N, "15"), {}, TypeError, "p"),
    (reweight, (A, N, 15, -1), {}, ValueError, "eps"),
    (reweight, (A, N, 15, 0, 0), {}, ValueError, "warm"),
    (reweight, (A, N[:2]), {}, ValueError, "n"),
    (log_weights, (A, N), {"dead_tol": -1.0}, ValueError, "dead_tol"),
    (log_weights, (A, N), {"dead_tol": None}, TypeError, "dead_tol"),
    (attend, (A, X.astype(np.float32)), {}, TypeError, "v"),
    (attend, (A, X[:, :2]), {}, ValueError, "v"),
    (attend, (A, np.zeros((3, 3, 2))), {}, ValueError, "v"),
    (lssa, (X, X, X[:, :2]), {}, ValueError, "v"),
    (lssa, (X, X, X), {"mask": np.ones((3, 3))}, TypeError, "mask"),
    (lssa, (X, X, X), {"mask": np.ones((2, 3), bool)}, ValueError, "mask"),
    (lssa, (X, X, X), {"eps": "1"}, TypeError, "eps"),
    (lssar, (X, X, X), {"eps_mode": "none"}, ValueError, "eps_mode"),
    (lssar, (X, X, X), {"p": True}, TypeError, "p"),
    (lssa, (X, X, X), {"causal": 1}, TypeError, "causal"),
    (lssar, (X, X, X), {"normalise_qk": 0}, TypeError, "normalise_qk"),
    (lssa_logits, (X, X, N), {"normalise_qk": "yes"}, TypeError, "normalise_qk"),
    (lssa_backward, (X, X, X, X[:, :2]), {}, ValueError, "dout"),
    (lssar_backward, (X, X, X, X), {"p": 0.5}, ValueError, "p"),
    (lssar, (X, X, X), {"warm": 2.5}, TypeError, "warm"),
    (lssa_backward, (X, X, X, None), {}, TypeError, "dout"),
    (lssar_backward, (X, X, X, None), {}, TypeError, "dout"),
    (step, (State(X, X), X, X[:, :1], X[:, :1]), {}, ValueError, "k"),
    (step, (State(X[:1], X), X, X, X), {}, ValueError, "state.k"),
)


@pytest.mark.parametrize(("function", "args", "options", "error", "name"), BAD)
def test_bad_input_is_named(
    function: Any, args: tuple[Any, ...], options: dict[str, Any], error: type, name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        function(*args, **options)
