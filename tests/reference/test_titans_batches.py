"""Titans over packed sequences: each sequence alone, shared states, gradients, bad inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec.reference.linear.titans import (
    titans_chunk_mlp,
    titans_packed_linear,
    titans_packed_linear_backward,
    titans_packed_mlp,
    titans_packed_mlp_backward,
    titans_sequential,
)

Layers = tuple[np.ndarray, ...]
OFFSETS = np.array([0, 3, 3, 8])


def draw(seed: int, depth: int = 1, leading: tuple[int, ...] = (3, 2)) -> tuple[Any, ...]:
    """Layers, momentum, k, v, q and rates of three sequences, two memories each."""
    rng = np.random.default_rng(seed)
    widths = [3, *[5] * (depth - 1), 4]
    W = tuple(0.5 * rng.standard_normal((*leading, a, b)) for a, b in itertools.pairwise(widths))
    S = tuple(0.1 * rng.standard_normal(w.shape) for w in W)
    k, v, q = (rng.standard_normal((heads, 8, n)) for heads, n in ((2, 3), (2, 4), (4, 3)))
    rates = tuple(rng.uniform(0, top, (2, 8)) for top in (0.2, 1.0, 0.5))
    return W, S, 0.5 * k, v, q, rates


def leaves(x: Any) -> list[np.ndarray]:
    return [leaf for item in x for leaf in leaves(item)] if isinstance(x, tuple) else [x]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("b", [1, 2, 5])
@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
def test_each_sequence_is_what_it_is_alone(depth: int, b: int, read: str) -> None:
    W, S, k, v, q, rates = draw(depth, depth)
    y, last, momentum = titans_packed_mlp(W, S, k, v, q, rates, OFFSETS, b, read=read)
    assert y.shape == (4, 8, 4)
    for n, (start, end) in enumerate(itertools.pairwise(OFFSETS)):
        own = [x[:, start:end] for x in (k, v, q)]
        states = [tuple(x[n] for x in layers) for layers in (W, S)]
        step = tuple(x[:, start:end] for x in rates)
        alone = titans_sequential(*states, *own, step, b, read=read)
        got = (y[:, start:end], *(x[n] for x in (*last, *momentum)))
        for a, c in zip(got, leaves(alone), strict=True):
            np.testing.assert_allclose(a, c, atol=1e-10)


def test_a_sequence_without_tokens_keeps_its_memory() -> None:
    W, S, k, v, q, rates = draw(4, 2)
    _, last, momentum = titans_packed_mlp(W, S, k, v, q, rates, OFFSETS, 2)
    for given, left in zip((*W, *S), (*last, *momentum), strict=True):
        np.testing.assert_array_equal(given[1], left[1])


def test_one_sequence_is_a_call_of_the_chunk_form() -> None:
    W, S, k, v, q, rates = draw(5, 2, (1, 2))
    got = titans_packed_mlp(W, S, k, v, q, rates, np.array([0, 8]), 3)
    first = [tuple(x[0] for x in layers) for layers in (W, S)]
    y, *states = titans_chunk_mlp(*first, k, v, q, rates, 3)
    for a, c in zip(leaves(got), [y, *(x[None] for x in leaves(tuple(states)))], strict=True):
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("leading", [(), (2,)])
def test_shared_first_states(leading: tuple[int, ...]) -> None:
    """They are those of every sequence, and their gradients are summed."""
    W, S, k, v, q, rates = draw(6, 2, leading)
    each = [tuple(np.broadcast_to(x, (3, 2, *x.shape[-2:])) for x in y) for y in (W, S)]
    got = titans_packed_mlp(W, S, k, v, q, rates, OFFSETS, 2)
    expected = titans_packed_mlp(*each, k, v, q, rates, OFFSETS, 2)
    for a, c in zip(leaves(got), leaves(expected), strict=True):
        np.testing.assert_array_equal(a, c)
    dy = np.cos(got[0])
    shared = titans_packed_mlp_backward(W, S, k, v, q, rates, OFFSETS, 2, dy)
    apart = titans_packed_mlp_backward(*each, k, v, q, rates, OFFSETS, 2, dy)
    axes = tuple(range(2 - len(leading)))
    for place in (0, 1):
        for a, c in zip(shared[place], apart[place], strict=True):
            np.testing.assert_allclose(a, np.sum(c, axis=axes), atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2])
def test_gradients(depth: int) -> None:
    W, S, k, v, q, rates = draw(7, depth)
    inputs = [*W, *S, k, v, q, *rates]

    def packed(x: list[np.ndarray]) -> Any:
        states, rest = (tuple(x[:depth]), tuple(x[depth : 2 * depth])), x[2 * depth :]
        return titans_packed_mlp(*states, *rest[:3], tuple(rest[3:]), OFFSETS, 2)

    up = [np.cos(x) for x in leaves(packed(inputs))]
    dW, dS = tuple(up[1 : 1 + depth]), tuple(up[1 + depth :])
    got = titans_packed_mlp_backward(W, S, k, v, q, rates, OFFSETS, 2, up[0], dW, dS)
    for n, gradient in enumerate(leaves(got)):
        numeric, h = np.zeros_like(inputs[n]), 1e-6
        for index in np.ndindex(numeric.shape):
            values = []
            for sign in (1, -1):
                moved = [x.copy() for x in inputs]
                moved[n][index] += sign * h
                outputs = leaves(packed(moved))
                values.append(sum(float(np.sum(a * c)) for a, c in zip(outputs, up, strict=True)))
            numeric[index] = (values[0] - values[1]) / (2 * h)
        np.testing.assert_allclose(gradient, numeric, atol=1e-7)
    if depth == 1:
        linear = titans_packed_linear_backward(
            W[0], S[0], k, v, q, rates, OFFSETS, 2, up[0], dW[0], dS[0]
        )
        flat = [linear[0], linear[1], *leaves(linear[2:])]
        for a, c in zip(flat, leaves(got), strict=True):
            np.testing.assert_array_equal(a, c)


W, S, k, v, q, rates = draw(8)
given = (k, v, q, rates)
deep = draw(8, 2)[0]


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: titans_packed_mlp(W, S, *given, OFFSETS[:3], 2), ValueError, "offsets"),
        (lambda: titans_packed_mlp(W, S, *given, 1.0 * OFFSETS, 2), TypeError, "offsets"),
        (lambda: titans_packed_mlp(W[0], S, *given, OFFSETS, 2), TypeError, "W0"),
        (lambda: titans_packed_mlp((), S, *given, OFFSETS, 2), ValueError, "W0"),
        (lambda: titans_packed_mlp((W[0][:2],), S, *given, OFFSETS, 2), ValueError, "W0"),
        (lambda: titans_packed_mlp(W, (S[0][:, :1],), *given, OFFSETS, 2), ValueError, "S0"),
        (lambda: titans_packed_mlp(deep, S, *given, OFFSETS, 2), ValueError, "S0"),
        (lambda: titans_packed_mlp(W, S, *given, OFFSETS, 0), ValueError, "b"),
        (lambda: titans_packed_mlp(W, S, *given[:3], (0.1, 2.0, 0.0), OFFSETS, 2), ValueError,
         "rates.eta"),
        (lambda: titans_packed_mlp(W, S, k[None], v, q, rates, OFFSETS, 2), ValueError, "k"),
        (lambda: titans_packed_linear(None, None, *given, OFFSETS, 2), TypeError, "W0"),
        (lambda: titans_packed_mlp_backward(W, S, *given, OFFSETS, 2, v), ValueError, "dy"),
        (lambda: titans_packed_mlp_backward(W, S, *given, OFFSETS, 2, q @ np.ones((3, 4)),
                                            (S[0][:1],)), ValueError, "dW"),
    ],
)  # fmt: skip
def test_bad_inputs(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name}: got "):
        call()
