"""Synaptic Resonance against its own properties and bad input; there is no outside evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.conventions import repeat_heads
from attnspec.reference.dense.attention import attend
from attnspec.reference.linear import synaptic_resonance as chapter
from attnspec.reference.linear.synaptic_resonance import (
    synaptic_resonance,
    synaptic_resonance_backward,
    synaptic_resonance_packed,
    synaptic_resonance_packed_backward,
)
from attnspec.reference.linear.synaptic_resonance_decode import State, init_state, step
from attnspec.reference.linear.synaptic_resonance_gradients import (
    memory_backward,
    relevance_backward,
)
from attnspec.reference.linear.synaptic_resonance_memory import (
    memory_chunked,
    memory_recurrent,
    relevance,
    unit,
)

quick = settings(max_examples=20, deadline=None, derandomize=True)
VALID = np.array([[1, 1, 0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 1, 0]], bool)


def tokens(
    T: int = 9, d: int = 4, dv: int = 3, H: int = 4, Hk: int = 2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = ((2, H, T, d), (2, Hk, T, d), (2, Hk, T, dv))
    q, k, v = (random.standard_normal(shape) for shape in shapes)
    return q, k + 0.5, v  # keys that lean one way: some relevant, some not


def states(d: int = 4, dv: int = 3, Hk: int = 2, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal((2, Hk, d, dv)), random.standard_normal((2, Hk, d))


def closed_form(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, rho: np.ndarray, eta: float, lam: float
) -> np.ndarray:
    """m by the double sum over tokens."""
    heads = q.shape[1]
    qh, kh, values = unit(q), repeat_heads(unit(k), heads), repeat_heads(v, heads)
    gates = repeat_heads(rho[..., None], heads)[..., 0]
    m = np.zeros((*q.shape[:-1], v.shape[-1]))
    for t in range(q.shape[2]):
        for j in range(t):
            weight = eta * lam ** (t - 1 - j) * gates[:, :, j] * (qh[:, :, t] * kh[:, :, j]).sum(-1)
            m[:, :, t] += weight[..., None] * values[:, :, j]
    return m


@pytest.mark.parametrize("nothing", [{"beta": 0.0}, {"eta": 0.0}])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_without_a_memory_it_is_attention(nothing: dict[str, float], window: int | None) -> None:
    q, k, v = tokens()
    mask = np.tri(9, dtype=bool) & ~np.tri(9, k=-(window or 9), dtype=bool)
    y, _ = synaptic_resonance(q, k, v, window=window, **nothing)
    np.testing.assert_array_equal(y, attend(q, k, v, mask=mask)[0])


@quick
@given(
    lam=st.sampled_from([0.0, 0.3, 0.99, 1.0]),
    T=st.integers(0, 9),
    chunk=st.integers(1, 11),
    padded=st.booleans(),
    given_state=st.booleans(),
)
def test_all_forms_agree(lam: float, T: int, chunk: int, padded: bool, given_state: bool) -> None:
    q, k, v = tokens(T)
    S0, c0 = states() if given_state else (None, None)
    valid = VALID[:, :T] if padded else None
    rho, _ = relevance(k, 0.8, valid, c0)
    m, S = memory_recurrent(q, k, v, rho, 0.3, lam, S0, valid)
    got = memory_chunked(q, k, v, rho, 0.3, lam, S0, valid, chunk=chunk)
    np.testing.assert_allclose(got[0], m, atol=1e-13)
    np.testing.assert_allclose(got[1], S, atol=1e-13)
    if not padded and not given_state:
        np.testing.assert_allclose(closed_form(q, k, v, rho, 0.3, lam), m, atol=1e-13)


@quick
@given(cut=st.integers(0, 9), window=st.sampled_from([None, 1, 2, 5]), lam=st.sampled_from([0, 1]))
def test_a_state_is_handed_over(cut: int, window: int | None, lam: float) -> None:
    q, k, v = tokens()
    options: dict[str, Any] = {"lam": lam, "mu": 0.7, "eta": 0.4, "window": window}
    y, (S, c) = synaptic_resonance(q, k, v, **options)
    _, first = synaptic_resonance(*(x[:, :, :cut] for x in (q, k, v)), **options)
    _, last = synaptic_resonance(*(x[:, :, cut:] for x in (q, k, v)), *first, **options)
    for got, expected in zip(last, (S, c), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-13)
    state, outs = init_state(k, v), []
    for rows in (slice(0, cut), slice(cut, 8), slice(8, 9)):
        out, state = step(state, *(x[:, :, rows] for x in (q, k, v)), **options)
        outs.append(out)
    if cut < 9:
        np.testing.assert_allclose(np.concatenate(outs, axis=2), y, atol=1e-13)
        np.testing.assert_allclose(state.S, S, atol=1e-13)
        np.testing.assert_allclose(state.c, c, atol=1e-13)
        assert state.k.shape == k.shape


def test_a_token_reads_before_it_writes() -> None:
    q, k, v = tokens()
    rho, _ = relevance(k)
    before, _ = memory_recurrent(q, k, v, rho)
    k, v = k.copy(), v.copy()
    k[:, :, 5:] *= -3
    v[:, :, 5:] += 9
    after, _ = memory_recurrent(q, k, v, relevance(k)[0])
    np.testing.assert_array_equal(after[:, :, :6], before[:, :, :6])
    assert np.all(before[:, :, 0] == 0)
    assert np.abs(after[:, :, 6:] - before[:, :, 6:]).max() > 1e-3


def test_without_retention_only_the_last_write_is_read() -> None:
    q, k, v = tokens(H=2)
    rho, _ = relevance(k)
    m, _ = memory_recurrent(q, k, v, rho, 0.5, 0.0)
    similar = (unit(q)[:, :, 1:] * unit(k)[:, :, :-1]).sum(-1)
    expected = 0.5 * (rho[:, :, :-1] * similar)[..., None] * v[:, :, :-1]
    np.testing.assert_allclose(m[:, :, 1:], expected, atol=1e-15)


def test_what_is_linear_and_what_has_no_scale() -> None:
    q, k, v = tokens()
    rho, _ = relevance(k)
    m, _ = memory_chunked(q, k, v, rho, 0.2)
    np.testing.assert_allclose(memory_chunked(q, k, 3 * v, rho, 0.2)[0], 3 * m, atol=1e-14)
    np.testing.assert_allclose(memory_chunked(q, k, v, rho, 0.6)[0], 3 * m, atol=1e-14)
    np.testing.assert_allclose(memory_chunked(5 * q, 7 * k, v, rho, 0.2)[0], m, atol=1e-14)
    np.testing.assert_allclose(relevance(7 * k)[0], rho, atol=1e-14)


@quick
@given(mu=st.sampled_from([0.0, 0.5, 0.99]), seed=st.integers(0, 9))
def test_relevance_lies_between_0_and_1(mu: float, seed: int) -> None:
    _, k, _ = tokens(seed=seed)
    rho, _ = relevance(k, mu)
    assert np.all(rho >= 0)
    assert np.all(rho <= 1 + 1e-15)
    assert np.all(rho[:, :, 0] == 1)


def test_relevance_of_equal_and_of_orthogonal_keys() -> None:
    same = np.broadcast_to(np.array([3.0, -1.0, 2.0]), (1, 1, 6, 3))
    np.testing.assert_allclose(relevance(same, 0.999)[0], 1, atol=1e-15)
    x = np.eye(3)[None, None]
    rho, _ = relevance(x)
    np.testing.assert_array_equal(rho[0, 0], [1, 0, 0])
    _, S = memory_recurrent(x, x, x, rho, 1.0, 1.0)
    np.testing.assert_array_equal(S[0, 0], np.diag([1.0, 0, 0]))


def test_a_first_token_is_one_of_a_fresh_state_only() -> None:
    _, k, _ = tokens()
    k[:, :, :2] = 0
    rho, _ = relevance(k)
    assert np.all(rho[:, :, :3] == 1)  # the trace of zero keys is 0
    assert np.all(rho[:, :, 3] < 1)
    resumed, _ = relevance(k, c0=-k[:, :, 2])
    assert np.all(resumed[:, :, :3] == 0)


@quick
@given(lam=st.sampled_from([0.0, 0.5, 0.9]), seed=st.integers(0, 9))
def test_the_memory_is_bounded(lam: float, seed: int) -> None:
    q, k, v = tokens(20, seed=seed)
    rho, _ = relevance(k)
    m, S = memory_recurrent(q, k, v, rho, 0.3, lam)
    bound = 0.3 * np.linalg.norm(v, axis=-1).max() / (1 - lam) + 1e-12
    assert np.linalg.norm(S, axis=(-1, -2)).max() <= bound
    assert np.linalg.norm(m, axis=-1).max() <= bound


def test_all_relevant_and_nothing_forgotten_is_cosine_linear_attention() -> None:
    q, k, v = tokens(H=2)
    m, _ = memory_chunked(q, k, v, np.ones(k.shape[:-1]), 1.0, 1.0)
    pairs = np.tril(unit(q) @ np.swapaxes(unit(k), -1, -2), k=-1)
    np.testing.assert_allclose(m, pairs @ v, atol=1e-13)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("resumed", [False, True])
def test_padding_changes_nothing(window: int | None, resumed: bool) -> None:
    q, k, v = (x[:1].copy() for x in tokens())
    S0, c0 = (x[:1] for x in states()) if resumed else (None, None)
    valid = VALID[:1]
    for x in (q, k, v):
        x[:, :, ~valid[0]] = np.nan
    y, state = synaptic_resonance(q, k, v, S0, c0, window=window, valid=valid)
    short = (x[:, :, valid[0]] for x in (q, k, v))
    expected, last = synaptic_resonance(*short, S0, c0, window=window)
    np.testing.assert_allclose(y[:, :, valid[0]], expected, atol=1e-14)
    assert np.all(y[:, :, ~valid[0]] == 0)
    for got, other in zip(state, last, strict=True):
        np.testing.assert_allclose(got, other, atol=1e-14)


def differences(function: Callable[..., Any], inputs: list[np.ndarray], ups: Any) -> list[Any]:
    """Central finite differences of sum(up * output), by each input."""
    found = []
    for n, x in enumerate(inputs):
        numeric = np.zeros_like(x)
        for place in np.ndindex(x.shape):
            sides = []
            for h in (1e-6, -1e-6):
                moved = list(inputs)
                moved[n] = x.copy()
                moved[n][place] += h
                outs = function(*moved)
                sides.append(sum(np.sum(up * out) for up, out in zip(ups, outs, strict=True)))
            numeric[place] = (sides[0] - sides[1]) / 2e-6
        found.append(numeric)
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 2])
def test_gradients_are_finite_differences(padded: bool, window: int | None) -> None:
    q, k, v = (x[:, :, :5] for x in tokens(d=3, dv=2))
    S0, c0 = states(d=3, dv=2)
    valid = VALID[:, :5] if padded else None
    random = np.random.default_rng(5)
    ups = [random.standard_normal(s) for s in ((2, 4, 5, 2), S0.shape, c0.shape)]
    options: dict[str, Any] = {"eta": 0.7, "lam": 0.8, "mu": 0.6, "beta": 1.3}
    options |= {"window": window, "valid": valid}

    def whole(*inputs: np.ndarray) -> Any:
        y, (S, c) = synaptic_resonance(*inputs, **options)
        return y, S, c

    got = synaptic_resonance_backward(q, k, v, S0, c0, *ups, **options)
    for mine, numeric in zip(got, differences(whole, [q, k, v, S0, c0], ups), strict=True):
        np.testing.assert_allclose(mine, numeric, atol=2e-8)
    rho, _ = relevance(k, 0.6, valid, c0)
    parts = memory_backward(q, k, v, rho, 0.7, 0.8, S0, valid, ups[0], ups[1])
    numeric = differences(
        lambda q, k, v, rho, S0: memory_recurrent(q, k, v, rho, 0.7, 0.8, S0, valid),
        [q, k, v, rho, S0],
        ups[:2],
    )
    drho = parts[3]
    parts += relevance_backward(k, 0.6, valid, c0, drho, ups[2])
    numeric += differences(lambda k, c0: relevance(k, 0.6, valid, c0), [k, c0], [drho, ups[2]])
    for mine, other in zip(parts, numeric, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-8)


def test_rows_below_the_floor_have_a_gradient() -> None:
    _, k, _ = tokens(3)
    k[:, :, 1] *= 1e-8
    drho = np.ones(k.shape[:-1])
    dk, _ = relevance_backward(k, 0.5, None, None, drho)
    assert np.all(np.isfinite(dk))
    assert np.abs(dk[:, :, 1]).max() > 1


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("started", [False, True])
def test_packed_sequences_are_alone(window: int | None, started: bool) -> None:
    """One of them without a token; with leading axes."""
    q, k, v = tokens()
    ends, random = np.array([0, 4, 4, 5, 9]), np.random.default_rng(4)
    S0, c0 = random.standard_normal((2, 4, 2, 4, 3)), random.standard_normal((2, 4, 2, 4))
    dS, dc = random.standard_normal(S0.shape), random.standard_normal(c0.shape)
    dy = random.standard_normal((2, 4, 9, 3))
    given = (S0, c0) if started else (None, None)
    options: dict[str, Any] = {"eta": 0.7, "lam": 0.8, "mu": 0.6, "beta": 0.4, "window": window}
    y, (S, c) = synaptic_resonance_packed(q, k, v, ends, *given, **options)
    found = synaptic_resonance_packed_backward(q, k, v, ends, *given, dy, dS, dc, **options)
    for n in range(4):
        rows = slice(ends[n], ends[n + 1])
        own = [x[..., rows, :] for x in (q, k, v)]
        state = [None if x is None else x[:, n] for x in given]
        expected, (last, trace) = synaptic_resonance(*own, *state, **options)
        np.testing.assert_allclose(y[..., rows, :], expected, atol=1e-13)
        np.testing.assert_allclose(S[:, n], last, atol=1e-13)
        np.testing.assert_allclose(c[:, n], trace, atol=1e-13)
        alone = synaptic_resonance_backward(
            *own, *state, dy[..., rows, :], dS[:, n], dc[:, n], **options
        )
        parts = [x[..., rows, :] for x in found[:3]] + [x[:, n] for x in found[3:]]
        for got, part in zip(parts, alone, strict=True):
            np.testing.assert_allclose(got, part, atol=1e-13)


def test_precision_and_leading_axes_are_kept() -> None:
    q, k, v = tokens()
    y, (S, c) = synaptic_resonance(*(x.astype(np.float32) for x in (q, k, v)), valid=VALID)
    assert {y.dtype, S.dtype, c.dtype} == {np.dtype(np.float32)}
    expected, _ = synaptic_resonance(q, k, v)
    alone, _ = synaptic_resonance(q[1], k[1], v[1])
    np.testing.assert_allclose(alone, expected[1], atol=1e-15)
    more, _ = synaptic_resonance(q[:, None], k[:, None], v[:, None], valid=VALID[:, None])
    np.testing.assert_allclose(more[:, 0], y, atol=1e-5)


X = np.zeros((2, 3, 4))
ENDS = np.array([0, 1, 3])
R, S4, C4 = np.zeros((2, 3)), np.zeros((2, 4, 4)), np.zeros((2, 4))
BAD: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], type, str], ...] = (
    (relevance, (X[0],), {}, ValueError, "k"),
    (relevance, (X.astype(int),), {}, TypeError, "k"),
    (relevance, (X, 1.0), {}, ValueError, "mu"),
    (relevance, (X, None), {}, TypeError, "mu"),
    (relevance, (X, 0.5, np.ones(3)), {}, TypeError, "valid"),
    (relevance, (X, 0.5, np.ones(2, bool)), {}, ValueError, "valid"),
    (relevance, (X, 0.5, None, C4[:1]), {}, ValueError, "c0"),
    (relevance, (X, 0.5, None, C4.astype(np.float32)), {}, TypeError, "c0"),
    (relevance_backward, (X, 0.5, None, None, R[0]), {}, ValueError, "drho"),
    (relevance_backward, (X, 0.5, None, None, R, R), {}, ValueError, "dc"),
    (memory_recurrent, (X, X, X, R[:1]), {}, ValueError, "rho"),
    (memory_recurrent, (X, X, X, R, -0.1), {}, ValueError, "eta"),
    (memory_recurrent, (X, X, X, R, 0.1, 1.1), {}, ValueError, "lam"),
    (memory_recurrent, (X, X, X, R, 0.1, "1"), {}, TypeError, "lam"),
    (memory_recurrent, (X, X, X, R, 0.1, 1.0, C4), {}, ValueError, "S0"),
    (memory_chunked, (X, X, X, R), {"chunk": 0}, ValueError, "chunk"),
    (memory_chunked, (X, X[:, :2], X[:, :2], R), {}, ValueError, "q"),
    (memory_backward, (X, X, X, R, 0.1, 1.0, None, None, X[:1]), {}, ValueError, "dm"),
    (synaptic_resonance, (X, X, X[:, :2]), {}, ValueError, "v"),
    (synaptic_resonance, (X, X, X), {"window": 0}, ValueError, "window"),
    (synaptic_resonance, (X, X, X), {"window": 2.0}, TypeError, "window"),
    (synaptic_resonance, (X, X, X), {"beta": np.inf}, ValueError, "beta"),
    (synaptic_resonance, (X, X, X), {"eta": True}, TypeError, "eta"),
    (synaptic_resonance, (X, X, X, S4[:1]), {}, ValueError, "S0"),
    (synaptic_resonance_backward, (X, X, X, None, None, X[:1]), {}, ValueError, "dy"),
    (synaptic_resonance_packed, (X, X, X, ENDS[:-1]), {}, ValueError, "offsets"),
    (synaptic_resonance_packed, (X, X, X, ENDS[::-1]), {}, ValueError, "offsets"),
    (synaptic_resonance_packed, (X, X, X, ENDS / 1), {}, TypeError, "offsets"),
    (synaptic_resonance_packed, (X, X, X, ENDS, S4), {}, ValueError, "S0"),
    (synaptic_resonance_packed, (X, X, X, ENDS, None, C4), {}, ValueError, "c0"),
    (synaptic_resonance_packed, (X, X, X[:, :2], ENDS), {}, ValueError, "v"),
    (synaptic_resonance_packed, (X, X, X, ENDS), {"mu": 1.0}, ValueError, "mu"),
    (synaptic_resonance_packed_backward, (X, X, X, ENDS, None, None, R), {}, ValueError, "dy"),
    (synaptic_resonance_packed_backward, (X, X, X, ENDS, None, None, X, S4), {}, ValueError, "dS"),
    (step, (State(X[..., :3], X, S4, C4), X, X, X), {}, ValueError, "state.k"),
    (unit, (np.zeros(3, int),), {}, TypeError, "x"),
)


@pytest.mark.parametrize(("function", "args", "options", "error", "name"), BAD)
def test_bad_input_is_named(
    function: Any, args: tuple[Any, ...], options: dict[str, Any], error: type, name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        function(*args, **options)


def test_inputs_stay_as_they_are() -> None:
    inputs = (*tokens(), *states())
    copies = [x.copy() for x in inputs]
    synaptic_resonance_backward(*inputs, np.ones((2, 4, 9, 3)), valid=VALID)
    for x, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
    assert chapter.MECHANISM.slug == "synaptic_resonance"
