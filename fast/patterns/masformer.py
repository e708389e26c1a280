"""MASFormer on the flash engine: each kind of layer is one pass over a range of keys a row.

Where a row's keys begin is arithmetic, so that nothing is gathered, reshaped or masked, blocks need
not divide the text, and a block layer costs what its blocks do. Full layers are dense attention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_bool,
    check_positive,
    check_size,
)
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash
from attnspec.fast.padding import real_tokens, without_padding
from attnspec.fast.patterns.masformer_decoding import Cache, cache_after, decode_step
from attnspec.fast.patterns.masformer_spans import (
    Span,
    block_mask,
    cache_rows_needed,
    check_sizes,
    check_span,
    layer_spans,
    ranges,
    reachability,
    relative_cost,
    span_mask,
    window_mask,
)

__all__ = [
    "Cache",
    "block_attend",
    "block_mask",
    "cache_after",
    "cache_rows_needed",
    "decode_step",
    "layer_attend",
    "layer_spans",
    "reachability",
    "relative_cost",
    "span_mask",
    "window_attend",
    "window_mask",
]
CLAIMS: dict[str, dict[str, Any]] = {
    **{
        name: {
            "gradient": True,
            "blocks": (16, 64),
            "compiled": True,
            "triton": {"configs": SPECIALISED_CONFIGS},
        }
        for name in ("block_attend", "layer_attend", "window_attend")
    },
    **{
        name: {"launches": None}
        for name in (
            "block_mask",
            "cache_rows_needed",
            "layer_spans",
            "reachability",
            "relative_cost",
            "span_mask",
            "window_mask",
        )
    },
}
"""Schedules, masks, reach and cost are a few torch operations and launch no kernel of ours."""


def block_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: int,
    n: int = 0,
    causal: bool = True,
    scale: float | None = None,
    *,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, H, T, dv) and lse (batch, H, T), float32, of a block layer.

    q (batch, H, T, d), k (batch, Hk, T, d), v (batch, Hk, T, dv); blocks of `b` tokens, `n` earlier
    ones visible, and `n` later ones if not `causal`; `lengths` int (batch,), the real tokens of
    each sequence; that they are 0 to T is checked on CPU tensors only. Differentiable in q, k and
    v.
    """
    check_sizes(("block", b, n))
    return _attend(q, k, v, ("block", b, n), causal, scale, lengths, backend)


def window_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: int,
    causal: bool = True,
    scale: float | None = None,
    *,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and lse of a window layer, `w` tokens on each side; all else is as in blocks."""
    check_sizes(("window", w))
    return _attend(q, k, v, ("window", w), causal, scale, lengths, backend)


def layer_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Span,
    causal: bool = True,
    scale: float | None = None,
    *,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and lse of a layer with any span; all else is as in blocks.

    `span` is ``("full",)``, ``("block", b, n)`` or ``("window", w)``.
    """
    check_span(span)
    return _attend(q, k, v, span, causal, scale, lengths, backend)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Span,
    causal: bool,
    scale: float | None,
    lengths: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    check_attention_inputs(q, k, v, FLOATS)
    T = q.shape[2]
    check_size("k", k.shape[2], T, "tokens, as in q: a cache is for decode_step")
    check_bool("causal", causal)
    if scale is not None:
        check_positive("scale", scale)
    options = {"scale": scale, "backend": backend, **ranges(T, span, causal, q.device)}
    if lengths is None:
        return flash(q, k, v, **options)
    real = real_tokens(q, lengths)
    # What padded rows hold must reach no gradient, not even times 0.
    q = q.where(real[:, None, :, None], 0.0)
    return without_padding(*flash(q, k, v, key_mask=real, **options), real)
