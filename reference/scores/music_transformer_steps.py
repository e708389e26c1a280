"""The steps of relative attention (S1-S7): tables, skewing, logits and their gradients."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_bool,
    check_integer,
    check_scale,
    check_size,
    default_scale,
    repeat_heads,
)
from attnspec.reference.scores.music_transformer_checks import (
    check_dtype,
    check_local_rows,
    check_rows,
    check_self,
    check_square,
    check_table,
)


def relative_table_slice(
    E: np.ndarray, L: int, causal: bool = True, clip: bool = False
) -> np.ndarray:
    """S1: the rows for L tokens: (..., L, d), or (..., 2 L - 1, d) without a causal order.

    E (..., M, d) ends with distance 0, or (..., 2 M - 1, d) has it in the middle. What is missing
    is 0, or with `clip` the farthest row there is; what is too much is cut, at the far end or both.

    >>> relative_table_slice(np.array([[2.0], [1.0]]), 3).ravel()
    array([0., 2., 1.])
    >>> relative_table_slice(np.array([[2.0], [1.0], [3.0]]), 1, causal=False).ravel()
    array([1.])
    """
    check_array("E", E, ("rows", "d"))
    check_integer("L", L, least=1)
    check_bool("causal", causal)
    check_bool("clip", clip)
    check_rows("E", E, causal)
    rows = E.shape[-2]
    zero = rows - 1 if causal else rows // 2
    index = zero + np.arange(1 - L, 1 if causal else L)
    there = (index >= 0) & (index < rows) | bool(clip)
    kept = E[..., np.clip(index, 0, rows - 1), :]
    return np.where(there[:, None], kept, np.zeros_like(kept))


def relative_logits(qs: np.ndarray, Eused: np.ndarray) -> np.ndarray:
    """S2: R (..., heads, L, rows) of scaled queries (..., heads, L, d) with every row of a table.

    >>> relative_logits(np.ones((1, 1, 2)), np.array([[1.0, 2.0]]))
    array([[[3.]]])
    """
    check_array("qs", qs, ("heads", "L", "d"))
    check_table("Eused", Eused, qs.shape[-3], qs.shape[-1], causal=True)
    check_dtype("Eused", Eused, qs, "qs")
    return qs @ np.swapaxes(Eused, -1, -2)


def skew(R: np.ndarray) -> np.ndarray:
    """S3: S (..., L, L) with S[i, j] = R[i, L - 1 - (i - j)] for j <= i; the rest is meaningless.

    One zero column on the left, the whole read row by row as (L + 1, L), its first row dropped.

    >>> skew(np.array([[1.0, 2.0], [3.0, 4.0]]))
    array([[2., 0.],
           [3., 4.]])
    """
    check_square("R", R)
    L = R.shape[-1]
    padded = np.concatenate([np.zeros_like(R[..., :1]), R], axis=-1)
    return padded.reshape(*R.shape[:-2], L + 1, L)[..., 1:, :]


def unskew(S: np.ndarray) -> np.ndarray:
    """S3: the inverse of `skew`: R (..., L, L) with R[i, L - 1 - (i - j)] = S[i, j] for j <= i.

    >>> unskew(np.array([[2.0, 0.0], [3.0, 4.0]]))
    array([[0., 2.],
           [3., 4.]])
    """
    check_square("S", S)
    L = S.shape[-1]
    padded = np.concatenate([np.zeros_like(S[..., :1, :]), S], axis=-2)
    return padded.reshape(*S.shape[:-2], L, L + 1)[..., 1:]


def skew_full(R: np.ndarray) -> np.ndarray:
    """S4: S (..., L, L) with S[i, j] = R[i, L - 1 + (j - i)], of R (..., L, 2 L - 1).

    >>> skew_full(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    array([[2., 3.],
           [4., 5.]])
    """
    check_array("R", R, ("L", "columns"))
    L = R.shape[-2]
    check_size("R", R.shape[-1], max(2 * L - 1, 0), "columns, 2 L - 1")
    if L == 0:
        return R
    flat = np.concatenate([R, np.zeros_like(R[..., :1])], axis=-1).reshape(*R.shape[:-2], -1)
    flat = np.concatenate([flat, np.zeros_like(flat[..., : L - 1])], axis=-1)
    return flat.reshape(*R.shape[:-2], L + 1, 2 * L - 1)[..., :L, L - 1 :]


def relative_logits_gather(
    qs: np.ndarray, E: np.ndarray, L: int, causal: bool = True
) -> np.ndarray:
    """S2: the relative logits (..., heads, L, L) looked up pair by pair, without skewing.

    Distances that the table lacks, and in the causal order negative ones, give 0.

    >>> relative_logits_gather(np.ones((1, 2, 1)), np.array([[5.0], [3.0]]), 2)
    array([[[3., 0.],
            [5., 3.]]])
    """
    check_array("qs", qs, ("heads", "L", "d"))
    check_integer("L", L, least=0)
    check_size("qs", qs.shape[-2], L, "L tokens")
    check_bool("causal", causal)
    check_table("E", E, qs.shape[-3], qs.shape[-1], causal)
    check_dtype("E", E, qs, "qs")
    zero = E.shape[-2] - 1 if causal else E.shape[-2] // 2
    index = zero + np.arange(L)[None, :] - np.arange(L)[:, None]
    there = (index >= 0) & (index < E.shape[-2])
    pairs = E[..., np.clip(index, 0, E.shape[-2] - 1), :]
    pairs = np.where(there[..., None], pairs, np.zeros_like(pairs))
    return np.einsum("...id,...ijd->...ij", qs, pairs)


def global_logits(
    q: np.ndarray,
    k: np.ndarray,
    E: np.ndarray,
    scale: float | None = None,
    causal: bool = True,
) -> np.ndarray:
    """S2-S4: logits (..., heads, L, L); in the causal order those with j > i are to be masked.

    q (..., heads, L, d), k (..., kv_heads, L, d); E (heads, M or 2 M - 1, d), or without its first
    axis if shared. The scale multiplies both terms.

    >>> x = np.ones((1, 2, 1))
    >>> global_logits(x, x, np.array([[5.0], [3.0]]))[0, 1]
    array([6., 4.])
    """
    check_self("k", q, k)
    check_scale(scale)
    check_bool("causal", causal)
    check_table("E", E, q.shape[-3], q.shape[-1], causal)
    check_dtype("E", E, q, "q")
    qs = (default_scale(q.shape[-1]) if scale is None else scale) * q
    content = qs @ np.swapaxes(repeat_heads(k, q.shape[-3]), -1, -2)
    if q.shape[-2] == 0:
        return content
    R = relative_logits(qs, relative_table_slice(E, q.shape[-2], causal))
    return content + (skew(R) if causal else skew_full(R))


def local_visibility(L: int, b: int) -> np.ndarray:
    """S5: bool (L, L): the keys up to a query in its own block of `b` and in the one before.

    Fewer than 2 b tokens are one block.

    >>> local_visibility(4, 1).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 1, 1, 0],
           [0, 0, 1, 1]])
    """
    check_integer("L", L, least=0)
    check_integer("b", b, least=1)
    i, j = np.arange(L)[:, None], np.arange(L)[None, :]
    return (j <= i) & ((j // b >= i // b - 1) | (2 * b > L))


def local_logits(
    q: np.ndarray, k: np.ndarray, E: np.ndarray, b: int, scale: float | None = None
) -> np.ndarray:
    """S5: logits (..., heads, L, L) computed block by block, -inf where nothing is seen.

    Arguments as in `global_logits`; the last row of E is distance 0, and min(2 b, L) rows are
    needed, of the 4 b that the authors keep.

    >>> x = np.ones((1, 3, 1))
    >>> local_logits(x, x, np.array([[5.0], [3.0]]), 1)[0]
    array([[  4., -inf, -inf],
           [  6.,   4., -inf],
           [-inf,   6.,   4.]])
    """
    check_self("k", q, k)
    check_scale(scale)
    check_table("E", E, q.shape[-3], q.shape[-1], causal=True)
    check_dtype("E", E, q, "q")
    L = q.shape[-2]
    seen = local_visibility(L, b)
    check_local_rows("E", E, L, b)
    logits = np.full_like(q, -np.inf, shape=(*q.shape[:-1], L))
    block = L if 2 * b > L else b
    for first in range(0, L, max(block, 1)):
        low, stop = max(first - block, 0), min(first + block, L)
        # Queries from the block before are not needed, but skewing wants a square.
        inside = global_logits(q[..., low:stop, :], k[..., low:stop, :], E, scale)
        logits[..., first:stop, low:stop] = inside[..., first - low :, :]
    return np.where(seen, logits, np.full_like(logits, -np.inf))


def decode_relative(
    q_row: np.ndarray, E: np.ndarray, n_keys: int, scale: float | None = None
) -> np.ndarray:
    """S6: the newest query's relative logits (..., heads, n_keys), the oldest key first.

    q_row (..., heads, d), not yet scaled, stands at the position of the last key. Positions are
    relative: keys that are seen no more may leave the cache.

    >>> decode_relative(np.ones((1, 1)), np.array([[5.0], [3.0]]), 3)
    array([[0., 5., 3.]])
    """
    check_array("q_row", q_row, ("heads", "d"))
    check_integer("n_keys", n_keys, least=1)
    check_scale(scale)
    check_table("E", E, q_row.shape[-2], q_row.shape[-1], causal=True)
    check_dtype("E", E, q_row, "q_row")
    qs = (default_scale(q_row.shape[-1]) if scale is None else scale) * q_row
    return relative_logits(qs[..., None, :], relative_table_slice(E, n_keys))[..., 0, :]


def table_gradient(dlogits: np.ndarray, qs: np.ndarray, M: int, causal: bool = True) -> np.ndarray:
    """S8: dE (heads, M or 2 M - 1, d), summed over the leading axes; a shared table's is its sum.

    Row r gets the sum over pairs at its distance of dlogits (..., heads, L, L), 0 where hidden,
    times qs (..., heads, L, d).

    >>> table_gradient(np.array([[[1.0, 0.0], [2.0, 1.0]]]), np.array([[[1.0], [3.0]]]), 2)
    array([[[6.],
            [4.]]])
    """
    check_array("dlogits", dlogits, ("heads", "L", "L"))
    check_array("qs", qs, ("heads", "L", "d"))
    check_integer("M", M, least=1)
    L = qs.shape[-2]
    if dlogits.shape != (*qs.shape[:-1], L):
        raise ValueError(f"dlogits: got shape {dlogits.shape}, expected {(*qs.shape[:-1], L)}")
    check_dtype("dlogits", dlogits, qs, "qs")
    check_bool("causal", causal)
    rows, zero = (M, M - 1) if causal else (2 * M - 1, M - 1)
    index = zero + np.arange(L)[None, :] - np.arange(L)[:, None]
    hit = (index[..., None] == np.arange(rows)).astype(qs.dtype)
    per_pair = np.einsum("...ij,ijr->...ri", dlogits, hit)
    return np.sum((per_pair @ qs).reshape(-1, qs.shape[-3], rows, qs.shape[-1]), axis=0)
