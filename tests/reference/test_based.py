"""Based against outside evidence, its own properties and bad input."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.dense.attention import attend
from attnspec.reference.linear import based
from attnspec.reference.linear.based import (
    based_attend,
    based_backward,
    based_chunk,
    based_chunk_backward,
    based_decode_step,
    based_packed,
    based_packed_backward,
    based_read,
    based_state_update,
    gated_convolution,
    sliding_window_attend,
    sliding_window_backward,
    taylor_features,
    taylor_features_backward,
    taylor_weights,
)
from attnspec.reference.linear.based_layers import layer_kinds

quick = settings(max_examples=20, deadline=None, derandomize=True)
EXACT = 1e-10


def tensors(
    Tq: int = 7, Tk: int = 7, d: int = 4, dv: int = 5, H: int = 4, Hk: int = 2, seed: int = 0
) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    shapes = ((1, H, Tq, d), (1, Hk, Tk, d), (1, Hk, Tk, dv))
    return tuple(random.standard_normal(shape) for shape in shapes)


def empty(k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    D = 1 + k.shape[-1] + k.shape[-1] ** 2
    return np.zeros((*k.shape[:2], D, v.shape[-1])), np.zeros((*k.shape[:2], D))


def test_it_is_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("based__taylor_causal_mid")
    q, k, v, do = (case[name] for name in ("q", "k", "v", "do"))
    np.testing.assert_allclose(taylor_features(q), case["phi_q"], atol=EXACT)
    np.testing.assert_allclose(taylor_features(k), case["phi_k"], atol=EXACT)
    np.testing.assert_allclose(based_attend(q, k, v, causal=True), case["out"], atol=EXACT)
    o, S, zk = based_chunk(q, k, v, 10)
    np.testing.assert_allclose(o, case["out"], atol=EXACT)
    np.testing.assert_allclose(S, case["final_kv"], atol=EXACT)
    np.testing.assert_allclose(zk, case["final_k"], atol=EXACT)
    for gradients in (
        based_backward(q, k, v, do, causal=True),
        based_chunk_backward(q, k, v, 10, None, None, do)[:3],
    ):
        for got, name in zip(gradients, ("dq", "dk", "dv"), strict=True):
            np.testing.assert_allclose(got, case[name], atol=EXACT)


def test_decoding_is_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("based__decode_steps")
    q, k, v = (case[name] for name in ("q", "k", "v"))
    S, zk = empty(k, v)
    for t in range(q.shape[2]):
        now = (x[:, :, t : t + 1] for x in (q, k, v))
        o, S, zk = based_decode_step(S, zk, *now)
        np.testing.assert_allclose(o[:, :, 0], case["out"][:, :, t], atol=EXACT)
    np.testing.assert_allclose(S, np.swapaxes(case["kv_state"][:, :, 0], -1, -2), atol=EXACT)
    np.testing.assert_allclose(zk, case["k_state"][:, :, 0, 0], atol=EXACT)


@quick
@given(d=st.integers(1, 17), scale=st.sampled_from([None, 0.3, 2.0]), packed=st.booleans())
def test_features_give_the_polynomial(d: int, scale: float | None, packed: bool) -> None:
    q, k, _ = tensors(d=d, H=2)
    phi_q, phi_k = (taylor_features(x, packed=packed, scale=scale) for x in (q, k))
    assert phi_q.shape[-1] == 1 + d + (d * (d + 1) // 2 if packed else d * d)
    weights = taylor_weights(q, k, scale=scale)
    np.testing.assert_allclose(phi_q @ np.swapaxes(phi_k, -1, -2), weights, rtol=1e-12)
    s = (d**-0.5 if scale is None else scale) * q @ np.swapaxes(k, -1, -2)
    np.testing.assert_allclose(weights, ((s + 1) ** 2 + 1) / 2, rtol=1e-12)
    assert np.all(weights >= 0.5)


@quick
@given(
    T=st.integers(0, 12),
    eps=st.sampled_from([0.0, 1e-12, 0.5]),
    scale=st.sampled_from([None, 0.7]),
    seed=st.integers(0, 9),
)
def test_quadratic_recurrent_and_chunked_agree(
    T: int, eps: float, scale: float | None, seed: int
) -> None:
    q, k, v = tensors(T, T, seed=seed)
    options: dict[str, Any] = {"eps": eps, "scale": scale}
    expected = based_attend(q, k, v, causal=True, **options)
    S, zk = empty(k, v)
    rows = [expected[:, :, :0]]
    for t in range(T):
        o, S, zk = based_decode_step(S, zk, *(x[:, :, t : t + 1] for x in (q, k, v)), **options)
        rows.append(o)
    np.testing.assert_allclose(np.concatenate(rows, axis=2), expected, atol=EXACT)
    S_end, zk_end = based_state_update(*empty(k, v), k, v, scale=scale)
    np.testing.assert_allclose(S, S_end, atol=EXACT)
    for chunk in range(1, T + 4):
        o, S, zk = based_chunk(q, k, v, chunk, **options)
        np.testing.assert_allclose(o, expected, atol=EXACT)
        np.testing.assert_allclose(S, S_end, atol=EXACT)
        np.testing.assert_allclose(zk, zk_end, atol=EXACT)
    assert np.all(zk_end[..., 0] == T)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (1, 1), (0, 4), (4, 0)])
def test_outputs_are_convex_combinations(causal: bool, lengths: tuple[int, int]) -> None:
    q, k, v = tensors(*lengths)
    o = based_attend(q, k, v, causal=causal, eps=0.0)
    assert o.shape == (1, 4, lengths[0], 5)
    for h in range(4):
        for i in range(lengths[0]):
            seen = max(0, i + 1 + lengths[1] - lengths[0]) if causal else lengths[1]
            values = v[0, h // 2, :seen]
            if not seen:
                assert np.all(o[0, h, i] == 0)
                continue
            assert np.all(o[0, h, i] <= values.max(0) + 1e-12)
            assert np.all(o[0, h, i] >= values.min(0) - 1e-12)
    ones = based_attend(q, k, np.ones_like(v), causal=causal, eps=0.0)
    unseeing = lengths[0] if not lengths[1] else max(0, lengths[0] - lengths[1]) * causal
    np.testing.assert_allclose(ones[:, :, unseeing:], 1, atol=1e-12)
    assert np.all(ones[:, :, :unseeing] == 0)


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_eps_is_added_to_the_weight_of_one_token(eps: float) -> None:
    q, k, v = tensors(1, 1, H=2)
    w = taylor_weights(q, k)
    for o in (based_attend(q, k, v, eps=eps), based_chunk(q, k, v, 4, eps=eps)[0]):
        np.testing.assert_allclose(o, v * w / (w + eps), rtol=1e-12)


def test_queries_of_zero_give_the_mean() -> None:
    q, k, v = tensors(H=2)
    running = np.cumsum(v, axis=2) / np.arange(1, 8)[:, None]
    np.testing.assert_allclose(based_attend(0 * q, k, v, causal=True), running, atol=EXACT)
    mean = np.broadcast_to(v.mean(axis=2, keepdims=True), v.shape)
    np.testing.assert_allclose(based_attend(q, k, v, scale=1e-14), mean, atol=EXACT)


def test_it_is_softmax_to_third_order() -> None:
    q, k, v = tensors()
    errors = []
    for t in (0.01, 0.005):
        exact = attend(t * q, k, v, causal=True)[0]
        errors.append(np.abs(based_attend(t * q, k, v, causal=True, eps=0.0) - exact).max())
    assert 7 < errors[0] / errors[1] < 9


def test_rotations_and_scales_that_cancel_change_nothing() -> None:
    q, k, v = tensors()
    R = np.linalg.qr(np.random.default_rng(3).standard_normal((4, 4)))[0]
    expected = based_attend(q, k, v, causal=True)
    np.testing.assert_allclose(based_attend(q @ R, k @ R, v, causal=True), expected, atol=EXACT)
    np.testing.assert_allclose(based_attend(3 * q, k / 3, v, causal=True), expected, atol=EXACT)


def test_a_shift_of_all_keys_is_felt_unlike_in_softmax() -> None:
    q, k, v = tensors()
    np.testing.assert_allclose(attend(q, k + 1, v)[0], attend(q, k, v)[0], atol=EXACT)
    assert np.abs(based_attend(q, k + 1, v) - based_attend(q, k, v)).max() > 1e-2


def test_states_add_and_forget_the_order() -> None:
    _, k, v = tensors(Tk=9)
    zero = empty(k, v)
    whole = based_state_update(*zero, k, v)
    first = based_state_update(*zero, k[:, :, :4], v[:, :, :4])
    last = based_state_update(*zero, k[:, :, 4:], v[:, :, 4:])
    order = np.random.default_rng(0).permutation(9)
    shuffled = based_state_update(*zero, k[:, :, order], v[:, :, order])
    for a, b, c, d in zip(first, last, shuffled, whole, strict=True):
        np.testing.assert_allclose(a + b, d, atol=EXACT)
        np.testing.assert_allclose(c, d, atol=EXACT)


def test_reading_the_state_of_all_keys_is_attention_without_an_order() -> None:
    q, k, v = tensors(5, 9)
    state = based_state_update(*empty(k, v), k, v)
    np.testing.assert_allclose(based_read(q, *state), based_attend(q, k, v), atol=EXACT)


def test_a_mask_removes_keys_and_their_nan() -> None:
    q, k, v = tensors(5, 9)
    mask = np.arange(9)[None] % 3 > 0
    k, v = (np.where(mask[:, None, :, None], x, np.nan) for x in (k, v))
    few = (x[:, :, mask[0]] for x in (k, v))
    np.testing.assert_allclose(
        based_attend(q, k, v, key_mask=mask), based_attend(q, *few), atol=EXACT
    )
    nothing = based_attend(q, k, v, key_mask=np.zeros((1, 9), bool), eps=0.0)
    assert np.all(nothing == 0)
    assert all(np.all(np.isfinite(g)) for g in based_backward(q, k, v, nothing, key_mask=mask))


def test_packed_sequences_are_alone() -> None:
    q, k, v = (x[0] for x in tensors(8, 8))
    offsets = np.array([0, 3, 3, 8])
    o, S, zk = based_packed(q, k, v, offsets)
    for n, (a, b) in enumerate(pairwise(offsets)):
        alone = based_chunk(q[:, a:b], k[:, a:b], v[:, a:b], 2)
        for got, expected in zip((o[:, a:b], S[n], zk[n]), alone, strict=True):
            np.testing.assert_allclose(got, expected, atol=EXACT)


def numerical(function: Callable[..., np.ndarray], x: np.ndarray, do: np.ndarray) -> np.ndarray:
    gradient, h = np.zeros_like(x), 1e-6
    for place in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[place] = h
        gradient[place] = np.sum(do * (function(x + step) - function(x - step))) / (2 * h)
    return gradient


@pytest.mark.parametrize("use_norm", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_slopes(causal: bool, use_norm: bool) -> None:
    inputs = list(tensors(4, 3, d=2, dv=2))
    mask = np.array([[True, False, True]])
    options: dict[str, Any] = {
        "causal": causal, "use_norm": use_norm, "eps": 0.1, "key_mask": mask,
    }  # fmt: skip
    do = np.random.default_rng(5).standard_normal((1, 4, 4, 2))
    for n, got in enumerate(based_backward(*inputs, do, **options)):
        rest = list(inputs)

        def along(x: np.ndarray, n: int = n, rest: list[Any] = rest) -> np.ndarray:
            return based_attend(*rest[:n], x, *rest[n + 1 :], **options)

        np.testing.assert_allclose(got, numerical(along, inputs[n], do), atol=1e-7)


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("lengths", [(3, 5), (5, 3)])
def test_gradients_of_the_window_are_slopes(lengths: tuple[int, int], left: int) -> None:
    inputs = list(tensors(*lengths, d=2, dv=2))
    do = np.random.default_rng(5).standard_normal((1, 4, lengths[0], 2))
    for n, got in enumerate(sliding_window_backward(*inputs, left, do)):

        def along(x: np.ndarray, n: int = n) -> np.ndarray:
            return sliding_window_attend(*inputs[:n], x, *inputs[n + 1 :], left)

        np.testing.assert_allclose(got, numerical(along, inputs[n], do), atol=1e-7)


def test_gradients_of_packed_sequences_are_theirs_alone() -> None:
    q, k, v = (x[0] for x in tensors(8, 8))
    offsets = np.array([0, 3, 3, 8])
    random = np.random.default_rng(6)
    do, dS, dzk = (random.standard_normal(x.shape) for x in based_packed(q, k, v, offsets))
    together = based_packed_backward(q, k, v, offsets, do, dS, dzk)
    for n, (a, b) in enumerate(pairwise(offsets)):
        own = (x[:, a:b] for x in (q, k, v))
        alone = based_chunk_backward(*own, 2, None, None, do[:, a:b], dS[n], dzk[n])
        for got, expected in zip(together, alone[:3], strict=True):
            np.testing.assert_allclose(got[:, a:b], expected, atol=EXACT)


def test_gradients_through_states_are_slopes() -> None:
    q, k, v = tensors(4, 4, d=2, dv=2, H=2, Hk=1)
    random = np.random.default_rng(6)
    S0, zk0 = based_state_update(*empty(k, v), k[:, :, :2], v[:, :, :2])
    ups = [random.standard_normal(x.shape) for x in based_chunk(q, k, v, 3, S0, zk0)]
    inputs = [q, k, v, S0, zk0]

    def total(*args: np.ndarray) -> np.ndarray:
        outs = based_chunk(*args[:3], 3, *args[3:])
        return np.array(sum(np.sum(up * out) for up, out in zip(ups, outs, strict=True)))

    for n, got in enumerate(based_chunk_backward(q, k, v, 3, S0, zk0, *ups)):

        def along(x: np.ndarray, n: int = n) -> np.ndarray:
            return total(*inputs[:n], x, *inputs[n + 1 :])

        np.testing.assert_allclose(got, numerical(along, inputs[n], np.array(1.0)), atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_features_are_slopes(packed: bool) -> None:
    x = np.random.default_rng(7).standard_normal((2, 3))
    up = np.random.default_rng(8).standard_normal(taylor_features(x, packed=packed).shape)
    expected = numerical(lambda y: taylor_features(y, packed=packed), x, up)
    np.testing.assert_allclose(taylor_features_backward(x, up, packed=packed), expected, atol=1e-7)


def test_the_window() -> None:
    q, k, v = tensors(6, 8, H=2)
    np.testing.assert_allclose(sliding_window_attend(q, k, v, 0), v[:, :, 2:], atol=1e-12)
    whole = attend(q, k, v, causal=True)[0]
    np.testing.assert_allclose(sliding_window_attend(q, k, v, 7), whole, atol=1e-12)
    last = attend(q[:, :, -1:], k[:, :, -3:], v[:, :, -3:])[0]
    np.testing.assert_allclose(sliding_window_attend(q, k, v, 2)[:, :, -1:], last, atol=1e-12)


def test_the_convolution_and_the_pattern() -> None:
    random = np.random.default_rng(9)
    x, W_in, W_out = (random.standard_normal(shape) for shape in ((5, 3), (3, 8), (4, 3)))
    filters = random.standard_normal((4, 3))
    u, gate = np.split(x @ W_in, 2, axis=-1)
    mixed = np.array(
        [
            sum(filters[:, 2 - back] * u[t - back] for back in range(3) if t >= back)
            for t in range(5)
        ]
    )
    expected = (mixed / (1 + np.exp(-mixed)) * gate) @ W_out
    np.testing.assert_allclose(gated_convolution(x, W_in, filters, W_out), expected, atol=1e-12)
    for layers, linear in ((27, [1, 6, 11, 16, 21]), (36, [1, 6, 11, 16, 21, 27, 33])):
        kinds = layer_kinds(layers)
        assert [n for n, kind in enumerate(kinds) if kind == "linear"] == linear
        window = [n for n, kind in enumerate(kinds) if kind == "window"]
        assert window == [n + 1 for n in linear]
        assert kinds.count("convolution") == layers - 2 * len(linear)
    with pytest.raises(ValueError, match="n_layers"):
        layer_kinds(12)


def test_float32_stays_float32() -> None:
    q, k, v = (x.astype(np.float32) for x in tensors())
    o = based_attend(q, k, v)
    outs = (o, *based_chunk(q, k, v, 3), *based_backward(q, k, v, o))
    assert {x.dtype for x in outs} == {np.dtype(np.float32)}


q0, k0, v0 = tensors()
S_0, zk_0 = empty(k0, v0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: based_attend(q0, k0[..., :2], v0), "k"),
        (lambda: based_attend(q0, k0, v0[:, :, :2]), "v"),
        (lambda: based_attend(q0.tolist(), k0, v0), "q"),
        (lambda: based_attend(q0, k0, v0, scale=0), "scale"),
        (lambda: based_attend(q0, k0, v0, scale="1"), "scale"),
        (lambda: based_attend(q0, k0, v0, eps=-1), "eps"),
        (lambda: based_attend(q0, k0, v0, eps=None), "eps"),
        (lambda: based_attend(q0, k0, v0, causal=1), "causal"),
        (lambda: based_attend(q0, k0, v0, use_norm=None), "use_norm"),
        (lambda: based_attend(q0, k0, v0, key_mask=np.ones((1, 7))), "key_mask"),
        (lambda: based_attend(q0, k0, v0, key_mask=np.ones((1, 3), bool)), "key_mask"),
        (lambda: based_backward(q0, k0, v0, v0), "do"),
        (lambda: taylor_features(1.0), "x"),
        (lambda: taylor_features(q0, packed=1), "packed"),
        (lambda: taylor_features_backward(q0, q0), "dfeatures"),
        (lambda: taylor_weights(q0, k0[..., :2]), "k"),
        (lambda: based_state_update(S_0[..., :2], zk_0, k0, v0), "S"),
        (lambda: based_state_update(S_0, zk_0[..., :2], k0, v0), "zk"),
        (lambda: based_state_update(S_0.astype(np.float32), zk_0, k0, v0), "S"),
        (lambda: based_read(q0, S_0[:, :, :3], zk_0), "S"),
        (lambda: based_read(q0, S_0, zk_0[..., None]), "zk"),
        (lambda: based_read(q0, S_0.astype(np.float32), zk_0), "S"),
        (lambda: based_read(q0, S_0, zk_0.astype(np.float32)), "zk"),
        (lambda: based_chunk(q0, k0, v0, 0), "chunk"),
        (lambda: based_chunk(q0[:, :, :2], k0, v0, 2), "q"),
        (lambda: based_chunk(q0, k0, v0, 2, S_0[..., :1]), "S0"),
        (lambda: based_chunk_backward(q0, k0, v0, 2, None, None, v0), "do"),
        (lambda: based_decode_step(S_0, zk_0, q0, k0, v0), "q"),
        (lambda: based_packed(q0[0], k0[0], v0[0], np.array([0, 3])), "offsets"),
        (lambda: sliding_window_attend(q0, k0, v0, -1), "left"),
        (lambda: gated_convolution(q0, np.ones((4, 3)), np.ones((2, 3)), np.ones((2, 4))), "W_in"),
    ],
)
def test_bad_input_is_refused_by_name(call: Callable[[], Any], name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
        call()


def test_the_record() -> None:
    assert based.MECHANISM.slug == "based"
    assert based.MECHANISM.family == "linear"
