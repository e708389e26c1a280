"""The gradients of the chunk forms of Titans: the clause S21 of `titans`.

A forward sweep keeps the weights that enter each chunk; a sweep from the end carries the gradients
of weights and momentum. Inside a chunk the gradient goes back through the end of the chunk, the
read, and last the inner gradient itself, which is differentiated once more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attnspec.reference.conventions import check_array
from attnspec.reference.linear.titans_chunks import (
    Layers,
    Reads,
    Tokens,
    check_memory_inputs,
    end_chunk,
    fold,
    reading,
)
from attnspec.reference.linear.titans_coefficients import (
    Coefficients,
    titans_coefficients_backward,
)
from attnspec.reference.linear.titans_memory import hidden_rows, output_gradients
from attnspec.reference.primitives.gelu import gelu, gelu_curvature, gelu_slope


def titans_chunk_mlp_backward(
    W0: Any, S0: Any, k: np.ndarray, v: np.ndarray, q: np.ndarray, rates: Any, b: int,
    dy: np.ndarray, dW: Any = None, dS: Any = None, *, loss_scale: float = 2.0,
    read: str = "inclusive", valid: np.ndarray | None = None,
) -> tuple[Layers, Layers, np.ndarray, np.ndarray, np.ndarray, Layers]:  # fmt: skip
    """S21: dW0, dS0, dk, dv, dq, drates of `titans_chunk_mlp`; dy, dW, dS are shaped as its
    outputs, None for a state that is not used. drates has the shape (..., kv_heads, T) in any case.

    >>> x, one = np.ones((1, 1, 1)), (np.ones((1, 1)),)
    >>> dW0, *rest = titans_chunk_mlp_backward(one, None, x, 0 * x, x, (0.25, 0.0, 0.0), 1, x)
    >>> dW0[0]
    array([[0.5]])
    """
    W, S, tokens = check_memory_inputs(W0, S0, k, v, q, rates, b, loss_scale, read, valid)
    check_array("dy", dy, ())
    if dy.shape != (*q.shape[:-1], v.shape[-1]):
        raise ValueError(f"dy: got shape {dy.shape}, expected {(*q.shape[:-1], v.shape[-1])}")
    uW, uS = upstream("dW", dW, W), upstream("dS", dS, W)
    if tokens.order is not None and tokens.stored is not None:
        dy = np.take_along_axis(dy, tokens.order[..., None], axis=-2)
        dy = np.where(tokens.stored[..., None], dy, 0.0).astype(dy.dtype)
    entering = []
    for rows, chunk in tokens.chunks(b):
        entering.append((rows, chunk, W, S))
        H, z = hidden_rows(W, chunk.k)
        W, S = end_chunk(W, S, H, output_gradients(W, z, chunk.v, loss_scale), chunk.coefficients())
    parts: list[_Part] = []
    for rows, chunk, W, S in reversed(entering):
        part = _chunk_backward(W, S, chunk, dy[..., rows, :], uW, uS, loss_scale, read)
        parts.insert(0, part)
        uW, uS = part.dW, part.dS

    def whole(name: str, like: np.ndarray) -> np.ndarray:
        return np.concatenate([like[..., :0, :], *(getattr(p, name) for p in parts)], axis=-2)

    dk, dv, dq = whole("dk", k), whole("dv", v), whole("dq", q)
    by_rate = [
        np.concatenate([k[..., :0, 0], *(p.drates[i] for p in parts)], axis=-1) for i in range(3)
    ]
    return (
        tuple(sum_to(x, w) for x, w in zip(uW, W0, strict=True)),
        tuple(sum_to(x, w) for x, w in zip(uS, W0 if S0 is None else S0, strict=True)),
        tokens.back(dk),
        tokens.back(dv),
        tokens.back(dq),
        tuple(tokens.back(x[..., None])[..., 0] for x in by_rate),
    )


def titans_chunk_linear_backward(
    W0: np.ndarray, S0: np.ndarray | None, k: np.ndarray, v: np.ndarray, q: np.ndarray, rates: Any,
    b: int, dy: np.ndarray, dW: np.ndarray | None = None, dS: np.ndarray | None = None, *,
    loss_scale: float = 2.0, read: str = "inclusive", valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, Layers]:  # fmt: skip
    """S21: dW0, dS0, dk, dv, dq, drates of `titans_chunk_linear`, a memory of one layer.

    >>> x = np.ones((1, 1, 1))
    >>> titans_chunk_linear_backward(x, None, x, 0 * x, x, (0.25, 0.0, 0.0), 1, x)[0]
    array([[[0.5]]])
    """
    first, momentum, last, final = (None if x is None else (x,) for x in (W0, S0, dW, dS))
    (dW0,), (dS0,), dk, dv, dq, drates = titans_chunk_mlp_backward(
        first, momentum, k, v, q, rates, b, dy, last, final, loss_scale=loss_scale, read=read,
        valid=valid,
    )  # fmt: skip
    return dW0, dS0, dk, dv, dq, drates


class _Part(NamedTuple):
    """The gradients of one chunk's inputs."""

    dW: Layers  # noqa: N815
    dS: Layers  # noqa: N815
    dk: np.ndarray
    dv: np.ndarray
    dq: np.ndarray
    drates: Layers


def _chunk_backward(
    W: Layers, S: Layers, chunk: Tokens, dy: np.ndarray, uW: Layers, uS: Layers, loss_scale: float,
    read: str,
) -> _Part:  # fmt: skip
    group = chunk.q.shape[-3] // chunk.k.shape[-3]
    of = chunk.coefficients()
    reads = reading(of, read, group)
    H, z = hidden_rows(W, chunk.k)
    Delta = output_gradients(W, z, chunk.v, loss_scale)
    d = _Sums(W, H, Delta)
    end = _end_backward(d, W, S, H, Delta, of, uW, uS)
    dA, dreads = _read_backward(d, W, S, H, Delta, reads, fold(chunk.q, chunk.k.shape[-3]),
                                fold(dy, chunk.k.shape[-3]))  # fmt: skip
    dk, dv = _inner_backward(d, W, H, z, Delta, loss_scale)
    stored = chunk.stored
    drates = titans_coefficients_backward(
        *chunk.rates, *_join(of, end, dreads, read, group),
        stored=None if stored is None else np.broadcast_to(stored, chunk.rates[0].shape),
    )  # fmt: skip
    return _Part(tuple(d.W), tuple(d.S), dk, dv, dA.reshape(chunk.q.shape), drates)


class _Sums:
    """Gradients that several steps add to, one entry a layer."""

    def __init__(self, W: Layers, H: Layers, Delta: Layers) -> None:
        self.W, self.S = [np.zeros_like(w) for w in W], [np.zeros_like(w) for w in W]
        self.H, self.Delta = [np.zeros_like(h) for h in H], [np.zeros_like(e) for e in Delta]


def _end_backward(
    d: _Sums, W: Layers, S: Layers, H: Layers, Delta: Layers, of: Coefficients, uW: Layers,
    uS: Layers,
) -> Coefficients:  # fmt: skip
    """S21 through the end of the chunk; the gradients of the last row of its coefficients."""
    beta, m, f = (x[..., -1, None, None] for x in (of.beta, of.m, of.f))
    n, G = (x[..., -1, :, None] for x in (of.n, of.G))
    sums = [np.zeros_like(x[..., -1]) for x in (of.beta, of.m, of.f)]
    rows = [np.zeros_like(of.beta), np.zeros_like(of.beta)]
    for i in range(len(W)):
        d.W[i] += beta * uW[i]
        d.S[i] += f * uW[i] + m * uS[i]
        for total, x, u in ((0, W, uW), (1, S, uS), (2, S, uW)):
            sums[total] += np.einsum("...de,...de->...", x[i], u[i])
        in_W, in_S = H[i] @ uW[i], H[i] @ uS[i]
        d.Delta[i] += -(G * in_W + n * in_S)
        d.H[i] += -((G * Delta[i]) @ np.swapaxes(uW[i], -1, -2))
        d.H[i] += -((n * Delta[i]) @ np.swapaxes(uS[i], -1, -2))
        for place, written in enumerate((in_S, in_W)):
            rows[place] += -np.einsum("...te,...te->...t", Delta[i], written)
    return Coefficients(sums[0], sums[1], sums[2], rows[0], rows[1])


def _read_backward(
    d: _Sums, W: Layers, S: Layers, H: Layers, Delta: Layers, of: Reads, Q: np.ndarray,
    dZ: np.ndarray,
) -> tuple[np.ndarray, Reads]:  # fmt: skip
    """S21 through the read: dQ, and the gradients of the coefficients it used."""
    inputs, before, products = [Q], [], []
    for i, (weights, momentum) in enumerate(zip(W, S, strict=True)):
        A = inputs[-1]
        scores = A @ np.swapaxes(H[i], -1, -2)
        products.append((A @ weights, A @ momentum, scores))
        if i + 1 < len(W):
            carried = of.beta * products[i][0] + of.f * products[i][1]
            before.append(carried - (scores * of.G) @ Delta[i])
            inputs.append(gelu(before[i]))
    dbeta, df, dG = np.zeros_like(of.beta), np.zeros_like(of.f), np.zeros_like(of.G)
    for i in reversed(range(len(W))):
        A, (in_W, in_S, scores) = inputs[i], products[i]
        if i + 1 < len(W):
            dZ = dZ * gelu_slope(before[i])
        dscores = -(dZ @ np.swapaxes(Delta[i], -1, -2))
        dbeta += np.einsum("...te,...te->...t", dZ, in_W)[..., None]
        df += np.einsum("...te,...te->...t", dZ, in_S)[..., None]
        dG += dscores * scores
        d.W[i] += np.swapaxes(A, -1, -2) @ (of.beta * dZ)
        d.S[i] += np.swapaxes(A, -1, -2) @ (of.f * dZ)
        d.Delta[i] += -(np.swapaxes(scores * of.G, -1, -2) @ dZ)
        d.H[i] += np.swapaxes(dscores * of.G, -1, -2) @ A
        dZ = (
            of.beta * (dZ @ np.swapaxes(W[i], -1, -2))
            + of.f * (dZ @ np.swapaxes(S[i], -1, -2))
            + (dscores * of.G) @ H[i]
        )
    return dZ, Reads(dbeta, df, dG)


def _inner_backward(
    d: _Sums, W: Layers, H: Layers, z: Layers, Delta: Layers, loss_scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """S21 through S2: dk and dv, once the sums hold what the read and the end of the chunk add."""
    dz = []
    for i in range(len(W) - 1):
        back = Delta[i + 1] @ np.swapaxes(W[i + 1], -1, -2)
        dback = d.Delta[i] * gelu_slope(z[i])
        dz.append(d.Delta[i] * back * gelu_curvature(z[i]))
        d.Delta[i + 1] += dback @ W[i + 1]
        d.W[i + 1] += np.swapaxes(dback, -1, -2) @ Delta[i + 1]
    dv = -loss_scale * d.Delta[-1]
    dz.append(loss_scale * d.Delta[-1])
    for i in reversed(range(len(W))):
        if i + 1 < len(W):
            dz[i] = dz[i] + d.H[i + 1] * gelu_slope(z[i])
        d.W[i] += np.swapaxes(H[i], -1, -2) @ dz[i]
        d.H[i] += dz[i] @ np.swapaxes(W[i], -1, -2)
    return d.H[0], dv


def _join(
    of: Coefficients, end: Coefficients, reads: Reads, read: str, group: int
) -> tuple[np.ndarray, ...]:
    """S21: the gradients of beta, m, f, n, G from those of the last row and of the read."""
    C = of.beta.shape[-1]
    back = np.arange(1, C + 1) if read == "exclusive" else np.arange(C)

    def ungroup(x: np.ndarray) -> np.ndarray:
        x = np.sum(x.reshape(*x.shape[:-2], group, C, x.shape[-1]), axis=-3)
        zero = np.zeros_like(x[..., :1, :])
        return np.concatenate([x, zero], axis=-2)[..., back, :]

    dbeta, df, dG = ungroup(reads.beta)[..., 0], ungroup(reads.f)[..., 0], ungroup(reads.G)
    dm, dn = np.zeros_like(of.m), np.zeros_like(of.n)
    for x, last in zip((dbeta, dm, df), end[:3], strict=True):
        x[..., -1] += last
    for x, last in zip((dn, dG), end[3:], strict=True):
        x[..., -1, :] += last
    return dbeta, dm, df, dn, dG


def upstream(name: str, given: Any, W: Layers) -> Layers:
    """S21, K14: the gradients of a state shaped as W, zeros if none are given.

    >>> upstream("dW", (np.ones(2),), (np.ones(3),))
    Traceback (most recent call last):
    ValueError: dW: got shape (2,), expected (3,)
    """
    if given is None:
        return tuple(np.zeros_like(w) for w in W)
    for x, w in zip(given, W, strict=True):
        check_array(name, x, ())
        if x.shape != w.shape:
            raise ValueError(f"{name}: got shape {x.shape}, expected {w.shape}")
    return tuple(given)


def sum_to(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    """S21: `x` summed over the leading axes that `like` does not have.

    >>> sum_to(np.ones((2, 3)), np.ones(3))
    array([2., 2., 2.])
    """
    return np.sum(x, axis=tuple(range(x.ndim - like.ndim))) if x.ndim > like.ndim else x


def mlp_memory_backward(W: Layers, x: np.ndarray, dy: np.ndarray) -> tuple[Layers, np.ndarray]:
    """S1, S21: the gradients of W and x of `mlp_memory`, where W has the leading axes of x.

    >>> mlp_memory_backward((np.full((1, 1), 3.0),), np.full((1, 1), 2.0), np.ones((1, 1)))
    ((array([[2.]]),), array([[3.]]))
    """
    H, z = hidden_rows(W, x)
    dW: list[np.ndarray] = []
    for layer in reversed(range(len(W))):
        dW.insert(0, np.swapaxes(H[layer], -1, -2) @ dy)
        dy = dy @ np.swapaxes(W[layer], -1, -2)
        if layer:
            dy = dy * gelu_slope(z[layer - 1])
    return tuple(dW), dy


def memory_grad_backward(
    W: Layers, k: np.ndarray, v: np.ndarray, loss_scale: float, dH: Layers, dDelta: Layers
) -> tuple[Layers, np.ndarray, np.ndarray]:
    """S2, S21: the gradients of W, k and v of `memory_grad`, where W has the leading axes of k.

    >>> one = np.ones((1, 1))
    >>> memory_grad_backward((one,), one, one, 2.0, (0 * one,), (one,))[2]
    array([[-2.]])
    """
    H, z = hidden_rows(W, k)
    Delta = output_gradients(W, z, v, loss_scale)
    d = _Sums(W, H, Delta)
    d.H, d.Delta = list(dH), list(dDelta)
    dk, dv = _inner_backward(d, W, H, z, Delta, loss_scale)
    return tuple(d.W), dk, dv
