"""Pointer networks on Numba and Triton: additive scores that are the output distribution.

The projections are matrix products; the scores are computed tile by tile, without an array of
steps x slots x width, and `pointer_cross_entropy` stores no scores either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_device,
    check_same,
    check_size,
    check_tensor,
    product,
)
from attnspec.fast.engines.additive import (
    additive_lse,
    additive_scores,
    masked_log_softmax,
    project,
)
from attnspec.fast.growing import checkable
from attnspec.fast.scores.pointer_networks_decoding import constraint_mask
from attnspec.fast.scores.pointer_networks_polygons import convex_clip_area, is_simple_polygon
from attnspec.fast.scores.pointer_networks_tasks import (
    hull_metrics,
    hull_target,
    incenter,
    is_permutation,
    polygon_area,
    tour_length,
    triangle_coverage,
    tsp_target,
)
from attnspec.fast.scores.pointer_networks_triangles import delaunay_target, is_delaunay

__all__ = [
    "constraint_mask",
    "convex_clip_area",
    "delaunay_target",
    "glimpse",
    "hull_metrics",
    "hull_target",
    "incenter",
    "is_delaunay",
    "is_permutation",
    "is_simple_polygon",
    "pointer_cross_entropy",
    "pointer_log_probs",
    "pointer_loss",
    "pointer_scores",
    "polygon_area",
    "tour_length",
    "triangle_coverage",
    "tsp_target",
]


_PLAIN = {"launches": None}
_GEOMETRY = {"launches": None, "dtypes": ("float32",)}
_ON_CPU = {"launches": None, "dtypes": ("float32",), "triton": None}
CLAIMS = {
    "pointer_scores": {"gradient": True, "compiled": True},
    "pointer_cross_entropy": {"gradient": True, "compiled": True},
    "pointer_log_probs": {"gradient": True, **_PLAIN},
    "pointer_loss": {"gradient": True, **_PLAIN},
    "glimpse": {"gradient": True, **_PLAIN},
    **dict.fromkeys(("constraint_mask", "is_permutation", "triangle_coverage"), _PLAIN),
    **dict.fromkeys(("incenter", "polygon_area", "tour_length"), _GEOMETRY),
    **dict.fromkeys(
        (
            "convex_clip_area",
            "delaunay_target",
            "hull_metrics",
            "hull_target",
            "is_delaunay",
            "is_simple_polygon",
            "tsp_target",
        ),
        _ON_CPU,
    ),
}
"""What is one call of a library launches no kernel; exact geometry wants float32 and more, and the
solvers run on the CPU."""


def pointer_scores(
    e: Tensor,
    d: Tensor,
    W1: Tensor,
    W2: Tensor,
    v: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scores (batch, steps, slots) of e (batch, slots, D) for d (batch, steps, D).

    W1, W2 (A, D); v and the optional biases b1, b2 (A). The scores are float32 for 16-bit inputs.
    Differentiable in all of them.
    """
    _check_states(e, d, W1, W2, v, b1, b2)
    k, q = project(e, W1, b1), project(d, W2, b2)
    return additive_scores(k, q, v.to(q.dtype), backend=backend)


def pointer_log_probs(scores: Tensor, mask: Tensor | None, *, backend: str | None = None) -> Tensor:
    """Log-probabilities float32 (batch, steps, slots) of scores (batch, steps, slots).

    `mask` is bool, (batch, slots) for all steps alike or (batch, steps, slots), True where a slot
    may be pointed at; None allows all. A masked slot gets -inf, whatever its score (K11). A step
    that is allowed no slot is a ValueError on the CPU; elsewhere, where reading the mask would
    stall the device, its row is -inf throughout.
    """
    check_tensor("scores", scores, ("batch", "steps", "slots"), FLOATS)
    if scores.shape[2] == 0:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected at least one slot")
    if mask is not None:
        mask = _allowed_slots(mask, *scores.shape, device=("scores", scores))
    return masked_log_softmax(scores, mask)


def pointer_loss(
    logp: Tensor,
    targets: Tensor,
    target_mask: Tensor | None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The mean over real steps of -logp at the target, a scalar in nats.

    `logp` (batch, steps, slots); `targets` int64 (batch, steps), slots; `target_mask` bool (batch,
    steps), True at real steps, or None if all are. A padding step is not read. A target that was
    masked makes the loss inf. That targets are slots and that a step is real is checked on the CPU
    only.
    """
    check_tensor("logp", logp, ("batch", "steps", "slots"), FLOATS)
    targets = _real_targets(targets, target_mask, *logp.shape, device=("logp", logp))
    surprise = -logp.gather(2, targets[..., None])[..., 0]
    return _mean(surprise, target_mask)


def pointer_cross_entropy(
    e: Tensor,
    d: Tensor,
    W1: Tensor,
    W2: Tensor,
    v: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The loss of decoder states `d` against `targets`, a scalar in nats, in one fused pass.

    Arguments as in `pointer_scores`, `pointer_log_probs` and `pointer_loss`. Differentiable; the
    backward evaluates tanh again.
    """
    _check_states(e, d, W1, W2, v, b1, b2)
    shape = (e.shape[0], d.shape[1], e.shape[1])
    if e.shape[1] == 0:
        raise ValueError(f"e: got shape {tuple(e.shape)}, expected at least one slot")
    if mask is not None:
        mask = _allowed_slots(mask, *shape, device=("e", e))
    targets = _real_targets(targets, target_mask, *shape, device=("e", e))
    k, q = project(e, W1, b1), project(d, W2, b2)
    lse, score = additive_lse(k, q, v.to(q.dtype), targets, mask=mask, backend=backend)
    return _mean(lse - score, target_mask)


def glimpse(
    e: Tensor,
    logp: Tensor,
    W1: Tensor,
    *,
    b1: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The averages (batch, steps, A) of W1 e_j + b1 under the pointer's probabilities.

    e (batch, slots, D); logp (batch, steps, slots) as `pointer_log_probs` returns it; W1 (A, D); b1
    (A). A state to which no step may point is not read (K11).
    """
    check_tensor("e", e, ("batch", "slots", "D"), FLOATS)
    check_tensor("logp", logp, ("batch", "steps", "slots"), FLOATS)
    check_device("logp", logp, "e", e)
    _check_projection("W1", W1, e, "e")
    if b1 is not None:
        _check_vector("b1", b1, W1)
    if logp.shape[0] != e.shape[0] or logp.shape[2] != e.shape[1]:
        expected = f"({e.shape[0]}, steps, {e.shape[1]})"
        raise ValueError(f"logp: got shape {tuple(logp.shape)}, expected {expected}")
    weights = logp.exp()
    unread = (weights == 0).all(1)[..., None]
    projected = project(e.masked_fill(unread, 0), W1, b1)
    return (product(weights.to(projected.dtype), projected)).to(e.dtype).contiguous()


def _mean(x: Tensor, target_mask: Tensor | None) -> Tensor:
    """The mean of x (batch, steps) over the real steps."""
    if target_mask is None:
        return x.mean()
    return torch.where(target_mask, x, 0).sum() / target_mask.sum()


def _check_states(e: Any, d: Any, W1: Any, W2: Any, v: Any, b1: Any, b2: Any) -> None:
    check_tensor("e", e, ("batch", "slots", "D"), FLOATS)
    check_tensor("d", d, ("batch", "steps", "D"), FLOATS)
    check_same("d", d, "e", e)
    check_size("d", d.shape[0], e.shape[0], "batch, as in e")
    _check_projection("W1", W1, e, "e")
    _check_projection("W2", W2, d, "d")
    check_size("W2", W2.shape[0], W1.shape[0], "A, as in W1")
    for name, x in (("v", v), ("b1", b1), ("b2", b2)):
        if x is not None or name == "v":
            _check_vector(name, x, W1)


def _check_projection(name: str, W: Any, x: Tensor, source: str) -> None:
    check_tensor(name, W, ("A", "D"), FLOATS)
    check_same(name, W, source, x)
    check_size(name, W.shape[1], x.shape[2], f"D, as in {source}")


def _check_vector(name: str, x: Any, W1: Tensor) -> None:
    check_tensor(name, x, ("A",), FLOATS)
    check_same(name, x, "W1", W1)
    check_size(name, x.shape[0], W1.shape[0], "A, as in W1")


def _allowed_slots(
    mask: Any, batch: int, steps: int, slots: int, *, device: tuple[str, Tensor]
) -> Tensor:
    """`mask`, broadcastable to (batch, steps, slots), on the device of the argument `device`."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: got {got}, expected a bool torch.Tensor")
    shared, full = (batch, slots), (batch, steps, slots)
    if tuple(mask.shape) not in (shared, full):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {shared} or {full}")
    check_device("mask", mask, *device)
    if checkable(mask) and not bool(mask.any(-1).all()):
        raise ValueError("mask: got a row that allows no slot, expected at least one")
    return mask if mask.dim() == 3 else mask[:, None]


def _real_targets(
    targets: Any,
    target_mask: Any,
    batch: int,
    steps: int,
    slots: int,
    *,
    device: tuple[str, Tensor],
) -> Tensor:
    """`targets` int64 (batch, steps) with 0 where a step is padding."""
    check_tensor("targets", targets, ("batch", "steps"), (torch.int64, torch.int32))
    if target_mask is not None:
        check_tensor("target_mask", target_mask, ("batch", "steps"), (torch.bool,))
    for name, x in (("targets", targets), ("target_mask", target_mask)):
        if x is None:
            continue
        if tuple(x.shape) != (batch, steps):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {(batch, steps)}")
        check_device(name, x, *device)
    real = targets.long()
    if target_mask is not None:
        real = real.masked_fill(~target_mask, 0)
    if checkable(real):
        if not (batch * steps if target_mask is None else bool(target_mask.any())):
            raise ValueError("target_mask: got no real step, expected at least one")
        outside = real[(real < 0) | (real >= slots)]
        if outside.numel():
            raise ValueError(
                f"targets: got {int(outside[0])}, expected a slot from 0 to {slots - 1}"
            )
    return real
