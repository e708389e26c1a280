"""How a call of the memory engine is laid out: gradient chunks, cut in pieces that fit a tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnspec.fast.engines.memory.packed import Packed


@dataclass(frozen=True)
class Pieces:
    """A gradient chunk of b tokens is cut in `per` pieces of up to `size` tokens; the last chunk of
    `tokens` may be shorter. Piece n starts at token n // per * b + n % per * size, unless the
    tokens are those of `packed` sequences.
    """

    tokens: int
    b: int
    size: int
    packed: Packed | None = None

    @property
    def per(self) -> int:
        return -(-self.b // self.size)

    @property
    def count(self) -> int:
        if self.packed is not None:
            return self.packed.count
        whole, rest = divmod(self.tokens, self.b)
        return whole * self.per + -(-rest // self.size)

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """x with its `dim` tokens as (count, size), zeros where a piece is short."""
        dim %= x.dim()
        if self._in_a_row:
            missing = self.count * self.size - self.tokens
            if missing:
                shape = (*x.shape[:dim], missing, *x.shape[dim + 1 :])
                x = torch.cat([x, x.new_zeros(shape)], dim)
            return x.unflatten(dim, (self.count, self.size))
        index, inside = self._index(x.device)
        x = x.index_select(dim, index.flatten()).unflatten(dim, (self.count, self.size))
        mask = inside.reshape(self.count, self.size, *[1] * (x.dim() - dim - 2))
        return torch.where(mask, x, 0)

    def join(self, x: Tensor, dim: int) -> Tensor:
        """The tokens of x (..., count, size, ...), the former at `dim`, in a row again."""
        dim %= x.dim()
        x = x.flatten(dim, dim + 1)
        if self._in_a_row:
            return x.narrow(dim, 0, self.tokens)
        start, _ = self.places(x.device)
        token = torch.arange(self.tokens, device=x.device)
        piece = torch.searchsorted(start, token, right=True) - 1
        return x.index_select(dim, piece * self.size + token - start[piece])

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first token of every piece, and how many it has."""
        if self.packed is not None:
            start, length, *_ = self.packed.table[:-1].unbind(1)
            return start.contiguous(), length.contiguous()
        piece = torch.arange(self.count, device=device)
        within = piece % self.per * self.size
        start = piece // self.per * self.b + within
        return start, (self.b - within).clamp(max=self.size).minimum(self.tokens - start)

    def table(self, like: Tensor) -> Tensor:
        """The table of packed sequences, or any tensor for kernels that do not look at it."""
        return like if self.packed is None else self.packed.table

    @property
    def _in_a_row(self) -> bool:
        """Whether only the last piece may be short."""
        whole = self.b % self.size == 0 or self.tokens <= self.size
        return self.packed is None and whole

    def _index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        start, length = self.places(device)
        within = torch.arange(self.size, device=device)
        inside = within < length[:, None]
        return torch.where(inside, start[:, None] + within, 0), inside


@dataclass(frozen=True)
class Rates:
    """theta, eta, alpha (batch * heads, tokens) in the arithmetic's dtype, and which tokens are
    stored, int8 (batch * heads, tokens), None if all are.
    """

    theta: Tensor
    eta: Tensor
    alpha: Tensor
    stored: Tensor | None

    @classmethod
    def of(
        cls, theta: Tensor, eta: Tensor, alpha: Tensor, stored: Tensor | None, dtype: torch.dtype
    ) -> Rates:
        """From (batch, heads, tokens), and `stored` bool (batch, tokens)."""
        flat = [x.to(dtype).flatten(0, 1).contiguous() for x in (theta, eta, alpha)]
        if stored is not None:
            stored = stored[:, None].expand(theta.shape).to(torch.int8).flatten(0, 1).contiguous()
        return cls(flat[0], flat[1], flat[2], stored)


@dataclass
class Scalars:
    """The coefficients of every piece: as each row reads them, and as the piece ends.

    rows (heads, count, size, 3) are beta, m, f; G and n (heads, count, size, size), n empty unless
    asked for; end (heads, count, 3), end_n and end_G (heads, count, size).
    """

    rows: Tensor
    n: Tensor
    G: Tensor
    end: Tensor
    end_n: Tensor
    end_G: Tensor  # noqa: N815

    @classmethod
    def empty(cls, like: Tensor, pieces: Pieces, with_n: bool) -> Scalars:
        def room(*shape: int) -> Tensor:
            return torch.empty(
                (like.shape[0], pieces.count, *shape), dtype=like.dtype, device=like.device
            )

        size = pieces.size
        return cls(
            room(size, 3), room(size, size) if with_n else like.new_empty(0), room(size, size),
            room(3), room(size), room(size),
        )  # fmt: skip

    def zeros(self) -> Scalars:
        """Room for gradients."""
        return Scalars(*(torch.zeros_like(x) for x in vars(self).values()))
