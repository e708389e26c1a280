"""The sinks of StreamingLLM: outside evidence, properties, finite differences and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.cache import streaming_llm as stream
from attnspec.reference.cache import streaming_llm_sinks as sinks
from attnspec.reference.conventions import repeat_heads
from attnspec.reference.dense.attention import attend
from attnspec.reference.primitives.softmax import softmax
from tests.differences import differences

quick = settings(max_examples=25, deadline=None, derandomize=True)
small = st.integers(0, 5)


def tokens(T: int = 12, H: int = 4, Hk: int = 2, d: int = 6, dv: int = 5, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    shapes = ((2, H, T, d), (2, Hk, T, d), (2, Hk, T, dv))
    return tuple(random.standard_normal(shape) for shape in shapes)


def test_sink_logit_is_that_of_a_released_model(golden: Callable[[str], Any]) -> None:
    case = golden("streaming_llm__sink_logit")
    q, k, v, s_h = (case[name] for name in ("q", "k", "v", "sinks"))
    atol = case["meta"]["tolerance"]
    mask = stream.sink_window_mask(q.shape[-2], S=0, R=3)
    out, _ = stream.attend_with_sink_logit(q, k, v, s_h, mask)
    scores = q @ np.swapaxes(repeat_heads(k, 4), -1, -2) / np.sqrt(q.shape[-1])
    weights, _, _ = sinks.softmax_with_sink(scores, s_h, mask)
    np.testing.assert_allclose(out, case["out"], atol=atol)
    np.testing.assert_allclose(weights, case["probs"], atol=atol)
    gradients = stream.attend_with_sink_logit_backward(q, k, v, s_h, mask, case["dout"])
    for name, gradient in zip(("dq", "dk", "dv", "dsinks"), gradients, strict=True):
        np.testing.assert_allclose(gradient, case[name], atol=atol, err_msg=name)


@quick
@given(seed=st.integers(0, 99), size=st.sampled_from([0.1, 3.0, 1e3, 1e5]))
def test_softmax1_is_a_softmax_with_one_more_key(seed: int, size: float) -> None:
    x = size * np.random.default_rng(seed).standard_normal((3, 7))
    p = stream.softmax1(x)
    padded = softmax(np.concatenate([x, np.zeros((3, 1))], axis=-1))
    np.testing.assert_allclose(p, padded[:, :-1], atol=1e-15, rtol=1e-12)
    assert np.all(p.sum(-1) <= 1)
    with_sink, _, _ = sinks.softmax_with_sink(x[None], np.zeros(1))
    np.testing.assert_allclose(with_sink[0], p, atol=1e-15, rtol=1e-12)


def test_softmax1_edges() -> None:
    x = np.random.default_rng(0).standard_normal((4, 5))
    Z = np.exp(x).sum(-1)
    np.testing.assert_allclose(stream.softmax1(x).sum(-1), Z / (1 + Z))
    assert not np.allclose(stream.softmax1(x + 1), stream.softmax1(x))
    np.testing.assert_allclose(stream.softmax1(x + 50), softmax(x), atol=1e-15)
    np.testing.assert_array_equal(stream.softmax1(np.full((2, 3), -np.inf)), 0)
    np.testing.assert_allclose(stream.softmax1(np.full(3, -1e3)), 0)
    np.testing.assert_array_equal(stream.softmax1(x.T, axis=0), stream.softmax1(x).T)
    assert stream.softmax1(np.zeros((2, 0))).shape == (2, 0)


def test_sink_logit_edges() -> None:
    q, k, v = tokens()
    mask = stream.sink_window_mask(12, 1, 2)
    mask[4] = False
    s_h = np.array([-np.inf, 0.0, 1.0, 60.0])
    out, lse = stream.attend_with_sink_logit(q, k, v, s_h, mask)
    plain, plain_lse = attend(q, k, v, mask=mask)
    np.testing.assert_allclose(out[:, 0], plain[:, 0], atol=1e-14)
    np.testing.assert_allclose(lse[:, 0], plain_lse[:, 0])
    np.testing.assert_allclose(lse[:, 1:], np.logaddexp(plain_lse, s_h[:, None])[:, 1:])
    np.testing.assert_array_equal(out[:, :, 4], 0)
    np.testing.assert_array_equal(lse[:, :, 4], np.broadcast_to(s_h, (2, 4)))
    np.testing.assert_allclose(out[:, 3], 0, atol=1e-12)
    off = np.zeros((12, 12), bool)
    for gradient in stream.attend_with_sink_logit_backward(q, k, v, s_h, off, np.ones_like(out)):
        np.testing.assert_array_equal(gradient, 0)
    none = stream.attend_with_sink_logit(q, k[..., :0, :], v[..., :0, :], s_h)
    np.testing.assert_array_equal(none[0], 0)


def test_sink_logit_ignores_what_the_mask_hides() -> None:
    q, k, v = tokens()
    mask = np.arange(12) != 3
    s_h, dout = np.ones(4), np.ones((2, 4, 12, 5))
    clean = stream.attend_with_sink_logit_backward(q, k, v, s_h, mask, dout)
    out, _ = stream.attend_with_sink_logit(q, k, v, s_h, mask)
    k[..., 3, :] = v[..., 3, :] = np.nan
    np.testing.assert_array_equal(stream.attend_with_sink_logit(q, k, v, s_h, mask)[0], out)
    poisoned = stream.attend_with_sink_logit_backward(q, k, v, s_h, mask, dout)
    for gradient, expected in zip(poisoned, clean, strict=True):
        np.testing.assert_array_equal(gradient, expected)


def test_sink_logit_gradient() -> None:
    q, k, v = tokens(T=4, H=2, Hk=1, d=2, dv=3)
    s_h, random = np.array([0.3, -1.0]), np.random.default_rng(1)
    dout, dlse = random.standard_normal((2, 2, 4, 3)), random.standard_normal((2, 2, 4))
    mask = stream.sink_window_mask(4, 1, 1)
    mask[2] = False

    def loss() -> float:
        out, lse = stream.attend_with_sink_logit(q, k, v, s_h, mask, scale=0.9)
        return float((out * dout).sum() + (lse * dlse).sum())

    gradients = stream.attend_with_sink_logit_backward(q, k, v, s_h, mask, dout, dlse, scale=0.9)
    for x, gradient in zip((q, k, v, s_h), gradients, strict=True):
        np.testing.assert_allclose(gradient, differences(loss, x), atol=1e-8)


@pytest.mark.parametrize("axis", [0, -1])
def test_softmax1_gradient(axis: int) -> None:
    x, dout = np.random.default_rng(2).standard_normal((2, 3, 4))
    expected = differences(lambda: float((stream.softmax1(x, axis=axis) * dout).sum()), x)
    gradient = stream.softmax1_backward(x, dout, axis=axis)
    np.testing.assert_allclose(gradient, expected, atol=1e-8)


def test_the_sink_token_stands_first() -> None:
    x, e = np.random.default_rng(3).standard_normal((2, 5, 4)), np.arange(4.0)
    longer = sinks.prepend_sink_token(x, e)
    np.testing.assert_array_equal(longer[:, 1:], x)
    np.testing.assert_array_equal(longer[:, 0], [e, e])


Q, K, V = tokens(T=3)
S_H = np.zeros(4)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: stream.softmax1(np.arange(3)), TypeError, "x"),
    (lambda: stream.softmax1(Q, axis=4), ValueError, "axis"),
    (lambda: stream.softmax1(Q, axis=0.5), TypeError, "axis"),  # type: ignore[arg-type]
    (lambda: stream.softmax1_backward(Q, K), ValueError, "dout"),
    (lambda: sinks.softmax_with_sink(S_H, S_H), ValueError, "scores"),
    (lambda: stream.attend_with_sink_logit(Q, K, V, S_H[:2]), ValueError, "s_h"),
    (lambda: stream.attend_with_sink_logit(Q, K, V, S_H.astype("f4")), TypeError, "s_h"),
    (lambda: stream.attend_with_sink_logit(Q, K, V, S_H, S_H), TypeError, "mask"),
    (
        lambda: stream.attend_with_sink_logit_backward(Q, K, V, S_H, None, S_H),
        ValueError,
        "dout",
    ),
    (lambda: sinks.prepend_sink_token(Q, S_H), ValueError, "e"),
]


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}: got .*expected"):
        call()
