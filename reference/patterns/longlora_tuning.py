"""What LongLoRA trains: adapters beside frozen weights, norms, embeddings; and its positions.

The clauses are those of `longlora`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_shaped, check_size
from attnspec.reference.primitives.rms_norm import rms_norm, rms_norm_backward

ADAPTER = "lora_"


def lora_forward(
    x: np.ndarray,
    W: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    alpha: float = 16.0,
    *,
    keep: np.ndarray | None = None,
    dropout: float = 0.0,
) -> np.ndarray:
    """S8: y (..., n_out) of x (..., n_in), frozen W (n_out, n_in), A (r, n_in) and B (n_out, r).

    `keep` bool, shaped as x, says which entries the adapter's `dropout` leaves; these are scaled by
    1 / (1 - dropout). The frozen part sees all of x.

    >>> x, W, A, B = np.ones((1, 2)), np.eye(2), np.ones((1, 2)), np.array([[0.0], [1.0]])
    >>> lora_forward(x, W, A, B, 2.0)
    array([[1., 5.]])
    """
    _check_adapter(W, A, B, alpha)
    _check_input(x, W, keep, dropout)
    low = _dropped(x, keep, dropout) @ np.swapaxes(A, -1, -2)
    return x @ np.swapaxes(W, -1, -2) + (alpha / A.shape[0]) * (low @ np.swapaxes(B, -1, -2))


def lora_backward(
    x: np.ndarray,
    W: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    alpha: float,
    dout: np.ndarray,
    *,
    keep: np.ndarray | None = None,
    dropout: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S9: gradients dx, dA, dB, shaped as x, A, B, given dout (..., n_out).

    >>> x, W, A, B = np.ones((1, 2)), np.eye(2), np.ones((1, 2)), np.array([[0.0], [1.0]])
    >>> dx, dA, dB = lora_backward(x, W, A, B, 2.0, np.array([[0.0, 1.0]]))
    >>> dx, dA, dB.ravel()
    (array([[2., 3.]]), array([[2., 2.]]), array([0., 4.]))
    """
    _check_adapter(W, A, B, alpha)
    _check_input(x, W, keep, dropout)
    check_shaped("dout", dout, (*x.shape[:-1], W.shape[0]))
    s = alpha / A.shape[0]
    rows, upstream = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
    kept = None if keep is None else keep.reshape(rows.shape)
    dropped, low_gradient = _dropped(rows, kept, dropout), upstream @ B
    dB = s * (np.swapaxes(upstream, -1, -2) @ (dropped @ np.swapaxes(A, -1, -2)))
    dA = s * (np.swapaxes(low_gradient, -1, -2) @ dropped)
    dx = upstream @ W + s * _dropped(low_gradient @ A, kept, dropout)
    return dx.reshape(x.shape), dA, dB


def lora_merge(W: np.ndarray, A: np.ndarray, B: np.ndarray, alpha: float = 16.0) -> np.ndarray:
    """S8: W + alpha / r B A, a new array (n_out, n_in).

    >>> lora_merge(np.eye(2), np.ones((1, 2)), np.array([[0.0], [1.0]]), 2.0)
    array([[1., 0.],
           [2., 3.]])
    """
    _check_adapter(W, A, B, alpha)
    return W + (alpha / A.shape[0]) * (B @ A)


def is_trained(name: str, trainable_params: str = "embed,norm") -> bool:
    """S10: whether the parameter called `name` is trained: an adapter's, or one listed.

    >>> [is_trained(n) for n in ("q_proj.weight", "q_proj.lora_A", "input_layernorm.weight")]
    [False, True, True]
    """
    for argument, text in (("name", name), ("trainable_params", trainable_params)):
        if not isinstance(text, str):
            raise TypeError(f"{argument}: got {type(text).__name__}, expected a string")
    parts = [part.strip() for part in trainable_params.split(",")]
    return any(part in name for part in (ADAPTER, *parts) if part)


def rmsnorm(x: np.ndarray, w: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """S10: x (..., D) by its root mean square, times w (D,).

    >>> rmsnorm(np.array([3.0, 4.0]), np.ones(2), 0.0).round(3)
    array([0.849, 1.131])
    """
    _check_norm(x, w, eps)
    return rms_norm(x, w, eps)


def rmsnorm_backward(
    x: np.ndarray, w: np.ndarray, dout: np.ndarray, eps: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """S10: gradients dx (..., D) and dw (D,) of `rmsnorm`, given dout (..., D).

    >>> dx, dw = rmsnorm_backward(np.array([1.0, -1.0]), np.ones(2), np.array([1.0, 0.0]), 0.0)
    >>> dx, dw
    (array([0.5, 0.5]), array([1., 0.]))
    """
    _check_norm(x, w, eps)
    check_shaped("dout", dout, x.shape)
    return rms_norm_backward(x, w, eps, dout)


def embedding_backward(ids: np.ndarray, dout: np.ndarray, vocab: int) -> np.ndarray:
    """S10: dE (vocab, D): for each token of the vocabulary the sum of dout (..., D) over its uses.

    `ids` int (...), 0 <= ids < vocab.

    >>> embedding_backward(np.array([2, 0, 2]), np.array([[1.0], [2.0], [3.0]]), 4).ravel()
    array([2., 0., 4., 0.])
    """
    check_array("ids", ids, (), dtype="int")
    check_array("dout", dout, ("D",))
    check_integer("vocab", vocab, least=1)
    if dout.shape[:-1] != ids.shape:
        raise ValueError(f"dout: got shape {dout.shape}, expected {(*ids.shape, 'D')}, as ids")
    if np.any((ids < 0) | (ids >= vocab)):
        raise ValueError(f"ids: got {ids.min()} to {ids.max()}, expected 0 to {vocab - 1}")
    rows, tokens = dout.reshape(-1, dout.shape[-1]), ids.reshape(-1)
    return np.stack([np.sum(rows[tokens == n], axis=0) for n in range(vocab)])


def interpolation_factor(new_len: int, orig_len: int, rope_factor: float = 1.0) -> float:
    """S11: what positions are divided by, for texts of `new_len` tokens.

    `orig_len` tokens is what the model knows, times the `rope_factor` it already has.

    >>> interpolation_factor(32768, 4096), interpolation_factor(9000, 4096, 2.0)
    (8.0, 2.0)
    """
    check_integer("new_len", new_len, least=1)
    check_integer("orig_len", orig_len, least=1)
    _check_positive("rope_factor", rope_factor)
    return float(math.ceil(new_len / (orig_len * rope_factor)))


def interpolate_positions(pos: np.ndarray, factor: float) -> np.ndarray:
    """S11: positions pos (...) to rotate by, divided; whole ones come back as float64.

    >>> interpolate_positions(np.array([0, 1, 8]), 4.0)
    array([0.  , 0.25, 2.  ])
    """
    floats = isinstance(pos, np.ndarray) and pos.dtype.kind == "f"
    check_array("pos", pos, (), dtype="float" if floats else "int")
    _check_positive("factor", factor)
    return pos / factor


def _dropped(x: np.ndarray, keep: np.ndarray | None, dropout: float) -> np.ndarray:
    """S8: x after dropout."""
    if keep is None:
        return x
    return np.where(keep, x / (1.0 - dropout), np.zeros_like(x))


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a number above 0")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, expected a number above 0")


def _check_adapter(W: Any, A: Any, B: Any, alpha: Any) -> None:
    """K14: the adapter fits the weights."""
    for name, x, axes in (
        ("W", W, ("n_out", "n_in")), ("A", A, ("r", "n_in")), ("B", B, ("n_out", "r")),
    ):  # fmt: skip
        check_array(name, x, axes)
        check_size(name, x.ndim, 2, "axes")
        if x.dtype != W.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {W.dtype}, as W")
    if A.shape[0] < 1:
        raise ValueError("A: got rank 0, expected at least 1")
    check_size("A", A.shape[1], W.shape[1], "n_in, as in W")
    check_size("B", B.shape[0], W.shape[0], "n_out, as in W")
    check_size("B", B.shape[1], A.shape[0], "r, as in A")
    _check_positive("alpha", alpha)


def _check_input(x: Any, W: np.ndarray, keep: Any, dropout: Any) -> None:
    """K14: x fits the weights, and `keep` fits x."""
    check_array("x", x, ("n_in",))
    check_size("x", x.shape[-1], W.shape[1], "n_in, as in W")
    if x.dtype != W.dtype:
        raise TypeError(f"x: got dtype {x.dtype}, expected {W.dtype}, as W")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout: got {dropout!r}, expected a number from 0 and below 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout}, expected a number from 0 and below 1")
    if keep is not None:
        check_array("keep", keep, ("n_in",), dtype="bool")
        if keep.shape != x.shape:
            raise ValueError(f"keep: got shape {keep.shape}, expected {x.shape}, as x")


def _check_norm(x: Any, w: Any, eps: Any) -> None:
    """K14: the gain fits x."""
    check_array("x", x, ("D",))
    check_array("w", w, ("D",))
    if w.shape != x.shape[-1:]:
        raise ValueError(f"w: got shape {w.shape}, expected {x.shape[-1:]}, as x")
    if w.dtype != x.dtype:
        raise TypeError(f"w: got dtype {w.dtype}, expected {x.dtype}, as x")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {eps!r}, expected a number of at least 0")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a number of at least 0")
