"""Entropy-ABF against outside evidence, its own properties and bad input."""

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
from attnspec.reference.positions import entropy_abf, giraffe
from attnspec.reference.positions.entropy_abf_probe import attention_entropy, entropy_growth
from attnspec.reference.positions.entropy_abf_rotation import (
    interpolated_frequencies,
    layer_is_exempt,
    ntk_frequencies,
    rope_frequencies,
    rope_rotate,
    rope_rotate_backward,
    row_scale,
    yarn_frequencies,
    yarn_scale,
)
from attnspec.reference.primitives.rope import rope

quick = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 999)
FLOAT32 = 1e-6  # the source takes logarithms and the softmax in float32
attention = entropy_abf.extended_attention


def tokens(seed: int = 0, T: int = 6, S: int = 6, H: int = 4, Hk: int = 2, d: int = 8) -> Any:
    random = np.random.default_rng(seed)
    shapes = ((H, T, d), (Hk, S, d), (Hk, S, 3))
    return tuple(random.standard_normal((2, *shape)) for shape in shapes)


def test_rows_around_the_boundary_are_those_of_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("entropy_abf__boundary_4090_4102")
    q, k, v, p = (case[name] for name in ("q", "k", "v", "position_ids"))
    freqs = rope_frequencies(q.shape[-1], case["meta"]["base"])
    lam = row_scale(p, case["meta"]["train_len"])
    np.testing.assert_allclose(lam, case["row_scale"], atol=FLOAT32)
    np.testing.assert_allclose(rope_rotate(k, p, freqs), case["k_rot"], atol=1e-10)
    turned = rope_rotate(q, p, freqs)
    np.testing.assert_allclose(turned, case["q_exempt_rot"], atol=1e-10)
    np.testing.assert_allclose(turned * lam[:, None, :, None], case["q_scaled_rot"], atol=FLOAT32)
    for layer, kind in ((2, "scaled"), (1, "exempt")):
        out, P = entropy_abf.attend(q, k, v, p, p, layer=layer)
        np.testing.assert_allclose(P, case[f"weights_{kind}"], atol=FLOAT32)
        np.testing.assert_allclose(out, case[f"out_{kind}"], atol=FLOAT32)
        np.testing.assert_allclose(attention(q, k, v, p, p, layer=layer)[0], out, atol=1e-12)


def test_released_code_scales_every_layer(golden: Callable[[str], Any]) -> None:
    case = golden("entropy_abf__boundary_4090_4102")
    q, k, v, p = (case[name] for name in ("q", "k", "v", "position_ids"))
    out, _ = attention(q, k, v, p, p, layer=0, n_exempt=0)
    np.testing.assert_allclose(out, case["out_scaled"], atol=FLOAT32)


@pytest.mark.parametrize("options", [{"layer": 5}, {"layer": 1, "c": 2}, {"layer": 9, "c": 6}])
@pytest.mark.parametrize("base", [500000.0, 10000.0])
def test_inside_the_window_and_in_exempt_layers_it_is_rotary(base: float, options: Any) -> None:
    q, k, v = tokens()
    at = np.arange(6)
    plain = dense(rope(q, at, base), rope(k, at, base), v, causal=True)
    got = attention(q, k, v, base=base, **options)
    np.testing.assert_allclose(got[0], plain[0], atol=1e-12)
    np.testing.assert_allclose(got[1], plain[1], atol=1e-12)
    if base == 10000.0:
        np.testing.assert_allclose(got[0], giraffe.attend(q, k, v)[0], atol=1e-12)


def test_the_scale_of_known_positions() -> None:
    assert np.all(row_scale(np.arange(4096)) == 1)
    assert 1 < row_scale(np.array([4096]))[0] < 1.00003
    np.testing.assert_allclose(row_scale(np.array([4096**2 - 1])), 2)
    lam = row_scale(np.arange(-3, 200), c=8, floor=0.5)
    assert np.all(np.diff(lam) >= 0)
    assert np.all(lam[:4] == 0.5)
    far = np.array([10**5, 2 * 10**5])
    assert 0 < math.log(2) / math.log(8) - np.diff(row_scale(far, c=8))[0] < 1e-5
    assert np.all(row_scale(np.arange(9), c=math.inf, floor=1.3) == 1.3)
    assert layer_is_exempt(1)
    assert not layer_is_exempt(0, n_exempt=0)


@quick
@given(seeds, st.integers(0, 500))
def test_only_differences_of_positions_matter_but_for_the_scale(seed: int, shift: int) -> None:
    q, k, _ = tokens(seed)
    at = np.arange(6)
    near = entropy_abf.logits(q, k, at, at, layer=0, base=100.0)
    far = entropy_abf.logits(q, k, at + shift, at + shift, layer=0, base=100.0)
    np.testing.assert_allclose(far, near, atol=1e-11)
    scaled = entropy_abf.logits(q, k, at + shift, at + shift, layer=2, base=100.0, c=4)
    lam = row_scale(at + shift, c=4)[:, None]
    np.testing.assert_allclose(scaled, lam * near, atol=1e-10)
    turned = rope_rotate(q, at + shift, rope_frequencies(8))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(q, axis=-1))


@quick
@given(seeds)
def test_a_larger_scale_sharpens_rows(seed: int) -> None:
    q, k, v = tokens(seed)
    at = np.arange(40, 46)
    rows = [
        entropy_abf.attend(q, k, v, at, at, layer=2, c=c)[1] for c in (math.inf, 100.0, 20.0, 3.0)
    ]
    for flatter, sharper in itertools.pairwise(rows):
        assert np.all(attention_entropy(sharper) <= attention_entropy(flatter) + 1e-12)
        np.testing.assert_array_equal(sharper.argmax(axis=-1), flatter.argmax(axis=-1))


def test_the_scale_belongs_to_the_query() -> None:
    q, k, v = tokens()
    lam = row_scale(np.arange(6), c=2)[:, None]
    expected = attention(q, k, v, layer=2, c=2)[0]
    np.testing.assert_allclose(attention(q * lam, k, v, layer=0)[0], expected, atol=1e-12)
    assert not np.allclose(attention(q, k * lam, v, layer=0)[0], expected)


@pytest.mark.parametrize("chunk", [1, 3])
def test_decoding_with_cached_rotated_keys_is_prefill(chunk: int) -> None:
    q, k, v = tokens(T=9, S=9)
    whole, _ = attention(q, k, v, layer=2, c=4)
    freqs = rope_frequencies(8)
    cached = rope_rotate(k, np.arange(9), freqs)
    for t in range(0, 9, chunk):
        at, seen = np.arange(t, t + chunk), t + chunk
        new = rope_rotate(q[..., t:seen, :], at, freqs) * row_scale(at, c=4)[:, None]
        out, _ = dense(new, cached[..., :seen, :], v[..., :seen, :], causal=True)
        np.testing.assert_allclose(out, whole[..., t:seen, :], atol=1e-12)
        again, _ = attention(q[..., t:seen, :], k[..., :seen, :], v[..., :seen, :], layer=2, c=4)
        np.testing.assert_allclose(again, whole[..., t:seen, :], atol=1e-12)


def test_positions_decide_not_indices() -> None:
    q, k, v = tokens()
    at, order = np.arange(6), np.array([4, 0, 3, 5, 1, 2])
    whole, lse = attention(q, k, v, layer=2, c=3)
    mixed = attention(
        q[..., order, :], k[..., order, :], v[..., order, :], order, order, layer=2, c=3
    )
    np.testing.assert_allclose(mixed[0], whole[..., order, :], atol=1e-12)
    np.testing.assert_allclose(mixed[1], lse[..., order], atol=1e-12)
    padded = np.stack([at, np.maximum(at - 2, 0)])
    real = np.array([[True] * 6, [False] * 2 + [True] * 4])
    k[1, :, :2], v[1, :, :2] = np.nan, np.nan
    out, _ = attention(q, k, v, padded, padded, layer=2, c=3, key_mask=real)
    alone, _ = attention(q[1:, :, 2:], k[1:, :, 2:], v[1:, :, 2:], layer=2, c=3)
    np.testing.assert_allclose(out[1:, :, 2:], alone, atol=1e-12)


def test_more_queries_than_keys() -> None:
    q, k, v = tokens(T=6, S=4)
    out, lse = attention(q, k, v, layer=2, c=2)
    assert np.all(out[..., :2, :] == 0)
    assert np.all(np.isneginf(lse[..., :2]))
    np.testing.assert_allclose(out[..., 2:, :], attention(q[..., 2:, :], k, v, layer=2, c=2)[0])


def test_frequencies() -> None:
    np.testing.assert_array_equal(rope_frequencies(2, 20.0), rope_frequencies(2))
    slow, fast = rope_frequencies(16), rope_frequencies(16, 10000.0)
    assert slow[0] == fast[0] == 1
    assert np.all(slow[1:] < fast[1:])
    for variant in (interpolated_frequencies, ntk_frequencies):
        np.testing.assert_allclose(variant(16, 1.0), fast)
    np.testing.assert_array_equal(ntk_frequencies(2, 4.0), [1.0])
    np.testing.assert_allclose(yarn_frequencies(16, 1.0, 4096), fast)
    np.testing.assert_allclose(ntk_frequencies(16, 4.0)[-1], fast[-1] / 4)
    yarn = yarn_frequencies(16, 4.0, 4096)
    assert yarn[0] == fast[0]
    np.testing.assert_allclose(yarn[-1], fast[-1] / 4)
    assert yarn_scale(1.0) == 1


def test_variants_are_frequencies_and_a_constant_scale() -> None:
    q, k, v = tokens()
    freqs, g = yarn_frequencies(8, 4.0, 32), yarn_scale(4.0)
    got = attention(q, k, v, layer=0, freqs=freqs, c=math.inf, floor=g, n_exempt=0)
    turned = (rope_rotate(x, np.arange(6), freqs) for x in (q, k))
    expected = dense(*turned, v, causal=True, scale=g / math.sqrt(8))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-12)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal: bool) -> None:
    inputs = tokens(T=4, S=5)
    random = np.random.default_rng(3)
    pq, pk = np.array([2, 7, 8, 30]), np.array([[0, 1, 5, 8, 9], [3, 4, 6, 7, 20]])
    options: dict[str, Any] = {"layer": 2, "c": 4, "base": 50.0, "causal": causal}
    out, lse = attention(*inputs, pq, pk, **options)
    seen = np.isfinite(lse)
    dout = random.standard_normal(out.shape)
    dlse = np.where(seen, random.standard_normal(lse.shape), 0)
    gradients = entropy_abf.extended_attention_backward(*inputs, pq, pk, dout, dlse, **options)
    for n, gradient in enumerate(gradients):
        direction = random.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[n] = inputs[n] + sign * 1e-6 * direction
            o, l_ = attention(*moved, pq, pk, **options)
            ends.append(np.sum(o * dout) + np.sum(np.where(seen, l_, 0) * dlse))
        slope = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6)


def test_rotation_is_orthogonal() -> None:
    x, dout = np.random.default_rng(0).standard_normal((2, 2, 3, 5, 8))
    at, freqs = np.array([[0, 3, 9, 1, 2], [5, 5, -2, 0, 80]]), rope_frequencies(8, 100.0)
    dx = rope_rotate_backward(x, at, freqs, dout)
    np.testing.assert_allclose(np.sum(dx * x), np.sum(dout * rope_rotate(x, at, freqs)))


def test_entropy_growth() -> None:
    random = np.random.default_rng(0)
    rows = {n: random.exponential(size=(3, 2, 4, n)) for n in (9, 4)}
    rows = {n: P / P.sum(axis=-1, keepdims=True) for n, P in rows.items()}
    lengths, E = entropy_growth(rows)
    np.testing.assert_array_equal(lengths, [4, 9])
    assert E.shape == (2, 2, 4)
    np.testing.assert_allclose(E[1], attention_entropy(rows[9]).mean(axis=0))
    uniform = {n: np.full((1, 1, 1, n), 1 / n) for n in (2, 8)}
    np.testing.assert_allclose(entropy_growth(uniform)[1].ravel(), np.log([2, 8]))


def test_float32_stays_float32() -> None:
    q, k, v = (x.astype(np.float32) for x in tokens())
    out, lse = attention(q, k, v, layer=2, c=3)
    assert out.dtype == lse.dtype == np.float32
    assert all(x.dtype == np.float32 for x in entropy_abf.attend(q, k, v, layer=2, c=3))
    grads = entropy_abf.extended_attention_backward(q, k, v, None, None, out, lse, layer=2, c=3)
    assert all(x.dtype == np.float32 for x in grads)


Q, K, V = tokens()
AT = np.arange(6)
ROWS = np.full((1, 1, 1, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: attention(Q, K, V, layer=-1), ValueError, "layer"),
        (lambda: attention(Q, K, V, layer=1.0), TypeError, "layer"),  # type: ignore[arg-type]
        (lambda: attention(Q, K, V, layer=2, n_exempt=-1), ValueError, "n_exempt"),
        (lambda: attention(Q, K, V, layer=2, c=1), ValueError, "c"),
        (lambda: attention(Q, K, V, layer=2, c="8"), TypeError, "c"),  # type: ignore[arg-type]
        (lambda: attention(Q, K, V, layer=2, floor=0.0), ValueError, "floor"),
        (lambda: attention(Q, K, V, layer=2, floor=math.inf), ValueError, "floor"),
        (lambda: attention(Q, K, V, layer=2, base=1.0), ValueError, "base"),
        (lambda: attention(Q, K, V, layer=2, base=1.0, freqs=np.ones(4)), ValueError, "base"),
        (lambda: attention(Q, K, V, layer=2, causal=1), TypeError, "causal"),  # type: ignore[arg-type]
        (lambda: attention(Q, K, V, AT[:3], layer=2), ValueError, "pq"),
        (lambda: attention(Q, K, V, AT, AT / 2, layer=2), TypeError, "pk"),
        (lambda: attention(Q, K, V, layer=2, freqs=np.ones(3)), ValueError, "freqs"),
        (lambda: attention(Q, K, V, layer=2, key_mask=np.ones(6)), TypeError, "key_mask"),
        (lambda: attention(Q, K, V, layer=2, key_mask=np.ones(5, bool)), ValueError, "key_mask"),
        (lambda: attention(Q[..., :7], K[..., :7], V, layer=2), ValueError, "d"),
        (lambda: attention(Q, K[..., :6], V, layer=2), ValueError, "k"),
        (lambda: rope_frequencies(0), ValueError, "d"),
        (lambda: rope_frequencies(4, math.inf), ValueError, "base"),
        (lambda: interpolated_frequencies(4, 0.0), ValueError, "s"),
        (lambda: ntk_frequencies(4, -1.0), ValueError, "s"),
        (lambda: yarn_frequencies(4, 2.0, 0), ValueError, "L"),
        (lambda: yarn_scale(0.0), ValueError, "s"),
        (lambda: rope_rotate(Q[0, 0], AT, rope_frequencies(8)), ValueError, "x"),
        (lambda: row_scale([1, 2]), TypeError, "positions"),  # type: ignore[arg-type]
        (lambda: row_scale(AT, c=0.5), ValueError, "c"),
        (lambda: layer_is_exempt(True), TypeError, "layer"),
        (lambda: attention_entropy(-ROWS), ValueError, "P"),
        (lambda: entropy_growth({}), TypeError, "P_by_length"),
        (lambda: entropy_growth({3: ROWS}), ValueError, "P_by_length"),
        (lambda: entropy_growth({2: ROWS[0]}), ValueError, "P_by_length"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}: got .*expected"):
        call()
