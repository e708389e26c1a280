"""SnapKV's selection on Numba and Triton: from the window's weights to the positions kept.

Scores are float32 whatever the inputs' dtype: rounding them would make ties.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    check_attention_inputs,
    check_choice,
    check_integer,
    check_mask,
    check_size,
    check_tensor,
)
from attnspec.fast.engines.columns import column_sums, smooth, weight_rows
from attnspec.fast.engines.select import top_k
from attnspec.fast.growing import checkable

POOLS = ("avg", "max")
REDUCTIONS = ("group_mean", "group_max", "per_query_head")


def window_attention(
    q: Tensor,
    k: Tensor,
    w: int = 32,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Weights A (batch, heads, w, T) of the last `w` queries over all keys, in float32.

    q (batch, heads, q_tokens, d), k (batch, kv_heads, T, d), `mask` bool (batch, T), True = real
    key, for prompts padded on the left.
    """
    check_attention_inputs(q, k, k)
    check_window(w, q.shape[2], k.shape[2])
    check_padding(mask, k)
    return weight_rows(q[:, :, q.shape[2] - w :], k, key_mask=mask, backend=backend)


def prefix_scores(A: Tensor, w: int = 32, *, backend: str | None = None) -> Tensor:
    """Scores s (batch, heads, T - w): the sum of the weights `A` (batch, heads, w, T) over w."""
    check_tensor("A", A, ("batch", "heads", "w", "T"))
    check_window(w, A.shape[2], A.shape[3])
    check_size("A", A.shape[2], w, "window queries, as w")
    return A[..., : A.shape[3] - w].sum(2, dtype=torch.float32)


def window_scores(
    q: Tensor,
    k: Tensor,
    w: int = 32,
    mask: Tensor | None = None,
    lse: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scores s (batch, heads, T - w) from one read of the keys if `lse` is given, else from two.

    Arguments as in `window_attention`; `lse` (batch, heads, w), float32 (float64 for float64), the
    log denominators of the window's rows over all keys. The weights are not written anywhere.
    """
    check_attention_inputs(q, k, k)
    check_window(w, q.shape[2], k.shape[2])
    check_padding(mask, k)
    q = q[:, :, q.shape[2] - w :]
    return column_sums(q, k, lse, key_mask=mask, columns=k.shape[2] - w, backend=backend)


def pool_scores(s: Tensor, p: int = 5, mode: str = "avg", *, backend: str | None = None) -> Tensor:
    """`s` (batch, heads, P) smoothed along the prefix with an odd width `p`, same shape."""
    check_pool(p, "mode", mode)
    return smooth(s, p, mode, backend=backend)


def reduce_groups(
    m: Tensor, Hk: int, mode: str = "group_mean", *, backend: str | None = None
) -> Tensor:
    """`m` (batch, heads, P) to (batch, Hk, P), or unchanged for ``per_query_head``."""
    check_tensor("m", m, ("batch", "heads", "P"))
    check_integer("Hk", Hk, least=1)
    check_choice("mode", mode, REDUCTIONS)
    if m.shape[1] % Hk:
        raise ValueError(f"Hk: got {Hk}, expected a divisor of the {m.shape[1]} query heads")
    return m if mode == "per_query_head" else pool_and_reduce(m, 1, "avg", Hk, mode, backend)


def select(m: Tensor, n: int, mask: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """idx int64 (batch, heads, n), ascending: the best positions of `m` (batch, heads, P).

    `mask` bool, broadcastable to `m`: a position where it is False comes after all others.
    """
    check_tensor("m", m, ("batch", "heads", "P"))
    check_integer("n", n, least=1)
    if mask is not None:
        check_mask("mask", mask, "m", m, m.shape)
        m = m.masked_fill(~mask, float("-inf"))
    return top_k(m, n, backend=backend)


def pool_and_reduce(
    s: Tensor, p: int, pool: str, kv_heads: int, gqa: str, backend: str | None
) -> Tensor:
    """Smoothing and the reduction over groups in one pass."""
    if gqa == "per_query_head":
        return smooth(s, p, pool, backend=backend)
    return smooth(s, p, pool, heads=kv_heads, reduce=gqa.removeprefix("group_"), backend=backend)


def check_window(w: Any, q_tokens: int, T: int) -> None:
    check_integer("w", w, least=1)
    if w > q_tokens or w >= T:
        raise ValueError(
            f"w: got {w}, expected at most {q_tokens} query tokens and less than {T} keys"
        )


def check_pool(p: Any, name: str, kind: Any) -> None:
    check_integer("p", p, least=1)
    if p % 2 == 0:
        raise ValueError(f"p: got {p}, expected an odd integer")
    check_choice(name, kind, POOLS)


def check_padding(mask: Any, k: Tensor) -> None:
    """`mask` (batch, T) has its padding on the left; what it holds is checked on the CPU only."""
    if mask is None:
        return
    check_tensor("mask", mask, ("batch", "T"), (torch.bool,))
    expected = (k.shape[0], k.shape[2])
    if tuple(mask.shape) != expected:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {expected}")
    if checkable(mask) and bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError("mask: got padding behind a real key, expected left padding only")
