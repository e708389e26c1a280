"""Wrong selections of DiffQKV's values: half a row, one head for all, values read in vain."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import altering, replacing, right, spoiling
from attnspec.conformance.mutants.heads.diffqkv import BLOCK, of

SELECT = right("diffqkv.select_values")
SELECTED = right("diffqkv.attend_selected")
SELECTIVE = right("diffqkv.selective_attend")


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


def one_chooses_for_a_group(
    P: Any, idx: Any, v: Any, hv: Any, *, renormalise: bool = False
) -> np.ndarray:
    """The query heads that share a value head use the keys that the first of them chose."""
    first = np.searchsorted(hv, hv)
    return SELECTED(P, idx[..., first, :, :], v, hv, renormalise=renormalise)


def reads_weightless(P: Any, idx: Any, v: Any, hv: Any, *, renormalise: bool = False) -> np.ndarray:
    SELECTED(P, idx, v, hv, renormalise=renormalise)
    weights = np.take_along_axis(P, idx, axis=-1)[..., None]
    rows = np.take_along_axis(v[..., hv, :, :][..., None, :, :], idx[..., None], axis=-2)
    out = np.einsum("...cw,...cd->...d", weights, rows)
    kept = np.sum(weights, axis=-2)
    return out / np.where(kept == 0, np.ones_like(kept), kept) if renormalise else out


def reads_unchosen(P: Any, idx: Any, v: Any, hv: Any, *, renormalise: bool = False) -> np.ndarray:
    """Weights that were not chosen are set to 0, and all values are read."""
    SELECTED(P, idx, v, hv, renormalise=renormalise)
    chosen = np.zeros(P.shape, bool)
    np.put_along_axis(chosen, idx, True, axis=-1)
    weights = np.where(chosen, P, np.zeros_like(P))
    kept = np.sum(weights, axis=-1, keepdims=True)
    out = weights @ v[..., hv, :, :]
    return out / np.where(kept == 0, np.ones_like(kept), kept) if renormalise else out


def nan_without_mass(P: Any, idx: Any, v: Any, hv: Any, *, renormalise: bool = False) -> np.ndarray:
    out = SELECTED(P, idx, v, hv, renormalise=renormalise)
    kept = np.take_along_axis(P, idx, axis=-1).sum(axis=-1)[..., None]
    return np.where((kept == 0) & renormalise, out.dtype.type(np.nan), out)


MUTANTS = (
    of("select_values", "by-tile", "agreement", "tiles choose, not the row", half_the_row),
    of("select_values", "last-ties", "agreement", "ties go to the higher index",
       ties_to_the_last),
    of("select_values", "ascending", "agreement", "the keys kept are sorted by index",
       spoiling(SELECT, sorted_by_index)),
    of("attend_selected", "renormalised", "agreement", "weights are renormalised by default",
       altering(SELECTED, always_renormalised)),
    of("attend_selected", "weightless", "poison", "values of weight 0 are read",
       reads_weightless),
    of("attend_selected", "unchosen", "poison", "values that were not chosen are read",
       reads_unchosen),
    of("attend_selected", "no-mass", "agreement", "a row without mass is NaN", nan_without_mass),
    of("selective_attend", "one-head-chooses", "agreement", "one query head chooses for all",
       replacing(SELECTIVE, select_values=chosen_by_first_head)),
    of("selective_attend", "group-chooses", "agreement", "one query head of a group chooses",
       replacing(SELECTIVE, attend_selected=one_chooses_for_a_group)),
    of("selective_attend", "selective-renormalised", "agreement",
       "weights are renormalised by default", altering(SELECTIVE, always_renormalised)),
)  # fmt: skip
