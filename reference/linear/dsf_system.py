"""Systems of `dsf`: their matrix, their gauge freedom, the gradient of their scan.

Clauses S2, S3 and S16 are those of `dsf`.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_array, check_shaped, check_size
from attnspec.reference.linear.dsf_recurrence import (
    check_given,
    elementwise_scan,
    elementwise_scan_backward,
)


def dsf_scan_backward(
    Lam: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None,
    u: np.ndarray,
    h0: np.ndarray | None,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
) -> tuple[np.ndarray | None, ...]:
    """S16: dLam, dB, dC, dD, du, dh0 of `dsf_scan`; None where the argument was None.

    dy (..., T, dv) and dh (..., N), or None, are the gradients of its outputs.

    >>> one = np.ones((1, 1))
    >>> [float(g.squeeze()) for g in dsf_scan_backward(
    ...     one, 2 * one[..., None], 3 * one[..., None], one[..., None], one, one[0], one)]
    [3.0, 3.0, 3.0, 1.0, 7.0, 3.0]
    >>> [float(g.squeeze()) for g in dsf_scan_backward(
    ...     one, 2 * one[..., None], 3 * one[..., None], None, one, one[0], one, one[0])
    ...     if g is not None]
    [4.0, 4.0, 3.0, 8.0, 4.0]
    """
    check_shaped("dy", dy, u.shape)
    dh = check_given("dh", dh, (*Lam.shape[:-2], Lam.shape[-1]))
    x = np.einsum("...nv,...v->...n", B, u)
    states, _ = elementwise_scan(Lam, x, h0)
    dstates = np.einsum("...vn,...v->...n", C, dy)
    dLam, dx, dh0 = elementwise_scan_backward(Lam, x, h0, dstates, dh)
    dB = np.einsum("...n,...v->...nv", dx, u)
    dC = np.einsum("...v,...n->...vn", dy, states)
    du = np.einsum("...nv,...n->...v", B, dx)
    dD = None
    if D is not None:
        dD = np.einsum("...w,...v->...wv", dy, u)
        du = du + np.einsum("...wv,...w->...v", D, dy)
    return dLam, dB, dC, dD, du, dh0


def dsf_matrix(
    Lam: np.ndarray, B: np.ndarray, C: np.ndarray, D: np.ndarray | None = None
) -> np.ndarray:
    """S2: Phi (..., T, T, dv, dv), the outputs' tokens first.

    >>> one = np.ones((3, 1))
    >>> dsf_matrix(one / 2, one[..., None], one[..., None])[..., 0, 0]
    array([[1.  , 0.  , 0.  ],
           [0.5 , 1.  , 0.  ],
           [0.25, 0.5 , 1.  ]])
    """
    check_system(Lam, B, C, D)
    *leading, T, _, dv = B.shape
    Phi = np.zeros_like(B, shape=(*leading, T, T, dv, dv))
    for j in range(T):
        reached = B[..., j, :, :]
        for i in range(j, T):
            if i > j:
                reached = Lam[..., i, :, None] * reached
            Phi[..., i, j, :, :] = C[..., i, :, :] @ reached
        if D is not None:
            Phi[..., j, j, :, :] += D[..., j, :, :]
    return Phi


def gauge(
    Lam: np.ndarray, B: np.ndarray, C: np.ndarray, T: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S3: Lam, B, C of the state T h; T (..., T, N) has no zeros and counts as 1 before token 0.

    >>> one = np.ones((2, 1))
    >>> [x.ravel() for x in gauge(one, one[..., None], one[..., None], np.array([[2.0], [8.0]]))]
    [array([2., 4.]), array([2., 8.]), array([0.5  , 0.125])]
    """
    check_system(Lam, B, C, None)
    check_shaped("T", T, Lam.shape)
    if np.any(T == 0):
        raise ValueError("T: got a 0, expected numbers that can be divided by")
    before = np.concatenate([np.ones_like(T[..., :1, :]), T[..., :-1, :]], axis=-2)
    before = before[..., : T.shape[-2], :]
    return T * Lam / before, T[..., None] * B, C / T[..., None, :]


def check_system(Lam: np.ndarray, B: np.ndarray, C: np.ndarray, D: np.ndarray | None) -> None:
    """S1, K14: the matrices of a system fit one another.

    >>> check_system(np.ones((3, 2)), np.ones((3, 1, 1)), np.ones((3, 1, 2)), None)
    Traceback (most recent call last):
    ValueError: B: got 1, expected 2 (N, as in Lam)
    """
    check_array("Lam", Lam, ("T", "N"))
    check_array("B", B, ("T", "N", "dv"))
    check_size("B", B.shape[-2], Lam.shape[-1], "N, as in Lam")
    check_shaped("B", B, (*Lam.shape, B.shape[-1]))
    check_shaped("C", C, (*Lam.shape[:-1], B.shape[-1], Lam.shape[-1]))
    if D is not None:
        check_shaped("D", D, (*Lam.shape[:-1], B.shape[-1], B.shape[-1]))
