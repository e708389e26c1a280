"""Wrong kernels of DiffQKV attention: one ratio for two maps, a wrong scale, half a selection."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.dense.attention import State
from attnspec.reference.heads import diffqkv, diffqkv_steps

ATTEND = right("diffqkv.diffqkv_attend")
BACKWARD = diffqkv.diffqkv_backward
CONTRACT = right("diffqkv.contract_query")
MAPS = right("diffqkv.head_maps")
SCORES = right("diffqkv.scores")
SELECT = right("diffqkv.select_values")
SELECTED = right("diffqkv.attend_selected")
SELECTIVE = right("diffqkv.selective_attend")
STEP = right("diffqkv.step")
BLOCK = 8


def one_ratio(q: Any, k: Any, v: Any) -> Any:
    """v is read with the ratio of k: beyond its end the last head, or else the wrong one."""
    hk, _ = diffqkv_steps.check_inputs(q, k, v)
    return hk, np.minimum(hk, v.shape[-3] - 1)


def interleaved(q: Any, k: Any, v: Any) -> Any:
    diffqkv_steps.check_inputs(q, k, v)
    h = np.arange(q.shape[-3])
    return h % k.shape[-3], h % v.shape[-3]


def value_map_through_keys(Hq: int, Hk: int, Hv: int) -> Any:
    """The value map is derived from the key map, as if the counts divided one another."""
    hk, _ = MAPS(Hq, Hk, Hv)
    return hk, hk * Hv // Hk


def scaled_by_values(q: Any, k: Any, v: Any, *, scale: float | None = None, **options: Any) -> Any:
    if scale is None and getattr(v, "ndim", 0) == 4 and v.shape[-1]:
        scale = v.shape[-1] ** -0.5
    return ATTEND(q, k, v, scale=scale, **options)


def padded_width(arguments: dict[str, Any]) -> None:
    """The scale of d padded to the next power of two."""
    if arguments["scale"] is None:
        arguments["scale"] = (1 << (arguments["q"].shape[-1] - 1).bit_length()) ** -0.5


def cut_to_query_width(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Output columns beyond the width of q are never written."""
    out, lse = ATTEND(q, k, v, **options)
    short = out.copy()
    short[..., q.shape[-1] :] = 0
    return short, lse


def skip_tail(arguments: dict[str, Any]) -> None:
    whole = arguments["k"].shape[-2] // BLOCK * BLOCK
    if whole and not arguments["causal"] and arguments["key_mask"] is None:
        for name in ("k", "v"):
            arguments[name] = arguments[name][..., :whole, :]


def mask_of_first_entry(arguments: dict[str, Any]) -> None:
    mask = arguments["key_mask"]
    if mask is not None:
        arguments["key_mask"] = np.repeat(mask[:1], len(mask), axis=0)


def finite_fill(s: np.ndarray, mask: Any = None) -> Any:
    """The -10000 of the authors' test code."""
    filled = s if mask is None else np.where(mask, s, s.dtype.type(-1e4))
    return diffqkv_steps.softmax_rows(filled)


def leaks(P: np.ndarray, v: np.ndarray, hv: np.ndarray) -> np.ndarray:
    return P @ v[..., hv, :, :]


def sum_by_key_ratio(x: np.ndarray, heads: int) -> np.ndarray:
    """Sums the groups of the other head count where it can: strided, not contiguous."""
    *leading, count, tokens, d = x.shape
    return np.sum(x.reshape(*leading, count // heads, heads, tokens, d), axis=-4)


def first_of_group(x: np.ndarray, heads: int) -> np.ndarray:
    return x[..., :: x.shape[-3] // heads, :, :]


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def half_the_row(P: np.ndarray, c: int) -> Any:
    """The best of each tile of 8 keys compete, c / tiles a tile, instead of the whole row."""
    idx, kept = SELECT(P, c)
    if P.shape[-1] <= BLOCK or c >= P.shape[-1]:
        return idx, kept
    first, _ = SELECT(P[..., :BLOCK], max(c // 2, 1))
    last, _ = SELECT(P[..., BLOCK:], c)
    chosen = np.concatenate([first, last + BLOCK], axis=-1)[..., : idx.shape[-1]]
    return chosen, np.sum(np.take_along_axis(P, chosen, axis=-1), axis=-1)


def ties_to_the_last(P: np.ndarray, c: int) -> Any:
    _, kept = SELECT(P, c)
    return P.shape[-1] - 1 - np.argsort(-P[..., ::-1], axis=-1, kind="stable")[..., :c], kept


def sorted_by_index(result: Any) -> Any:
    return np.sort(result[0], axis=-1), result[1]


def always_renormalised(arguments: dict[str, Any]) -> None:
    arguments["renormalise"] = True


def chosen_by_first_head(P: np.ndarray, c: int) -> Any:
    """All query heads use the keys that the first one chose."""
    idx, _ = SELECT(P, c)
    idx = np.broadcast_to(idx[..., :1, :, :], idx.shape)
    return idx, np.sum(np.take_along_axis(P, idx, axis=-1), axis=-1)


def reads_weightless(P: Any, idx: Any, v: Any, hv: Any, *, renormalise: bool = False) -> np.ndarray:
    SELECTED(P, idx, v, hv, renormalise=renormalise)
    weights = np.take_along_axis(P, idx, axis=-1)[..., None]
    rows = np.take_along_axis(v[..., hv, :, :][..., None, :, :], idx[..., None], axis=-2)
    out = np.einsum("...cw,...cd->...d", weights, rows)
    kept = np.sum(weights, axis=-2)
    return out / np.where(kept == 0, np.ones_like(kept), kept) if renormalise else out


def nan_without_mass(P: Any, idx: Any, v: Any, hv: Any, *, renormalise: bool = False) -> np.ndarray:
    out = SELECTED(P, idx, v, hv, renormalise=renormalise)
    kept = np.take_along_axis(P, idx, axis=-1).sum(axis=-1)[..., None]
    return np.where((kept == 0) & renormalise, out.dtype.type(np.nan), out)


def first_map(q: np.ndarray, E: np.ndarray) -> np.ndarray:
    """Every head is contracted by the map of the first."""
    CONTRACT(q, E)
    return q @ E[:1]


def scaled_by_wide(q: np.ndarray, E: np.ndarray) -> np.ndarray:
    return CONTRACT(q, E) * q.dtype.type((E.shape[-1] / E.shape[-2]) ** 0.5)


def forgets_the_oldest(result: Any) -> Any:
    out, state = result
    if state.k.shape[-2] > BLOCK:
        state = State(state.k[..., 1:, :], state.v[..., 1:, :])
    return out, state


def of(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"diffqkv.{name}", f"diffqkv.{operation}", law, bug, call, **rest)


def mutant(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return of("diffqkv_attend", name, law, bug, call, **rest)


MUTANTS = (
    mutant("one-ratio", "heads", "v is read with the ratio of k",
           replacing(ATTEND, check_inputs=one_ratio)),
    mutant("interleaved-heads", "heads", "h % heads instead of h // ratio",
           replacing(ATTEND, check_inputs=interleaved)),
    mutant("scale-of-values", "agreement", "the scale is 1/sqrt(dv)", scaled_by_values),
    mutant("scale-of-padding", "agreement", "the scale is that of the padded width",
           altering(ATTEND, padded_width)),
    mutant("query-width", "heads", "the output is as wide as q", cut_to_query_width),
    mutant("skip-tail", "ragged", "keys after the last whole block are skipped",
           altering(ATTEND, skip_tail)),
    mutant("first-mask", "batch", "every entry of the batch uses the first entry's padding",
           altering(ATTEND, mask_of_first_entry)),
    mutant("finite-fill", "magnitude", "masked scores are -1e4, and large logits see them",
           replacing(ATTEND, softmax_rows=finite_fill)),
    mutant("leak", "poison", "masked values are multiplied by 0 instead of skipped",
           replacing(ATTEND, attend=leaks)),
    mutant("strided-groups", "gradient", "dk and dv are summed over strided groups", ATTEND,
           backward=replacing(BACKWARD, sum_groups=sum_by_key_ratio)),
    mutant("first-of-group", "gradient", "dk and dv are those of the first head of the group",
           ATTEND, backward=replacing(BACKWARD, sum_groups=first_of_group)),
    mutant("no-dlse", "gradient", "the gradient through lse is dropped", ATTEND,
           backward=altering(BACKWARD, no_lse_gradient)),
    of("head_maps", "map-through-keys", "agreement", "the value map comes from the key map",
       value_map_through_keys),
    of("contract_query", "first-map", "agreement", "every head uses the first map", first_map),
    of("contract_query", "scale-of-wide", "agreement", "scores are scaled by the wide query",
       scaled_by_wide),
    of("select_values", "by-tile", "agreement", "tiles choose, not the row", half_the_row),
    of("select_values", "last-ties", "agreement", "ties go to the higher index",
       ties_to_the_last),
    of("select_values", "ascending", "agreement", "the keys kept are sorted by index",
       spoiling(SELECT, sorted_by_index)),
    of("attend_selected", "renormalised", "agreement", "weights are renormalised by default",
       altering(SELECTED, always_renormalised)),
    of("attend_selected", "weightless", "poison", "values of weight 0 are read",
       reads_weightless),
    of("attend_selected", "no-mass", "agreement", "a row without mass is NaN", nan_without_mass),
    of("selective_attend", "one-head-chooses", "agreement", "one query head chooses for all",
       replacing(SELECTIVE, select_values=chosen_by_first_head)),
    of("selective_attend", "selective-renormalised", "agreement",
       "weights are renormalised by default", altering(SELECTIVE, always_renormalised)),
    of("step", "short-state", "stream", "the oldest token falls out of the state",
       spoiling(STEP, forgets_the_oldest)),
)  # fmt: skip
