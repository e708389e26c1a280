"""Inputs and costs that benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.model import Cost


def qkv(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    d: int,
    dv: int | None = None,
    **parameters: Any,
) -> Callable[[str, str], dict[str, Any]]:
    """Random q, k, v of the given sizes, and the operation's other arguments."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        shapes = {
            "q": (batch, heads, queries, d),
            "k": (batch, kv_heads, keys, d),
            "v": (batch, kv_heads, keys, dv or d),
        }
        arrays = {
            name: torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))
            for name, shape in shapes.items()
        }
        return {**arrays, **parameters}

    return make


def bytes_of(*tensors: Any) -> float:
    """Bytes of all of `tensors`."""
    return float(sum(x.numel() * x.element_size() for x in tensors))


def attention_cost(pairs: float | None = None, factor: float = 1.0) -> Any:
    """Cost of softmax attention over `pairs` (query, key) pairs a head; all of them if None.

    `factor` scales the arithmetic: 3.5 for forward and backward together.
    """

    def cost(arguments: Mapping[str, Any]) -> Cost:
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        batch, heads, queries, d = q.shape
        keys, dv = k.shape[2], v.shape[3]
        seen = pairs
        if seen is None:
            causal = bool(arguments.get("causal"))
            seen = queries * keys - queries * (queries - 1) / 2 if causal else queries * keys
        out = batch * heads * queries * dv * q.element_size()
        moved = bytes_of(q, k, v) + out
        return Cost(
            2.0 * batch * heads * seen * (d + dv) * factor, moved * (1 if factor == 1 else 3)
        )

    return cost


def forward_and_backward(
    function: Callable[..., Any], arguments: Mapping[str, Any]
) -> Callable[[], Any]:
    """The timed call: the operation and the gradients of q, k and v."""
    from attnspec.conformance.bench.rivals import with_backward

    inputs = tuple(arguments[name] for name in ("q", "k", "v"))
    return with_backward(lambda: function(**arguments), inputs)
