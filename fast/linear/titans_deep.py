"""Titans in chunks for a memory of any depth: a call of the memory engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnspec.fast.engines.memory import memory
from attnspec.fast.linear.titans_checks import Layers, check_memory_inputs, in_order


def titans_chunk_mlp(
    W0: tuple[Tensor, ...], S0: tuple[Tensor, ...] | None, k: Tensor, v: Tensor, q: Tensor,
    rates: tuple[Any, Any, Any], b: int, *, loss_scale: float = 2.0, read: str = "inclusive",
    valid: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Layers, Layers]:  # fmt: skip
    """As `titans_chunk_linear` for a memory of any depth; W0, S0, W and S are tuples of layers."""
    W, S, full = check_memory_inputs(W0, S0, k, v, q, rates, b, loss_scale, read, valid)
    before = read == "exclusive"
    if valid is None:
        return memory(W, S, k, v, q, full, b, loss_scale=loss_scale, before=before, backend=backend)
    tokens = in_order(k, v, q, full, valid)
    y, last_W, last_S = memory(
        W, S, tokens.k, tokens.v, tokens.q, tokens.rates, b, loss_scale=loss_scale, before=before,
        stored=tokens.stored, backend=backend,
    )  # fmt: skip
    return tokens.back(y), last_W, last_S
