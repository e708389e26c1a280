r"""TempScale, the diagnostics: attention as a filter along the tokens, and how embeddings collapse.

An attention matrix averages tokens, so it keeps their common part and shrinks what differs between
them. How much it shrinks is a property of the matrix and can be measured; the longer the text, the
more is lost, layer after layer. Padding tokens are cut off before anything here is computed.

Definition
----------
X (T, c) are T tokens, A (T, T) is an attention matrix whose rows sum to 1, unless a query saw
nothing and its row is 0.

S6. **Split.** :math:`DC[X] = \frac 1 T 1 1^\top X`, the mean token repeated, is the zero frequency
of X along the tokens; :math:`HC[X] = X - DC[X]` is all the others.

S7. **Filter gain.** :math:`\sigma(A)` is the largest singular value of
:math:`(I - 1 1^\top / T) A`. If :math:`A 1 = 1`, then
:math:`\lVert HC[A X] \rVert_F \le \sigma(A) \lVert HC[X] \rVert_F` for every X, and
:math:`\sigma(A_2 A_1) \le \sigma(A_2)\, \sigma(A_1)`. It may exceed 1.

S8. **Retention.** :math:`\rho(A, X) = \lVert HC[A X] \rVert_F / \lVert HC[X] \rVert_F`, of X as it
is; 0 where all tokens of X are equal.

S9. **Spectrum and entropy.** F is the discrete Fourier transform of each column of A along its
rows, :math:`s_f` the mean of :math:`|F_f|` over the columns, and the spectrum is
:math:`s_f / s_0` for f = 0..T//2; 0 if A is 0. A low-pass filter decreases in f. The entropy of a
row of weights is :math:`-\sum_j p_j \ln p_j` with 0 ln 0 = 0.

S10. **Collapse.** Embeddings of texts of similar length: the mean cosine over unordered pairs, a
text with itself left out, and the mean distance to their mean, of the embeddings as they are.
Buckets of different lengths are compared.

S11. **Gaussian logits.** A closed form for :math:`\sigma` that falls with T, with :math:`s^2` the
variance of the logits: :math:`\sqrt{T / (2 \sqrt{1 + e^{-2 s^2}}\,(T - 1)^{3/2} + 1)}`.

Complexity
----------
S7 is :math:`O(T^3)`, by singular values; S9's spectrum is :math:`O(T^3)` as written and
:math:`O(T^2 \log T)` by a fast transform; the others are linear in the size of their input.

Paper and code
--------------
The authors released no code for these: S6 to S10 are exact definitions of what their theory speaks
of. The zeros of S8 and S9, the cosine 0 of a zero vector and a distance of embeddings that are not
brought to length 1 are ours. S11 is unverified, and is no
bound in fact: random Gaussian logits of variance 1 at T = 64 have a gain of 0.34 where it says
0.24. It is here to be reported, not relied on.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size
from attnspec.reference.primitives.entropy import entropy


def dc(X: np.ndarray) -> np.ndarray:
    """S6: the mean token of X (..., T, c), repeated T times.

    >>> dc(np.array([[1.0], [3.0]]))
    array([[2.],
           [2.]])
    """
    _check_tokens("X", X)
    return np.zeros_like(X) + np.mean(X, axis=-2, keepdims=True)


def hc(X: np.ndarray) -> np.ndarray:
    """S6: what differs between the tokens of X (..., T, c), same shape.

    >>> hc(np.array([[1.0], [3.0]]))
    array([[-1.],
           [ 1.]])
    """
    return X - dc(X)


def filter_gain(A: np.ndarray) -> np.ndarray:
    """S7: the gain (...) of attention matrices A (..., T, T) on what differs between tokens.

    >>> filter_gain(np.stack([np.eye(4), np.full((4, 4), 0.25)])).round(6)
    array([1., 0.])
    """
    _check_square(A)
    centred = hc(A)
    wide = centred.astype(np.promote_types(A.dtype, np.float32))
    return np.linalg.svd(wide, compute_uv=False)[..., 0].astype(A.dtype)


def retention(A: np.ndarray, X: np.ndarray) -> np.ndarray:
    """S8: the share (...) of what differs between tokens X (..., T, c) that A (..., T, T) keeps.

    >>> retention(np.array([[0.75, 0.25], [0.25, 0.75]]), np.array([[1.0], [3.0]]))
    array(0.5)
    """
    _check_square(A)
    _check_tokens("X", X)
    if X.dtype != A.dtype:
        raise TypeError(f"X: got dtype {X.dtype}, expected {A.dtype}, as A")
    if X.shape[:-2] != A.shape[:-2]:
        raise ValueError(f"X: got leading axes {X.shape[:-2]}, expected {A.shape[:-2]}, as A")
    check_size("X", X.shape[-2], A.shape[-1], "T, as in A")
    # The mean of equal numbers may be off by rounding, so HC[X] = 0 is told from X itself.
    constant = np.all(X[..., :1, :] == X, axis=(-2, -1))
    before, after = _frobenius(hc(X)), _frobenius(hc(A @ X))
    kept = after / np.where(constant, np.ones_like(before), before)
    return np.where(constant, np.zeros_like(kept), kept)


def token_spectrum(A: np.ndarray) -> np.ndarray:
    """S9: relative magnitudes (..., T//2 + 1) of the frequencies along the rows of A (..., T, T).

    >>> token_spectrum(np.stack([np.eye(4), np.full((4, 4), 0.25)])).round(6)
    array([[1., 1., 1.],
           [1., 0., 0.]])
    """
    _check_square(A)
    T = A.shape[-1]
    turns = np.outer(np.arange(T // 2 + 1), np.arange(T)) % T / T
    real = np.cos(2 * np.pi * turns).astype(A.dtype) @ A
    imaginary = np.sin(2 * np.pi * turns).astype(A.dtype) @ A
    s = np.mean(np.hypot(real, imaginary), axis=-1)
    constant = s[..., :1]
    return s / np.where(constant == 0, np.ones_like(constant), constant)


def attention_entropy(P: np.ndarray) -> np.ndarray:
    """S9: the entropy (..., q_tokens), natural, of each row of weights P (..., q_tokens, k_tokens).

    >>> attention_entropy(np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])).round(4)
    array([0.6931, 0.    ])
    """
    check_array("P", P, ("q_tokens", "k_tokens"))
    if np.any(P < 0):
        raise ValueError(f"P: got {P.min()}, expected weights >= 0")
    return entropy(P)


def pairwise_cosine(E: np.ndarray) -> np.ndarray:
    """S10: the mean cosine (...) over the pairs i < j of embeddings E (..., texts, c).

    ValueError for fewer than two texts. A zero vector has cosine 0 with all others.

    >>> pairwise_cosine(np.array([[[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]]])).round(4)
    array([0.3333])
    """
    check_array("E", E, ("texts", "c"))
    texts = E.shape[-2]
    if texts < 2:
        raise ValueError(f"E: got {texts} texts, expected at least 2")
    length = np.sqrt(np.sum(E * E, axis=-1, keepdims=True))
    unit = E / np.where(length == 0, np.ones_like(length), length)
    first, second = np.triu_indices(texts, 1)
    return np.mean((unit @ np.swapaxes(unit, -1, -2))[..., first, second], axis=-1)


def centre_distance(E: np.ndarray) -> np.ndarray:
    """S10: the mean distance (...) of embeddings E (..., texts, c) to their mean.

    >>> centre_distance(np.array([[[1.0, 0.0], [3.0, 0.0]]]))
    array([1.])
    """
    check_array("E", E, ("texts", "c"))
    if E.shape[-2] < 1:
        raise ValueError("E: got 0 texts, expected at least 1")
    away = hc(E)
    return np.mean(np.sqrt(np.sum(away * away, axis=-1)), axis=-1)


def gaussian_gain(T: int, variance: float) -> float:
    """S11: the closed form for `T` tokens and Gaussian logits of a `variance`; unverified.

    >>> round(gaussian_gain(64, 1.0), 2)
    0.24
    """
    check_integer("T", T, least=2)
    if not variance >= 0:
        raise ValueError(f"variance: got {variance!r}, expected a number >= 0")
    return math.sqrt(T / (2 * math.sqrt(1 + math.exp(-2 * variance)) * (T - 1) ** 1.5 + 1))


def _frobenius(X: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(X * X, axis=(-2, -1)))


def _check_tokens(name: str, X: Any) -> None:
    check_array(name, X, ("T", "c"))
    if X.shape[-2] < 1:
        raise ValueError(f"{name}: got 0 tokens, expected at least 1")


def _check_square(A: Any) -> None:
    _check_tokens("A", A)
    check_size("A", A.shape[-2], A.shape[-1], "as many rows as columns")
