"""What the model steps of pointer networks accept: checks shared with their gradients (K14)."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_array, check_shaped, check_size


def check_states(
    e: np.ndarray,
    d: np.ndarray,
    W1: np.ndarray,
    W2: np.ndarray,
    v: np.ndarray,
    b1: np.ndarray | None,
    b2: np.ndarray | None,
) -> None:
    """S2: e (..., slots, D), d (..., steps, D), W1 and W2 (A, D), v, b1 and b2 (A) fit.

    >>> one = np.ones((1, 1))
    >>> check_states(one, one, one, one, np.ones(2), None, None)
    Traceback (most recent call last):
    ValueError: v: got 2, expected 1 (A, as in W1)
    """
    check_array("e", e, ("slots", "D"))
    check_array("d", d, ("steps", "D"))
    check_same_dtype("d", d, e)
    if d.shape[:-2] != e.shape[:-2]:
        raise ValueError(f"d: got leading axes {d.shape[:-2]}, expected {e.shape[:-2]}, as e")
    check_projection("W1", W1, e, "e")
    check_projection("W2", W2, d, "d")
    check_size("W2", W2.shape[0], W1.shape[0], "A, as in W1")
    for name, x in (("v", v), ("b1", b1), ("b2", b2)):
        if x is not None:
            check_vector(name, x, W1)


def check_projection(name: str, W: np.ndarray, x: np.ndarray, source: str) -> None:
    """S2: `W` (A, D) projects rows of `x` (..., D), the argument called `source`.

    >>> check_projection("W1", np.ones((2, 3)), np.ones((1, 4)), "e")
    Traceback (most recent call last):
    ValueError: W1: got 3, expected 4 (D, as in e)
    """
    check_array(name, W, ("A", "D"))
    check_size(f"{name} axes", W.ndim, 2, "A and D")
    check_same_dtype(name, W, x, source)
    check_size(name, W.shape[1], x.shape[-1], f"D, as in {source}")


def check_vector(name: str, x: np.ndarray, W1: np.ndarray) -> None:
    """S2: `x` (A) belongs to the hidden width of `W1` (A, D).

    >>> check_vector("v", np.ones(2), np.ones((3, 4)))
    Traceback (most recent call last):
    ValueError: v: got 2, expected 3 (A, as in W1)
    """
    check_array(name, x, ("A",))
    check_size(f"{name} axes", x.ndim, 1, "A")
    check_same_dtype(name, x, W1, "W1")
    check_size(name, x.shape[0], W1.shape[0], "A, as in W1")


def check_same_dtype(name: str, x: np.ndarray, like: np.ndarray, source: str = "e") -> None:
    """K10: `x` has the dtype of `like`, the argument called `source`.

    >>> check_same_dtype("d", np.ones(1, np.float32), np.ones(1))
    Traceback (most recent call last):
    TypeError: d: got dtype float32, expected float64, as e
    """
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected {like.dtype}, as {source}")


def check_output_gradient(dout: np.ndarray, shape: tuple[int, ...]) -> None:
    """S6: `dout` is a float array of the output's `shape`.

    >>> check_output_gradient(np.ones(2), (3,))
    Traceback (most recent call last):
    ValueError: dout: got shape (2,), expected (3,)
    """
    check_shaped("dout", dout, shape)


def allowed_slots(scores: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
    """S3: `mask` broadcastable to `scores` (..., steps, slots), or None for no mask.

    ValueError if the mask has another shape or if a step may point nowhere.

    >>> allowed_slots(np.zeros((4, 2)), np.array([True, False])).shape
    (1, 2)
    """
    check_array("scores", scores, ("steps", "slots"))
    if scores.shape[-1] == 0:
        raise ValueError(f"scores: got shape {scores.shape}, expected at least one slot")
    if mask is None:
        return None
    check_array("mask", mask, ("slots",), dtype="bool")
    shared = (*scores.shape[:-2], scores.shape[-1])
    if mask.shape not in (shared, scores.shape):
        raise ValueError(f"mask: got shape {mask.shape}, expected {shared} or {scores.shape}")
    if not np.all(np.any(mask, axis=-1)):
        raise ValueError("mask: got a row that allows no slot, expected at least one")
    return mask if mask.ndim == scores.ndim else mask[..., None, :]


def real_steps(
    logp: np.ndarray, targets: np.ndarray, target_mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """S5: `targets` (..., steps) with 0 where a step is padding, and the mask of real steps.

    ValueError if a real target is not a slot of `logp` (..., steps, slots) or no step is real.

    >>> real_steps(np.zeros((2, 3)), np.array([2, -1]), np.array([True, False]))[0]
    array([2, 0])
    """
    check_array("logp", logp, ("steps", "slots"))
    check_array("targets", targets, ("steps",), dtype="int")
    if target_mask is None:
        target_mask = np.ones(targets.shape, dtype=bool)
    check_array("target_mask", target_mask, ("steps",), dtype="bool")
    for name, x in (("targets", targets), ("target_mask", target_mask)):
        if x.shape != logp.shape[:-1]:
            raise ValueError(f"{name}: got shape {x.shape}, expected {logp.shape[:-1]}")
    if not np.any(target_mask):
        raise ValueError("target_mask: got no real step, expected at least one")
    real = np.where(target_mask, targets, 0)
    outside = (real < 0) | (real >= logp.shape[-1])
    if np.any(outside):
        raise ValueError(
            f"targets: got {real[outside][0]}, expected a slot from 0 to {logp.shape[-1] - 1}"
        )
    return real, target_mask
