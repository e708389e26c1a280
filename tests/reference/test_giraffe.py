"""Giraffe against outside evidence, its own properties and bad input: positions and attention."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.dense.attention import attend as dense
from attnspec.reference.dense.attention import score
from attnspec.reference.positions import giraffe
from attnspec.reference.positions.giraffe_masks import visible
from attnspec.reference.positions.giraffe_rotation import (
    positions,
    random_positions,
    relative_kernel,
    rope_basis,
    rotate_half_split,
    rotate_half_split_backward,
    rotate_interleaved,
    rotate_interleaved_backward,
)
from attnspec.reference.positions.giraffe_xpos import (
    scale_base,
    xpos,
    xpos_attend,
    xpos_attend_backward,
    xpos_backward,
    xpos_scale,
)
from attnspec.reference.primitives.rope import rope

quick = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 999)
FLOAT32 = 2e-6  # the authors compute in float32
attend = giraffe.attend
HALVES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # half-split channels in the order of interleaved pairs


def tokens(seed: int = 0, T: int = 6, S: int = 6, H: int = 4, Hk: int = 2, d: int = 8) -> Any:
    random = np.random.default_rng(seed)
    shapes = ((H, T, d), (Hk, S, d), (Hk, S, 3))
    return tuple(random.standard_normal((2, *shape)) for shape in shapes)


def test_frequencies_are_those_of_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("giraffe__frequencies")
    names = {"scale": "scale", "scale_power": "power", "truncate": "truncate"}
    for name, config in case["meta"]["configs"].items():
        options = {names[key]: value for key, value in config.items()}
        for d in (16, 128):
            f = rope_basis(d, case["meta"]["base"], **options)
            np.testing.assert_allclose(f, case[f"freq_{name}_d{d}"], rtol=FLOAT32)
        f = rope_basis(16, case["meta"]["base"], **options)
        at = positions(32)
        one, other = np.zeros((2, 1, 32, 16))
        one[..., :8], other[..., 8:] = 1, 1
        cos, sin = case[f"cos_{name}_d16"], case[f"sin_{name}_d16"]
        turned = rotate_half_split(one, at, f)[0]
        np.testing.assert_allclose(turned, np.hstack([cos[:, :8], sin[:, 8:]]), atol=1e-5)
        turned = rotate_half_split(other, at, f)[0]
        np.testing.assert_allclose(turned, np.hstack([-sin[:, :8], cos[:, 8:]]), atol=1e-5)


def test_random_positions_are_those_of_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("giraffe__random_positions")
    p = random_positions(case["u"])
    assert p.dtype == np.float32
    np.testing.assert_allclose(p, case["positions"], rtol=FLOAT32)
    f = rope_basis(16, scale=case["meta"]["scale"])
    np.testing.assert_allclose(f, case["freq"], rtol=FLOAT32)
    one = np.zeros((3, 1, 20, 16))
    one[..., :8] = 1
    turned = rotate_half_split(one, case["positions"], f)[:, 0]
    np.testing.assert_allclose(turned[..., :8], case["cos"][..., :8], atol=1e-5)
    np.testing.assert_allclose(turned[..., 8:], case["sin"][..., 8:], atol=1e-5)


def test_xpos_is_that_of_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("giraffe__xpos_sb512")
    q, k = case["q"].astype(float), case["k"].astype(float)
    N, b = case["meta"]["max_positions"], case["meta"]["scale_base"]
    at = positions(24)
    zeta = xpos_scale(8, np.array([b + N // 2]), N, b)[0]
    np.testing.assert_allclose(zeta, case["scale"], rtol=FLOAT32)
    q_out, k_out = xpos(q, k, at, at, N=N, b=b)
    np.testing.assert_allclose(q_out, case["q_out"], atol=1e-5)
    np.testing.assert_allclose(k_out, case["k_out"], atol=1e-5)
    np.testing.assert_allclose(q_out @ k_out.swapaxes(-1, -2), case["logits"], atol=1e-4)
    single, _ = xpos(q[..., 5:6, :], k, at[5:6], at, N=N, b=b)
    np.testing.assert_allclose(single, case["q_single_pos5"], atol=1e-5)
    last, _ = xpos(q[..., 23:, :], k, at[23:], at, N=N, b=b)
    np.testing.assert_allclose(last, q_out[..., 23:, :], atol=1e-12)


def test_default_settings_are_rotary() -> None:
    q, k, v = tokens()
    at = positions(6)
    plain = dense(rope(q, at), rope(k, at), v, causal=True)
    for got in (attend(q, k, v), attend(q, k, v, at, at, rope_basis(8))):
        np.testing.assert_allclose(got[0], plain[0], atol=1e-12)
        np.testing.assert_allclose(got[1], plain[1], atol=1e-12)
    theta = rope_basis(8)
    for options in ({"scale": 0.5}, {"scale": 1}, {"power": 0}, {"truncate": 0}, {"truncate": -1}):
        np.testing.assert_array_equal(rope_basis(8, **options), theta)
    np.testing.assert_array_equal(rope_basis(8, truncate=1e12), theta)


@quick
@given(seeds, st.floats(1.1, 40))
def test_linear_scaling_divides_positions(seed: int, s: float) -> None:
    q, k, v = tokens(seed)
    at = positions(6)
    scaled = attend(q, k, v, at, at, rope_basis(8, scale=s))
    np.testing.assert_allclose(attend(q, k, v, at / s, at / s)[0], scaled[0], atol=1e-10)
    np.testing.assert_allclose(rope_basis(8, scale=s) * s, rope_basis(8))
    L = 64
    reach = (math.floor(s * L) - 1) * rope_basis(8, scale=s)
    assert np.all(reach < L * rope_basis(8))


@quick
@given(st.floats(0.05, 3), st.sampled_from([4, 16, 128]))
def test_power_slows_low_frequencies_most(kappa: float, d: int) -> None:
    ratio = rope_basis(d, power=kappa) / rope_basis(d)
    assert ratio[0] == 1
    assert np.all(np.diff(ratio) < 0)
    assert ratio[-1] > 0


@pytest.mark.parametrize(("length", "counts"), [(2048, (41, 14, 9)), (4096, (46, 14, 4))])
def test_truncated_frequencies(length: int, counts: tuple[int, int, int]) -> None:
    f, theta, cut = rope_basis(128, truncate=length), rope_basis(128), 2 * np.pi / length
    low = cut / 16
    kept = theta >= cut
    assert (kept.sum(), np.sum(f == low), np.sum(f == 0)) == counts
    np.testing.assert_array_equal(f[kept], theta[kept])
    assert np.all(np.diff(kept.astype(int)) <= 0)
    assert rope_basis(8, truncate=2 * np.pi)[0] == 1
    after = rope_basis(128, scale=4, power=0.5, truncate=length)
    bent = rope_basis(128, scale=4, power=0.5)
    assert set(after) <= {*bent[bent >= cut], low, 0.0}
    assert not np.array_equal(after, f)


def test_pairs_without_rotation_do_not_know_positions() -> None:
    q, k, _ = tokens()
    f = np.array([1.0, 0.3, 0.0, 0.0])
    q[..., [0, 1, 4, 5]] = 0
    at = positions(6)
    turned = rotate_half_split(q, at, f) @ rotate_half_split(k, at, f)[:, [0, 0, 1, 1]].swapaxes(
        -1, -2
    )
    np.testing.assert_allclose(turned, q @ k[:, [0, 0, 1, 1]].swapaxes(-1, -2), atol=1e-12)


@quick
@given(seeds, st.integers(-300, 300))
def test_logits_depend_on_distances(seed: int, shift: int) -> None:
    q, k, _ = tokens(seed)
    f, at = rope_basis(8, 100.0, 2.0, 0.3), positions(6)
    for rotate in (rotate_half_split, rotate_interleaved):
        near = score(rotate(q, at, f), rotate(k, at, f))
        far = score(rotate(q, at + shift, f), rotate(k, at + shift, f))
        np.testing.assert_allclose(far, near, atol=1e-10)
        np.testing.assert_allclose(
            np.linalg.norm(rotate(q, at + shift, f), axis=-1), np.linalg.norm(q, axis=-1)
        )
        np.testing.assert_array_equal(rotate(q, at, f)[..., 0, :], q[..., 0, :])
    near, far = (score(*xpos(q, k, p, p, N=32, b=64)) for p in (at, at + shift / 4))
    np.testing.assert_allclose(far, near, atol=1e-9)


def test_the_logit_is_the_sum_of_its_pairs() -> None:
    q, k = np.random.default_rng(0).standard_normal((2, 8))
    f, i, j = rope_basis(8, 50.0), 9, 4
    angle = (i - j) * f
    expected = np.sum(
        (q[:4] * k[:4] + q[4:] * k[4:]) * np.cos(angle)
        + (q[:4] * k[4:] - q[4:] * k[:4]) * np.sin(angle)
    )
    turned = (rotate_half_split(x[None, None], np.array([p]), f)[0, 0] for x, p in ((q, i), (k, j)))
    np.testing.assert_allclose(np.dot(*turned), expected)
    w = q[:4] ** 2 + q[4:] ** 2
    same = [rotate_half_split(q[None, None], np.array([p]), f)[0, 0] for p in (i, j)]
    np.testing.assert_allclose(relative_kernel(f, w)(np.array([i - j]))[0], np.dot(*same))


def test_interleaved_is_half_split_in_another_order() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 8))
    at, f = np.array([[0, 1.5, 2, 3, 9], [4, 4, 5, 6, 7]]), rope_basis(8)
    expected = rotate_half_split(x, at, f)[..., HALVES]
    np.testing.assert_allclose(rotate_interleaved(x[..., HALVES], at, f), expected)


@quick
@given(seeds, st.integers(1, 30), st.floats(0.02, 1))
def test_random_positions(seed: int, T: int, most: float) -> None:
    u = np.random.default_rng(seed).uniform(1e-3, most, (3, T))
    p = random_positions(u)
    assert np.all(np.diff(p, axis=-1) > 0)
    assert np.all(p[:, -1] <= T * (1 + 1e-15))
    total = np.cumsum(2 * u, axis=-1)
    inside = total[:, -1] <= T
    np.testing.assert_allclose(p[inside], total[inside])
    np.testing.assert_allclose(p[~inside], (total * T / total[:, -1:])[~inside])
    assert random_positions(u[:, :0]).shape == (3, 0)


def test_equal_positions_do_not_show_later_tokens() -> None:
    q, k, v = tokens()
    p = random_positions(np.array([0.3, 0.0, 0.4, 0.0, 0.0, 0.2]))
    whole, _ = attend(q, k, v, p, p)
    v[:, :, 1:] = 7
    np.testing.assert_array_equal(attend(q, k, v, p, p)[0][:, :, 0], whole[:, :, 0])


@quick
@given(seeds, st.floats(4, 600))
def test_xpos_is_a_rotation_that_fades(seed: int, b: float) -> None:
    q, k, _ = tokens(seed, Hk=4)
    at, N = positions(6), 16
    q_out, k_out = xpos(q, k, at, at, N=N, b=b)
    shifted = xpos(q, k, at, at, N=N + 10, b=b)
    np.testing.assert_allclose(score(*shifted), score(q_out, k_out), atol=1e-8)
    zeta = xpos_scale(8, np.array([b + N // 2]), N, b)[0]
    assert np.all((zeta > 0.28) & (zeta < 1))
    f = rope_basis(8)
    turned = (rotate_interleaved(x, at, f).reshape(2, 4, 6, 4, 2) for x in (q, k))
    by_pair = np.einsum("bhimc,bhjmc->bhijm", *turned)
    fading = zeta ** ((at[:, None] - at)[..., None] / b)
    np.testing.assert_allclose(
        np.sum(by_pair * fading, axis=-1) / np.sqrt(8), score(q_out, k_out), atol=1e-9
    )
    assert np.all(fading[np.tril_indices(6)] <= 1)
    assert np.all(np.diff(fading[-1], axis=0) > 0)


def test_xpos_without_fading_is_rotary() -> None:
    q, k, v = tokens()
    at = positions(6)
    plain = xpos(q, k, at, at, N=16, b=1e15)
    np.testing.assert_allclose(plain[0], rotate_interleaved(q, at, rope_basis(8)))
    out, _ = xpos_attend(q[..., HALVES], k[..., HALVES], v, N=16, b=1e15)
    np.testing.assert_allclose(out, attend(q, k, v)[0], atol=1e-9)
    assert [scale_base(n) for n in (0, 100, 10**6)] == [8192, 7392, 128]


@pytest.mark.parametrize("chunk", [1, 4])
def test_decoding_is_prefill(chunk: int) -> None:
    q, k, v = tokens(T=9, S=9)
    f = rope_basis(8, scale=2.0)
    at = np.stack([positions(9), positions(9) + 5])
    whole, _ = attend(q, k, v, at, at, f)
    faded, _ = xpos_attend(q, k, v, N=9, b=4)
    state = giraffe.init_state(k, v)
    cached = xpos(q, k, positions(9), positions(9), N=9, b=4)[1]
    for t in range(0, 9, chunk):
        rows = slice(t, min(t + chunk, 9))
        out, state = giraffe.step(
            state, q[..., rows, :], k[..., rows, :], v[..., rows, :], at[:, rows], f
        )
        np.testing.assert_allclose(out, whole[..., rows, :], atol=1e-12)
        new, _ = xpos(q[..., rows, :], k, positions(9)[rows], positions(9), N=9, b=4)
        out, _ = dense(new, cached[..., : rows.stop, :], v[..., : rows.stop, :], causal=True)
        np.testing.assert_allclose(out, faded[..., rows, :], atol=1e-12)


def test_padding_is_not_read() -> None:
    q, k, v = tokens()
    at = np.maximum(positions(6) - 2, 0)
    real = np.array([[True] * 6, [False] * 2 + [True] * 4])
    k[1, :, :2], v[1, :, :2] = np.nan, np.nan
    for got, alone in (
        (attend(q, k, v, at, at, key_mask=real), attend(q[1:, :, 2:], k[1:, :, 2:], v[1:, :, 2:])),
        (
            xpos_attend(q, k, v, at, at, N=8, key_mask=real),
            xpos_attend(q[1:, :, 2:], k[1:, :, 2:], v[1:, :, 2:], N=8),
        ),
    ):
        np.testing.assert_allclose(got[0][1:, :, 2:], alone[0], atol=1e-12)
        assert np.all(got[0][1, :, :2] == 0)
        assert np.all(np.isneginf(got[1][1, :, :2]))
    q, k, v = tokens(T=6, S=4)
    assert np.all(attend(q, k, v)[0][..., :2, :] == 0)


CALLS: Any = [
    (attend, giraffe.attend_backward, (rope_basis(8, 20.0),), {}),
    (xpos_attend, xpos_attend_backward, (), {"N": 40, "b": 20, "base": 20.0}),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("forward", "backward", "extra", "options"), CALLS)
def test_gradients(forward: Any, backward: Any, extra: Any, options: Any, causal: bool) -> None:
    inputs = tokens(T=4, S=5)
    random = np.random.default_rng(3)
    at = np.array([2.5, 7, 8, 30]), np.array([[0, 1, 5, 8, 9], [3, 4, 6, 7, 20]])
    options = {**options, "causal": causal}
    out, lse = forward(*inputs, *at, *extra, **options)
    dout, dlse = random.standard_normal(out.shape), random.standard_normal(lse.shape)
    gradients = backward(*inputs, *at, *extra, dout, dlse, **options)
    for n, gradient in enumerate(gradients):
        direction = random.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[n] = inputs[n] + sign * 1e-6 * direction
            o, l_ = forward(*moved, *at, *extra, **options)
            ends.append(np.sum(o * dout) + np.sum(l_ * dlse))
        slope = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6)


def test_gradients_of_rotations_are_adjoint() -> None:
    x, dout = np.random.default_rng(0).standard_normal((2, 2, 3, 5, 8))
    at, f = np.array([[0, 3, 9, 1, 2], [5, 5, -2, 0, 80]]), rope_basis(8, 100.0)
    for rotate, back in (
        (rotate_half_split, rotate_half_split_backward),
        (rotate_interleaved, rotate_interleaved_backward),
    ):
        dx = back(x, at, f, dout)
        np.testing.assert_allclose(np.sum(dx * x), np.sum(dout * rotate(x, at, f)))
    outs = xpos(x, x, at, at, N=32, b=20)
    grads = xpos_backward(x, x, at, at, dout, dout, N=32, b=20)
    for out, dx in zip(outs, grads, strict=True):
        np.testing.assert_allclose(np.sum(dx * x), np.sum(dout * out))


def test_float32_stays_float32() -> None:
    q, k, v = (x.astype(np.float32) for x in tokens())
    for result in (attend(q, k, v), xpos_attend(q, k, v, N=8)):
        assert all(x.dtype == np.float32 for x in result)
    grads = giraffe.attend_backward(q, k, v, None, None, None, *attend(q, k, v))
    grads += xpos_attend_backward(q, k, v, None, None, *xpos_attend(q, k, v, N=8), N=8)
    out, state = giraffe.step(giraffe.init_state(k, v), q, k, v, positions(6))
    assert all(x.dtype == np.float32 for x in (*grads, out, *state))


Q, K, V = tokens()
AT = positions(6)
F = rope_basis(8)
EMPTY = giraffe.init_state(K, V)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: rope_basis(3), ValueError, "d"),
        (lambda: rope_basis(4.0), TypeError, "d"),  # type: ignore[arg-type]
        (lambda: rope_basis(4, 1.0), ValueError, "base"),
        (lambda: rope_basis(4, scale=0.0), ValueError, "scale"),
        (lambda: rope_basis(4, scale=math.inf), ValueError, "scale"),
        (lambda: rope_basis(4, power=-0.5), ValueError, "power"),
        (lambda: rope_basis(4, power="1"), TypeError, "power"),  # type: ignore[arg-type]
        (lambda: rope_basis(4, truncate=math.nan), ValueError, "truncate"),
        (lambda: positions(-1), ValueError, "T"),
        (lambda: random_positions(np.array([0.5, 1.0])), ValueError, "u"),
        (lambda: random_positions(np.arange(3)), TypeError, "u"),
        (lambda: rotate_half_split(Q, AT[:3], F), ValueError, "p"),
        (lambda: rotate_half_split(Q, [0.0] * 6, F), TypeError, "p"),  # type: ignore[arg-type]
        (lambda: rotate_half_split(Q, AT > 2, F), TypeError, "p"),
        (lambda: rotate_half_split(Q, AT, F[:3]), ValueError, "f"),
        (lambda: rotate_interleaved(Q[..., :7], AT, F), ValueError, "x"),
        (lambda: relative_kernel(F, F[:2]), ValueError, "w"),
        (lambda: xpos_scale(7, AT, 4), ValueError, "d"),
        (lambda: xpos_scale(8, np.array(3), 4), ValueError, "p"),
        (lambda: xpos_scale(8, AT, 0), ValueError, "N"),
        (lambda: xpos_scale(8, AT, 4, 0), ValueError, "b"),
        (lambda: xpos(Q, K, AT[:2], AT, N=4), ValueError, "pq"),
        (lambda: xpos(Q[..., :7], K[..., :7], AT, AT, N=4), ValueError, "q"),
        (lambda: xpos_attend(Q, K, V, N=4.0), TypeError, "N"),  # type: ignore[arg-type]
        (lambda: xpos_attend(Q, K, V[..., :5, :], N=4), ValueError, "v"),
        (lambda: scale_base(-1), ValueError, "step"),
        (lambda: attend(Q, K, V, AT, AT[:5]), ValueError, "pk"),
        (lambda: attend(Q, K, V, f=F[:2]), ValueError, "f"),
        (lambda: attend(Q, K[..., :6], V), ValueError, "k"),
        (lambda: attend(Q, K, V, causal=1), TypeError, "causal"),  # type: ignore[arg-type]
        (lambda: attend(Q, K, V, key_mask=np.ones(6)), TypeError, "key_mask"),
        (lambda: visible(2, 3, key_mask=np.ones(2, bool)), ValueError, "key_mask"),
        (lambda: giraffe.step(EMPTY, Q, K, V, AT[:2]), ValueError, "p"),
        (lambda: giraffe.step(EMPTY, Q, K, V[..., :2], AT), ValueError, "v"),
        (lambda: giraffe.step(EMPTY, Q[..., :2, :], K, V, AT), ValueError, "k"),
        (lambda: giraffe.step(EMPTY, Q, K, V, AT, F[:1]), ValueError, "f"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}: got .*expected"):
        call()


def test_cases_are_distinct() -> None:
    """The variants differ where they should: no two share their frequencies."""
    options: Any = ({}, {"scale": 4}, {"power": 0.5}, {"truncate": 2048})
    for one, other in itertools.combinations([rope_basis(128, **o) for o in options], 2):
        assert not np.allclose(one, other, rtol=1e-3)
