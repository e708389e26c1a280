"""Wrong kernels of Giraffe: positions cut, shared or taken from the cache, causal by place."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right
from attnspec.conformance.mutants.positions.giraffe_positions import (
    BASIS,
    HALF_SPLIT,
    INTERLEAVED,
    XPOS,
    both_grown,
    coarse,
    not_turned_back,
    step,
)
from attnspec.reference.positions import giraffe, giraffe_xpos

ATTEND = right("giraffe.attend")
BACKWARD = giraffe.attend_backward
XPOS_ATTEND = right("giraffe.xpos_attend")
XPOS_ATTEND_BACKWARD = giraffe_xpos.xpos_attend_backward
STEP = right("giraffe.step")


def whole(x: Any, p: Any, f: Any) -> Any:
    """Positions are cast to integers on the way."""
    return HALF_SPLIT(x, np.floor(p).astype(np.int64), f)


def first_entry(x: Any, p: Any, f: Any) -> Any:
    """Every entry of the batch stands where the first does."""
    return HALF_SPLIT(x, p[0] if p.ndim > 1 else p, f)


def own_of_heads(x: Any, p: Any, f: Any) -> Any:
    """Every head has positions of its own, drawn for it alone."""
    heads = range(x.shape[-3])
    turned = [HALF_SPLIT(x[..., h : h + 1, :, :], p * (1 + h / 4), f) for h in heads]
    return np.concatenate(turned, axis=-3) if turned else HALF_SPLIT(x, p, f)


def other_layout(x: Any, p: Any, f: Any) -> Any:
    return INTERLEAVED(x, p, f)


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def plain_frequencies(arguments: dict[str, Any]) -> None:
    """The table cached from the first call, whatever the frequencies."""
    arguments["f"] = None


def order_by_position(q: Any, k: Any, v: Any, pq: Any = None, pk: Any = None, *rest: Any,
                      **options: Any) -> Any:  # fmt: skip
    """Causal order goes by position: equal ones see one another."""
    if pq is None or pk is None or not options.get("causal", True):
        return ATTEND(q, k, v, pq, pk, *rest, **options)
    seen = pk[..., None, :] <= pq[..., :, None]
    mask = seen[..., None, :, :]
    key_mask = options.get("key_mask")
    if key_mask is not None:
        mask = mask & key_mask[..., None, None, :]
    f = BASIS(q.shape[-1]) if not rest or rest[0] is None else rest[0]
    return giraffe.dense.attend(HALF_SPLIT(q, pq, f), HALF_SPLIT(k, pk, f), v, mask=mask)


def mask_of_the_first(T: int, S: int, causal: bool = True, key_mask: Any = None) -> Any:
    return giraffe_xpos.visible(T, S, causal, None if key_mask is None else key_mask[:1])


def centre_of_the_call(q: Any, k: Any, v: Any, pq: Any = None, pk: Any = None, *, N: int,
                       **options: Any) -> Any:  # fmt: skip
    """Keys keep N, and queries take the number of keys in its place."""
    pq, pk = giraffe_xpos.default_positions(q, k, pq, pk)
    own = {name: options[name] for name in ("b", "base") if name in options}
    q_out, _ = XPOS(q, k, pq, pk, N=max(k.shape[-2], 1), **own)
    _, k_out = XPOS(q, k, pq, pk, N=N, **own)
    mask = giraffe_xpos.visible(
        q.shape[-2], k.shape[-2], options.get("causal", True), options.get("key_mask")
    )
    return giraffe_xpos.dense.attend(q_out, k_out, v, mask=mask)


def by_rows(state: Any, q: Any, k: Any, v: Any, p: Any, f: Any = None) -> Any:
    """The number of cached rows is taken for the position."""
    return STEP(state, q, k, v, state.k.shape[-2] + np.arange(q.shape[-2]), f)


def cached_before_turning(state: Any, q: Any, k: Any, v: Any, p: Any, f: Any = None) -> Any:
    """New keys are cached as they come."""
    out, (keys, values) = STEP(state, q, k, v, p, f)
    keys = np.concatenate([keys[..., : state.k.shape[-2], :], k], axis=-2)
    return out, giraffe.State(keys, values)


def turned_again(state: Any, q: Any, k: Any, v: Any, p: Any, f: Any = None) -> Any:
    """Cached keys are turned once more, as if by a table that starts again."""
    past = state.k.shape[-2]
    theta = BASIS(q.shape[-1]) if f is None else f
    again = giraffe.State(HALF_SPLIT(state.k, np.arange(past), theta), state.v)
    return STEP(again, q, k, v, p, f)


def attention(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"giraffe.{name}", "giraffe.attend", law, bug, call, **rest)


def turning(name: str, law: str, bug: str, rotate: Any) -> Mutant:
    return attention(name, law, bug, replacing(ATTEND, rotate_half_split=rotate))


MUTANTS = (
    turning("whole", "agreement", "positions are cut to integers", whole),
    turning("coarse", "agreement", "angles are rounded to eight bits", coarse),
    turning("first-entry", "batch", "every entry has the positions of the first", first_entry),
    turning("own-of-heads", "agreement", "positions are drawn for each head", own_of_heads),
    turning("interleaved", "agreement", "neighbouring channels are paired", other_layout),
    attention("one-way", "agreement", "keys are turned the other way",
              lambda q, k, v, pq=None, pk=None, f=None, **o: ATTEND(
                  q, k, v, pq, -giraffe.default_positions(q, k, pq, pk)[1], f, **o)),
    attention("cached-table", "agreement", "the frequencies are those of the first call",
              altering(ATTEND, plain_frequencies)),
    attention("order-by-position", "agreement", "causal order goes by position",
              order_by_position),
    attention("first-mask", "batch", "every entry uses the first entry's key mask",
              replacing(ATTEND, visible=mask_of_the_first)),
    attention("not-turned-back", "gradient", "gradients are those of turned q and k", ATTEND,
              backward=replacing(BACKWARD, rotate_half_split_backward=not_turned_back)),
    attention("no-dlse", "gradient", "the gradient through lse is dropped", ATTEND,
              backward=altering(BACKWARD, no_lse_gradient)),
    step("attend-keys-grow", "xpos_attend", "agreement", "keys grow as queries do",
         replacing(XPOS_ATTEND, xpos=both_grown)),
    step("two-tables", "xpos_attend", "agreement", "queries are centred by what the cache holds",
         centre_of_the_call),
    step("xpos-no-dlse", "xpos_attend", "gradient", "the gradient through lse is dropped",
         XPOS_ATTEND, backward=altering(XPOS_ATTEND_BACKWARD, no_lse_gradient)),
    step("by-rows", "step", "agreement", "rows in the cache are taken for the position", by_rows),
    step("unturned", "step", "agreement", "keys are cached before they are turned",
         cached_before_turning),
    step("turned-again", "step", "stream", "cached keys are turned once more", turned_again),
)  # fmt: skip
