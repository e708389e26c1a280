"""What Flowformer carries from token to token, and its checks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_device,
    check_size,
    check_tensor,
    wide_dtype,
)
from attnspec.fast.engines.scan.flows_gradient import state_shapes
from attnspec.fast.linear.flowformer_flows import check_eps


class FlowState(NamedTuple):
    """The sums of b, a, b N / O and a N / I (batch, heads, d), of exp(Oh) (batch, heads), of b
    (c v)^T (batch, heads, d, dv), and the number of tokens N (batch, heads): float32, for query
    heads. N is exact up to 2^24 tokens. Nothing is updated in place.
    """

    sb: Tensor
    sa: Tensor
    sbO: Tensor  # noqa: N815
    saI: Tensor  # noqa: N815
    se: Tensor
    KV: Tensor
    N: Tensor


def check_tokens(q: Any, k: Any, v: Any, eps: Any) -> None:
    """Tokens of an ordered call fit one another."""
    check_attention_inputs(q, k, v, FLOATS)
    check_size("q", q.shape[2], k.shape[2], "tokens, as in k")
    check_eps(eps)


def no_tokens(q: Tensor, v: Tensor) -> FlowState:
    """The state before the first token."""
    dtype, shapes = wide_dtype(q), state_shapes(q, v)
    return FlowState(*(torch.zeros(x, dtype=dtype, device=q.device) for x in shapes))


def checked_state(state: Any, q: Tensor, v: Tensor) -> FlowState:
    """The state in the dtype of sums, once it fits."""
    if not isinstance(state, tuple) or len(state) != len(FlowState._fields):
        raise TypeError(f"state: got {type(state).__name__}, expected FlowState")
    parts = []
    for name, x, expected in zip(FlowState._fields, state, state_shapes(q, v), strict=True):
        axes = ("batch", "heads", "d", "dv")[: len(expected)]
        check_tensor(f"state.{name}", x, axes, FLOATS)
        if tuple(x.shape) != expected:
            raise ValueError(f"state.{name}: got shape {tuple(x.shape)}, expected {expected}")
        check_device(f"state.{name}", x, "q", q)
        parts.append(x.to(wide_dtype(q)))
    return FlowState(*parts)
