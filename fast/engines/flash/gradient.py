"""The gradient of flash attention for an operation that has its own, of which it is a part."""

from __future__ import annotations

from torch import Tensor

from attnspec.fast.engines.flash.plans import plan_of


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    key_mask: Tensor | None = None,
    offsets: tuple[Tensor, Tensor] | None = None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, new and contiguous, from the gradient of `out`, which `flash` returned with
    `lse` for these arguments; not differentiable.
    """
    lists = (None, None, None, 0, 0)
    options = (
        q.shape[3] ** -0.5, causal, window, 0, None, None, key_mask, None, *lists,
        *(offsets or (None, None)), None, None, None,
    )  # fmt: skip
    plan = plan_of((q, k, v, *options), backend)
    dq, dk, dv, _ = plan.backward(dout, None, q, k, v, out, lse, *options)
    return dq, dk, dv
