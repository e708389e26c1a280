"""The Taylor engine on the CPU: pairs of near tokens in Numba, far ones through the state.

A sequence is cut in segments. Inside one the polynomial of the scores is taken pair by pair; what
lies before it is a product of features with the state, as is everything for long sequences without
a causal order. float16 and bfloat16 are widened to float32; float64 is computed in float64.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnspec.fast.backend import wide_dtype
from attnspec.fast.engines.taylor.layout import packed_count, packed_features, unpacked_features
from attnspec.fast.engines.taylor.near_op import near_op, token_op

SEGMENT = 256
"""Tokens between two states, unless a call asks for another number."""
State = tuple[Tensor, Tensor]


def attend(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: State | None, causal: bool,
    scale: float, eps: float, use_norm: bool, want: bool, chunk: int,
) -> tuple[Tensor, State | None]:  # fmt: skip
    """o (batch, heads, q_tokens, dv), and the last state, unpacked, if it is wanted."""
    wide = wide_dtype(q)
    Q, K, V = (x.to(wide) for x in (q, k, v))
    real = torch.ones(k.shape[0], k.shape[2], dtype=wide)
    if key_mask is not None:
        K, V = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (K, V))
        real = key_mask.to(wide)
    rows, keys = q.shape[2], k.shape[2]
    segment = -(-chunk // 16) * 16 if chunk else SEGMENT
    segments = max(1, -(-keys // segment)) if causal else 1
    pairwise = causal or (state is None and keys <= 2 * packed_count(q.shape[3]))
    far = state is not None or segments > 1 or not pairwise
    num = Q.new_zeros(*Q.shape[:3], V.shape[3])
    den = Q.new_zeros(Q.shape[:3])
    last = None
    if far or want:
        form = packed_features if state is None and not want else unpacked_features
        phi_k = form(K, scale) * real[:, None, :, None]
        values = torch.cat([V, torch.ones_like(V[..., :1])], dim=-1)
        first = None if state is None else torch.cat([state[0], state[1][..., None]], dim=-1)
        entering, last = _states(phi_k, values, first, segment if segments > 1 else max(keys, 1))
        if far and rows:
            read = entering if causal else last[:, :, None]
            both = _read(form(Q, scale), read, keys if causal else rows, segment)
            num, den = both[..., :-1], both[..., -1]
    if pairwise:
        hi = torch.full((rows,), keys)
        lo = torch.zeros_like(hi)
        if causal:
            hi = torch.arange(keys - rows + 1, keys + 1)
            lo = (hi - 1) // segment * segment if segments > 1 else lo
        near = near_op(Q, K, V, real, lo, hi, scale)
        num, den = num + near[0], den + near[1]
    if use_norm:
        empty = den == 0
        total = torch.where(empty, 1.0, den + eps)[..., None]
        num = torch.where(empty[..., None], 0.0, num / total)
    final = (last[..., :-1], last[..., -1]) if want and last is not None else None
    return num.to(q.dtype), final


def _states(
    phi: Tensor, values: Tensor, first: Tensor | None, segment: int
) -> tuple[Tensor, Tensor]:
    """The states (batch, kv_heads, segments, D, dv + 1) before each segment, and the last."""
    missing = -phi.shape[2] % segment
    phi, values = (pad(x, (0, 0, 0, missing)).unflatten(2, (-1, segment)) for x in (phi, values))
    if not phi.shape[2]:
        phi, values = (pad(x, (0, 0, 0, 0, 0, 1)) for x in (phi, values))
    sums = phi.mT @ values
    if first is None:
        first = torch.zeros_like(sums[:, :, 0])
    through = torch.cat([first[:, :, None], sums], dim=2).cumsum(2)
    return through[:, :, :-1], through[:, :, -1]


def _read(phi: Tensor, states: Tensor, positions: int, segment: int) -> Tensor:
    """phi(q) times the state of its segment, (batch, heads, rows, dv + 1)."""
    rows, many = phi.shape[2], states.shape[2]
    length = positions if many == 1 else segment
    before = positions - rows
    phi = pad(phi, (0, 0, before, many * length - positions)).unflatten(2, (many, length))
    phi = phi.unflatten(1, (states.shape[1], -1))
    states = states[:, :, None]
    # The count and the sum of all values are large: they are added last, to keep small terms.
    both = phi[..., 1:] @ states[..., 1:, :] + phi[..., :1] * states[..., :1, :]
    out = both.flatten(1, 2).flatten(2, 3)
    return out[:, :, before:positions]


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, eps: float, use_norm: bool,
    want: bool, chunk: int,
) -> tuple[Tensor, State | None]:  # fmt: skip
    """Causal attention inside each packed sequence, one after the other, and the last states."""
    ends = offsets.tolist()
    rising = all(first <= last for first, last in pairwise(ends))
    if ends[0] != 0 or ends[-1] != q.shape[2] or not rising:
        raise ValueError(
            f"offsets: got {ends}, expected offsets that increase from 0 to {q.shape[2]}"
        )
    outputs, states = [], []
    for first, last in pairwise(ends):
        Q, K, V = (x[:, :, first:last] for x in (q, k, v))
        o, state = attend(Q, K, V, None, None, True, scale, eps, use_norm, want, chunk)
        outputs.append(o)
        if state is not None:
            states.append(state)
    if not want:
        return torch.cat(outputs, dim=2), None
    S, zk = (torch.cat(parts) for parts in zip(*states, strict=True))
    return torch.cat(outputs, dim=2), (S, zk)


def step(
    S: Tensor, zk: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """o (batch, heads, 1, dv) of one token, and the state with it."""
    wide = wide_dtype(q)
    o, new_S, new_zk = token_op(*(x.to(wide) for x in (S, zk, q, k, v)), scale, eps)
    return o.to(q.dtype), new_S, new_zk
