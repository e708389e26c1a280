"""Wrong bookkeeping of MASFormer: layers from the top, short blocks forgotten, stacks reversed."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right, spoiling
from attnspec.conformance.mutants.patterns.masformer import of, one_less

SPANS = right("masformer.layer_spans")
COST = right("masformer.relative_cost")


def rounded(L: Any, l: Any, placement: Any = "bottom") -> Any:
    """Layers i L / l are rounded to the nearest."""
    full = SPANS(L, l, placement)
    if placement == "every":
        full = np.zeros_like(full)
        full[[min(round(i * L / l), L - 1) for i in range(l)]] = True
    return full


def first_length(arguments: dict[str, Any]) -> None:
    lengths = arguments["lengths"]
    if isinstance(lengths, np.ndarray) and lengths.dtype.kind == "i" and lengths.size > 1:
        arguments["lengths"] = np.full_like(lengths, lengths[0])


def whole_blocks(T: Any, L: Any, l: Any, kind: Any, b: Any = None, w: Any = None) -> float:
    """Every block has b tokens."""
    cost: float = COST(T, L, l, kind, b, w)
    return (l + (L - l) * (b + 1) / (T + 1)) / L if kind == "block" else cost


def no_start(T: Any, L: Any, l: Any, kind: Any, b: Any = None, w: Any = None) -> float:
    """Every row of a window has w + 1 keys."""
    cost: float = COST(T, L, l, kind, b, w)
    return (l + (L - l) * 2 * (w + 1) / (T + 1)) / L if kind == "window" else cost


def from_the_top(arguments: dict[str, Any]) -> None:
    if isinstance(arguments["schedule"], np.ndarray):
        arguments["schedule"] = arguments["schedule"][::-1]


def border_row(rows: int, t: int, span: Any) -> int:
    """A new block begins with the row of the last token before it."""
    return rows + 1 if span[0] == "block" and rows <= t and t % span[1] == 0 else rows


MUTANTS: tuple[Mutant, ...] = (
    of("layer_spans", "from-the-top", "agreement", "layers are counted from the top",
       spoiling(SPANS, lambda full: full[::-1])),
    of("layer_spans", "rounded", "agreement", "full layers are spread by rounding", rounded),
    of("span_mask", "transposed", "agreement", "tokens see those after them",
       spoiling(right("masformer.span_mask"), lambda mask: mask.T)),
    of("block_mask", "first-length", "agreement", "the first length is that of all",
       altering(right("masformer.block_mask"), first_length)),
    of("window_mask", "mask-one-less", "agreement", "a window has w keys, not w + 1",
       altering(right("masformer.window_mask"), one_less)),
    of("cache_rows_needed", "border-row", "agreement", "a block begins with one row too many",
       lambda t, span: border_row(right("masformer.cache_rows_needed")(t, span), t, span)),
    of("reachability", "reversed", "agreement", "the product is taken from the top",
       altering(right("masformer.reachability"), from_the_top)),
    of("relative_cost", "whole-blocks", "agreement", "the short last block costs as a whole one",
       whole_blocks),
    of("relative_cost", "no-start", "agreement", "rows at the start have full windows", no_start),
)  # fmt: skip
