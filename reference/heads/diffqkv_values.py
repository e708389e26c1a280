"""DiffQKV's selective values: which are kept, what they give, what must be read (S7, S8).

The clauses are those of `diffqkv`.

Paper and code
--------------
- Whether selected weights are renormalised is not stated where we read it. The default, not to, is
  ours: it makes c = k_tokens the limit of smaller c, and the error bound hold. Recalled, not
  verified: c = 100 in an ablation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size


def select_values(P: np.ndarray, c: int) -> tuple[np.ndarray, np.ndarray]:
    """S7: the keys kept, int64 (..., q_tokens, min(c, k_tokens)), and their mass (..., q_tokens).

    P (..., q_tokens, k_tokens) are the weights of whole rows. By descending weight, equal ones by
    index. ValueError unless c >= 1.

    >>> select_values(np.array([[0.2, 0.5, 0.2, 0.1]]), 2)
    (array([[1, 0]]), array([0.7]))
    """
    check_array("P", P, ("q_tokens", "k_tokens"))
    check_integer("c", c, least=1)
    idx = np.argsort(-P, axis=-1, kind="stable")[..., :c]
    return idx, np.sum(np.take_along_axis(P, idx, axis=-1), axis=-1)


def attend_selected(
    P: np.ndarray,
    idx: np.ndarray,
    v: np.ndarray,
    hv: np.ndarray,
    *,
    renormalise: bool = False,
) -> np.ndarray:
    """S7: outputs (..., heads, q_tokens, dv) from the kept values alone.

    P (..., heads, q_tokens, k_tokens), idx (..., heads, q_tokens, c), v (..., v_heads, k_tokens,
    dv), hv (heads,). A row whose kept mass is 0 gives 0.

    >>> P, v = np.array([[[0.25, 0.75]]]), np.array([[[8.0], [4.0]]])
    >>> attend_selected(P, np.array([[[1]]]), v, np.array([0]))
    array([[[3.]]])
    """
    check_array("P", P, ("heads", "q_tokens", "k_tokens"))
    check_array("idx", idx, ("heads", "q_tokens", "c"), dtype="int")
    check_array("v", v, ("v_heads", "k_tokens", "dv"))
    if v.dtype != P.dtype:
        raise TypeError(f"v: got dtype {v.dtype}, expected {P.dtype}, as P")
    check_size("v", v.shape[-2], P.shape[-1], "k_tokens, as in P")
    check_map("hv", hv, P.shape[-3], v.shape[-3])
    if idx.shape[:-1] != P.shape[:-1]:
        raise ValueError(f"idx: got shape {idx.shape}, expected {(*P.shape[:-1], 'c')}")
    if idx.size and (idx.min() < 0 or idx.max() >= P.shape[-1]):
        raise ValueError(f"idx: got {idx.min()}..{idx.max()}, expected 0..{P.shape[-1] - 1}")
    weights = np.take_along_axis(P, idx, axis=-1)[..., None]
    rows = np.take_along_axis(v[..., hv, :, :][..., None, :, :], idx[..., None], axis=-2)
    rows = np.where(weights == 0, np.zeros_like(rows), rows)
    out = np.einsum("...cw,...cd->...d", weights, rows)
    if not renormalise:
        return out
    kept = np.sum(weights, axis=-2)
    return out / np.where(kept == 0, np.ones_like(kept), kept)


def union_indices(idx: np.ndarray, hv: np.ndarray) -> list[list[np.ndarray]]:
    """S8: for each batch entry and value head the keys whose values must be read, ascending.

    idx int (batch, heads, q_tokens, c), hv (heads,): the union over the heads of a group and all
    rows.

    >>> union_indices(np.array([[[[3, 0]], [[5, 3]]]]), np.array([0, 0]))
    [[array([0, 3, 5])]]
    """
    check_array("idx", idx, ("batch", "heads", "q_tokens", "c"), dtype="int")
    check_map("hv", hv, idx.shape[1], None)
    heads = int(hv.max()) + 1
    return [[np.unique(entry[hv == g]) for g in range(heads)] for entry in idx]


def cache_bytes(Hk: int, dk: int, Hv: int, dv: int, itemsize: int, S: int) -> int:
    """S8: bytes of the cache of one sequence of S tokens, numbers of `itemsize` bytes.

    Hk key heads are dk wide, Hv value heads dv.

    >>> cache_bytes(4, 128, 16, 128, 2, 1) / cache_bytes(16, 128, 16, 128, 2, 1)
    0.625
    """
    sizes = {"Hk": Hk, "dk": dk, "Hv": Hv, "dv": dv, "itemsize": itemsize}
    for name, size in sizes.items():
        check_integer(name, size, least=1)
    check_integer("S", S, least=0)
    return S * itemsize * (Hk * dk + Hv * dv)


def check_map(name: str, heads_map: Any, heads: int, sources: int | None) -> None:
    """S1, K14: an int map (heads,) into `sources` heads, or any number of them if None.

    >>> check_map("hv", np.array([0, 2]), 2, 2)
    Traceback (most recent call last):
    ValueError: hv: got [0, 2], expected 2 heads out of 0..1
    """
    check_array(name, heads_map, ("heads",), dtype="int")
    inside = heads_map.size and heads_map.min() >= 0
    if sources is not None:
        inside = inside and heads_map.max() < sources
    if heads_map.shape != (heads,) or not inside:
        limit = "0.." if sources is None else f"0..{sources - 1}"
        got = heads_map.tolist()
        raise ValueError(f"{name}: got {got}, expected {heads} heads out of {limit}")
