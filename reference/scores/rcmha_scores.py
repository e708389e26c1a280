"""The scores of RCMHA (S3, S4): content with its bias, distances with theirs, and the shift."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size
from attnspec.reference.scores.rcmha_steps import check_like


def relative_shift(Bmat: np.ndarray) -> np.ndarray:
    """S4: (..., T, S) with result[i, j] = Bmat[i, T + j - i], of Bmat (..., T, S + T).

    A column of zeros on the right, all numbers in a row, the last T of them dropped, read as
    (T, S + T): its last S columns. Exact for j - M > i too.

    >>> relative_shift(np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]))
    array([[2., 3.],
           [5., 6.]])
    """
    check_array("Bmat", Bmat, ("T", "S + T"))
    T, columns = Bmat.shape[-2:]
    if columns < 2 * T:
        raise ValueError(f"Bmat: got {columns} columns, expected at least 2 T = {2 * T}")
    padded = np.concatenate([Bmat, np.zeros_like(Bmat[..., :1])], axis=-1)
    flat = padded.reshape(*Bmat.shape[:-2], T * (columns + 1))
    return flat[..., : T * columns].reshape(Bmat.shape)[..., T:]


def check_heads(name: str, x: np.ndarray, q: np.ndarray) -> None:
    """K14: keys or values (..., heads, S, width) for queries q (..., heads, T, dk)."""
    check_array(name, x, ("heads", "S", "width"))
    check_like(name, x, q, (*q.shape[:-2], *x.shape[-2:]))


def check_tokens(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """K14: q of T tokens, k and v of at least as many, S."""
    check_array("q", q, ("heads", "T", "dk"))
    check_heads("k", k, q)
    check_heads("v", v, q)
    T, S = q.shape[-2], k.shape[-2]
    if S < T:
        raise ValueError(f"k: got {S} tokens, expected at least the {T} of q")
    check_size("v", v.shape[-2], S, "S tokens, as in k")


def content_scores(q: np.ndarray, u: np.ndarray, k: np.ndarray) -> np.ndarray:
    """S3: (q_i + u) . k_j, unscaled, (..., heads, T, S).

    q (..., heads, T, dk), u (heads, dk), k (..., heads, S, dk).

    >>> content_scores(np.ones((1, 1, 2)), np.array([[0.0, 1.0]]), np.ones((1, 1, 2)))
    array([[[3.]]])
    """
    check_array("q", q, ("heads", "T", "dk"))
    check_like("u", u, q, (q.shape[-3], q.shape[-1]))
    check_heads("k", k, q)
    check_size("k", k.shape[-1], q.shape[-1], "dk, as in q")
    return (q + u[:, None]) @ np.swapaxes(k, -1, -2)


def check_tables(q: np.ndarray, R: np.ndarray, b: np.ndarray, M: int) -> int:
    """S3, K14: tables R (2 P, heads, dk) and b (2 P, heads), P at least M + T; returns P."""
    check_array("q", q, ("heads", "T", "dk"))
    check_array("R", R, ("2 P", "heads", "dk"))
    check_like("R", R, q, (R.shape[0], q.shape[-3], q.shape[-1]))
    check_integer("M", M, least=0)
    P, S = R.shape[0] // 2, M + q.shape[-2]
    if R.shape[0] % 2 or S > P:
        raise ValueError(
            f"R: got {R.shape[0]} rows, expected 2 P of them with P >= M + T = {S} tokens"
        )
    check_like("b", b, q, (R.shape[0], q.shape[-3]))
    return P


def relative_scores(q: np.ndarray, R: np.ndarray, b: np.ndarray, M: int) -> np.ndarray:
    """S3, S4: q_i . R_r + b_r at r = P + (j - M) - i, unscaled, (..., heads, T, M + T).

    q (..., heads, T, dk), R (2 P, heads, dk), b (2 P, heads), `M` tokens of memory before the T.

    >>> R, b = np.arange(4.0).reshape(4, 1, 1), np.array([[0.0], [0.5], [0.0], [0.0]])
    >>> relative_scores(np.ones((1, 2, 1)), R, b, 0)
    array([[[2. , 3. ],
            [1.5, 2. ]]])
    """
    P = check_tables(q, R, b, M)
    T = q.shape[-2]
    rows = slice(P - (M + T), P + T)
    table = np.swapaxes(R[rows], 0, 1)
    return relative_shift(q @ np.swapaxes(table, -1, -2) + np.swapaxes(b[rows], 0, 1)[:, None])
