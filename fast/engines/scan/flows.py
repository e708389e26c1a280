"""Flowformer's outputs on Triton: a few launches, known calls replayed.

Each token is read as often as the chain of sums demands, and nothing of the tokens' size is written
but the output: features, flows and weights are formed from the tiles. Custom ops for compiled code,
and in order for a gradient.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import load, unobserved, untraced, wants_gradient
from attnspec.fast.engines.scan.api import WIDEST
from attnspec.fast.engines.scan.flows_gradient import OUTPUTS, kept_flows_op, state_shapes
from attnspec.fast.engines.scan.replay import alias, known
from attnspec.fast.engines.scan.replay import kind as kind_of
from attnspec.fast.engines.scan.running import KINDS

Clamp = tuple[float, float] | None


@cache
def _kernels() -> ModuleType:
    """The implementation, imported on first use."""
    return load("attnspec.fast.engines.scan.triton_flows_host")


def run_flows(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None,
    eps: float, kind: int, low: float, high: float, clamped: bool,
) -> Tensor:  # fmt: skip
    tensors = (q, k, v, key_mask, query_mask)
    key = _key("flows", tensors, eps, kind, low, high, clamped)
    replay = known(key)
    if replay is not None:
        return replay(tensors)[0]
    with torch.cuda.device_of(q):
        made: Tensor = _kernels().attend(*tensors, eps, kind, (low, high) if clamped else None, key)
    return made


flows_op = torch.library.custom_op("attnspec::flows", run_flows, mutates_args=())


@flows_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None,
    eps: float, kind: int, low: float, high: float, clamped: bool,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3])


def run_ordered_flows(
    q: Tensor, k: Tensor, v: Tensor, first: Sequence[Tensor], eps: float, kind: int, low: float,
    high: float, clamped: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (q, k, v, *first)
    key = _key("ordered flows", tensors, eps, kind, low, high, clamped)
    replay = known(key)
    if replay is not None:
        return replay(tensors)  # type: ignore[return-value]
    with torch.cuda.device_of(q):
        return _kernels().attend_in_order(tensors, eps, kind, (low, high) if clamped else None, key)


ordered_flows_op = torch.library.custom_op(
    "attnspec::ordered_flows", run_ordered_flows, mutates_args=()
)


@ordered_flows_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, first: Sequence[Tensor], eps: float, kind: int, low: float,
    high: float, clamped: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    state = (q.new_empty(shape, dtype=torch.float32) for shape in state_shapes(q, v))
    return q.new_empty(*q.shape[:3], v.shape[3]), *state  # type: ignore[return-value]


def _key(name: str, tensors: Sequence[Tensor | None], *options: Any) -> Hashable:
    return kind_of(tensors, (name, *options))


class DirectFlows:
    """One call, by its tensors (q, k and v first) and options.

    `known` are the outputs of a call of a kind that has passed all checks before, computed before
    any check; it is None for a new kind.
    """

    def __init__(
        self, name: str, tensors: Sequence[Tensor | None], backend: str | None, *options: Any
    ) -> None:
        self.tensors = tensors
        self.compiling = torch.compiler.is_compiling() and not wants_gradient(*tensors)
        self.learning = False
        self.key: Hashable = None
        self.known: tuple[Tensor, ...] | None = None
        q = tensors[0]
        if unobserved(*tensors) and q is not None and (q.is_cuda or backend == "triton"):
            self.key = _key(name, tensors, backend, *options)
            replay = known(self.key)
            self.known = None if replay is None else replay(tensors)

    def serves(self, gradient: bool = False) -> bool:
        """Whether the kernels take the tensors, all checks of which have been passed, and if a
        `gradient` is wanted too where there is one.
        """
        q, k, v = self.tensors[:3]
        if gradient and wants_gradient(*self.tensors):
            self.learning = torch.compiler.is_compiling() or untraced(*self.tensors)
        if not (self.compiling or self.key or self.learning) or q is None or k is None or v is None:
            return False
        # Triton's interpreter has no bfloat16.
        whole = q.dtype in (torch.float32, torch.float16)
        served = whole or (q.dtype == torch.bfloat16 and q.is_cuda)
        widths = 1 <= q.shape[3] <= WIDEST and 1 <= v.shape[3] <= WIDEST
        return served and widths and q.numel() > 0 and k.numel() > 0

    def attend(self, eps: float, kind: str, clamp: Clamp) -> Tensor:
        """out (batch, heads, n, dv) of q, k, v, key_mask and query_mask."""
        options: tuple[Any, ...] = (*self.tensors, *_options(eps, kind, clamp))
        if self.compiling:
            out: Tensor = flows_op(*options)
            return out
        out = run_flows(*options)
        alias(self.key, _key("flows", self.tensors, *options[5:]))
        return out

    def attend_in_order(
        self, first: Sequence[Tensor] | None, eps: float, kind: str, clamp: Clamp
    ) -> tuple[Tensor, ...]:
        """out (batch, heads, tokens, dv) and the parts of the last state, of q, k and v, from the
        parts of a `first` one in float32, if any.
        """
        options = _options(eps, kind, clamp)
        parts = [] if first is None else list(first)
        given: tuple[Any, ...] = (*self.tensors[:3], parts, *options)
        if self.learning:
            learnt: tuple[Tensor, ...] = kept_flows_op(*given[:3], None, *given[3:])
            return learnt[:OUTPUTS]
        if self.compiling:
            made: tuple[Tensor, ...] = ordered_flows_op(*given)
            return made
        made = run_ordered_flows(*given)
        # Parts that came in another dtype are no inputs of what is kept.
        if all(x is y for x, y in zip(parts, self.tensors[3:], strict=True)):
            alias(self.key, _key("ordered flows", self.tensors, *options))
        return made


def packed_flows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    first: Sequence[Tensor] | None,
    *,
    eps: float,
    kind: str,
    clamp: Clamp,
) -> tuple[Tensor, ...]:
    """out (heads, tokens, dv) and the parts of the last states of packed sequences, of q (heads,
    tokens, d), k and v, of one token or more, from the parts of `first` ones in float32, if any.
    Differentiable in all but the offsets. Triton alone.
    """
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[2] <= WIDEST:
            raise ValueError(f"{name}: got {x.shape[2]} channels, expected 1 to {WIDEST}")
    parts = [] if first is None else list(first)
    made = kept_flows_op(q[None], k[None], v[None], offsets, parts, *_options(eps, kind, clamp))
    return made[0][0], *made[1:OUTPUTS]


def _options(eps: float, kind: str, clamp: Clamp) -> tuple[float, int, float, float, bool]:
    low, high = (0.0, 0.0) if clamp is None else clamp
    return float(eps), KINDS[kind], low, high, clamp is not None
