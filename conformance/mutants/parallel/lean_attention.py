"""Wrong kernels of lean attention: tiles misread, triples merged badly, workers forgotten."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.conformance.mutants.dense.attention import (
    eleven_bits,
    read_as_contiguous,
    wrap_32_bits,
)
from attnspec.reference.parallel import lean_attention as lean
from attnspec.reference.parallel import lean_attention_schedule as schedule
from attnspec.reference.parallel.lean_attention import Triple

ATTEND = right("lean_attention.attend")
PARTIAL = right("lean_attention.partial")
MERGE = right("lean_attention.merge")
LOG2_E = np.float32(1 / np.log(2))
visible, helpers = lean._visible, schedule.helpers


def with_partial(change: Any) -> Any:
    return replacing(ATTEND, partial=spoiling(PARTIAL, change))


def nan_when_empty(triple: Triple) -> Triple:
    """e^(-inf - (-inf)) for a tile of which a row sees nothing."""
    empty = np.isneginf(triple.m)
    nan = np.where(empty, np.float32(np.nan), np.float32(0))
    return Triple(triple.m, triple.l + nan, triple.o + nan[..., None])


def whole_tiles(q: np.ndarray, k: np.ndarray, v: np.ndarray, lo: int, hi: int, scale: Any = None,
                mask: Any = None) -> Triple:  # fmt: skip
    """The last tile of a sequence is read to its end."""
    end = min(hi + (lo - hi) % 4, k.shape[-2])
    if mask is not None:
        mask = mask.copy()
        mask[..., hi:end] = True
    return PARTIAL(q, k, v, lo, end, scale, mask)


def divided(a: Triple, b: Triple) -> Triple:
    """The helper's output is divided by its sum already."""
    return MERGE(a, b._replace(o=b.o / np.where(b.l == 0, 1, b.l)[..., None]))


def in_base_2(a: Triple, b: Triple) -> Triple:
    """The helper wrote its maximum in base 2."""
    return MERGE(a, b._replace(m=b.m * LOG2_E))


def last_helper_missing(n: np.ndarray, start: np.ndarray, end: np.ndarray, u: int) -> range:
    """The owner of the last tile is found among shares that are all of the larger size."""
    found = helpers(n, start, end, u)
    return range(found.start, min(found.stop, int(n[: u + 1].sum() - 1) // max(end[0], 1) + 1))


def whole_tiles_only(lengths: np.ndarray, N: int, *rest: Any) -> np.ndarray:
    """Tiles are counted by a division that rounds down."""
    return schedule.tiles_per_output(lengths // N * N, N, *rest)


def natural_order(Hkv: int, batch: int, blocks: int, order: str) -> Any:
    return schedule.line_order(Hkv, batch, blocks, "natural")


def aligned_at_room(Tq: int, Tk: int, length: int, causal: bool) -> np.ndarray:
    """The last query stands at the end of the room for keys, not of the sequence."""
    return visible(Tq, Tk, Tk, causal) & visible(Tq, Tk, length, False)


def all_room(arguments: dict[str, Any]) -> None:
    lengths, k = arguments["lengths"], arguments["k"]
    if isinstance(lengths, np.ndarray) and lengths.dtype.kind in "iu":
        inside = (lengths > 0) & (lengths <= k.shape[-2])
        arguments["lengths"] = np.where(inside, k.shape[-2], lengths)


def length_of_first_entry(arguments: dict[str, Any]) -> None:
    lengths = arguments["lengths"]
    if isinstance(lengths, np.ndarray) and lengths.dtype.kind in "iu" and len(lengths):
        arguments["lengths"] = np.full_like(lengths, lengths[0])


def lengths_that_fit(arguments: dict[str, Any]) -> None:
    lengths, k = arguments["lengths"], arguments["k"]
    if isinstance(lengths, np.ndarray) and isinstance(k, np.ndarray) and k.ndim == 4:
        arguments["lengths"] = np.minimum(lengths, k.shape[-2])


def last_key_forgotten(arguments: dict[str, Any]) -> None:
    lengths = arguments["lengths"]
    if not arguments["causal"] and isinstance(lengths, np.ndarray):
        arguments["lengths"] = np.where(lengths > 1, lengths - 1, lengths)


def packed_rows_are_positions(q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: np.ndarray,
                              N: int, G: int, scale: Any = None, causal: bool = False,
                              *rest: Any, **options: Any) -> Any:  # fmt: skip
    """The second head of a group stands behind the first, so it sees all keys."""
    out, lse = ATTEND(q, k, v, lengths, N, G, scale, causal, *rest, **options)
    if not causal:
        return out, lse
    all_out, all_lse = ATTEND(q, k, v, lengths, N, G, scale, False, *rest, **options)
    behind = np.arange(q.shape[-3]) % (q.shape[-3] // k.shape[-3]) > 0
    return np.where(behind[:, None, None], all_out, out), np.where(behind[:, None], all_lse, lse)


def interleaved_heads(q: np.ndarray, k: np.ndarray, v: np.ndarray, *rest: Any,
                      **options: Any) -> Any:  # fmt: skip
    out, lse = ATTEND(q, k, v, *rest, **options)
    order = np.arange(q.shape[-3]) % k.shape[-3]
    wrong = ATTEND(q, k[..., order, :, :], v[..., order, :, :], *rest, **options)
    return wrong if k.shape[-3] > 1 else (out, lse)


def unwritten_when_empty(q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: np.ndarray,
                         *rest: Any, **options: Any) -> Any:  # fmt: skip
    """An output without tiles has no host, so nobody writes it."""
    out, lse = ATTEND(q, k, v, lengths, *rest, **options)
    fresh = np.empty_like(out)
    return np.where((lengths == 0)[:, None, None, None], fresh, out), lse


class StaleScratch:
    """A flag that is still up from the last launch lets a host read the scratch of that launch."""

    def __init__(self) -> None:
        self.values: dict[Any, np.ndarray] = {}

    def __call__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: np.ndarray,
                 N: int, G: int, *rest: Any, **options: Any) -> Any:  # fmt: skip
        old = self.values.get((v.shape, v.dtype, N, G), v)
        self.values[v.shape, v.dtype, N, G] = v.copy()
        keys = np.arange(v.shape[-2])[:, None]
        return ATTEND(q, k, np.where(keys >= N, old, v), lengths, N, G, *rest, **options)


class Racing:
    """Merges come in the order in which workers finish."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        out, lse = ATTEND(*args, **options)
        self.calls += 1
        return out * out.dtype.type(1 + 2**-23 * (self.calls % 2)), lse


def future_maximum(q: np.ndarray, k: np.ndarray, v: np.ndarray, *rest: Any, **options: Any) -> Any:
    """Rescales by a maximum over all keys, later ones too: right up to rounding."""
    out, lse = ATTEND(q, k, v, *rest, **options)
    top = np.abs(k).max(initial=0) * np.float32(37)
    return out, ((lse - top) + top).astype(lse.dtype)


def only_maximum(result: Any) -> Any:
    """lse is the maximum and the log of the sum rounded down to whole numbers."""
    out, lse = result
    return out, np.floor(lse)


def clipped(arguments: dict[str, Any]) -> None:
    if isinstance(arguments["v"], np.ndarray) and arguments["v"].dtype.kind == "f":
        arguments["v"] = np.clip(arguments["v"], -2, 2)


def mutant(name: str, law: str, bug: str, call: Any) -> Mutant:
    return Mutant(f"lean_attention.{name}", "lean_attention.attend", law, bug, call)


MUTANTS = (
    mutant("nan-tile", "agreement", "a tile that a row does not see is NaN",
           with_partial(nan_when_empty)),
    mutant("whole-tiles", "poison", "keys behind the last are read to the end of the tile",
           replacing(ATTEND, partial=whole_tiles)),
    mutant("divided-helper", "schedule", "a helper's output is divided by its sum already",
           replacing(ATTEND, merge=divided)),
    mutant("base-2-helper", "schedule", "a helper's maximum is in base 2",
           replacing(ATTEND, merge=in_base_2)),
    mutant("last-helper", "schedule", "the last helper is missed where shares get smaller",
           replacing(ATTEND, helpers=last_helper_missing)),
    mutant("skip-tail", "agreement", "keys behind the last whole tile are skipped",
           replacing(ATTEND, tiles_per_output=whole_tiles_only)),
    mutant("two-orders", "schedule", "the line is paired for the tiles, natural for the outputs",
           replacing(ATTEND, line_order=natural_order)),
    mutant("room", "agreement", "causal order is aligned at the room for keys",
           replacing(ATTEND, _visible=aligned_at_room)),
    mutant("all-room", "agreement", "all keys there is room for are read",
           altering(ATTEND, all_room)),
    mutant("first-length", "batch", "every sequence has the first one's length",
           altering(ATTEND, length_of_first_entry)),
    mutant("clamped-length", "refusal", "a length beyond the keys is cut to fit",
           altering(ATTEND, lengths_that_fit)),
    mutant("last-key", "permutation", "the last key of a sequence is forgotten",
           altering(ATTEND, last_key_forgotten)),
    mutant("packed-rows", "heads", "packed heads are masked as if they were positions",
           packed_rows_are_positions),
    mutant("interleaved-heads", "heads", "query head h reads kv head h % kv_heads",
           interleaved_heads),
    mutant("unwritten", "agreement", "the output of an empty sequence is not written",
           unwritten_when_empty),
    mutant("stale-scratch", "stateless", "triples of the last launch are merged", StaleScratch()),
    mutant("racing", "repeatable", "the last bits depend on who finishes first", Racing()),
    mutant("future-maximum", "prefix", "the rounding of a row depends on later keys",
           future_maximum),
    mutant("whole-lse", "split", "lse is rounded down", spoiling(ATTEND, only_maximum)),
    mutant("clipped", "linearity", "values are clipped", altering(ATTEND, clipped)),
    mutant("contiguous", "layout", "strides are made up from the shape",
           altering(ATTEND, read_as_contiguous)),
    mutant("wrap-32", "far", "offsets are computed in 32 bits", altering(ATTEND, wrap_32_bits)),
    mutant("tf32", "precision", "float32 operands are rounded to TF32",
           altering(ATTEND, eleven_bits)),
)  # fmt: skip
