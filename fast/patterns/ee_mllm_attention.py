"""Composite attention on the flash engine: a row's keys are those before an end of its own.

In the order of positions a text token sees a prefix of the tokens, images and text alike, and image
tokens have no rows: one pass of the engine with row ends, no mask. Tokens that are stored in that
order are read where they lie; others are moved first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_device,
    check_scale,
    check_size,
    check_tensor,
    choose_by_dtype,
)
from attnspec.fast.engines.flash import flash
from attnspec.fast.engines.flash.checks import check_inputs, check_masks
from attnspec.fast.engines.select import last_unflagged, places, take_tokens
from attnspec.fast.growing import checkable

VISIBILITIES = ("causal", "all")
TOKENS = 2


def composite_mask(
    is_visual: Tensor,
    positions: Tensor,
    image_visible: str = "causal",
    *,
    backend: str | None = None,
) -> Tensor:
    """bool (S, S), which tokens each token sees, both in the order they are stored in.

    `is_visual` bool (S,), `positions` int (S,), all different, which is checked on CPU tensors
    only.
    """
    check_tokens(is_visual, "positions", positions, image_visible)
    seen = positions[None, :] <= positions[:, None]
    if image_visible == "all":
        seen = seen | is_visual[None, :]
    alone = torch.eye(len(positions), dtype=torch.bool, device=positions.device)
    return torch.where(is_visual[:, None], alone, seen)


def composite_attention(
    qt: Tensor,
    k: Tensor,
    v: Tensor,
    is_visual: Tensor,
    pos: Tensor | None = None,
    image_visible: str = "causal",
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, q_tokens, dv) and lse (batch, heads, q_tokens) of text tokens, float32.

    k (batch, kv_heads, S, d) and v (batch, kv_heads, S, dv) are of all tokens; the rows of qt
    (batch, heads, q_tokens, d) are those of the last q_tokens text tokens, in the order they are
    stored in. `is_visual` bool (S,); `pos` int (S,), 0 to S - 1 unless given; `key_mask` bool
    (batch, S), True = a real key. Without `pos` and with "causal" nothing is copied. That positions
    differ and that there are enough text tokens is checked on CPU tensors only: a check on a CUDA
    device would wait for it. Differentiable in qt, k and v.
    """
    check_tensor("qt", qt, ("batch", "heads", "q_tokens", "d"), FLOATS)
    check_inputs(qt, k, v, choose_by_dtype(backend, "qt", qt))
    check_scale(scale)
    check_tokens(is_visual, "pos", pos, image_visible)
    S, n = k.shape[TOKENS], qt.shape[TOKENS]
    check_size("is_visual", is_visual.shape[0], S, "tokens, as in k")
    check_device("is_visual", is_visual, "qt", qt)
    if n > S or (checkable(is_visual) and n > S - int(is_visual.sum())):
        raise ValueError(f"qt: got {n} rows, expected at most as many as there are text tokens")
    if pos is None and image_visible == "causal":
        ends = last_unflagged(is_visual, n, backend=backend) + 1
        return flash(qt, k, v, row_end=ends, key_mask=key_mask, scale=scale, backend=backend)
    check_masks(qt, k, key_mask, None)
    ahead = image_visible == "all"
    at = places(is_visual, pos, rows=n, ahead=ahead, backend=backend)
    qt, _ = take_tokens(qt, None, at.row_order, at.row_place, backend=backend)
    k, v = take_tokens(k, v, at.order, at.place, backend=backend)
    key_mask = None if key_mask is None else key_mask.index_select(1, at.order)
    out, lse = flash(qt, k, v, row_end=at.ends, key_mask=key_mask, scale=scale, backend=backend)
    out, lse = take_tokens(out, lse[..., None], at.row_place, at.row_order, backend=backend)
    return out, lse[..., 0]


def check_tokens(is_visual: Any, name: str, positions: Any, image_visible: Any) -> None:
    """Which tokens are visual, and where each is; `pos` may be left out."""
    check_tensor("is_visual", is_visual, ("S",), (torch.bool,))
    check_choice("image_visible", image_visible, VISIBILITIES)
    if positions is None and name == "pos":
        return
    check_tensor(name, positions, ("S",), INTEGERS)
    check_size(name, positions.shape[0], is_visual.shape[0], "tokens, as in is_visual")
    check_device(name, positions, "is_visual", is_visual)
    if checkable(positions) and len(torch.unique(positions)) < len(positions):
        raise ValueError(f"{name}: got {positions.tolist()}, expected all different")
