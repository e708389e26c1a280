"""What the mechanisms' layers for PyTorch models share: residual rows, heads, decoding in steps."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from attnspec.fast.backend import (
    FLOATS,
    check_integer,
    check_size,
    check_tensor,
    wide_dtype,
)

EPSILON = 1e-6
"""Added under the root of every norm."""


class Block(nn.Module, abc.ABC):
    """x + mix(norm(x)) for rows x (batch, tokens, width), a causal mixer of tokens in `mix`.

    For decoding, `init_state` and `step`; what steps compute is what `forward` computes of all rows
    at once. Positions are the caller's, unless the mixer has some.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        check_integer("width", width, least=1)
        self.width = width
        self.norm = nn.RMSNorm(width, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (batch, tokens, width) of rows x, likewise. Differentiable."""
        return x + self.mix(self.norm(self._rows(x)), None)[0]

    @abc.abstractmethod
    def init_state(self, batch: int) -> Any:
        """The state before the first token of `batch` sequences."""

    def state_size(self, tokens: int) -> int:
        """How many numbers the state of one sequence holds after `tokens` tokens."""
        return numbers(self.init_state(1))

    @torch.no_grad()
    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Rows of the new tokens x (batch, tokens, width), and the state with them in it.

        A prompt is one step of many tokens. For inference: there is no gradient.
        """
        rows, state = self.mix(self.norm(self._rows(x)), state)
        return x + rows, state

    @abc.abstractmethod
    def mix(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """What is added to the rows whose norm is x, and the next state.

        Without a state, x is a whole sequence, and no state need be returned.
        """

    def zeros(self, *shape: int) -> Tensor:
        """A first state where the parameters are, in float32 at least."""
        weight = self.norm.weight
        return weight.new_zeros(shape, dtype=wide_dtype(weight))

    def _rows(self, x: Tensor) -> Tensor:
        check_tensor("x", x, ("batch", "tokens", "width"), FLOATS)
        check_size("x", x.shape[2], self.width, "width")
        return x


class Heads(nn.Module):
    """Queries and keys (batch, heads, tokens, d), values (batch, heads, tokens, width / heads)."""

    def __init__(self, width: int, heads: int, d: int | None = None, *, bias: bool = False) -> None:
        super().__init__()
        check_integer("heads", heads, least=1)
        if width % heads:
            raise ValueError(f"heads: got {heads}, expected a divisor of {width} (width)")
        self.heads, self.dv = heads, width // heads
        self.d = self.dv if d is None else d
        self.q = nn.Linear(width, heads * self.d, bias=bias)
        self.k = nn.Linear(width, heads * self.d, bias=bias)
        self.v = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of rows x (batch, tokens, width)."""
        q, k, v = (part(x).unflatten(2, (self.heads, -1)) for part in (self.q, self.k, self.v))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def numbers(state: Any) -> int:
    """How many numbers are in the tensors of a state, however nested its tuples are."""
    if isinstance(state, Tensor):
        return state.numel()
    return sum(map(numbers, state)) if isinstance(state, tuple) else 0


def joined(o: Tensor) -> Tensor:
    """Rows (batch, tokens, heads dv) of o (batch, heads, tokens, dv)."""
    return o.transpose(1, 2).flatten(2)
