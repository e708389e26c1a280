"""Lists that pack the active rows of every group of heads: a custom op on Triton alone."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import load
from attnspec.fast.engines.operation import Operation

Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def run(
    active: Tensor, kv_heads: int, keys: int, causal: bool, token_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(active):
        module = load("attnspec.fast.engines.select.triton_packed")
        return module.packed_rows(active, kv_heads, keys, causal, token_first)


packed_op = Operation("attnspec::packed_rows", run)


@packed_op.register_fake
def _(
    active: Tensor, kv_heads: int, keys: int, causal: bool, token_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    order, back, places, source, ends = (
        active.new_empty(active.numel(), dtype=torch.int32) for _ in range(5)
    )
    sequences = active.shape[0] * kv_heads
    offsets, k_offsets = (active.new_empty(sequences + 2, dtype=torch.int64) for _ in range(2))
    return order, back, places, source, ends, offsets, k_offsets


def packed_rows(
    active: Tensor, kv_heads: int, keys: int, *, causal: bool, token_first: bool
) -> Lists:
    """Where the rows of `active` bool (batch, tokens, heads), fewer than 2^31, go if the active
    ones of a sequence, which is a batch entry and kv head, come behind one another, tokens
    ascending and the heads of a group side by side, and all others at the end.

    Returns, int32: for each place the row of q (batch, heads, tokens), or with `token_first` of
    (batch, tokens, heads), and the inverse; the place of each row of (batch, tokens, heads), and
    the inverse; and for each place how many of `keys` keys it sees, causally (K3) or all, 0 if the
    row is not active. Then the offsets, int64 (sequences + 2), of rows and of keys; the last
    sequence has the rows that are not active, and no keys.
    """
    return packed_op(active, kv_heads, keys, causal, token_first)
