"""Wrong kernels of SinkLoRA's attention: sinks that count twice, wrong heads, rolls that leak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.conventions import causal_mask, repeat_heads
from attnspec.reference.dense.attention import attend, attend_backward
from attnspec.reference.patterns import sinklora, sinklora_heads
from attnspec.reference.patterns.longlora_groups import s2_mask
from attnspec.reference.primitives.softmax import merge

ATTEND = right("sinklora.sf_attend")
BACKWARD = sinklora.sf_attend_backward
MASK = right("sinklora.sf_mask")
KIND = right("sinklora.sf_head_kind")
ROLL = right("sinklora.segment_and_reassemble")
PLAIN = sinklora_heads.plain_heads
Pattern = dict[str, Any]


def with_mask(change: Callable[..., np.ndarray]) -> Callable[..., Any]:
    """Attention whose mask `change` has made from the right one and the pattern."""

    def mask(T: int, G: int, H: int, s: int, rho: float, wrap: bool, causal: bool) -> np.ndarray:
        right_mask = MASK(T, G, H, s, rho, wrap, causal)
        pattern = {"T": T, "G": G, "H": H, "s": s, "rho": rho, "wrap": wrap, "causal": causal}
        return change(right_mask, pattern)

    return replacing(ATTEND, sf_mask=mask)


def sees_all_of(mask: np.ndarray, pattern: Pattern) -> np.ndarray:
    """The rows of sinks see the tokens behind them too."""
    return mask | (np.arange(pattern["T"]) < pattern["s"])[:, None]


def sinks_ahead(mask: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Sinks are seen by the tokens before them too."""
    return mask | (np.arange(pattern["T"]) < pattern["s"])


def one_sink_less(mask: np.ndarray, pattern: Pattern) -> np.ndarray:
    return MASK(**{**pattern, "s": max(0, pattern["s"] - 1)})


def wraps(mask: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Groups are rolled where they should be cut."""
    if pattern["wrap"] or pattern["T"] % 2 or pattern["T"] % pattern["G"] or pattern["G"] % 2:
        return mask
    return MASK(**{**pattern, "wrap": True})


def two_groups(mask: np.ndarray, pattern: Pattern) -> np.ndarray:
    """A group of G sees the one before it as well."""
    t = np.arange(pattern["T"])
    near = np.abs(t[:, None] // pattern["G"] - t // pattern["G"]) < 2
    return mask | (near & causal_mask(len(t), len(t)) if pattern["causal"] else near)


def open_group(mask: np.ndarray, pattern: Pattern) -> np.ndarray:
    """The group that wraps has no causal order."""
    if not (pattern["wrap"] and pattern["causal"]):
        return mask
    free = s2_mask(pattern["T"], pattern["G"], 2, "roll", False)[1]
    ends = np.arange(pattern["T"]) % max(1, pattern["T"] - pattern["G"] // 2) < pattern["G"] // 2
    shifted = KIND(pattern["H"], pattern["rho"])[:, None, None] == 1
    return mask | (free & ends[:, None] & ends & shifted)


def kinds(order: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Any]:
    """Heads are shifted in another order."""
    return with_mask(lambda mask, pattern: mask[order(np.arange(pattern["H"]))])


def returned_last(heads: np.ndarray) -> np.ndarray:
    """The shifted quarter comes before the returned one."""
    half = len(heads) // 2
    return np.concatenate([heads[:half], heads[half:][::-1]])


def by_kv_heads(q: Any, k: Any, v: Any, G: Any, s: Any = 4, rho: Any = 0.5, *rest: Any,
                **options: Any) -> Any:  # fmt: skip
    """Query heads are of the kind of their kv head."""
    result = ATTEND(q, k, v, G, s, rho, *rest, **options)
    H, kv_heads = q.shape[-3], k.shape[-3]
    kind = np.repeat(KIND(kv_heads, rho), H // kv_heads)
    k, v = repeat_heads(k, H), repeat_heads(v, H)
    out, lse = result[0].copy(), result[1].copy()
    for h in np.flatnonzero(kind != KIND(H, rho)):
        pair = [x[..., [h, h], :, :] for x in (q, k, v)]
        both = ATTEND(*pair, G, s, 0.0, *rest, **options)
        out[..., h, :, :], lse[..., h, :] = both[0][..., kind[h], :, :], both[1][..., kind[h], :]
    return out, lse


def counted_twice(q: Any, k: Any, v: Any, *, mask: np.ndarray, scale: Any = None) -> Any:
    """Token 0 is merged in again where it is seen in any case."""
    sink = np.zeros_like(mask)
    sink[..., :1] = mask[..., :1]
    if not mask.shape[-1]:
        return attend(q, k, v, mask=mask, scale=scale)
    return merge(*attend(q, k, v, mask=mask, scale=scale), *attend(q, k, v, mask=sink, scale=scale))


def rolled(
    first: Callable[..., int], last: Callable[..., int], by: int, shifts: bool = True
) -> Callable[..., Any]:
    """Rolled attention whose heads from `first` to `last` are off by half a group in the end;
    without `shifts` they are not rolled before attention.
    """

    def call(q: Any, k: Any, v: Any, G: Any, s: Any = 4, rho: Any = 0.5, wrap: Any = False,
             *rest: Any, **options: Any) -> Any:  # fmt: skip
        result = ATTEND(q, k, v, G, s, rho, wrap, *rest, **options)
        if not wrap:
            return result
        out, _ = result if shifts else ATTEND(q, k, v, G, s, 1.0, wrap, *rest, **options)
        h = np.arange(q.shape[-3])[:, None, None]
        off = (h >= first(len(h), rho)) & (h < last(len(h), rho))
        return np.where(off, np.roll(out, by * (G // 2), axis=-2), result[0]), result[1]

    return call


def all_heads(H: int, rho: float) -> int:
    return H


def second_half(H: int, rho: float) -> int:
    return H // 2


def short_last(mask: np.ndarray, pattern: Pattern) -> np.ndarray:
    """A last group that is no whole tile sees the sinks alone, but for itself."""
    T, G = pattern["T"], pattern["G"]
    last = T % G if T > 8 else 0
    if pattern["wrap"] or not 0 < last < min(8, G):
        return mask
    cut = mask.copy()
    cut[:, T - last :, pattern["s"] :] &= np.eye(T, dtype=bool)[T - last :, pattern["s"] :]
    return cut


def far_sinks(q: Any, k: Any, v: Any, dout: Any, dlse: Any = None, **options: Any) -> Any:
    """Sinks have no gradient from tokens 8 and more behind them."""
    dq, dk, dv = attend_backward(q, k, v, dout, dlse, **options)
    T = q.shape[-2]
    near = dout.copy()
    near[..., 8:, :] = 0
    of_lse = None if dlse is None else np.where(np.arange(T) < 8, dlse, 0).astype(dlse.dtype)
    _, dk_near, dv_near = attend_backward(q, k, v, near, of_lse, **options)
    for whole, part in ((dk, dk_near), (dv, dv_near)):
        whole[..., :1, :] = part[..., :1, :]
    return dq, dk, dv


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def rounded_down(H: int, rho: Any) -> int:
    half = H // 2
    return min(PLAIN(H, rho), half + int(rho * (H - half)))


def unguarded(H: int, rho: Any) -> int:
    half = H // 2
    return max(PLAIN(H, rho), half + int(np.ceil(rho * (H - half))))


def whole_half(x: Any, G: Any, rho: Any, sign: Any) -> Any:
    """The whole second half is rolled back."""
    return ROLL(x, G, rho if sign == -1 else min(rho, 0), sign)


def rolls_in_place(x: np.ndarray, G: Any, rho: Any, sign: Any) -> Any:
    x[...] = ROLL(x, G, rho, sign)
    return x


def of(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"sinklora.{name}", f"sinklora.{operation}", law, bug, call, **rest)


def attends(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return of("sf_attend", name, law, bug, call, **rest)


MUTANTS = (
    attends("counted-twice", "agreement", "a sink in the own group counts twice",
            replacing(ATTEND, attend=counted_twice)),
    attends("kv-kinds", "agreement", "kv heads are shifted instead of query heads", by_kv_heads),
    attends("all-back", "agreement", "the output of the whole second half is rolled back",
            rolled(second_half, PLAIN, 1)),
    attends("not-back", "agreement", "the output is not rolled back",
            rolled(PLAIN, all_heads, -1)),
    attends("only-back", "agreement", "only the output is rolled",
            rolled(PLAIN, all_heads, 1, shifts=False)),
    attends("rows-ahead", "prefix", "sinks see the tokens behind them", with_mask(sees_all_of)),
    attends("sinks-ahead", "prefix", "sinks are seen before they come", with_mask(sinks_ahead)),
    attends("one-sink-less", "agreement", "the last sink is not global",
            with_mask(one_sink_less)),
    attends("wraps", "prefix", "segments are rolled", with_mask(wraps)),
    attends("two-groups", "reach", "a group sees the one before it", with_mask(two_groups)),
    attends("open-group", "rolled-heads", "a group that wraps has no causal order",
            with_mask(open_group)),
    attends("returned-last", "agreement", "shifted heads come before returned ones",
            kinds(returned_last)),
    attends("backwards", "kinds", "the first heads are shifted", kinds(lambda heads: heads[::-1])),
    attends("short-last", "ragged", "a short last group sees itself and sinks alone",
            with_mask(short_last)),
    attends("no-dlse", "gradient", "the gradient through lse is dropped", ATTEND,
            backward=altering(BACKWARD, no_lse_gradient)),
    attends("far-sinks", "gradient", "a sink has no gradient from far tokens", ATTEND,
            backward=replacing(BACKWARD, attend_backward=far_sinks)),
    of("sf_head_kind", "rounded-down", "agreement", "the returned share is rounded down",
       replacing(KIND, plain_heads=rounded_down)),
    of("sf_head_kind", "one-too-many", "agreement", "7.000000000000001 heads are 8",
       replacing(KIND, plain_heads=unguarded)),
    of("sf_mask", "mask-ahead", "agreement", "global rows are not causal",
       lambda T, G, H, s=4, rho=0.5, wrap=False, causal=True: sees_all_of(
           MASK(T, G, H, s, rho, wrap, causal), {"T": T, "s": s})),
    of("segment_and_reassemble", "whole-half", "agreement", "the whole second half is rolled back",
       whole_half),
    of("segment_and_reassemble", "rolls-in-place", "agreement", "the input is rolled as well",
       rolls_in_place),
    of("segment_and_reassemble", "one-back", "agreement", "heads are rolled by a token too few",
       spoiling(ROLL, lambda x: np.roll(x, 1, axis=-2))),
)  # fmt: skip
