"""The gradients of Titans beside attention: MAC, MAG and MAL. Clauses S14 to S17 and S21.

Each goes back through the gate, the attention, the memory and the matrices in front of them.
Gradients of a prefix, of matrices, gains and shared states are sums over the leading axes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_shaped
from attnspec.reference.dense.attention_gradient import attend_backward
from attnspec.reference.linear.titans_chunks import Layers, check_states
from attnspec.reference.linear.titans_deep import titans_chunk_mlp
from attnspec.reference.linear.titans_gradients import (
    mlp_memory_backward,
    sum_to,
    titans_chunk_mlp_backward,
)
from attnspec.reference.linear.titans_layouts import (
    EPSILON,
    Three,
    attend_rows,
    by_head,
    directed,
    mac_segment,
    mag,
    mal,
    persistent_prefix,
    titans_mask_mac,
    titans_mask_mag,
)
from attnspec.reference.linear.titans_memory import mlp_memory

Gradients = tuple[Any, ...]


def mac_segment_backward(
    seg: np.ndarray, P: np.ndarray, W: Any, S: Any, attn: Three, mem: Three, rates: Any,
    gains: tuple[np.ndarray, np.ndarray], b: int, do: np.ndarray, dW: Any = None, dS: Any = None,
    *, loss_scale: float = 2.0, tokenwise: bool = False, normalise: bool = False,
) -> Gradients:  # fmt: skip
    """S14, S21: dseg, dP, dW, dS, dattn, dmem, drates (..., C), dgains of `mac_segment`.

    do, dW and dS are shaped as its outputs, None for a state that is not used.

    >>> one = np.ones((1, 1))
    >>> mac_segment_backward(one, one[:0], (one,), None, (one,) * 3, (one,) * 3,
    ...                      (0.5, 0.0, 0.0), (one[0], one[0]), 1, one)[1].shape
    (0, 1)
    """
    options: dict[str, Any] = {"loss_scale": loss_scale, "normalise": normalise}
    o, *_ = mac_segment(seg, P, W, S, attn, mem, rates, gains, b, tokenwise=tokenwise, **options)
    check_shaped("do", do, o.shape)
    N_p, C = P.shape[0], seg.shape[-2]
    asking = directed(seg @ mem[0], normalise)
    layers, momentum = check_states(W, S, asking)
    h = mlp_memory(layers, asking)
    z = np.concatenate([persistent_prefix(P, seg)[..., :N_p, :], h, seg], axis=-2)
    mask = titans_mask_mac(C, max(C, 1), N_p, tokenwise)
    y = attend_rows(seg, z, attn, mask)
    store = _Store(y, layers, momentum, mem, rates, b, **options)
    later = directed(y @ mem[0], normalise)
    read = store.y if tokenwise else mlp_memory(store.W, later)
    dy, dread, dgains = _gate_backward(y, read, gains, do)
    uW = [np.zeros_like(w) for w in layers] if dW is None else list(dW)
    dmem = [np.zeros_like(m) for m in mem]
    if not tokenwise:
        more, dlater = mlp_memory_backward(store.W, later, dread)
        uW = [u + x for u, x in zip(uW, more, strict=True)]
        into, dmatrix = _projected_backward(y, mem[0], dlater, normalise)
        dy, dmem[0] = dy + into, dmem[0] + dmatrix
        dread = np.zeros_like(store.y)
    into, dlayers, dmomentum, dthree, drates = store.backward(dread, tuple(uW), dS)
    dseg, dz, dattn = _attend_backward(seg, z, attn, mask, dy + into)
    dseg = dseg + dz[..., N_p + C :, :]
    more, dasking = mlp_memory_backward(layers, asking, dz[..., N_p : N_p + C, :])
    into, dmatrix = _projected_backward(seg, mem[0], dasking, normalise)
    dmem[0] = dmem[0] + dmatrix
    dlayers = tuple(a + c for a, c in zip(dlayers, more, strict=True))
    return (
        dseg + into, sum_to(dz[..., :N_p, :], P), *_states(dlayers, dmomentum, W, S), dattn,
        tuple(a + c for a, c in zip(dmem, dthree, strict=True)), drates, dgains,
    )  # fmt: skip


def mag_backward(
    x: np.ndarray, P: np.ndarray, W: Any, S: Any, attn: Three, mem: Three, rates: Any,
    gains: tuple[np.ndarray, np.ndarray], w: int, b: int, do: np.ndarray, dW: Any = None,
    dS: Any = None, *, loss_scale: float = 2.0, normalise: bool = False,
) -> Gradients:  # fmt: skip
    """S15, S21: dx, dP, dW, dS, dattn, dmem, drates (..., N_p + T), dgains of `mag`.

    >>> one = np.ones((1, 1))
    >>> mag_backward(one, one[:0], (0 * one,), None, (one,) * 3, (one,) * 3, (0.0, 0.0, 0.0),
    ...              (one[0], one[0]), 1, 1, one)[7][0].round(4)
    array([0.5])
    """
    options: dict[str, Any] = {"loss_scale": loss_scale, "normalise": normalise}
    o, *_ = mag(x, P, W, S, attn, mem, rates, gains, w, b, **options)
    check_shaped("do", do, o.shape)
    N_p, xt = P.shape[0], persistent_prefix(P, x)
    mask = titans_mask_mag(x.shape[-2], w, N_p)
    y = attend_rows(xt, xt, attn, mask)
    layers, momentum = check_states(W, S, xt @ mem[0])
    store = _Store(xt, layers, momentum, mem, rates, b, **options)
    dy, dh, dgains = _gate_backward(y, store.y, gains, _behind(do, N_p))
    dxt, dlayers, dmomentum, dmem, drates = store.backward(dh, dW, dS)
    dq, dz, dattn = _attend_backward(xt, xt, attn, mask, dy)
    dxt = dxt + dq + dz
    return (
        dxt[..., N_p:, :], sum_to(dxt[..., :N_p, :], P), *_states(dlayers, dmomentum, W, S), dattn,
        dmem, drates, dgains,
    )  # fmt: skip


def mal_backward(
    x: np.ndarray, P: np.ndarray, W: Any, S: Any, attn: Three, mem: Three, rates: Any, w: int,
    b: int, do: np.ndarray, dW: Any = None, dS: Any = None, *, loss_scale: float = 2.0,
    normalise: bool = False,
) -> Gradients:  # fmt: skip
    """S16, S21: dx, dP, dW, dS, dattn, dmem, drates (..., N_p + T) of `mal`.

    >>> one = np.ones((1, 1))
    >>> mal_backward(one, one[:0], (0 * one,), None, (one,) * 3, (one,) * 3, (0.5, 0.0, 0.0), 1, 1,
    ...              one)[0]
    array([[3.]])
    """
    options: dict[str, Any] = {"loss_scale": loss_scale, "normalise": normalise}
    o, *_ = mal(x, P, W, S, attn, mem, rates, w, b, **options)
    check_shaped("do", do, o.shape)
    N_p, xt = P.shape[0], persistent_prefix(P, x)
    layers, momentum = check_states(W, S, xt @ mem[0])
    store = _Store(xt, layers, momentum, mem, rates, b, **options)
    mask = titans_mask_mag(xt.shape[-2], w, 0)
    dq, dz, dattn = _attend_backward(store.y, store.y, attn, mask, _behind(do, N_p))
    dxt, dlayers, dmomentum, dmem, drates = store.backward(dq + dz, dW, dS)
    return (
        dxt[..., N_p:, :], sum_to(dxt[..., :N_p, :], P), *_states(dlayers, dmomentum, W, S), dattn,
        dmem, drates,
    )  # fmt: skip


class _Store:
    """S14 to S16: the memory over rows x, what it says and has at last, and the way back."""

    def __init__(
        self, x: np.ndarray, W: Layers, S: Layers, mem: Three, rates: Any, b: int, *,
        loss_scale: float, normalise: bool,
    ) -> None:  # fmt: skip
        self.x, self.mem, self.normalise, self.loss_scale = x, mem, normalise, loss_scale
        q, k, v = (x @ matrix for matrix in mem)
        q, k = directed(q, normalise), directed(k, normalise)
        q, k, v = (rows[..., None, :, :] for rows in (q, k, v))
        self.given = (_headed(W), _headed(S), k, v, q, by_head(rates), b)
        y, last, momentum = titans_chunk_mlp(*self.given, loss_scale=loss_scale)
        self.y = y[..., 0, :, :]
        self.W, self.S = (tuple(w[..., 0, :, :] for w in z) for z in (last, momentum))

    def backward(self, dy: np.ndarray, dW: Any, dS: Any) -> Gradients:
        """dx, dW, dS, dmem, drates."""
        last, momentum = (None if z is None else _headed(z) for z in (dW, dS))
        first, second, dk, dv, dq, drates = titans_chunk_mlp_backward(
            *self.given, dy[..., None, :, :], last, momentum, loss_scale=self.loss_scale
        )
        dx, dmem = np.zeros_like(self.x), list[np.ndarray]()
        for matrix, rows, norm in zip(
            self.mem, (dq, dk, dv), (self.normalise, self.normalise, False), strict=True
        ):
            into, dmatrix = _projected_backward(self.x, matrix, rows[..., 0, :, :], norm)
            dx, dmem = dx + into, [*dmem, dmatrix]
        states = (tuple(w[..., 0, :, :] for w in z) for z in (first, second))
        return dx, *states, tuple(dmem), tuple(r[..., 0, :] for r in drates)


def _headed(layers: Layers) -> Layers:
    return tuple(w[..., None, :, :] for w in layers)


def _states(dW: Layers, dS: Layers, W: Any, S: Any) -> tuple[Layers, Layers]:
    """Gradients of states as they were given; those of no momentum as W."""
    return (
        tuple(sum_to(x, w) for x, w in zip(dW, W, strict=True)),
        tuple(sum_to(x, s) for x, s in zip(dS, W if S is None else S, strict=True)),
    )


def _behind(do: np.ndarray, N_p: int) -> np.ndarray:
    """The gradient of all rows from that of those behind the prefix."""
    prefix = np.zeros_like(do, shape=(*do.shape[:-2], N_p, do.shape[-1]))
    return np.concatenate([prefix, do], axis=-2)


def _projected_backward(
    x: np.ndarray, matrix: np.ndarray, dy: np.ndarray, normalise: bool
) -> tuple[np.ndarray, np.ndarray]:
    """dx and the matrix's gradient of x @ matrix, divided by its norm if `normalise`."""
    if normalise:
        rows = x @ matrix
        size = np.sqrt(np.sum(rows * rows, axis=-1, keepdims=True) + EPSILON)
        unit = rows / size
        dy = (dy - unit * np.sum(dy * unit, axis=-1, keepdims=True)) / size
    return dy @ np.swapaxes(matrix, -1, -2), sum_to(np.swapaxes(x, -1, -2) @ dy, matrix)


def _attend_backward(
    x: np.ndarray, z: np.ndarray, attn: Three, mask: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Layers]:
    """dx, dz and the gradients of the matrices of rows x that attend to rows z."""
    q, k, v = (rows[..., None, :, :] for rows in (x @ attn[0], z @ attn[1], z @ attn[2]))
    rows = attend_backward(q, k, v, dy[..., None, :, :], mask=mask)
    dx, dq = _projected_backward(x, attn[0], rows[0][..., 0, :, :], False)
    into_k, dk = _projected_backward(z, attn[1], rows[1][..., 0, :, :], False)
    into_v, dv = _projected_backward(z, attn[2], rows[2][..., 0, :, :], False)
    return dx, into_k + into_v, (dq, dk, dv)


def _gate_backward(
    y: np.ndarray, h: np.ndarray, gains: tuple[np.ndarray, np.ndarray], do: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Layers]:
    """S17: dy, dh and the gradients of the gains."""
    (y_rms, y_size), (h_rms, h_size) = _rms(y), _rms(h)
    pushed = h_rms * gains[1]
    small = np.exp(-np.abs(pushed))
    opened = np.where(pushed >= 0, 1 / (1 + small), small / (1 + small)).astype(y.dtype)
    dpushed = do * y_rms * gains[0] * (opened * (1 - opened))
    dgains = sum_to(do * y_rms * opened, gains[0]), sum_to(dpushed * h_rms, gains[1])
    dy_rms, dh_rms = do * gains[0] * opened, dpushed * gains[1]
    dy = (dy_rms - y_rms * np.mean(dy_rms * y_rms, axis=-1, keepdims=True)) / y_size
    dh = (dh_rms - h_rms * np.mean(dh_rms * h_rms, axis=-1, keepdims=True)) / h_size
    return dy, dh, dgains


def _rms(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON)
    return x / size, size
