"""Wrong kernels of LongLoRA: wraps that leak, short segments, halves of the wrong heads."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right
from attnspec.reference.conventions import repeat_heads
from attnspec.reference.dense.attention import attend
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.patterns import longlora, longlora_gradient, longlora_groups

ATTEND = right("longlora.grouped_attend")
BACKWARD = longlora.grouped_attend_backward
MASK = right("longlora.s2_mask")
SHIFT = right("longlora.shift_heads")
SIZE = right("longlora.choose_group_size")
STARTS = right("longlora.group_starts")
SEGMENTS = longlora_groups.segments
TILE = 8


def wraps(q: Any, k: Any, v: Any, G: Any, variant: str = "segments", lengths: Any = None,
          causal: bool = True, scale: Any = None) -> Any:  # fmt: skip
    """Segments are rolled: the first rows of shifted heads come after the last tokens."""
    result = ATTEND(q, k, v, G, variant, lengths, causal, scale)
    if variant == "roll" or lengths is not None or not causal:
        return result
    T, H = q.shape[-2], q.shape[-3]
    t = np.arange(T)
    row = np.where(np.arange(H)[:, None] >= H // 2, (t - G // 2) % max(T, 1), t)
    same = row[:, :, None] // G == row[:, None, :] // G
    return attend(q, k, v, mask=same & (row[:, :, None] >= row[:, None, :]), scale=scale)


def token_order(q: Any, k: Any, v: Any, G: Any, variant: str = "segments", lengths: Any = None,
                causal: bool = True, scale: Any = None) -> Any:  # fmt: skip
    """In the group that wraps the causal order is that of the tokens, not of the rows."""
    result = ATTEND(q, k, v, G, variant, lengths, causal, scale)
    if variant != "roll" or not causal:
        return result
    T, H = q.shape[-2], q.shape[-3]
    mask = MASK(T, G, H, "roll", False) & np.tri(T, dtype=bool)
    return attend(q, k, v, mask=mask, scale=scale)


def open_group(q: Any, k: Any, v: Any, G: Any, variant: str = "segments", lengths: Any = None,
               causal: bool = True, scale: Any = None) -> Any:  # fmt: skip
    """The group that wraps has no causal order at all."""
    result = ATTEND(q, k, v, G, variant, lengths, causal, scale)
    if variant != "roll" or not causal:
        return result
    T, H = q.shape[-2], q.shape[-3]
    row = (np.arange(T) - G // 2) % max(T, 1)
    last = (row[:, None] >= T - G) & (row >= T - G) & (np.arange(H)[:, None, None] >= H // 2)
    return attend(q, k, v, mask=MASK(T, G, H, "roll") | last, scale=scale)


def values_stay() -> Any:
    """The third of the arrays that are rolled before attention is not."""
    calls = [0]

    def shift(x: Any, G: Any, sign: int) -> Any:
        if sign != -1:
            calls[0] = 0
            return SHIFT(x, G, sign)
        calls[0] += 1
        return x if calls[0] % 3 == 0 else SHIFT(x, G, sign)

    return shift


def output_stays(x: Any, G: Any, sign: int) -> Any:
    return SHIFT(x, G, sign) if sign == -1 else x


def halves_of_kv_heads(q: Any, k: Any, v: Any, G: Any, variant: str = "segments", *rest: Any,
                       **options: Any) -> Any:  # fmt: skip
    """Query heads are shifted if their kv head is in the upper half."""
    out, lse = ATTEND(q, k, v, G, variant, *rest, **options)
    H, kv_heads = q.shape[-3], k.shape[-3]
    shifted = np.arange(H) // (H // kv_heads) >= kv_heads // 2
    return _with_kinds(q, k, v, G, variant, shifted, (out, lse), *rest, **options)


def every_second_head(q: Any, k: Any, v: Any, G: Any, variant: str = "segments", *rest: Any,
                      **options: Any) -> Any:  # fmt: skip
    result = ATTEND(q, k, v, G, variant, *rest, **options)
    shifted = np.arange(q.shape[-3]) % 2 == 1
    return _with_kinds(q, k, v, G, variant, shifted, result, *rest, **options)


def _with_kinds(q: Any, k: Any, v: Any, G: Any, variant: str, shifted: np.ndarray, result: Any,
                *rest: Any, **options: Any) -> Any:  # fmt: skip
    """`result` with every head of the kind that `shifted` says."""
    H = q.shape[-3]
    k, v = repeat_heads(k, H), repeat_heads(v, H)
    out, lse = result[0].copy(), result[1].copy()
    for h, kind in enumerate(shifted):
        pair = [x[..., [h, h], :, :] for x in (q, k, v)]
        both = ATTEND(*pair, G, variant, *rest, **options)
        out[..., h, :, :], lse[..., h, :] = (
            both[0][..., int(kind), :, :],
            both[1][..., int(kind), :],
        )
    return out, lse


def whole_first_segment(T: int, G: int, H: int, variant: str) -> Any:
    """The first segment of a shifted head is read as if it had G tokens."""
    for heads, rows in SEGMENTS(T, G, H, variant):
        last = min(G, T) if rows.start == 0 else rows.stop
        yield heads, slice(rows.start, last)


def no_short_segment(T: int, G: int, H: int, variant: str) -> Any:
    """A segment that ends before a whole tile is left out."""
    for heads, rows in SEGMENTS(T, G, H, variant):
        if rows.stop < T or T < TILE or rows.stop - rows.start >= min(G, TILE):
            yield heads, rows


def longest(arguments: dict[str, Any]) -> None:
    """The longest sequence of the batch gives the length of all."""
    lengths = arguments["lengths"]
    if isinstance(lengths, np.ndarray) and lengths.dtype.kind == "i" and lengths.size:
        arguments["lengths"] = np.full_like(lengths, lengths.max())


def padded_rows_attend(lengths: Any, rows: slice) -> Any:
    """Padding hides keys only; its own rows have outputs."""
    real = longlora_groups.real_pairs(lengths, rows)
    if real is None:
        return None
    return np.broadcast_to((np.arange(rows.start, rows.stop) < lengths[..., None])[
        ..., None, None, :], real.shape)  # fmt: skip


def padding_of_the_first_group(lengths: Any, rows: slice) -> Any:
    """The corner of the padding mask is repeated for every group."""
    return longlora_groups.real_pairs(lengths, slice(0, rows.stop - rows.start))


def leaks(q: Any, k: Any, v: Any, *, causal: bool, mask: Any, scale: Any = None) -> Any:
    """Hidden values are multiplied by 0 instead of skipped."""
    out, lse = attend(q, k, v, causal=causal, mask=mask, scale=scale)
    return out + 0 * np.sum(v, axis=-2)[..., None, :], lse


def own_half_only(x: np.ndarray, kv_heads: int) -> np.ndarray:
    """The gradient of a kv head that serves both halves is that of the upper one."""
    H = x.shape[-3]
    group = H // kv_heads
    straddling = (H // 2) // group
    kept = x.copy()
    kept[..., straddling * group : H // 2, :, :] = 0
    return sum_groups(kept, kv_heads)


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def truncates(T: int, ratio: Any = 0.25, sft_group_size: Any = None) -> Any:
    """G is T ratio rounded down, if that divides T."""
    if sft_group_size is None and isinstance(ratio, float) and isinstance(T, int) and T > 0:
        G = int(T * ratio)
        if 0 < ratio <= 1 and G and T % G == 0:
            return G
    return SIZE(T, ratio, sft_group_size)


def always_a_quarter(T: int, ratio: Any = 0.25, sft_group_size: Any = None) -> Any:
    """A quarter of whatever text it is, also where it is no whole context."""
    size = SIZE(T, ratio, sft_group_size)
    return size if sft_group_size is None else max(1, T // 4)


def first_start_twice(T: int, G: int, shifted: bool) -> Any:
    starts = STARTS(T, G, shifted)
    return np.concatenate([starts[:1], starts]) if shifted and G < 2 else starts


def order_of_tokens(T: int, G: int, H: int, variant: str = "segments", causal: bool = True) -> Any:
    mask = MASK(T, G, H, variant, causal)
    return mask & np.tri(T, dtype=bool) if causal else mask


def rolls_in_place(x: np.ndarray, G: int, sign: int) -> Any:
    x[...] = SHIFT(x, G, sign)
    return x


def of(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"longlora.{name}", f"longlora.{operation}", law, bug, call, **rest)


def grouped(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return of("grouped_attend", name, law, bug, call, **rest)


MUTANTS = (
    grouped("wraps", "prefix", "segments are rolled, and the first rows see the last",
            wraps),
    grouped("token-order", "agreement", "a group that wraps is causal by token", token_order),
    grouped("open-group", "wrap", "a group that wraps has no causal order", open_group),
    grouped("values-stay", "agreement", "values are not rolled",
            replacing(ATTEND, shift_heads=values_stay())),
    grouped("output-stays", "agreement", "the output is not rolled back",
            replacing(ATTEND, shift_heads=output_stays)),
    grouped("kv-halves", "heads", "kv heads are halved instead of query heads",
            halves_of_kv_heads),
    grouped("interleaved", "halves", "every second head is shifted", every_second_head),
    grouped("whole-first", "agreement", "the first segment of a shifted head has G tokens",
            replacing(ATTEND, segments=whole_first_segment)),
    grouped("short-last", "ragged", "a short last segment is left out",
            replacing(ATTEND, segments=no_short_segment)),
    grouped("longest", "batch", "the longest sequence gives all lengths",
            altering(ATTEND, longest)),
    grouped("padded-rows", "agreement", "padded rows have outputs",
            replacing(ATTEND, real_pairs=padded_rows_attend)),
    grouped("first-group", "agreement", "every group has the padding of the first",
            replacing(ATTEND, real_pairs=padding_of_the_first_group)),
    grouped("leak", "poison", "hidden values are multiplied by 0",
            replacing(ATTEND, attend=leaks)),
    grouped("one-half", "gradient", "a kv head of both halves has the gradient of one", ATTEND,
            backward=replacing(BACKWARD, s2_backward=replacing(
            longlora_gradient.s2_backward, sum_groups=own_half_only))),
    grouped("no-dlse", "gradient", "the gradient through lse is dropped", ATTEND,
            backward=altering(BACKWARD, no_lse_gradient)),
    of("choose_group_size", "truncates", "refusal", "T ratio is rounded down", truncates),
    of("choose_group_size", "a-quarter", "agreement", "supervised training always has a quarter",
       always_a_quarter),
    of("group_starts", "twice", "agreement", "without a shift the first start comes twice",
       first_start_twice),
    of("s2_mask", "mask-order", "agreement", "rolled masks are causal by token", order_of_tokens),
    of("shift_heads", "rolls-in-place", "agreement", "the input is rolled as well",
       rolls_in_place),
    of("shift_heads", "other-way", "agreement", "heads are rolled the other way",
       lambda x, G, sign: SHIFT(x, G, -sign)),
)  # fmt: skip
