"""MASFormer's spans: which layers have which, who sees whom in them, how far and at what cost.

The clauses are those of `masformer`. A span is ``("full",)``, ``("block", b, n)`` or
``("window", w)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_bool,
    check_choice,
    check_integer,
    check_lengths,
    check_size,
)

Span = Sequence[Any]
PLACEMENTS = ("bottom", "top", "every")
SPARSE = ("block", "window")
SIZES = {"full": (), "block": (("b", 1), ("n", 0)), "window": (("w", 0),)}
"""By kind of span: the names of its sizes, and the least that each may be."""


def layer_spans(L: int, l: int, placement: str | Sequence[int] = "bottom") -> np.ndarray:
    """S1: bool (L), True for the `l` layers, counted from the bottom, with full attention.

    `placement` is "bottom", "top", "every" or the numbers of the layers, `l` different ones.

    >>> layer_spans(6, 2).astype(int), layer_spans(6, 2, "every").astype(int)
    (array([1, 1, 0, 0, 0, 0]), array([1, 0, 0, 1, 0, 0]))
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
    full = np.zeros(L, bool)
    full[layers] = True
    return full


def sees(t: np.ndarray, u: np.ndarray, span: Span, causal: bool) -> np.ndarray:
    """S2-S4: bool, whether the token at position `t` sees that at position `u`; they broadcast.

    >>> sees(np.array([2, 3, 4]), np.array([2, 2, 2]), ("block", 3, 0), True)
    array([ True, False, False])
    """
    if span[0] == "full":
        near = np.ones(np.broadcast_shapes(t.shape, u.shape), bool)
    elif span[0] == "block":
        near = np.abs(t // span[1] - u // span[1]) <= span[2]
    else:
        near = np.abs(t - u) <= span[1]
    return near & (u <= t) if causal else near


def span_mask(T: int, span: Span, causal: bool = True) -> np.ndarray:
    """S2-S4: bool (T, T), which tokens a layer of this span lets each token see.

    >>> span_mask(3, ("window", 1)).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]])
    """
    check_integer("T", T, least=0)
    check_span(span)
    check_bool("causal", causal)
    t = np.arange(T)
    return sees(t[:, None], t, span, causal)


def block_mask(
    T: int, b: int, n: int = 0, causal: bool = True, lengths: np.ndarray | None = None
) -> np.ndarray:
    """S3, S6: bool (T, T), or with `lengths` int (B) bool (B, T, T), who sees whom in a block layer
    of blocks of `b` tokens, of which `n` earlier ones are visible, and later ones if not `causal`.

    >>> block_mask(4, 2).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 0],
           [0, 0, 1, 1]])
    """
    check_sizes(("block", b, n))
    mask = span_mask(T, ("block", b, n), causal)
    if lengths is None:
        return mask
    check_array("lengths", lengths, ("B",), dtype="int")
    check_lengths(lengths, lengths.shape, T)
    real = np.arange(T) < lengths[..., None]
    return mask & real[..., :, None] & real[..., None, :]


def window_mask(T: int, w: int, causal: bool = True) -> np.ndarray:
    """S4: bool (T, T), who sees whom in a window layer: `w` tokens on each side.

    >>> window_mask(3, 1, causal=False).astype(int)
    array([[1, 1, 0],
           [1, 1, 1],
           [0, 1, 1]])
    """
    check_sizes(("window", w))
    return span_mask(T, ("window", w), causal)


def cache_rows_needed(t: int, span: Span) -> int:
    """S9: how many rows the query at position `t` reads, its own included.

    >>> [cache_rows_needed(t, ("block", 3, 0)) for t in range(7)]
    [1, 2, 3, 1, 2, 3, 1]
    """
    check_integer("t", t, least=0)
    check_span(span)
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
) -> float:
    """S12: pairs that L causal layers score, `l` of them full, per pair that full ones would.

    `kind` is "block", with blocks of `b` tokens and none of them visible to another, or "window",
    with `w` tokens to the left.

    >>> round(relative_cost(8192, 24, 4, "block", b=1024), 3)
    0.271
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


def reachability(T: int, schedule: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """S11: bool (T, T), whether the top of a stack at token t can depend on the input at token u.

    `schedule` holds the masks of the layers, bottom first: bool (layers, T, T), or a sequence.

    >>> stack = [span_mask(4, ("full",)), block_mask(4, 2)]
    >>> reachability(4, stack).astype(int)[2]
    array([1, 1, 1, 0])
    """
    check_integer("T", T, least=0)
    reached = np.eye(T, dtype=bool)
    for mask in schedule:
        check_array("schedule", mask, ("T", "T"), dtype="bool")
        check_size("schedule", mask.ndim, 2, "axes of a layer's mask")
        for size in mask.shape:
            check_size("schedule", size, T, "tokens of a layer's mask")
        reached = mask @ reached
    return reached


def check_span(span: Any) -> None:
    """K14: `span` names a kind and has its sizes.

    >>> check_span(("block", 4))
    Traceback (most recent call last):
    ValueError: span: got ('block', 4), expected ('block', b, n)
    """
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
    """K14: the sizes of a span whose kind is known, each under its own name.

    >>> check_sizes(("window", -1))
    Traceback (most recent call last):
    ValueError: w: got -1, expected an integer >= 0
    """
    for size, (name, least) in zip(span[1:], SIZES[span[0]], strict=True):
        check_integer(name, size, least)
