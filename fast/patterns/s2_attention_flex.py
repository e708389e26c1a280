"""The ready patterns as mask functions of FlexAttention."""

from __future__ import annotations

from torch import Tensor

from attnspec.fast.flex import MaskMod
from attnspec.fast.patterns.s2_attention_patterns import check_starts, check_stride, check_window


def mask_mod(
    H: int,
    Hk: int,
    b: int = 64,
    local: int | tuple[int, int] = 32,
    v_stride: int = 8,
    step: int | None = None,
    offset: int = 0,
    num_dense_heads: int = 0,
    *,
    homo_head: bool = False,
    causal: bool = True,
    q_start: int = 0,
    kv_start: int = 0,
) -> MaskMod:
    """For `H` query heads on `Hk` kv heads; the parameters are those of `s2_attend`."""
    left, right, step = check_stride(
        H, Hk, local, v_stride, num_dense_heads, step, offset, homo_head
    )
    check_window(local, causal)
    check_starts(b, q_start, kv_start)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        c = head // (H // Hk)
        t, u = query + q_start, key + kv_start
        row, column = t // b, u // b
        if causal:
            phase = offset if homo_head else c * step + offset
            seen = ((column + phase) % v_stride == 0) | (row - column < left)
        else:
            before = (row - column - left + 1).clamp(min=0)
            behind = (column - row - right + 1).clamp(min=0)
            seen = (before + behind) % v_stride == 0
        seen = seen | (c >= Hk - num_dense_heads)
        return seen & (u <= t) if causal else seen

    return visible
