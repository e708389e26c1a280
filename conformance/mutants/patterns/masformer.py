"""Wrong kernels of MASFormer: borders that move, windows off by one, spans of other layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right
from attnspec.reference.dense.attention import attend, attend_backward, combine, score
from attnspec.reference.patterns.masformer import (
    block_attend_backward,
    layer_attend_backward,
)
from attnspec.reference.patterns.masformer_spans import sees, span_mask
from attnspec.reference.patterns.masformer_tiles import (
    attend_tiles,
    differentiate_tiles,
    real_pairs,
    tiles,
)
from attnspec.reference.primitives.softmax import softmax_lse

BLOCK = right("masformer.block_attend")
WINDOW = right("masformer.window_attend")
LAYER = right("masformer.layer_attend")
STEP = right("masformer.decode_step")
HIDDEN = -20.0


def in_tiles(function: Any, **steps: Any) -> Any:
    """An operation whose tiles have wrong steps."""
    return replacing(function, attend_tiles=replacing(attend_tiles, **steps))


def zeros_as_keys(q: Any, k: Any, v: Any, b: Any, n: Any = 0, causal: Any = True, scale: Any = None,
                  *, lengths: Any = None) -> Any:  # fmt: skip
    """The last block is filled up with zeros, which are keys like all others."""
    result = BLOCK(q, k, v, b, n, causal, scale, lengths=lengths)
    T = q.shape[-2]
    if causal or lengths is not None or T % b == 0:
        return result
    room = [(0, 0)] * (q.ndim - 2) + [(0, b - T % b), (0, 0)]
    out, lse = BLOCK(*(np.pad(x, room) for x in (q, k, v)), b, n, causal, scale)
    return out[..., :T, :], lse[..., :T]


def earlier_blocks_only(t: Any, u: Any, span: Any, causal: Any) -> Any:
    """Neighbours are those before, in attention without causal order too."""
    seen = sees(t, u, span, causal)
    return seen & (t // span[1] >= u // span[1]) if span[0] == "block" else seen


def one_less(arguments: dict[str, Any]) -> None:
    if isinstance(arguments["w"], int) and arguments["w"] > 0:
        arguments["w"] -= 1


def unscaled(arguments: dict[str, Any]) -> None:
    if arguments["scale"] is None:
        arguments["scale"] = 1.0


def scaled_twice(arguments: dict[str, Any]) -> None:
    if isinstance(arguments["scale"], float) and arguments["scale"] > 0:
        arguments["scale"] /= max(1, arguments["q"].shape[-1]) ** 0.5


def needs_tokens(q: Any, *rest: Any, **options: Any) -> Any:
    if isinstance(q, np.ndarray) and q.ndim > 2 and q.shape[-2] == 0:
        raise ZeroDivisionError("no blocks")
    return BLOCK(q, *rest, **options)


def pads_left(lengths: Any, rows: slice, keys: slice) -> Any:
    """The real tokens are the last ones."""
    if lengths is None:
        return real_pairs(lengths, rows, keys)
    starts = np.max(lengths, initial=0) - lengths[..., None, None, None]
    t, u = np.arange(rows.start, rows.stop)[:, None], np.arange(keys.start, keys.stop)
    ends = np.max(lengths, initial=0)
    return (t >= starts) & (u >= starts) & (t < ends) & (u < ends)


def padded_rows_attend(lengths: Any, rows: slice, keys: slice) -> Any:
    """Padding hides keys only; its own rows have outputs."""
    if lengths is None:
        return real_pairs(lengths, rows, keys)
    return np.arange(keys.start, keys.stop) < lengths[..., None, None, None]


def longest(arguments: dict[str, Any]) -> None:
    """The longest sequence of the batch gives the length of all."""
    lengths = arguments["lengths"]
    if isinstance(lengths, np.ndarray) and lengths.dtype.kind == "i" and lengths.size:
        arguments["lengths"] = np.full_like(lengths, lengths.max())


def leaks(q: Any, k: Any, v: Any, *, mask: Any, scale: Any = None) -> Any:
    """Hidden values are multiplied by 0 instead of skipped."""
    out, lse = attend(q, k, v, mask=mask, scale=scale)
    return out + 0 * np.sum(v, axis=(-1, -2, -3))[..., None, None, None], lse


def barely_hidden(q: Any, k: Any, v: Any, *, mask: Any, scale: Any = None) -> Any:
    """What is hidden has a low score, but a score."""
    scores = np.where(mask, score(q, k, scale=scale), HIDDEN).astype(q.dtype)
    weights, lse = softmax_lse(scores)
    return combine(weights, v), lse


def every_other_head(arguments: dict[str, Any]) -> None:
    """Query head h reads kv head h modulo their number."""
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    fits = all(isinstance(x, np.ndarray) and x.ndim > 2 for x in (q, k, v))
    if fits and k.shape[-3] == v.shape[-3] and k.shape[-3] and q.shape[-3] % k.shape[-3] == 0:
        group = q.shape[-3] // k.shape[-3]
        for name in ("k", "v"):
            arguments[name] = np.concatenate([arguments[name]] * group, axis=-3)


def first_mask_for_all() -> Any:
    """The mask is made once for each length, whatever the layer's span."""
    masks: dict[Any, np.ndarray] = {}

    def mutant(q: Any, k: Any, v: Any, span: Any, causal: Any = True, scale: Any = None, *,
               lengths: Any = None) -> Any:  # fmt: skip
        result = LAYER(q, k, v, span, causal, scale, lengths=lengths)
        if lengths is not None:
            return result
        T = q.shape[-2]
        mask = masks.setdefault((T, causal), span_mask(T, span, causal))
        return attend(q, k, v, mask=mask, scale=scale)

    return mutant


def overwrites(q: Any, k: Any, v: Any, dout: Any, dlse: Any, span: Any, causal: Any, scale: Any,
               lengths: Any) -> Any:  # fmt: skip
    """A key has its gradient from the last tile that reads it, not from all of them."""
    dq, dk, dv = differentiate_tiles(q, k, v, dout, dlse, span, causal, scale, lengths)
    if lengths is not None:
        return dq, dk, dv
    for rows, keys, seen in tiles(q.shape[-2], span, causal):
        _, dk[..., keys, :], dv[..., keys, :] = attend_backward(
            q[..., rows, :], k[..., keys, :], v[..., keys, :], dout[..., rows, :],
            None if dlse is None else dlse[..., rows], mask=seen, scale=scale,
        )  # fmt: skip
    return dq, dk, dv


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def one_row_less(t: Any, u: Any, span: Any, causal: Any) -> Any:
    """A window of a step ends before the w-th token to the left."""
    seen = sees(t, u, span, causal)
    return seen & (t - u < max(span[1], 1)) if span[0] == "window" else seen


def borders_of_the_chunk(t: Any, u: Any, span: Any, causal: Any) -> Any:
    """Blocks count from the first of the new tokens."""
    return sees(t - t[:1], u - t[:1], span, causal)


def keeps_everything(q: Any, k: Any, v: Any, cache: Any, span: Any, *, scale: Any = None) -> Any:
    """The cache never frees a row."""
    out, after = STEP(q, k, v, cache, span, scale=scale)
    rows = {"k": np.concatenate([cache.k, k], -2), "v": np.concatenate([cache.v, v], -2)}
    return out, after._replace(**rows)


def counts_rows(q: Any, k: Any, v: Any, cache: Any, span: Any, *, scale: Any = None) -> Any:
    """The tokens seen are taken for the rows of the cache."""
    out, after = STEP(q, k, v, cache, span, scale=scale)
    return out, after._replace(seen=after.k.shape[-2])


def of(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"masformer.{name}", f"masformer.{operation}", law, bug, call, **rest)


MUTANTS = (
    of("block_attend", "zero-keys", "ragged", "the last block is filled up with zero keys",
       zeros_as_keys),
    of("block_attend", "one-sided", "agreement", "later blocks are never visible",
       in_tiles(BLOCK, sees=earlier_blocks_only)),
    of("block_attend", "no-tokens", "tiny", "a text without tokens has no blocks", needs_tokens),
    of("block_attend", "unscaled", "agreement", "scores of GPT-Neo for all models",
       altering(BLOCK, unscaled)),
    of("block_attend", "scaled-twice", "agreement", "a given scale comes on top of 1/sqrt(d)",
       altering(BLOCK, scaled_twice)),
    of("block_attend", "pads-left", "agreement", "padding is on the left",
       in_tiles(BLOCK, real_pairs=pads_left)),
    of("block_attend", "longest", "batch", "the longest sequence gives all lengths",
       altering(BLOCK, longest)),
    of("block_attend", "leak", "poison", "hidden values are multiplied by 0",
       in_tiles(BLOCK, attend=leaks)),
    of("block_attend", "low-score", "hidden", "hidden pairs have a low score",
       in_tiles(BLOCK, attend=barely_hidden)),
    of("block_attend", "modulo", "heads", "query head h reads kv head h modulo their number",
       altering(BLOCK, every_other_head)),
    of("block_attend", "overwrites", "gradient", "keys that blocks share have one gradient", BLOCK,
       backward=replacing(block_attend_backward, differentiate_tiles=overwrites)),
    of("window_attend", "one-less", "agreement", "a window has w keys, not w + 1",
       altering(WINDOW, one_less)),
    of("window_attend", "padded-rows", "cells", "padded rows have outputs",
       in_tiles(WINDOW, real_pairs=padded_rows_attend)),
    of("layer_attend", "stale-mask", "layers", "the mask of the first layer serves all",
       first_mask_for_all()),
    of("layer_attend", "ahead", "prefix", "the tiles on the diagonal have no causal order",
       altering(LAYER, lambda arguments: arguments.update(causal=False))),
    of("layer_attend", "no-dlse", "gradient", "the gradient through lse is dropped", LAYER,
       backward=altering(layer_attend_backward, no_lse_gradient)),
    of("decode_step", "chunk-border", "stream", "blocks count from the chunk's first token",
       replacing(STEP, sees=borders_of_the_chunk)),
    of("decode_step", "step-window", "stream", "a step reads one row too few",
       replacing(STEP, sees=one_row_less)),
    of("decode_step", "keeps-all", "agreement", "no row is ever freed", keeps_everything),
    of("decode_step", "counts-rows", "agreement", "rows of the cache are taken for positions",
       counts_rows),
)  # fmt: skip
