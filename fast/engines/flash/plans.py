"""Plans of calls of the flash engine, made once for each kind of call: shapes, strides, dtypes and
options.
"""

from __future__ import annotations

from collections.abc import Hashable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import load, wide_dtype
from attnspec.fast.engines.flash.configs import TABLE
from attnspec.fast.recent import Recent

DEVICE_MODULES = {
    ("numba", "prepare_forward"): "numba_cpu",
    ("numba", "prepare_backward"): "numba_cpu",
    ("triton", "prepare_forward"): "triton_forward",
    ("triton", "prepare_backward"): "triton_backward",
}
SINK_LOGIT = 18
"""The place of the sink logits among the arguments of the custom op."""


class Plan:
    """How every call of a kind is computed, from arguments like the custom op's but its backend."""

    def __init__(self, arguments: tuple[Any, ...], backend: str) -> None:
        q, k = arguments[:2]
        self.backend, self.scale = backend, arguments[3]
        self.empty = q.numel() == 0 or k.numel() == 0
        self.forward = _empty if self.empty else _kernel(backend, "prepare_forward")(*arguments)
        self.backward = (
            _empty_gradients if self.empty else _kernel(backend, "prepare_backward")(*arguments)
        )


plans: Recent[Hashable, Plan] = Recent()


def kind_of(arguments: tuple[Any, ...], backend: str | None) -> Hashable:
    """What checks and plans depend on: all but what tensors hold. Whether q, k and v start at
    multiples of 16 bytes decides how they are read. None if these are no tensors.
    """
    q, k, v = arguments[:3]
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return None
    return (
        backend, TABLE.state(), (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15 == 0,
        *(
            (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor)
            else None if x is None else (x, type(x))
            for x in arguments
        ),
    )  # fmt: skip


def known(kind: Hashable) -> Plan | None:
    """The plan of this kind of call, if there was one; an option without a hash is a wrong one,
    which the checks will name.
    """
    try:
        return plans.get(kind)
    except TypeError:
        return None


def plan_of(arguments: tuple[Any, ...], backend: str) -> Plan:
    """The plan of this kind of call, whose arguments have been checked."""
    kind = kind_of(arguments, backend)
    plan = plans.get(kind)
    if plan is None:
        plan = plans[kind] = Plan(arguments, backend)
    return plan


def _kernel(backend: str, part: str) -> Any:
    """The function that computes `part` on `backend`; its module is imported on first use."""
    module: ModuleType = load(f"attnspec.fast.engines.flash.{DEVICE_MODULES[backend, part]}")
    return getattr(module, part)


def _empty(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """out and lse if there are no queries or no keys."""
    lse = q.new_full(q.shape[:3], -float("inf"), dtype=wide_dtype(q))
    sink_logit = options[SINK_LOGIT - 3]
    if sink_logit is not None:
        lse = torch.zeros_like(lse) + sink_logit[:, None]
    return q.new_zeros(*q.shape[:3], v.shape[3]), lse


def _empty_gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv and dsink likewise."""
    sink_logit = options[SINK_LOGIT - 3]
    dsink = None
    if sink_logit is not None:
        dsink = lse.new_zeros(q.shape[1]) if dlse is None else dlse.sum((0, 2))
    return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), dsink
