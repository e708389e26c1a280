"""Titans over packed sequences: the clause S22 of `titans`.

Sequences lie end to end, and each has a memory of its own: its first weights and momentum, gradient
chunks that begin with its first token, its last weights and momentum. Results are those of each
sequence alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_offsets,
    check_shaped,
    check_size,
)
from attnspec.reference.linear.titans_chunks import Layers, token_rates
from attnspec.reference.linear.titans_deep import titans_chunk_mlp
from attnspec.reference.linear.titans_gradients import sum_to, titans_chunk_mlp_backward, upstream
from attnspec.reference.linear.titans_memory import check_layers


def titans_packed_linear(
    W0: np.ndarray, S0: np.ndarray | None, k: np.ndarray, v: np.ndarray, q: np.ndarray, rates: Any,
    offsets: np.ndarray, b: int, *, loss_scale: float = 2.0, read: str = "inclusive",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """S22: y (heads, total, dv) and the last W and S (sequences, kv_heads, d, dv) of linear
    memories.

    k (kv_heads, total, d), v (kv_heads, total, dv), q (heads, total, d); rates theta, eta, alpha,
    each a number or (kv_heads, total); offsets int (sequences + 1), increasing from 0 to the total.
    W0 and S0 as W, or (kv_heads, d, dv) or (d, dv) for all sequences.

    >>> x = np.ones((1, 3, 1))
    >>> y, W, S = titans_packed_linear(
    ...     np.zeros((1, 1)), None, x, x, x, (0.5, 0.0, 0.0), np.array([0, 1, 3]), 2)
    >>> y.ravel(), W.ravel()
    (array([1., 1., 2.]), array([1., 2.]))
    """
    first, momentum = (None if x is None else (x,) for x in (W0, S0))
    y, (W,), (S,) = titans_packed_mlp(
        first, momentum, k, v, q, rates, offsets, b, loss_scale=loss_scale, read=read
    )
    return y, W, S


def titans_packed_mlp(
    W0: Any, S0: Any, k: np.ndarray, v: np.ndarray, q: np.ndarray, rates: Any, offsets: np.ndarray,
    b: int, *, loss_scale: float = 2.0, read: str = "inclusive",
) -> tuple[np.ndarray, Layers, Layers]:  # fmt: skip
    """S22: as `titans_packed_linear` for memories of any depth; W0, S0, W, S are tuples of layers.

    >>> x, first = np.ones((1, 3, 1)), (np.ones((1, 1)), np.zeros((1, 1)))
    >>> y, W, S = titans_packed_mlp(
    ...     first, None, x, x, x, (0.5, 0.0, 0.0), np.array([0, 1, 3]), 2)
    >>> y.ravel().round(4), W[0].shape
    (array([0.7079, 0.7079, 1.4157]), (2, 1, 1, 1))
    """
    first, momentum, full, sequences = check_packed_inputs(W0, S0, k, v, q, rates, offsets)
    options: dict[str, Any] = {"loss_scale": loss_scale, "read": read}
    outputs, last = [], []
    for n, rows in enumerate(sequences):
        step = tuple(x[..., rows] for x in full)
        keys, values, queries = (x[..., rows, :] for x in (k, v, q))
        y, *states = titans_chunk_mlp(
            _of(first, n), _of(momentum, n), keys, values, queries, step, b, **options
        )
        outputs.append(y)
        last.append(states)
    W, S = (tuple(map(np.stack, zip(*layers, strict=True))) for layers in zip(*last, strict=True))
    return np.concatenate(outputs, axis=-2), W, S


def titans_packed_linear_backward(
    W0: np.ndarray, S0: np.ndarray | None, k: np.ndarray, v: np.ndarray, q: np.ndarray, rates: Any,
    offsets: np.ndarray, b: int, dy: np.ndarray, dW: np.ndarray | None = None,
    dS: np.ndarray | None = None, *, loss_scale: float = 2.0, read: str = "inclusive",
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, Layers]:  # fmt: skip
    """S21, S22: dW0, dS0, dk, dv, dq, drates of `titans_packed_linear`.

    >>> x = np.ones((1, 2, 1))
    >>> titans_packed_linear_backward(
    ...     np.ones((1, 1)), None, x, 0 * x, x, (0.25, 0.0, 0.0), np.array([0, 1, 2]), 1, x)[0]
    array([[1.]])
    """
    first, momentum, last, final = (None if x is None else (x,) for x in (W0, S0, dW, dS))
    (dW0,), (dS0,), dk, dv, dq, drates = titans_packed_mlp_backward(
        first, momentum, k, v, q, rates, offsets, b, dy, last, final, loss_scale=loss_scale,
        read=read,
    )  # fmt: skip
    return dW0, dS0, dk, dv, dq, drates


def titans_packed_mlp_backward(
    W0: Any, S0: Any, k: np.ndarray, v: np.ndarray, q: np.ndarray, rates: Any, offsets: np.ndarray,
    b: int, dy: np.ndarray, dW: Any = None, dS: Any = None, *, loss_scale: float = 2.0,
    read: str = "inclusive",
) -> tuple[Layers, Layers, np.ndarray, np.ndarray, np.ndarray, Layers]:  # fmt: skip
    """S21, S22: dW0, dS0, dk, dv, dq, drates of `titans_packed_mlp`; dy, dW, dS are shaped as its
    outputs, None for a state that is not used. The gradients of shared states are sums over
    sequences.

    >>> x, one = np.ones((1, 2, 1)), (np.ones((1, 1)),)
    >>> titans_packed_mlp_backward(
    ...     one, None, x, 0 * x, x, (0.25, 0.0, 0.0), np.array([0, 1, 2]), 1, x)[0]
    (array([[1.]]),)
    """
    first, momentum, full, sequences = check_packed_inputs(W0, S0, k, v, q, rates, offsets)
    check_shaped("dy", dy, (*q.shape[:-1], v.shape[-1]))
    dW, dS = upstream("dW", dW, first), upstream("dS", dS, first)
    parts = []
    for n, rows in enumerate(sequences):
        step = tuple(x[..., rows] for x in full)
        keys, values, queries, above = (x[..., rows, :] for x in (k, v, q, dy))
        part = titans_chunk_mlp_backward(
            _of(first, n), _of(momentum, n), keys, values, queries, step, b, above, _of(dW, n),
            _of(dS, n), loss_scale=loss_scale, read=read,
        )  # fmt: skip
        parts.append(part)
    by_W, by_S, *by_token, by_rate = zip(*parts, strict=True)
    dk, dv, dq = (np.concatenate(x, axis=-2) for x in by_token)
    return (
        _gather(by_W, W0),
        _gather(by_S, W0 if S0 is None else S0),
        dk,
        dv,
        dq,
        tuple(np.concatenate(x, axis=-1) for x in zip(*by_rate, strict=True)),
    )


def check_packed_inputs(
    W0: Any, S0: Any, k: np.ndarray, v: np.ndarray, q: np.ndarray, rates: Any, offsets: np.ndarray
) -> tuple[Layers, Layers | None, Layers, list[slice]]:
    """K14, S22: W0 and S0 of every sequence and head, rates of every token, and the rows of each
    sequence.

    What else may be wrong, the form for one sequence refuses.

    >>> x = np.ones((1, 3, 1))
    >>> check_packed_inputs((x[0],), None, x, x, x, (1, 1, 1), np.array([0, 2]))
    Traceback (most recent call last):
    ValueError: offsets: got [0, 2], expected offsets that increase from 0 to 3
    """
    check_attention_inputs(q, k, v)
    for name, x in (("k", k), ("v", v), ("q", q)):
        if x.ndim != 3:
            raise ValueError(f"{name}: got shape {x.shape}, expected (heads, total, width)")
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    sequences = check_offsets("offsets", offsets, k.shape[-2])
    leading = (len(sequences), k.shape[0])
    first = _spread("W0", W0, k, leading)
    momentum = None if S0 is None else _spread("S0", S0, k, leading)
    return first, momentum, token_rates(rates, k), sequences


def _spread(name: str, layers: Any, k: np.ndarray, leading: tuple[int, int]) -> Layers:
    """Layers (sequences, kv_heads, inputs, outputs), if they have some of these leading axes."""
    if isinstance(layers, (tuple, list)):
        for x in layers:
            check_array(name, x, ("inputs", "outputs"))
            if x.shape[:-2] not in ((), leading[1:], leading):
                raise ValueError(
                    f"{name}: got leading axes {x.shape[:-2]}, expected none, {leading[1:]} or "
                    f"{leading}, heads of k and sequences"
                )
        layers = tuple(np.broadcast_to(x, (*leading, *x.shape[-2:]), subok=True) for x in layers)
        check_layers(name, tuple(x[0] for x in layers), k, "k")
    else:
        check_layers(name, layers, k, "k")
    return tuple(layers)


def _of(layers: Layers | None, n: int) -> Layers | None:
    return None if layers is None else tuple(x[n] for x in layers)


def _gather(parts: tuple[Layers, ...], given: Any) -> Layers:
    """Gradients of layers, of sequences that share them added up."""
    layers = map(np.stack, zip(*parts, strict=True))
    return tuple(sum_to(x, w) for x, w in zip(layers, given, strict=True))
