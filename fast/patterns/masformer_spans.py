"""MASFormer's spans: schedules, masks, reach and cost; and a span as the flash engine's ranges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    INTEGERS,
    check_bool,
    check_choice,
    check_integer,
    check_size,
    check_tensor,
)
from attnspec.fast.kept import kept
from attnspec.fast.padding import tokens_of

Span = Sequence[Any]
PLACEMENTS = ("bottom", "top", "every")
SPARSE = ("block", "window")
SIZES = {"full": (), "block": (("b", 1), ("n", 0)), "window": (("w", 0),)}
"""By kind of span: the names of its sizes, and the least that each may be."""


def layer_spans(
    L: int, l: int, placement: str | Sequence[int] = "bottom", *, backend: str | None = None
) -> Tensor:
    """bool (L), True for the `l` layers, counted from the bottom, with full attention.

    `placement` is "bottom", "top", "every" or the numbers of the layers, `l` different ones.
    """
    check_integer("L", L, least=1)
    check_integer("l", l, least=0)
    if l > L:
        raise ValueError(f"l: got {l}, expected at most L = {L} full layers")
    if isinstance(placement, (list, tuple)):
        for layer in placement:
            check_integer("placement", layer, least=0)
        if len(placement) != l or len(set(placement)) != l or max(placement, default=0) >= L:
            raise ValueError(
                f"placement: got {list(placement)}, expected {l} different layers from 0 to {L - 1}"
            )
        layers = list(placement)
    else:
        check_choice("placement", placement, PLACEMENTS)
        layers = [L - l + i if placement == "top" else i for i in range(l)]
        if placement == "every":
            layers = [i * L // l for i in range(l)]
    full = torch.zeros(L, dtype=torch.bool)
    full[layers] = True
    return full


def sees(t: Tensor, u: Tensor, span: Span, causal: bool) -> Tensor:
    """bool, whether the token at position `t` sees that at position `u`; they broadcast."""
    if span[0] == "full":
        near = (t == t) & (u == u)
    elif span[0] == "block":
        near = (t // span[1] - u // span[1]).abs() <= span[2]
    else:
        near = (t - u).abs() <= span[1]
    return near & (u <= t) if causal else near


def span_mask(T: int, span: Span, causal: bool = True, *, backend: str | None = None) -> Tensor:
    """bool (T, T), which tokens a layer of this span lets each token see."""
    check_integer("T", T, least=0)
    check_span(span)
    check_bool("causal", causal)
    t = torch.arange(T)
    return sees(t[:, None], t, span, causal)


def block_mask(
    T: int,
    b: int,
    n: int = 0,
    causal: bool = True,
    lengths: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """bool (T, T), or with `lengths` int (B) bool (B, T, T), who sees whom in a block layer of
    blocks of `b` tokens, of which `n` earlier ones are visible, and later ones if not `causal`.
    """
    check_sizes(("block", b, n))
    mask = span_mask(T, ("block", b, n), causal)
    if lengths is None:
        return mask
    check_tensor("lengths", lengths, ("B",), INTEGERS)
    real = tokens_of(lengths, T)
    return mask.to(lengths.device) & real[:, :, None] & real[:, None]


def window_mask(T: int, w: int, causal: bool = True, *, backend: str | None = None) -> Tensor:
    """bool (T, T), who sees whom in a window layer: `w` tokens on each side."""
    check_sizes(("window", w))
    return span_mask(T, ("window", w), causal)


def cache_rows_needed(t: int, span: Span, *, backend: str | None = None) -> int:
    """How many rows the query at position `t` reads, its own included."""
    check_integer("t", t, least=0)
    check_span(span)
    return rows_read(t, span)


def rows_read(t: int, span: Span) -> int:
    """`cache_rows_needed` of a position and a span that are checked."""
    if span[0] == "full":
        return t + 1
    if span[0] == "block":
        return min(t + 1, t % span[1] + 1 + span[1] * span[2])
    return min(t + 1, span[1] + 1)


def relative_cost(
    T: int,
    L: int,
    l: int,
    kind: str,
    b: int | None = None,
    w: int | None = None,
    *,
    backend: str | None = None,
) -> float:
    """Pairs that L causal layers score, `l` of them full, per pair that full ones would.

    `kind` is "block", with blocks of `b` tokens and none of them visible to another, or "window",
    with `w` tokens to the left.
    """
    check_integer("T", T, least=1)
    full_layers = int(layer_spans(L, l).sum())
    check_choice("kind", kind, SPARSE)
    other, unused = ("w", w) if kind == "block" else ("b", b)
    if unused is not None:
        raise ValueError(f"{other}: got {unused} for kind {kind!r}, expected None")
    if kind == "block":
        check_integer("b", b, least=1)
        assert b is not None
        r = T % b
        twice = (T - r) * (b + 1) + r * (r + 1)
    else:
        check_integer("w", w, least=0)
        assert w is not None
        w = min(w, T - 1)
        twice = 2 * (w + 1) * T - w * (w + 1)
    whole = T * (T + 1)
    return (full_layers * whole + (L - full_layers) * twice) / (L * whole)


def reachability(
    T: int, schedule: Tensor | Sequence[Tensor], *, backend: str | None = None
) -> Tensor:
    """bool (T, T), whether the top of a stack at token t can depend on the input at token u.

    `schedule` holds the masks of the layers, bottom first: bool (layers, T, T), or a sequence.
    Products of float32: sums of ones are never 0 by rounding.
    """
    check_integer("T", T, least=0)
    layers = list(schedule)
    for mask in layers:
        check_tensor("schedule", mask, ("T", "T"), (torch.bool,))
        for size in mask.shape:
            check_size("schedule", size, T, "tokens of a layer's mask")
    device = layers[0].device if layers else None
    reached = torch.eye(T, dtype=torch.bool, device=device)
    for mask in layers:
        reached = mask.float() @ reached.float() > 0
    return reached


def ranges(T: int, span: Span, causal: bool, device: torch.device) -> dict[str, Any]:
    """The options of the flash engine by which T tokens have the span."""
    whole = span[0] == "full"
    if span[0] == "block":
        whole = span[2] >= -(-T // span[1]) - 1
    elif span[0] == "window":
        whole = span[1] >= T - 1
    if whole:
        return {"causal": causal}
    if span[0] == "window" and causal:
        return {"causal": True, "window": span[1] + 1}
    start, end = kept(_bounds, device, T, *span)
    return {"causal": causal, "row_start": start} | ({} if causal else {"row_end": end})


def _bounds(device: torch.device, T: int, *span: Any) -> tuple[Tensor, Tensor]:
    """int32 (T) each, where the keys of a token of a text begin and end."""
    t = torch.arange(T, device=device, dtype=torch.int32)
    if span[0] == "window":
        start, end = t - span[1], t + (span[1] + 1)
    else:
        _, b, n = span
        start = block_starts(t, b, n)
        end = start + (2 * n + 1) * b
    return start.clamp(min=0), end


def block_starts(t: Tensor, b: int, n: int) -> Tensor:
    """Where the n-th block before that of position `t` begins, or would."""
    return (torch.div(t, b, rounding_mode="floor") - n) * b


def check_span(span: Any) -> None:
    """`span` names a kind and has its sizes."""
    if not isinstance(span, (tuple, list)) or not span:
        raise TypeError(f"span: got {span!r}, expected ('full',), ('block', b, n) or ('window', w)")
    check_choice("span", span[0], tuple(SIZES))
    names = SIZES[span[0]]
    if len(span) != 1 + len(names):
        wanted = ", ".join([repr(span[0]), *(name for name, _ in names)])
        comma = "" if names else ","
        raise ValueError(f"span: got {tuple(span)}, expected ({wanted}{comma})")
    for size, (name, least) in zip(span[1:], names, strict=True):
        check_integer(f"span's {name}", size, least)


def check_sizes(span: Span) -> None:
    """The sizes of a span whose kind is known, each under its own name."""
    for size, (name, least) in zip(span[1:], SIZES[span[0]], strict=True):
        check_integer(name, size, least)
