"""The softplus engine on CPU tensors: prepares queries and keys and calls the Numba kernels.

Queries are multiplied by the factor of their row and keys made unit vectors beforehand, in the
arithmetic of the kernels: float32 and float64 as they are, float16 and bfloat16 widened to float32
and the results rounded back.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnspec.fast.engines.flash import numba_cpu as flash_host
from attnspec.fast.engines.flash.numba_lanes import REGISTER_BYTES
from attnspec.fast.engines.softplus import numba_gradients, numba_kernels

MOST_MULTIPLIED = 32
"""The largest power that is multiplied out."""


@functools.cache
def series(double: bool) -> np.ndarray:
    """log2(1 + e) / e on [0, 1] as a polynomial in e - 1/2, then the 1/2, to the precision of
    float64 or float32.
    """
    degree = 20 if double else 9
    chebyshev = np.polynomial.chebyshev.Chebyshev.interpolate(
        lambda e: np.where(e > 0, np.log1p(e) / np.where(e > 0, e, 1.0), 1.0) / math.log(2),
        degree,
        domain=[0, 1],
    )
    plain = chebyshev.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1])
    shifted = plain(np.polynomial.Polynomial([0.5, 1.0])).coef
    return np.append(shifted, 0.5).astype(np.float64 if double else np.float32)


def _scales(
    q: Tensor, k: Tensor, counts: Tensor, factor: float, normalise: bool
) -> tuple[Tensor, Tensor]:
    """What queries and keys are multiplied by, (batch, heads, q_tokens, 1) and the same for k."""
    of_rows = factor * torch.log2(counts.to(q.dtype).clamp(min=1.0))[:, None, :, None]
    if not normalise:
        return of_rows, k.new_ones(1, 1, 1, 1)
    norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12) for x in (q, k)]
    return of_rows / norms[0], 1.0 / norms[1]


def _whole(power: float) -> int:
    """The power if it is multiplied out, -1 if not."""
    return int(power) if power == int(power) and 1 <= power <= MOST_MULTIPLIED else -1


def _visible(
    q: Tensor, k: Tensor, causal: bool, key_mask: Tensor | None, mask: Tensor | None
) -> tuple[Any, ...]:
    return flash_host.visible_arguments(
        q, k, causal, None, 0, None, None, key_mask, mask, None, None, None, 0, 0
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    factor: float,
    normalise: bool,
    eps: float,
    causal: bool,
    key_mask: Tensor | None,
    mask: Tensor | None,
    power: float,
    warm: int,
    second_eps: float,
    dead: float,
) -> tuple[Tensor, Tensor]:
    """The output in q's dtype and the four numbers of each row, (4, batch, heads, q_tokens)."""
    q_wide, k_wide, v_wide = (flash_host.widened(x) for x in (q, k, v))
    real = q_wide.dtype
    batch, heads, q_tokens, d = q.shape
    k_tokens, dv = k.shape[2], v.shape[3]
    of_rows, of_keys = _scales(q_wide, k_wide, counts, factor, normalise)
    out = torch.empty(batch, heads, q_tokens, dv, dtype=real)
    numbers = torch.empty(4, batch, heads, q_tokens, dtype=real)
    numbers[0] = of_rows[..., 0]
    see = _visible(q, k, causal, key_mask, mask)
    tiles = flash_host.tile_table(q_tokens, k_tokens, 0, None, None)
    arguments = [
        (q_wide * of_rows).numpy(), (k_wide * of_keys).numpy(), v_wide.numpy(),
        counts.to(real).numpy(), out.numpy(), numbers.numpy(), eps, power, _whole(power), warm,
        second_eps, dead, series(real == torch.float64), *see, tiles,
    ]  # fmt: skip
    flash_host.run_parts(
        numba_kernels.forward_kernel(flash_host.number_type(q_wide)), arguments,
        batch * heads * len(tiles), batch * heads * q_tokens * k_tokens * (2 * d + dv), real,
        numba_kernels.forward_scratch(d, dv), flash_host.most_spans_of(k_tokens, see[7], 0),
    )  # fmt: skip
    return out.to(q.dtype), numbers


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    out: Tensor,
    rows: Tensor,
    factor: float,
    normalise: bool,
    eps: float,
    causal: bool,
    key_mask: Tensor | None,
    mask: Tensor | None,
    power: float,
    warm: int,
    second_eps: float,
    dead: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the inputs' dtype."""
    q_wide, k_wide, v_wide, dout_wide = (flash_host.widened(x) for x in (q, k, v, dout))
    real = q_wide.dtype
    batch, heads, q_tokens, d = q.shape
    kv_heads, k_tokens, d_v = k.shape[1], k.shape[2], v.shape[3]
    of_rows, of_keys = _scales(q_wide, k_wide, counts, factor, normalise)
    delta = (dout_wide * flash_host.widened(out)).sum(-1)
    lanes = REGISTER_BYTES // q_wide.element_size()
    d_padded, dv_padded = -(-d // lanes) * lanes, -(-d_v // lanes) * lanes
    see = _visible(q, k, causal, key_mask, mask)
    tiles = flash_host.tile_table(q_tokens, k_tokens, 0, None, None)
    shares = flash_host.shares_of(batch * kv_heads, len(tiles))
    dq = torch.empty(batch, heads, q_tokens, d, dtype=real)
    dk = torch.zeros(shares, batch, kv_heads, k_tokens, d_padded, dtype=real)
    dv = torch.zeros(shares, batch, kv_heads, k_tokens, dv_padded, dtype=real)
    arguments = [
        (q_wide * of_rows).numpy(), (k_wide * of_keys).numpy(), v_wide.numpy(), dout_wide.numpy(),
        counts.to(real).numpy(), rows.detach().numpy(), delta.numpy(), dq.numpy(), dk.numpy(),
        dv.numpy(), eps, power, _whole(power), warm, dead, series(real == torch.float64), *see,
        tiles,
    ]  # fmt: skip
    flash_host.run_parts(
        numba_gradients.backward_kernel(flash_host.number_type(q_wide)), arguments,
        shares * batch * kv_heads, 3 * batch * heads * q_tokens * k_tokens * (d + d_v), real,
        numba_gradients.backward_scratch(d_padded, dv_padded),
        flash_host.most_spans_of(k_tokens, see[7], 0),
    )  # fmt: skip
    dq = dq * of_rows
    dk_wide = dk.sum(0)[..., :d] * of_keys
    if normalise:
        dq, dk_wide = _without_length(dq, q_wide), _without_length(dk_wide, k_wide)
    return (
        dq.to(q.dtype), dk_wide.to(k.dtype).contiguous(),
        dv.sum(0)[..., :d_v].to(v.dtype).contiguous(),
    )  # fmt: skip


def _without_length(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient less what points along x: it would change the length of x alone.

    Where there is no gradient x is not read, since it may be NaN (K11).
    """
    square = (x * x).sum(-1, keepdim=True)
    along = torch.where(square > 1e-24, (x * grad).sum(-1, keepdim=True) / square, 0.0)
    touched = (grad != 0).any(-1, keepdim=True)
    return torch.where(touched, grad - x * along, 0.0)
