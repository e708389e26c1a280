"""Gradients of Titans' layouts and granular chunks by finite differences; wrong upstreams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec.reference.linear import titans_layout_gradients as gradients
from attnspec.reference.linear import titans_layouts as layouts
from attnspec.reference.linear.titans_granular import titans_chunk_granular
from attnspec.reference.linear.titans_granular_gradients import titans_chunk_granular_backward


def leaves(x: Any) -> list[np.ndarray]:
    if x is None:
        return []
    return [leaf for item in x for leaf in leaves(item)] if isinstance(x, tuple) else [x]


def check(
    call: Callable[..., Any], given: list[Any], got: Any, up: list[np.ndarray], seed: int
) -> None:
    """Some entries of every gradient are what moving the input shows."""
    rng, h = np.random.default_rng(seed), 1e-5
    pairs = [pair for x, g in zip(given, got, strict=True) if x is not None
             for pair in zip(leaves(x), leaves(g), strict=True)]  # fmt: skip
    for leaf, gradient in pairs:
        assert gradient.shape == leaf.shape
        for _ in range(4 if leaf.size else 0):
            index, values = tuple(rng.integers(0, n) for n in leaf.shape), []
            kept = leaf[index]
            for sign in (1, -1):
                leaf[index] = kept + sign * h
                outputs = leaves(call(*given))
                values.append(sum(float(np.sum(a * c)) for a, c in zip(outputs, up, strict=True)))
            leaf[index] = kept
            np.testing.assert_allclose(gradient[index], (values[0] - values[1]) / (2 * h),
                                       atol=1e-6, rtol=1e-5)  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mac_segment", {}),
        ("mac_segment", {"tokenwise": True, "normalise": True}),
        ("mag", {}),
        ("mag", {"normalise": True, "loss_scale": 0.5}),
        ("mal", {}),
        ("mal", {"normalise": True}),
    ],
)
def test_layouts(name: str, options: dict[str, Any], shared: bool) -> None:
    rng, T, N_p = np.random.default_rng(7), 4, 2
    leading: tuple[int, ...] = () if shared else (2,)

    def draw(*shape: int) -> np.ndarray:
        return 0.4 * rng.standard_normal(shape)

    W = draw(*leading, 3, 5), draw(*leading, 5, 4)
    S = None if shared else (draw(2, 3, 5), draw(2, 5, 4))
    attn, mem = ((draw(4, 3), draw(4, 3), draw(4, 4)) for _ in range(2))
    rows = T if name == "mac_segment" else N_p + T
    rates = tuple(rng.uniform(0, top, (2, rows)) for top in (0.1, 0.9, 0.5))
    given: list[Any] = [draw(2, T, 4), draw(N_p, 4), W, S, attn, mem, rates]
    if name != "mal":
        given.append((1 + draw(4), 1 + draw(4)))
    sizes = (2,) if name == "mac_segment" else (3, 2)

    def call(*inputs: Any) -> Any:
        return getattr(layouts, name)(*inputs, *sizes, **options)

    up = [np.cos(x) for x in leaves(call(*given))]
    backward = getattr(gradients, f"{name}_backward")
    got = backward(*given, *sizes, up[0], tuple(up[1:3]), tuple(up[3:]), **options)
    check(call, given, got, up, seed=1)
    with pytest.raises(ValueError, match=r"^do: got "):
        backward(*given, *sizes, up[0][:1], **options)


@pytest.mark.parametrize(
    ("c", "period", "shared"), [(2, None, True), (2, 4, False), (3, 3, False), (9, None, False)]
)
def test_granular_chunks(c: int, period: int | None, shared: bool) -> None:
    rng, T = np.random.default_rng(c), 8
    leading: tuple[int, ...] = () if shared else (2, 2)
    W, S = (tuple(0.4 * rng.standard_normal((*leading, *s)) for s in ((3, 5), (5, 4)))
            for _ in range(2))  # fmt: skip
    k, v, q = (0.5 * rng.standard_normal((2, heads, T, n)) for heads, n in ((2, 3), (2, 4), (4, 3)))
    theta, eta, alpha = (rng.uniform(0, top, (2, 2, many))
                         for top, many in ((0.1, T), (0.9, T // c), (0.5, T // c)))  # fmt: skip
    given = [W, S, k, v, q, theta, eta, alpha]

    def call(*inputs: Any) -> Any:
        return titans_chunk_granular(*inputs, c, period)

    up = [np.cos(x) for x in leaves(call(*given))]
    got = titans_chunk_granular_backward(
        W, S, k, v, q, theta, eta, alpha, c, up[0], tuple(up[1:3]), tuple(up[3:5]), tuple(up[5:]),
        period,
    )  # fmt: skip
    check(call, given, got, up, seed=2)
    with pytest.raises(ValueError, match=r"^dy: got "):
        titans_chunk_granular_backward(W, S, k, v, q, theta, eta, alpha, c, up[0][:1])
