"""Wrong kernels of MoA: windows too long, slots of another head, influence half computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right
from attnspec.reference.dense.attention import attend
from attnspec.reference.patterns import moa
from attnspec.reference.patterns.moa_cache import Cache

ATTEND = right("moa.moa_attend")
BACKWARD = moa.moa_attend_backward
BLOCK_MASK = right("moa.moa_block_mask")
DECODE = right("moa.decode")
INFLUENCE = right("moa.influence")
BLOCKS = right("moa.block_influence")
BLOCK_SUM = right("moa.block_sum")
GROUPS = right("moa.group_influence")
SLOTS = right("moa.circular_slots")
STEP = right("moa.decode_step")
TOKEN_MASK = right("moa.moa_token_mask")
UPDATE = right("moa.cache_update")


def longer_window(arguments: dict[str, Any]) -> None:
    """The window does not count the query's own token."""
    arguments["c"] = tuple(c + 1 for c in arguments["c"])


def sinks_beside(T: int, s: Any, c: Any) -> np.ndarray:
    """The local tokens are counted beside the sinks and inside them too."""
    return TOKEN_MASK(T, s, tuple(a + b for a, b in zip(s, c, strict=True)))


def one_window(arguments: dict[str, Any]) -> None:
    """All heads have the window of the first."""
    for name in ("s", "c"):
        arguments[name] = arguments[name][:1] * len(arguments[name])


def block_window_without_diagonal(T: int, s: Any, c: Any, block: int = 64) -> np.ndarray:
    """The local blocks are counted beside the diagonal one."""
    return BLOCK_MASK(T, s, tuple(n + block for n in c), block)


class Tiled:
    """NumPy with a `repeat` that lays copies end to end: query head h has the rule of kv head h
    modulo their number.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def repeat(self, x: np.ndarray, repeats: int, axis: int) -> np.ndarray:
        return np.concatenate([x] * repeats, axis=axis)


def leaks(q: Any, k: Any, v: Any, *, mask: Any, scale: Any = None) -> Any:
    """Hidden values are multiplied by 0."""
    out, lse = attend(q, k, v, mask=mask, scale=scale)
    group = q.shape[-3] // k.shape[-3]
    return out + 0 * np.repeat(v.sum(axis=-2, keepdims=True), group, axis=-3), lse


def future(T: int, s: Any, c: Any) -> np.ndarray:
    """Sinks are visible before they have come."""
    mask = TOKEN_MASK(T, s, c)
    return mask | (np.arange(T) < np.array(s)[:, None, None])


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def window_of_backward(arguments: dict[str, Any]) -> None:
    """The backward pass has a window that is one token shorter."""
    if arguments["granularity"] == "token":
        arguments["c"] = tuple(max(1, c - 1) for c in arguments["c"])


def no_static_offset(count: np.ndarray, s: int, c: int) -> np.ndarray:
    """The slot is the count modulo the cache, so that sinks are overwritten."""
    return np.asarray(count % (s + c))


def counts_padding(arguments: dict[str, Any]) -> None:
    """Padding is stored like a token."""
    arguments["valid_mask"] = None


def first_wins(cache: Cache, k: Any, v: Any, s: Any, c: Any, valid_mask: Any = None) -> Any:
    """Of many tokens for one slot, the slot keeps the first that is new."""
    new = UPDATE(cache, k, v, s, c, valid_mask)
    old = UPDATE(cache, k[..., :1, :], v[..., :1, :], s, c,
                 None if valid_mask is None else valid_mask[..., :1])  # fmt: skip
    changed = np.any(old.k != cache.k, axis=-1, keepdims=True)
    return Cache(np.where(changed, old.k, new.k), np.where(changed, old.v, new.v), new.seen)


def no_start(arguments: dict[str, Any]) -> None:
    """Every head's slots are looked for one place too early."""
    cache = arguments["cache"]
    k, v = (np.roll(x, 1, axis=-2) for x in cache[:2])
    arguments["cache"] = Cache(k, v, cache.seen)


def longest_of_batch(arguments: dict[str, Any]) -> None:
    """All sequences are as long as the longest."""
    cache = arguments["cache"]
    arguments["cache"] = cache._replace(seen=np.full_like(cache.seen, cache.seen.max()))


def stale_slots(q: Any, k: Any, v: Any, *, mask: Any, scale: Any = None) -> Any:
    """The values of slots that nothing was written to are multiplied by 0."""
    out, lse = attend(q, k, v, mask=mask, scale=scale)
    return out + 0 * (q.sum(axis=-1, keepdims=True) + k.sum(axis=(-1, -2))[..., None, None]), lse


def attends_before_writing(
    q: Any, k: Any, v: Any, cache: Any, s: Any, c: Any, *, scale: Any = None
) -> Any:
    """A token attends before it is written, and so does not see itself."""
    _, _, after = STEP(q, k, v, cache, s, c, scale=scale)
    out, lse = np.zeros_like(q, shape=(*q.shape[:-1], v.shape[-1])), np.zeros_like(q[..., 0])
    for i in range(q.shape[-2]):
        new = slice(i, i + 1)
        out[..., new, :], lse[..., new] = DECODE(q[..., new, :], cache, s, c, scale=scale)
        cache = UPDATE(cache, k[..., new, :], v[..., new, :], s, c)
    return out, lse, after


def no_mean(P: Any, V: Any, g: Any, eps: float) -> Any:
    """The mean of the row is not taken off."""
    slopes = g @ np.swapaxes(np.repeat(V, P.shape[-3] // V.shape[-3], axis=-3), -1, -2)
    return -P * slopes / np.where(P == 1, 1, 1 - P + eps)


def over_weight(P: Any, V: Any, g: Any, eps: float) -> Any:
    """Divided by P + eps, not by 1 - P + eps; row 0 is divided by nothing."""
    E = INFLUENCE(P, V, g, eps)
    first = np.arange(P.shape[-2])[:, None] == 0
    return np.where(first, E, E * (1 - P + eps) / (P + eps))


def first_row_too(P: Any, V: Any, g: Any, eps: float) -> Any:
    """Row 0 is treated like the others, and its influence vanishes."""
    E = INFLUENCE(P, V, g, eps).copy()
    E[..., 0, :] = 0
    return E


def first_kv_head(q: Any, k: Any, v: Any, g: Any, *rest: Any, **options: Any) -> Any:
    """Values of the first kv head serve all query heads."""
    return BLOCKS(q, k, np.repeat(v[..., :1, :, :], v.shape[-3], axis=-3), g, *rest, **options)


def reads_future(E: np.ndarray, b: int = 64) -> np.ndarray:
    """Entries above the diagonal are added as well."""
    T = E.shape[-1]
    return np.asarray(E.reshape(*E.shape[:-2], T // b, b, T // b, b).sum(axis=(-3, -1)))


def zero_times(E: np.ndarray, b: int = 64) -> np.ndarray:
    """Entries above the diagonal are multiplied by 0."""
    return BLOCK_SUM(E, b) + 0 * E.sum(axis=(-1, -2))[..., None, None]


def other_grouping(arguments: dict[str, Any]) -> None:
    arguments["interleaved"] = not arguments["interleaved"]


def of(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"moa.{name}", f"moa.{operation}", law, bug, call, **rest)


MUTANTS = (
    of("moa_attend", "longer-window", "agreement", "the window leaves the own token out",
       replacing(ATTEND, moa_token_mask=altering(TOKEN_MASK, longer_window))),
    of("moa_attend", "sinks-beside", "agreement", "sinks are counted beside the window",
       replacing(ATTEND, moa_token_mask=sinks_beside)),
    of("moa_attend", "block-diagonal", "agreement", "the diagonal block is not one of the local",
       replacing(ATTEND, moa_block_mask=block_window_without_diagonal)),
    of("moa_attend", "one-window", "agreement", "all heads have the first head's window",
       altering(ATTEND, one_window)),
    of("moa_attend", "query-head-rules", "rules-move", "rules are dealt out to query heads",
       replacing(ATTEND, np=Tiled())),
    of("moa_attend", "leak", "outside-window", "hidden values are multiplied by 0",
       replacing(ATTEND, attend=leaks)),
    of("moa_attend", "future-sinks", "prefix", "sinks are seen before they have come",
       replacing(ATTEND, moa_token_mask=future)),
    of("moa_attend", "no-dlse", "gradient", "the gradient through lse is dropped", ATTEND,
       backward=altering(BACKWARD, no_lse_gradient)),
    of("moa_attend", "backward-window", "gradient", "the backward window is a token short", ATTEND,
       backward=altering(BACKWARD, window_of_backward)),
    of("moa_token_mask", "token-sinks-beside", "agreement", "sinks are counted beside the window",
       sinks_beside),
    of("moa_block_mask", "block-sinks", "agreement", "the diagonal block is not one of the local",
       block_window_without_diagonal),
    of("circular_slots", "no-static-offset", "agreement", "sinks are overwritten",
       no_static_offset),
    of("cache_update", "overwrites-sinks", "agreement", "sinks are overwritten",
       replacing(UPDATE, circular_slots=no_static_offset)),
    of("cache_update", "stores-padding", "agreement", "padding is stored",
       altering(UPDATE, counts_padding)),
    of("cache_update", "first-wins", "agreement", "a slot keeps the first of many tokens",
       first_wins),
    of("decode", "neighbour", "agreement", "slots are those of the head before",
       altering(DECODE, no_start)),
    of("decode", "longest", "agreement", "all sequences are as long as the longest",
       altering(DECODE, longest_of_batch)),
    of("decode", "stale", "poison", "slots without a token are read",
       replacing(DECODE, attend=stale_slots)),
    of("decode_step", "before-writing", "agreement", "a token does not see itself",
       attends_before_writing),
    of("decode_step", "step-sinks", "stream", "sinks are overwritten",
       replacing(STEP, cache_update=replacing(UPDATE, circular_slots=no_static_offset))),
    of("influence", "no-mean", "agreement", "the row's mean is not taken off", no_mean),
    of("influence", "over-weight", "agreement", "divided by P, not by 1 - P", over_weight),
    of("block_influence", "first-row", "agreement", "row 0 is treated like the others",
       replacing(BLOCKS, influence=first_row_too)),
    of("block_influence", "first-kv-head", "heads", "all heads read the values of the first",
       first_kv_head),
    of("block_sum", "above", "agreement", "entries above the diagonal are added", reads_future),
    of("block_sum", "zero-times", "poison", "entries above the diagonal are read", zero_times),
    of("group_influence", "grouping", "agreement", "the other heads are taken together",
       altering(GROUPS, other_grouping)),
)  # fmt: skip
