"""The softplus engine's operation, its custom ops and their gradient.

It is an engine of its own beside flash: there is no maximum to follow and nothing to rescale, a
row has several saved numbers instead of one lse, and sharpening needs a second sweep over the keys.
Who sees whom, the tiles and their walk are the flash engine's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnspec.fast.backend import choose_backend, load, wide_dtype
from attnspec.fast.engines.flash import checks
from attnspec.fast.engines.operation import operation


@dataclass(frozen=True)
class Sharpening:
    """The second stage: weights max(count * a - offset, 0) ** power, normalised again.

    `offset` is 1 in rows that see more than `warm` keys, else 0. `eps` joins the second normaliser;
    0 leaves it out, and rows whose largest excess is at most `dead` are then 0.
    """

    power: float
    warm: int
    eps: float
    dead: float = 0.0


def softplus(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    *,
    factor: float,
    normalise: bool,
    eps: float,
    causal: bool = False,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    sharpening: Sharpening | None = None,
    backend: str | None = None,
) -> Tensor:
    """out (B, H, Tq, dv): values weighed by softplus(x) over the sum of it and `eps`.

    x_ij = factor * log(counts_i) * <q_i, k_j>, of unit vectors if `normalise`; counts (B, Tq)
    float32 with the number of keys that a row sees, `causal`, `key_mask` and `mask` as in the flash
    engine. Rows that see nothing are 0. Differentiable in q, k and v, once; the gradients are
    bitwise repeatable.
    """
    backend = choose_backend(backend, q) if isinstance(q, Tensor) else "numba"
    checks.check_inputs(q, k, v, backend)
    checks.check_ranges(q, causal, None, 0, None)
    mask = checks.check_masks(q, k, key_mask, mask)
    second = sharpening or Sharpening(0.0, 1, 0.0)
    return _forward(
        q, k, v, counts.contiguous(), factor, normalise, eps, causal, key_mask, mask, second.power,
        second.warm, second.eps, second.dead, backend,
    )[0]  # fmt: skip


def _kernel(backend: str, part: str) -> Any:
    """The function that computes `part` on `backend`; its module is imported on first use."""
    name = "numba_cpu" if backend == "numba" else f"triton_{part}"
    module = load(f"attnspec.fast.engines.softplus.{name}")
    return getattr(module, part)


@operation("attnspec::softplus_forward")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    factor: float,
    normalise: bool,
    eps: float,
    causal: bool,
    key_mask: Tensor | None,
    mask: Tensor | None,
    power: float,
    warm: int,
    second_eps: float,
    dead: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output, and four numbers a row for the backward pass, (4, B, H, Tq): the factor of its
    scores, the sum of its softplus scores, its largest score and its second normaliser.
    """
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]), _no_rows(q).zero_()
    return _kernel(backend, "forward")(
        q, k, v, counts, factor, normalise, eps, causal, key_mask, mask, power, warm, second_eps,
        dead,
    )  # fmt: skip


def _no_rows(q: Tensor) -> Tensor:
    wide = wide_dtype(q)
    return q.new_empty((4, *q.shape[:3]), dtype=wide)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), _no_rows(q)


@operation("attnspec::softplus_backward")
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    out: Tensor,
    rows: Tensor,
    factor: float,
    normalise: bool,
    eps: float,
    causal: bool,
    key_mask: Tensor | None,
    mask: Tensor | None,
    power: float,
    warm: int,
    second_eps: float,
    dead: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    return _kernel(backend, "backward")(
        dout, q, k, v, counts, out, rows, factor, normalise, eps, causal, key_mask, mask, power,
        warm, second_eps, dead,
    )  # fmt: skip


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, counts, factor, normalise, eps, causal, key_mask, mask, *plain = inputs
    ctx.save_for_backward(q, k, v, counts, *output, key_mask, mask)
    ctx.plain = factor, normalise, eps, causal, plain


def _gradient(ctx: Any, dout: Tensor, drows: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, counts, out, rows, key_mask, mask = ctx.saved_tensors
    factor, normalise, eps, causal, plain = ctx.plain
    grads = _backward(
        dout, q, k, v, counts, out, rows, factor, normalise, eps, causal, key_mask, mask, *plain
    )
    return *grads, *[None] * 12


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("softplus attention is differentiable once: its gradient has none")


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(_refuse_gradient)
