"""MoH's packed rows: which row goes where, by the select engine or by sums over the mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import choose_backend
from attnspec.fast.engines.select import inverse, packed_rows, take_rows


class Rows(NamedTuple):
    """The active rows of each sequence, all others behind them.

    `order` (n,) names the row of q at each place and `back` the place of each; `places` and
    `source` are the same for rows (batch, tokens, heads). `ends` (n,) is how many keys each place
    sees, None for all its sequence has. `offsets` and `k_offsets` (sequences + 2).
    """

    order: Tensor
    back: Tensor
    places: Tensor
    source: Tensor
    ends: Tensor | None
    offsets: Tensor
    k_offsets: Tensor


class Front(NamedTuple):
    """Entries in the order of their sequences, those that are flagged before all others.

    `places` (n,) says where each entry goes; `offsets` (sequences + 2) where each sequence's
    flagged ones begin, then where the others do, then n.
    """

    places: Tensor
    offsets: Tensor


def list_rows(
    active: Tensor, q: Tensor, k: Tensor, causal: bool, token_first: bool,
    key_mask: Tensor | None, backend: str | None,
) -> Rows:  # fmt: skip
    """The rows `active` (batch, tokens, heads) of q, which with `token_first` lies as these do."""
    heads, tokens = q.shape[1:3]
    kv_heads, keys = k.shape[1:3]
    if choose_backend(backend, q) == "triton" and active.numel() < 1 << 31:
        rows = Rows(*packed_rows(active, kv_heads, keys, causal=causal, token_first=token_first))
        ends = rows.ends if causal else None
        if key_mask is not None:
            assert rows.ends is not None
            ends = _real(key_mask)[rows.source.long() // (heads * tokens), rows.ends.long()]
        return rows._replace(ends=ends)
    group = heads // kv_heads
    flags = active.unflatten(2, (kv_heads, group)).transpose(1, 2)
    packed = front(flags.flatten(2))
    places = packed.places.view(q.shape[0], kv_heads, tokens, group)
    by_token = places.transpose(1, 2).flatten()
    by_row = by_token if token_first else places.transpose(2, 3).flatten()
    source = inverse(by_token)
    starts = torch.arange(q.shape[0] * kv_heads + 1, device=q.device) * keys
    return Rows(
        inverse(by_row),
        by_row,
        by_token,
        source,
        _row_ends(source, packed.offsets, q, keys, causal, key_mask),
        packed.offsets,
        torch.cat([starts, starts[-1:]]),
    )


def front(flags: Tensor) -> Front:
    """`flags` bool (batch, sequences a batch entry, entries), none of them 0."""
    size = flags.shape[2]
    flat = flags.flatten()
    entries = torch.arange(flat.shape[0], device=flat.device)
    before = flat.cumsum(0)
    places = torch.where(flat, before - 1, before[-1] + entries - before)
    ends = before[size - 1 :: size]
    return Front(places, torch.cat([ends.new_zeros(1), ends, entries[-1:] + 1]))


def _real(key_mask: Tensor) -> Tensor:
    """How many keys (batch, k_tokens + 1) are real before each, and in all."""
    return torch.nn.functional.pad(key_mask.cumsum(1), (1, 0))


def _row_ends(
    source: Tensor, offsets: Tensor, q: Tensor, keys: int, causal: bool, key_mask: Tensor | None
) -> Tensor | None:
    """Where the real keys of each packed row end; the rows of the last sequence see none.

    `source` is each row's index among (batch, tokens, heads).
    """
    if not causal and key_mask is None:
        return None
    heads, tokens = q.shape[1:3]
    ends = torch.full_like(source, keys)
    if causal:
        ends = (source // heads % tokens + (keys - tokens + 1)).clamp(min=0)
    if key_mask is not None:
        ends = _real(key_mask)[source // (heads * tokens), ends]
    inside = torch.arange(source.shape[0], device=q.device) < offsets[-2]
    return torch.where(inside, ends, 0)


class Gathered(torch.autograd.Function):
    """Rows of x in another order. `order` is a permutation, so the gradient gathers by `back`."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        return take_rows(x, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return take_rows(dout, back), None, None
