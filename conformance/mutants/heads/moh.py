"""Wrong kernels of Mixture-of-Head attention: rows of the wrong head or token, leaks, tails."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right, spoiling
from attnspec.reference.dense.attention import State
from attnspec.reference.heads import moh, moh_heads

HEADS = right("moh.head_outputs")
MIX = right("moh.mix_heads")
MOH = right("moh.moh_attend")
STEP = right("moh.step")
BLOCK = 8


def masked_mean(q: Any, k: Any, v: Any, active: Any = None, **options: Any) -> np.ndarray:
    """Inactive rows have scores of -1e9 throughout: a softmax of equals, the mean of the values."""
    out = HEADS(q, k, v, active, **options)
    if active is None or not v.shape[-2]:
        return out
    mean = np.repeat(v.mean(axis=-2, keepdims=True), q.shape[-3] // v.shape[-3], axis=-3)
    return np.where(np.swapaxes(active, -1, -2)[..., None], out, mean)


def nan_rows(q: Any, k: Any, v: Any, active: Any = None, **options: Any) -> np.ndarray:
    """All scores of an inactive row are -inf, and 0 / 0 its weights."""
    out = HEADS(q, k, v, active, **options)
    if active is None:
        return out
    rows = np.swapaxes(active, -1, -2)[..., None]
    return np.where(rows, out, out.dtype.type(np.nan))


def multiplied_by_zero(q: Any, k: Any, v: Any, active: Any = None, **options: Any) -> np.ndarray:
    """Computes all rows and multiplies by 0: what an unused query holds comes through."""
    HEADS(q, k, v, active, **options)
    out = HEADS(q, k, v, None, **options)
    if active is None:
        return out
    with np.errstate(invalid="ignore"):
        return out * np.swapaxes(active, -1, -2)[..., None].astype(out.dtype)


def packed(q: Any, k: Any, v: Any, active: Any = None, *, place: Any, **options: Any) -> np.ndarray:
    """Head by head, the active rows gathered, attended to and written where `place` says."""
    whole = HEADS(q, k, v, active, **options)
    if active is None or not options.get("causal"):
        return whole
    out = np.zeros_like(whole)
    group, shift = q.shape[-3] // k.shape[-3], k.shape[-2] - q.shape[-2]
    key_mask = options.get("key_mask")
    for index in np.ndindex(q.shape[:-2]):
        rows = np.flatnonzero(active[index[:-1]][:, index[-1]])
        kv = (*index[:-1], index[-1] // group)
        real = np.ones(k.shape[-2], bool) if key_mask is None else key_mask[index[:-1]]
        for n, row in enumerate(rows):
            end, target = place(n, int(row), rows)
            seen = real & (np.arange(k.shape[-2]) <= end + shift)
            one = HEADS(
                q[index][None, row : row + 1], k[kv][None], v[kv][None],
                key_mask=seen, scale=options.get("scale"),
            )  # fmt: skip
            out[index][target] = one[0, 0]
    return out


def ends_by_place(*args: Any, **options: Any) -> np.ndarray:
    """The causal limit is that of the place in the list, not of the token."""
    return packed(*args, place=lambda n, row, rows: (n, row), **options)


def ends_of_tile(*args: Any, **options: Any) -> np.ndarray:
    """All rows of a tile see what its last row sees."""

    def place(n: int, row: int, rows: np.ndarray) -> tuple[int, int]:
        return int(rows[min(n // BLOCK * BLOCK + BLOCK, len(rows)) - 1]), row

    return packed(*args, place=place, **options)


def back_in_order(*args: Any, **options: Any) -> np.ndarray:
    """Results are written back in the order of the list, to the first rows."""
    return packed(*args, place=lambda n, row, rows: (row, n), **options)


def tail_of_the_list_lost(arguments: dict[str, Any]) -> None:
    """Rows of a head beyond the last whole tile are not computed."""
    active = arguments["active"]
    if active is not None:
        count = np.cumsum(active, axis=-2)
        whole = count[..., -1:, :] // BLOCK * BLOCK
        arguments["active"] = active & ((count <= whole) | (whole == 0))


def rows_of_first_head(arguments: dict[str, Any]) -> None:
    """One list of rows serves all heads of a group."""
    active, group = arguments["active"], arguments["q"].shape[-3] // arguments["k"].shape[-3]
    if active is not None:
        arguments["active"] = np.repeat(active[..., ::group], group, axis=-1)


def drops_unused_keys(arguments: dict[str, Any]) -> None:
    """The keys of a token that does not use a head are left out of that head."""
    active, k = arguments["active"], arguments["k"]
    if active is not None and active.shape[-2] == k.shape[-2] and active.shape[-1] == k.shape[-3]:
        unused = ~np.swapaxes(active, -1, -2)[..., None]
        for name in ("k", "v"):
            x = arguments[name]
            arguments[name] = np.where(unused, np.zeros_like(x), x)


def mask_of_first_entry(arguments: dict[str, Any]) -> None:
    mask = arguments["key_mask"]
    if mask is not None:
        arguments["key_mask"] = np.repeat(mask[:1], len(mask), axis=0)


def all_rows_pull(arguments: dict[str, Any]) -> None:
    """The backward pass runs over all rows, as if every head were active."""
    arguments["active"] = None


def gated_weights(q: Any, k: Any, v: Any, gates: Any, *rest: Any, **options: Any) -> np.ndarray:
    """The gate multiplies the scores, before the softmax."""
    MOH(q, k, v, gates, *rest, **options)
    factor = np.swapaxes(gates, -1, -2)[..., None]
    binary = (gates != 0).astype(gates.dtype)
    return MOH((q * factor).astype(q.dtype), k, v, binary, *rest, **options)


def gated_bias(gates: Any, h: Any, Wo: Any, bo: Any = None) -> np.ndarray:
    out = MIX(gates, h, Wo, bo)
    return out if bo is None else out + (gates.mean(axis=-1, keepdims=True) - 1) * bo


def heads_last(gates: Any, h: Any, Wo: Any, bo: Any = None) -> np.ndarray:
    """Channels before heads in the input of the projection."""
    out = MIX(gates, h, Wo, bo)
    if out.shape[-1]:
        split = Wo.reshape(Wo.shape[0], h.shape[-1], h.shape[-3])
        Wo = np.swapaxes(split, -1, -2).reshape(Wo.shape)
    return MIX(gates, h, Wo, bo)


def gradient_of_plain_heads(gates: Any, *args: Any, **rest: Any) -> Any:
    """The gradient of the heads leaves the gates out."""
    dgates, _, dWo, dbo = moh_heads.mix_heads_backward(gates, *args, **rest)
    _, dh, _, _ = moh_heads.mix_heads_backward(np.ones_like(gates), *args, **rest)
    return dgates, dh, dWo, dbo


def gates_without_gradient(*args: Any, **options: Any) -> Any:
    gradients = list(moh.moh_backward(*args, **options))
    gradients[3] = np.zeros_like(gradients[3])
    return tuple(gradients)


def caches_used_heads(
    state: State, q: Any, k: Any, v: Any, active: Any = None, *, scale: float | None = None
) -> Any:
    """The cache of a head that no new token uses is not written."""
    out, new = STEP(state, q, k, v, active, scale=scale)
    if active is None:
        return out, new
    used = active.any(axis=-2).reshape(*active.shape[:-2], k.shape[-3], -1).any(axis=-1)
    keys, values = new.k.copy(), new.v.copy()
    for x in (keys, values):
        x[..., state.k.shape[-2] :, :] *= used[..., None, None]
    return out, State(keys, values)


def forgets_the_oldest(result: Any) -> Any:
    h, state = result
    return h, State(state.k[..., -BLOCK:, :], state.v[..., -BLOCK:, :])


def of(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"moh.{name}", f"moh.{operation}", law, bug, call, **rest)


MUTANTS = (
    of("head_outputs", "mean-of-values", "agreement", "an inactive row is a softmax of equals",
       masked_mean),
    of("head_outputs", "nan-rows", "agreement", "an inactive row is 0 / 0", nan_rows),
    of("head_outputs", "multiplied-by-zero", "poison", "unused queries are read",
       multiplied_by_zero),
    of("head_outputs", "ends-by-place", "agreement", "causal by the place in the list",
       ends_by_place),
    of("head_outputs", "ends-of-tile", "prefix", "a tile sees what its last row sees",
       ends_of_tile),
    of("head_outputs", "back-in-order", "agreement", "results go to the first rows", back_in_order),
    of("head_outputs", "list-tail", "ragged", "the ragged tail of a list is not computed",
       altering(HEADS, tail_of_the_list_lost)),
    of("head_outputs", "rows-of-first-head", "heads", "a group has one list of rows",
       altering(HEADS, rows_of_first_head)),
    of("head_outputs", "drops-unused-keys", "agreement", "keys of tokens that do not use the head",
       altering(HEADS, drops_unused_keys)),
    of("head_outputs", "mask-of-first-entry", "batch", "all entries have the first one's padding",
       altering(HEADS, mask_of_first_entry)),
    of("head_outputs", "all-rows-pull", "gradient", "inactive rows add to dk and dv", HEADS,
       backward=altering(moh_heads.head_outputs_backward, all_rows_pull)),
    of("moh_attend", "gated-scores", "agreement", "the gate multiplies the scores", gated_weights),
    of("moh_attend", "gates-without-gradient", "gradient", "gates learn nothing", MOH,
       backward=gates_without_gradient),
    of("mix_heads", "gated-bias", "agreement", "the bias is gated too", gated_bias),
    of("mix_heads", "channels-first", "heads", "channels before heads in the projection",
       heads_last),
    of("mix_heads", "plain-heads", "gradient", "the heads' gradient is not gated", MIX,
       backward=gradient_of_plain_heads),
    of("step", "caches-used-heads", "agreement", "unused heads are not cached", caches_used_heads),
    of("step", "short-state", "stream", "the oldest tokens fall out of the state",
       spoiling(STEP, forgets_the_oldest)),
)  # fmt: skip
