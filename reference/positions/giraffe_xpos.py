r"""Giraffe, xPos: a rotation whose logits fade with the distance.

Queries grow and keys shrink with their positions, each pair of channels at its own rate, so that
the product of the two depends on how far apart they are.

Definition
----------
S7. **xPos.** Interleaved pairs, turned by :math:`p\, \theta_m` (S1 without a scale, S5). Then the
pair m of a query is multiplied by :math:`\zeta_m^{e(p)}` and of a key by :math:`\zeta_m^{-e(p)}`,
with :math:`\zeta_m = (2m + 0.4 d) / (1.4 d)` and :math:`e(p) = (p - \lfloor N/2 \rfloor) / b`; N is
the length of the model's position table and b the scale base. In a logit that leaves
:math:`\zeta_m^{(i-j)/b}`, below 1 and falling with the distance where the query comes later.

S8. **One N.** It cancels only if the query and every cached key used the same one: it belongs to
the model, never to what a cache holds. The amplitudes must fit the dtype, which
:math:`3.5^{|p - N/2| / b}` bounds: float32 holds 3.5 to the power of 70, float16 only to that of 8.

S9. **Schedule.** Training starts at a large b and lowers it: 8192, less 8 a step, down to 128.

Paper and code
--------------
The authors' code keeps q and k in float32 throughout. It takes a slice of its table of positions
unless that slice would end where the table does, so that a step at the last position meets the
whole table; here there is no table. Their default for b is 512, their runs follow S9.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_array, check_attention_inputs, check_integer
from attnspec.reference.dense import attention as dense
from attnspec.reference.positions.giraffe_masks import default_positions, visible
from attnspec.reference.positions.giraffe_rotation import (
    check_number,
    check_places,
    check_positions,
    check_width,
    rope_basis,
    rotate_interleaved,
    rotate_interleaved_backward,
)


def scale_base(step: int, start: int = 8192, drop: int = 8, least: int = 128) -> int:
    """S9: b at a training `step`, counted from 0.

    >>> [scale_base(step) for step in (0, 1, 5000)]
    [8192, 8184, 128]
    """
    check_integer("step", step, least=0)
    check_integer("start", start, least=1)
    check_integer("drop", drop, least=0)
    check_integer("least", least, least=1)
    return max(start - drop * step, least)


def xpos_scale(d: int, p: np.ndarray, N: int, b: float = 512) -> np.ndarray:
    """S7: the amplitudes :math:`\\zeta_m^{e(p)}` (..., d/2), float64, of queries at `p` (...).

    >>> xpos_scale(4, np.array([2, 14]), N=4, b=12).round(4)
    array([[1.    , 1.    ],
           [0.2857, 0.6429]])
    """
    check_integer("d", d, least=2)
    check_width("d", d)
    check_places("p", p)
    check_integer("N", N, least=1)
    check_number("b", b, 0, strict=True)
    zeta = (np.arange(0, d, 2) + 0.4 * d) / (1.4 * d)
    return zeta ** ((p.astype(np.float64) - N // 2) / float(b))[..., None]


def xpos(
    q: np.ndarray,
    k: np.ndarray,
    pq: np.ndarray,
    pk: np.ndarray,
    *,
    N: int,
    b: float = 512,
    base: float = 10000.0,
) -> tuple[np.ndarray, np.ndarray]:
    """S7: q (..., heads, T, d) and k (..., kv_heads, S, d), turned and given their amplitudes.

    `pq` (T) or (..., T), `pk` (S) or (..., S), whole or real numbers.

    >>> x, p = np.array([[[1.0, 0.0]]]), np.array([0])
    >>> [y.round(4) for y in xpos(x, x, p, p, N=4, b=2)]
    [array([[[3.5, 0. ]]]), array([[[0.2857, 0.    ]]])]
    """
    _check(q, k, pq, pk)
    f = rope_basis(q.shape[-1], base)
    grown, shrunk = _amplitudes(q, pq, N, b), 1 / _amplitudes(k, pk, N, b)
    q_out = rotate_interleaved(q, pq, f) * grown.astype(q.dtype)
    return q_out, rotate_interleaved(k, pk, f) * shrunk.astype(k.dtype)


def xpos_backward(
    q: np.ndarray,
    k: np.ndarray,
    pq: np.ndarray,
    pk: np.ndarray,
    dq_out: np.ndarray,
    dk_out: np.ndarray,
    *,
    N: int,
    b: float = 512,
    base: float = 10000.0,
) -> tuple[np.ndarray, np.ndarray]:
    """S13: gradients dq, dk: the amplitudes are the same, and the rotation is undone.

    >>> x, p = np.array([[[1.0, 0.0]]]), np.array([0])
    >>> [y.round(4) for y in xpos_backward(x, x, p, p, x, x, N=4, b=2)]
    [array([[[3.5, 0. ]]]), array([[[0.2857, 0.    ]]])]
    """
    _check(q, k, pq, pk)
    f = rope_basis(q.shape[-1], base)
    grown, shrunk = _amplitudes(q, pq, N, b), 1 / _amplitudes(k, pk, N, b)
    dq = rotate_interleaved_backward(q, pq, f, dq_out * grown.astype(q.dtype))
    return dq, rotate_interleaved_backward(k, pk, f, dk_out * shrunk.astype(k.dtype))


def xpos_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pq: np.ndarray | None = None,
    pk: np.ndarray | None = None,
    *,
    N: int,
    b: float = 512,
    base: float = 10000.0,
    causal: bool = True,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S7, S12: output (..., heads, T, dv) and lse (..., heads, T).

    v (..., kv_heads, S, dv); positions as in `xpos`, keys at 0..S-1 and queries at the last T of
    them by default; `key_mask` bool (..., S), True = a real key.

    >>> x = np.array([[[1.0, 0.0], [1.0, 0.0]]])
    >>> xpos_attend(x, x, x, N=2, b=1)[1].round(4)
    array([[0.7071, 1.1453]])
    """
    check_attention_inputs(q, k, v)
    pq, pk = default_positions(q, k, pq, pk)
    turned = xpos(q, k, pq, pk, N=N, b=b, base=base)
    return dense.attend(*turned, v, mask=visible(q.shape[-2], k.shape[-2], causal, key_mask))


def xpos_attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pq: np.ndarray | None,
    pk: np.ndarray | None,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    *,
    N: int,
    b: float = 512,
    base: float = 10000.0,
    causal: bool = True,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S13: gradients dq, dk, dv, shaped as q, k, v; `dlse` None means lse is not used.

    >>> one = np.ones((1, 1, 2))
    >>> [x.ravel() for x in xpos_attend_backward(one, one, one, None, None, one, N=4)]
    [array([0., 0.]), array([0., 0.]), array([1., 1.])]
    """
    check_attention_inputs(q, k, v)
    pq, pk = default_positions(q, k, pq, pk)
    turned = xpos(q, k, pq, pk, N=N, b=b, base=base)
    mask = visible(q.shape[-2], k.shape[-2], causal, key_mask)
    dq, dk, dv = dense.attend_backward(*turned, v, dout, dlse, mask=mask)
    return (*xpos_backward(q, k, pq, pk, dq, dk, N=N, b=b, base=base), dv)


def _check(q: np.ndarray, k: np.ndarray, pq: np.ndarray, pk: np.ndarray) -> None:
    """S7, K14: queries and keys of one head size, each with its positions."""
    check_array("q", q, ("heads", "T", "d"))
    check_array("k", k, ("kv_heads", "S", "d"))
    check_attention_inputs(q, k, k)
    check_width("q", q.shape[-1])
    check_positions("pq", pq, q)
    check_positions("pk", pk, k)


def _amplitudes(x: np.ndarray, p: np.ndarray, N: int, b: float) -> np.ndarray:
    """S7: amplitudes (..., 1, T, d), each one for the two channels of a pair, float64."""
    scale = xpos_scale(x.shape[-1], p, N, b)[..., None, :, :]
    return np.repeat(scale, 2, axis=-1)
