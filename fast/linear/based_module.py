"""Based as layers of a PyTorch model: Taylor attention, the window and the gated convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnspec.fast.backend import check_choice, check_integer
from attnspec.fast.blocks import Block, Heads, joined
from attnspec.fast.engines.flash import flash
from attnspec.fast.engines.taylor import unpacked_count
from attnspec.fast.linear.based import (
    based_attend,
    based_chunk,
    based_decode_step,
    gated_convolution,
    sliding_window_attend,
)

CHUNK = 512
"""Tokens between two states where a step has many."""


class TaylorState(NamedTuple):
    """Sums over all tokens, float32: S (batch, heads, D, dv), zk (batch, heads, D)."""

    S: Tensor
    zk: Tensor


class TaylorBlock(Block):
    """Causal Taylor attention: `heads` heads whose queries and keys have `feature_dim` channels."""

    def __init__(self, width: int, *, heads: int = 8, feature_dim: int = 16) -> None:
        super().__init__(width)
        check_integer("feature_dim", feature_dim, least=1)
        self.heads = Heads(width, heads, feature_dim)
        self.out = nn.Linear(width, width, bias=False)

    def init_state(self, batch: int) -> TaylorState:
        """All sums 0."""
        features = (batch, self.heads.heads, unpacked_count(self.heads.d))
        return TaylorState(self.zeros(*features, self.heads.dv), self.zeros(*features))

    def mix(self, x: Tensor, state: TaylorState | None) -> tuple[Tensor, TaylorState | None]:
        q, k, v = self.heads(x)
        if state is None:
            return self.out(joined(based_attend(q, k, v, causal=True))), None
        if x.shape[1] == 1:
            o, S, zk = based_decode_step(*state, q, k, v)
        else:
            o, S, zk = based_chunk(q, k, v, CHUNK, *state)
        return self.out(joined(o)), TaylorState(S, zk)


class WindowState(NamedTuple):
    """The keys and values of the last `left` tokens, (batch, heads, tokens, dv)."""

    k: Tensor
    v: Tensor


class WindowBlock(Block):
    """Softmax attention of every token to itself and to the `left` tokens before it."""

    def __init__(self, width: int, *, heads: int = 8, left: int = 63) -> None:
        super().__init__(width)
        check_integer("left", left, least=0)
        self.left = left
        self.heads = Heads(width, heads)
        self.out = nn.Linear(width, width, bias=False)

    def init_state(self, batch: int) -> WindowState:
        """No keys and no values."""
        empty = self.norm.weight.new_empty(batch, self.heads.heads, 0, self.heads.dv)
        return WindowState(empty, empty)

    def state_size(self, tokens: int) -> int:
        return 2 * min(tokens, self.left) * self.width

    def mix(self, x: Tensor, state: WindowState | None) -> tuple[Tensor, WindowState | None]:
        q, k, v = self.heads(x)
        if state is None:
            return self.out(joined(sliding_window_attend(q, k, v, self.left))), None
        k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        o, _ = flash(q, k, v, causal=True, window=self.left + 1)
        first = max(k.shape[2] - self.left, 0)
        return self.out(joined(o)), WindowState(k[:, :, first:], v[:, :, first:])


class ConvolutionBlock(Block):
    """The gated convolution of `inner` channels, `width` of them by default, over `taps` tokens.

    Its state is the rows before, (batch, taps - 1, width).
    """

    def __init__(self, width: int, *, inner: int | None = None, taps: int = 3) -> None:
        super().__init__(width)
        inner = width if inner is None else inner
        check_integer("inner", inner, least=1)
        check_integer("taps", taps, least=1)
        self.taps = taps
        self.into = nn.Parameter(torch.randn(width, 2 * inner) / width**0.5)
        self.filters = nn.Parameter(torch.randn(inner, taps) / taps**0.5)
        self.out = nn.Parameter(torch.randn(inner, width) / inner**0.5)

    def init_state(self, batch: int) -> Tensor:
        """Rows of zeros, which is what the convolution sees before the first token."""
        return self.norm.weight.new_zeros(batch, self.taps - 1, self.width)

    def mix(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if state is None:
            return gated_convolution(x, self.into, self.filters, self.out), None
        rows = torch.cat([state, x], 1)
        y = gated_convolution(rows, self.into, self.filters, self.out)
        return y[:, self.taps - 1 :], rows[:, rows.shape[1] - self.taps + 1 :]


class Based(nn.Module):
    """Layers of the given `kinds`, in order: "linear", "window" or "convolution".

    `layer_kinds` of the mechanism's module has the orders of the released models. The other
    arguments are those of `TaylorBlock`, `WindowBlock` and `ConvolutionBlock`.
    """

    def __init__(
        self,
        width: int,
        kinds: Sequence[str],
        *,
        heads: int = 8,
        feature_dim: int = 16,
        left: int = 63,
        taps: int = 3,
    ) -> None:
        super().__init__()
        layers: list[Block] = []
        for kind in kinds:
            check_choice("kinds", kind, ("linear", "window", "convolution"))
            if kind == "linear":
                layer: Block = TaylorBlock(width, heads=heads, feature_dim=feature_dim)
            elif kind == "window":
                layer = WindowBlock(width, heads=heads, left=left)
            else:
                layer = ConvolutionBlock(width, taps=taps)
            layers.append(layer)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (batch, tokens, width) of rows x, likewise. Differentiable."""
        for layer in self.layers:
            x = layer(x)
        return x

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """The first state of every layer."""
        return tuple(layer.init_state(batch) for layer in self._blocks())

    def state_size(self, tokens: int) -> int:
        """How many numbers the states of one sequence hold after `tokens` tokens."""
        return sum(layer.state_size(tokens) for layer in self._blocks())

    def step(self, x: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """Rows of the new tokens x (batch, tokens, width), and the states with them."""
        states = []
        for layer, before in zip(self._blocks(), state, strict=True):
            x, after = layer.step(x, before)
            states.append(after)
        return x, tuple(states)

    def _blocks(self) -> list[Block]:
        return [layer for layer in self.layers if isinstance(layer, Block)]
