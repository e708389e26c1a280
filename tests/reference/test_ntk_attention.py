"""NTK-Attention against outside evidence, its own properties and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.conventions import causal_mask, repeat_heads
from attnspec.reference.dense.attention import attend, init_state
from attnspec.reference.linear import ntk_attention
from attnspec.reference.linear.ntk_attention import (
    merge_prefix,
    ntk_attend,
    ntk_backward,
    ntk_packed,
    ntk_packed_backward,
    phi,
    prefix_state,
    prefix_terms,
    step,
)

quick = settings(max_examples=20, deadline=None, derandomize=True)
FLOAT32 = 2e-6  # the source computes in float32


def tensors(
    Tq: int = 5, Tk: int = 7, d: int = 6, dv: int = 4, H: int = 4, Hk: int = 2, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """q, K, V, Z, k."""
    random = np.random.default_rng(seed)
    shapes = ((2, H, Tq, d), (2, Hk, Tk, d), (2, Hk, Tk, dv), (H, d, dv), (H, d))
    return tuple(random.standard_normal(shape) for shape in shapes)


def some_keys(Tk: int = 7) -> np.ndarray:
    """A padding mask: the first entry has two keys less, the second none at all."""
    return np.stack([np.arange(Tk) >= 2, np.zeros(Tk, bool)])


@pytest.mark.parametrize("name", ["causal", "negative_k"])
def test_outputs_and_gradients_are_those_of_the_authors(
    name: str, golden: Callable[[str], Any]
) -> None:
    case = golden(f"ntk_attention__{name}")
    inputs = (case["q"], case["k"], case["v"], case["Z"][0], case["zk"][0, ..., 0])
    np.testing.assert_allclose(phi(case["q"]), case["phi_q"], atol=FLOAT32)
    out = ntk_attend(*inputs, causal=True)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, case["out"], rtol=FLOAT32, atol=FLOAT32)
    gradients = ntk_backward(*inputs, case["do"], causal=True)
    theirs = (case["dq"], case["dk"], case["dv"], case["dZ"][0], case["dzk"][0, ..., 0])
    for got, expected in zip(gradients, theirs, strict=True):
        # Where a negative k makes the denominator small, gradients are large.
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lengths", [(5, 7), (7, 7), (9, 7), (1, 7), (3, 0)])
@pytest.mark.parametrize("shift", [0.0, -900.0])
def test_an_empty_state_is_dense_attention(
    causal: bool, padded: bool, lengths: tuple[int, int], shift: float
) -> None:
    q, K, V, Z, k = tensors(*lengths)
    # A channel of its own lowers every score by the same amount.
    q, K = (np.concatenate([x, np.full_like(x[..., :1], c)], -1) for x, c in ((q, 1), (K, shift)))
    Z, k = np.zeros((4, 7, 4)), np.zeros((4, 7))
    mask = some_keys(lengths[1]) if padded else None
    dense_mask = None if mask is None else mask[:, None, None]
    expected, lse = attend(q, K, V, causal=causal, mask=dense_mask)
    got = ntk_attend(q, K, V, Z, k, causal=causal, key_mask=mask)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert np.all(got[np.isneginf(lse)] == 0)


@quick
@given(
    causal=st.booleans(),
    padded=st.booleans(),
    size=st.sampled_from([0.1, 1.0, 6.0]),
    kept=st.sampled_from([0.0, 1e-6, 1.0]),
    seed=st.integers(0, 9),
)
def test_the_merge_form_is_the_definition(
    causal: bool, padded: bool, size: float, kept: float, seed: int
) -> None:
    """Scores up to about +-60, and a k of zeros with a Z that is not."""
    q, K, V, Z, k = tensors(9, 7, seed=seed)
    q, K, k = size * q, size * K, kept * k
    mask = some_keys() if padded else None
    soft, lse = attend(q, K, V, causal=causal, mask=None if mask is None else mask[:, None, None])
    num, den = prefix_terms(q, Z, k)
    merged = merge_prefix(soft, lse, num, den)
    direct = ntk_attend(q, K, V, Z, k, causal=causal, key_mask=mask)
    scale = np.abs(direct).max(axis=-1, keepdims=True) + 1
    np.testing.assert_allclose(merged / scale, direct / scale, atol=1e-11)
    empty = np.isneginf(lse)
    if kept:
        np.testing.assert_allclose(direct[empty], (num / den[..., None])[empty], rtol=1e-12)
    else:
        assert np.all(direct[empty] == 0)


@quick
@given(causal=st.booleans(), m=st.integers(1, 6), seed=st.integers(0, 9))
def test_a_given_prefix_is_weighted_by_its_features(causal: bool, m: int, seed: int) -> None:
    q, K, V, _, _ = tensors(seed=seed)
    random = np.random.default_rng(seed)
    K_P, V_P = random.standard_normal((4, m, 6)), random.standard_normal((4, m, 4))
    out = ntk_attend(q, K, V, *prefix_state(K_P, V_P), causal=causal)
    keys, values = repeat_heads(K, 4), repeat_heads(V, 4)
    allowed = causal_mask(5, 7) if causal else np.ones((5, 7), bool)
    for b, h, i in np.ndindex(out.shape[:3]):
        real = [
            (np.exp(q[b, h, i] @ keys[b, h, j] / np.sqrt(6)), values[b, h, j])
            for j in range(7)
            if allowed[i, j]
        ]
        prefix = [(phi(q[b, h, i]) @ phi(K_P[h, p]), V_P[h, p]) for p in range(m)]
        pairs = real + prefix
        rows = [row for _, row in pairs]
        expected = sum(w * row for w, row in pairs) / sum(w for w, _ in pairs)
        np.testing.assert_allclose(out[b, h, i], expected, atol=1e-12)
        assert np.all(out[b, h, i] <= np.max(rows, axis=0) + 1e-12)
        assert np.all(out[b, h, i] >= np.min(rows, axis=0) - 1e-12)


def test_a_free_state_may_leave_the_values_behind() -> None:
    """Only a state that comes from a prefix makes a mean of values."""
    q, K, V, Z, k = tensors()
    out = ntk_attend(q, K, V, 10 * Z, k)
    assert np.any(out > V.max()), "outside the values of all tokens"
    assert np.any(out < V.min())


def test_no_mask_hides_the_prefix() -> None:
    """den, from what is left of values of 1, is the same whatever a row sees."""
    q, K, V, Z, k = tensors(7, 7)
    _, den = prefix_terms(q, Z, k)
    for options in ({}, {"causal": True}, {"key_mask": np.arange(14).reshape(2, 7) % 3 > 0}):
        mask = options.get("key_mask")
        dense = {"causal": options.get("causal", False)}
        lse = attend(q, K, V, mask=None if mask is None else mask[:, None, None], **dense)[1]
        kept = ntk_attend(q, K, np.ones_like(V), 0 * Z, k, **options)[..., 0]
        np.testing.assert_allclose(np.exp(lse) * (1 / kept - 1), den, rtol=1e-9)
        sigmoid = 1 / (1 + np.exp(np.log(den) - lse))
        np.testing.assert_allclose(kept, sigmoid, rtol=1e-12)


def test_states_add_and_forget_the_order() -> None:
    random = np.random.default_rng(1)
    K_P, V_P = random.standard_normal((3, 9, 4)), random.standard_normal((3, 9, 5))
    whole = prefix_state(K_P, V_P)
    parts = prefix_state(K_P[:, :4], V_P[:, :4]), prefix_state(K_P[:, 4:], V_P[:, 4:])
    order = random.permutation(9)
    shuffled = prefix_state(K_P[:, order], V_P[:, order])
    for name, a, b, other, total in zip(("Z", "k"), *parts, shuffled, whole, strict=True):
        np.testing.assert_allclose(a + b, total, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(other, total, atol=1e-12, err_msg=name)
    for state in (whole, parts[0], prefix_state(K_P[:, :0], V_P[:, :0])):
        assert [x.shape for x in state] == [(3, 4, 5), (3, 4)]


def test_a_large_state_drowns_the_tokens_and_a_small_one_vanishes() -> None:
    q, K, V, Z, k = tensors()
    num, den = prefix_terms(q, Z, k)
    large = ntk_attend(q, K, V, 1e12 * Z, 1e12 * k)
    np.testing.assert_allclose(large, num / den[..., None], atol=1e-8)
    small = ntk_attend(q, K, V, 1e-12 * Z, 1e-12 * k)
    np.testing.assert_allclose(small, attend(q, K, V)[0], atol=1e-9)


def test_every_further_key_leaves_less_to_the_prefix() -> None:
    q, K, V, Z, k = tensors()
    kept = []
    for keys in range(8):
        ones = np.ones_like(V[..., :keys, :])
        kept.append(ntk_attend(q, K[..., :keys, :], ones, 0 * Z, k))
    assert np.all(np.diff(kept, axis=0) > 0)


def test_the_sign_of_k_does_not_matter() -> None:
    q, K, V, Z, k = tensors()
    np.testing.assert_array_equal(ntk_attend(q, K, V, Z, k), ntk_attend(q, K, V, Z, -k))
    plus, minus = (ntk_backward(q, K, V, Z, x, np.ones((2, 4, 5, 4)))[4] for x in (k, -k))
    np.testing.assert_array_equal(plus, -minus)


def test_later_keys_have_no_influence_at_all() -> None:
    q, K, V, Z, k = tensors(7, 7)
    before = ntk_attend(q, K, V, Z, k, causal=True)
    K, V = K.copy(), V.copy()
    K[..., 4:, :] *= 1000
    V[..., 4:, :] *= -1000
    after = ntk_attend(q, K, V, Z, k, causal=True)
    np.testing.assert_array_equal(after[..., :4, :], before[..., :4, :])


def test_the_prefix_does_not_move_with_the_keys() -> None:
    """A vector added to all keys changes nothing in a softmax, and does here."""
    q, K, V, Z, k = tensors()
    moved = K + 1.0
    np.testing.assert_allclose(attend(q, moved, V)[0], attend(q, K, V)[0], atol=1e-12)
    assert np.abs(ntk_attend(q, moved, V, Z, k) - ntk_attend(q, K, V, Z, k)).max() > 1e-2


def test_decoding_is_prefill() -> None:
    q, K, V, Z, k = tensors(7, 7)
    expected = ntk_attend(q, K, V, Z, k, causal=True)
    state = init_state(K, V)
    for first, last in ((0, 1), (1, 4), (4, 5), (5, 7)):
        rows = slice(first, last)
        out, state = step(state, *(x[..., rows, :] for x in (q, K, V)), Z, k)
        np.testing.assert_allclose(out, expected[..., rows, :], atol=1e-12)
    np.testing.assert_array_equal(state.k, K)


def test_other_features_and_thin_factors_go_through_the_merge_form() -> None:
    q, K, V, _, k = tensors()
    random = np.random.default_rng(2)
    A, B = random.standard_normal((4, 6, 2)), random.standard_normal((4, 2, 4))
    num, den = prefix_terms(q, A @ B, k)
    np.testing.assert_allclose((phi(q) @ A) @ B, num, atol=1e-12)
    np.testing.assert_allclose(
        merge_prefix(*attend(q, K, V), (phi(q) @ A) @ B, den),
        ntk_attend(q, K, V, A @ B, k),
        atol=1e-12,
    )


def test_extreme_scores_stay_finite_in_float32() -> None:
    q, K, V, Z, k = (x.astype(np.float32) for x in tensors())
    for size in (300, -300):
        out = ntk_attend(q, size * K * np.sign(q[:, ::2, :1]), V, Z, k)
        assert out.dtype == np.float32
        assert np.all(np.isfinite(out))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("positivity", ["abs", "softplus"])
@pytest.mark.parametrize("empty", [False, True])
def test_gradients_are_finite_differences(causal: bool, positivity: str, empty: bool) -> None:
    inputs = list(tensors(6, 4, d=3, dv=2))
    if empty:
        inputs[3] = np.zeros_like(inputs[3])
    dout = np.random.default_rng(3).standard_normal((2, 4, 6, 2))
    options: dict[str, Any] = {"causal": causal, "positivity": positivity, "scale": 0.4}
    options["key_mask"] = some_keys(4)
    gradients = ntk_backward(*inputs, dout, **options)
    for n, gradient in enumerate(gradients):
        assert gradient.shape == inputs[n].shape
        numeric = np.zeros_like(gradient)
        for place in np.ndindex(gradient.shape):
            sides = []
            for h in (1e-6, -1e-6):
                moved = list(inputs)
                moved[n] = moved[n].copy()
                moved[n][place] += h
                sides.append(np.sum(dout * ntk_attend(*moved, **options)))
            numeric[place] = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(gradient, numeric, atol=1e-7)


def test_a_k_of_zeros_never_learns_under_abs() -> None:
    q, K, V, Z, k = tensors()
    dout = np.ones((2, 4, 5, 4))
    k[:, :3] = 0
    dk = ntk_backward(q, K, V, Z, k, dout)[4]
    assert np.all(dk[:, :3] == 0)
    assert np.all(dk[:, 3:] != 0)
    assert np.all(ntk_backward(q, K, V, Z, k, dout, positivity="softplus")[4] != 0)


def test_leading_axes_are_free() -> None:
    q, K, V, Z, k = tensors()
    out = ntk_attend(q, K, V, Z, k, key_mask=some_keys())
    np.testing.assert_allclose(ntk_attend(q[1], K[1], V[1], Z, k, key_mask=some_keys()[1]), out[1])
    more = (x[:, None] for x in (q, K, V))
    np.testing.assert_allclose(
        ntk_attend(*more, Z, k, key_mask=some_keys()[:, None])[:, 0], out, atol=1e-15
    )
    alone = ntk_backward(q[0], K[0], V[0], Z, k, out[0])
    both = ntk_backward(q[:1], K[:1], V[:1], Z, k, out[:1])
    np.testing.assert_allclose(alone[3], both[3], atol=1e-15)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("positivity", ["abs", "softplus"])
def test_packed_sequences_are_alone(causal: bool, positivity: str) -> None:
    """One without a query, one without a key, and leading axes."""
    q, K, V, Z, k = tensors(6, 7)
    q_offsets, k_offsets = np.array([0, 2, 2, 3, 6]), np.array([0, 1, 3, 3, 7])
    options: dict[str, Any] = {"causal": causal, "positivity": positivity, "scale": 0.4}
    dout = np.random.default_rng(5).standard_normal((2, 4, 6, 4))
    out = ntk_packed(q, K, V, Z, k, q_offsets, k_offsets, **options)
    gradients = ntk_packed_backward(q, K, V, Z, k, q_offsets, k_offsets, dout, **options)
    dZ, dk = np.zeros_like(Z), np.zeros_like(k)
    for n in range(4):
        rows, keys = (slice(x[n], x[n + 1]) for x in (q_offsets, k_offsets))
        own = (q[..., rows, :], K[..., keys, :], V[..., keys, :], Z, k)
        np.testing.assert_allclose(out[..., rows, :], ntk_attend(*own, **options), atol=1e-14)
        alone = ntk_backward(*own, dout[..., rows, :], **options)
        for part, whole, some in zip(alone, gradients, (rows, keys, keys), strict=False):
            np.testing.assert_array_equal(part, whole[..., some, :])
        dZ, dk = dZ + alone[3], dk + alone[4]
    np.testing.assert_allclose(gradients[3], dZ, atol=1e-14)
    np.testing.assert_allclose(gradients[4], dk, atol=1e-14)


X = np.zeros((2, 3, 4))
ENDS = np.array([0, 1, 3])
Z4, K4 = np.zeros((2, 4, 4)), np.zeros((2, 4))
GOOD = (X, X, X, Z4, K4)


def swap(place: int, value: Any, *rest: Any) -> tuple[Any, ...]:
    return (*GOOD[:place], value, *GOOD[place + 1 :], *rest)


BAD: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], type, str], ...] = (
    (phi, ([1.0],), {}, TypeError, "x"),
    (phi, (np.zeros(3, int),), {}, TypeError, "x"),
    (phi, (np.zeros(()),), {}, ValueError, "x"),
    (prefix_state, (X[0], X), {}, ValueError, "K_P"),
    (prefix_state, (X, None), {}, TypeError, "V_P"),
    (prefix_state, (X, X.astype(np.float32)), {}, TypeError, "V_P"),
    (prefix_state, (X, X[:, :2]), {}, ValueError, "V_P"),
    (prefix_terms, (X[0], Z4, K4), {}, ValueError, "q"),
    (prefix_terms, (X, Z4[:1], K4), {}, ValueError, "Z"),
    (prefix_terms, (X, Z4[None], K4), {}, ValueError, "Z"),
    (prefix_terms, (X, Z4, K4[:, :3]), {}, ValueError, "k"),
    (prefix_terms, (X, Z4, K4.astype(int)), {}, TypeError, "k"),
    (prefix_terms, (X, Z4.astype(np.float32), K4), {}, TypeError, "Z"),
    (prefix_terms, (X, Z4, K4), {"positivity": "exp"}, ValueError, "positivity"),
    (merge_prefix, (X, X[..., 0], X, X), {}, ValueError, "den"),
    (merge_prefix, (X, X[0, :, 0], X, X[..., 0]), {}, ValueError, "lse"),
    (merge_prefix, (X, X[..., 0], X[:1], X[..., 0]), {}, ValueError, "num"),
    (merge_prefix, (X[0, 0], X[..., 0], X, X[..., 0]), {}, ValueError, "softmax_out"),
    (merge_prefix, (X, None, X, X[..., 0]), {}, TypeError, "lse"),
    (ntk_attend, swap(0, X.tolist()), {}, TypeError, "q"),
    (ntk_attend, swap(1, X[..., :3]), {}, ValueError, "K"),
    (ntk_attend, swap(1, X.repeat(2, 0)), {}, ValueError, "V"),
    (ntk_attend, (X, *(x.repeat(2, 0) for x in (X, X)), Z4, K4), {}, ValueError, "K"),
    (ntk_attend, swap(1, X[None]), {}, ValueError, "K"),
    (ntk_attend, swap(2, X[:, :2]), {}, ValueError, "V"),
    (ntk_attend, swap(2, X.astype(np.float32)), {}, TypeError, "V"),
    (ntk_attend, swap(3, Z4[..., :3]), {}, ValueError, "Z"),
    (ntk_attend, swap(4, None), {}, TypeError, "k"),
    (ntk_attend, GOOD, {"key_mask": np.ones(3)}, TypeError, "key_mask"),
    (ntk_attend, GOOD, {"key_mask": np.ones(4, bool)}, ValueError, "key_mask"),
    (ntk_attend, GOOD, {"positivity": None}, ValueError, "positivity"),
    (ntk_attend, GOOD, {"scale": "1"}, TypeError, "scale"),
    (ntk_attend, GOOD, {"scale": 0.0}, ValueError, "scale"),
    (ntk_backward, (*GOOD, X), {"scale": -1.0}, ValueError, "scale"),
    (ntk_backward, (*GOOD, X[:, :2]), {}, ValueError, "dout"),
    (ntk_backward, (*GOOD, None), {}, TypeError, "dout"),
    (ntk_packed, (*GOOD, ENDS[:-1], ENDS), {}, ValueError, "q_offsets"),
    (ntk_packed, (*GOOD, ENDS, ENDS[::-1]), {}, ValueError, "k_offsets"),
    (ntk_packed, (*GOOD, ENDS, ENDS[[0, 2]]), {}, ValueError, "k_offsets"),
    (ntk_packed, (*GOOD, ENDS / 1, ENDS), {}, TypeError, "q_offsets"),
    (ntk_packed, (*swap(3, Z4[:1]), ENDS, ENDS), {}, ValueError, "Z"),
    (ntk_packed_backward, (*GOOD, ENDS, ENDS, X[:, :2]), {}, ValueError, "dout"),
    (step, (init_state(X, X), X, X[:, :2], X[:, :2], Z4, K4), {}, ValueError, "K"),
    (step, (init_state(X[..., :3], X), *GOOD), {}, ValueError, "state.k"),
    (step, (None, *GOOD), {}, TypeError, "state"),
    (step, (init_state(X, X), *GOOD), {"scale": True}, TypeError, "scale"),
)


@pytest.mark.parametrize(("function", "args", "options", "error", "name"), BAD)
def test_bad_input_is_named(
    function: Any, args: tuple[Any, ...], options: dict[str, Any], error: type, name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        function(*args, **options)


def test_inputs_stay_as_they_are() -> None:
    inputs = tensors()
    copies = [x.copy() for x in inputs]
    ntk_backward(*inputs, np.ones((2, 4, 5, 4)), key_mask=some_keys())
    for x, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
    assert ntk_attention.MECHANISM.slug == "ntk_attention"
