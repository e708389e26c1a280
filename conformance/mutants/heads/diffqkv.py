"""Wrong kernels of DiffQKV attention: one ratio for two maps, a wrong scale, wrong sums."""

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


def values_by_key_group(q: Any, k: Any, v: Any, dout: Any, dlse: Any = None, **options: Any) -> Any:
    """dv of a value head sums as many query heads as share a key head."""
    hk, hv = diffqkv_steps.check_inputs(q, k, v)
    dq, dk, each = BACKWARD(q, k, v[..., hv, :, :], dout, dlse, **options)
    group = len(hk) // k.shape[-3]
    parts = [
        np.sum(each[..., g * group : (g + 1) * group, :, :], axis=-3) for g in range(v.shape[-3])
    ]
    return dq, dk, np.stack(parts, axis=-3)


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def first_map(q: np.ndarray, E: np.ndarray) -> np.ndarray:
    """Every head is contracted by the map of the first."""
    CONTRACT(q, E)
    return q @ E[:1]


def scaled_by_wide(q: np.ndarray, E: np.ndarray) -> np.ndarray:
    return CONTRACT(q, E) * q.dtype.type((E.shape[-1] / E.shape[-2]) ** 0.5)


def all_values(arguments: dict[str, Any]) -> None:
    arguments["c"] = None


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
    mutant("values-by-key-group", "gradient", "dv is summed over the groups of the keys", ATTEND,
           backward=values_by_key_group),
    mutant("no-dlse", "gradient", "the gradient through lse is dropped", ATTEND,
           backward=altering(BACKWARD, no_lse_gradient)),
    of("head_maps", "map-through-keys", "agreement", "the value map comes from the key map",
       value_map_through_keys),
    of("contract_query", "first-map", "agreement", "every head uses the first map", first_map),
    of("contract_query", "scale-of-wide", "agreement", "scores are scaled by the wide query",
       scaled_by_wide),
    of("step", "step-of-all-values", "agreement", "c is not passed on",
       altering(STEP, all_values)),
    of("step", "short-state", "stream", "the oldest token falls out of the state",
       spoiling(STEP, forgets_the_oldest)),
)  # fmt: skip
