"""The prefix engine's operation, its custom ops and their gradient."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from attnspec.fast.backend import load, unobserved
from attnspec.fast.engines.operation import Operation


def _host() -> ModuleType:
    """The Triton implementation, imported on first use."""
    return load("attnspec.fast.engines.prefix.triton_host")


def add_prefix(
    q: Tensor, soft: Tensor, lse: Tensor, Z: Tensor, k: Tensor, *, positivity: str
) -> Tensor:
    """Outputs (batch, heads, tokens, dv) of softmax attention with a prefix, on Triton.

    q (batch, heads, tokens, d); soft, as its outputs, and lse (batch, heads, tokens) float32 of
    softmax attention, -inf where no key is visible; Z (heads, d, dv) and k (heads, d), float32
    or as q; `positivity` "abs" or "softplus". The arguments have been checked. Differentiable in
    all five, once; the gradients are bitwise repeatable.
    """
    softplus = positivity == "softplus"
    tensors = q, soft, lse, Z, k
    out: Tensor = _forward(*tensors, softplus, not unobserved(*tensors))[0]
    return out


def _run(
    q: Tensor, soft: Tensor, lse: Tensor, Z: Tensor, k: Tensor, softplus: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out, share, part = _host().forward(q, soft, lse, Z, k, softplus, keep)
    return out, share, part


_forward = Operation("attnspec::prefix_forward", _run)


@_forward.register_fake
def _(
    q: Tensor, soft: Tensor, lse: Tensor, Z: Tensor, k: Tensor, softplus: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept = lse.shape if keep else (0,)
    return soft.new_empty(soft.shape), lse.new_empty(kept), lse.new_empty(kept)


def _run_backward(
    dout: Tensor, q: Tensor, soft: Tensor, Z: Tensor, k: Tensor, share: Tensor, part: Tensor,
    softplus: bool, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dsoft, dlse, dZ, dk = _host().backward(dout, q, soft, Z, k, share, part, softplus, wanted)
    return dq, dsoft, dlse, dZ, dk


_backward = Operation("attnspec::prefix_backward", _run_backward)


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, soft: Tensor, Z: Tensor, k: Tensor, share: Tensor, part: Tensor,
    softplus: bool, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_state = (Z.shape, k.shape) if wanted else ((0,), (0,))
    return (
        q.new_empty(q.shape), soft.new_empty(soft.shape), share.new_empty(share.shape),
        Z.new_empty(of_state[0]), k.new_empty(of_state[1]),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, soft, _, Z, k, ctx.softplus, _ = inputs
    ctx.save_for_backward(q, soft, Z, k, *output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dout: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 7
    tensors = (dout, *ctx.saved_tensors)
    wanted = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    *of_rows, dZ, dk = _backward(*tensors, ctx.softplus, wanted)
    return *of_rows, *((dZ, dk) if wanted else (None, None)), None, None


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("a prefix is differentiable once: its gradient has none")


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(_refuse_gradient)
