"""A memory of any depth by batched products, where it has no kernel.

Pieces follow one another, because each one's gradient is taken at weights the one before has left;
everything that reads is done for a group of pieces at once. Only the weights that enter a group are
kept for the backward pass, which walks the group again. No per-token weights are ever formed.
Products are float32 whatever the inputs are: a call waits for launches, not for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from attnspec.fast.backend import load
from attnspec.fast.engines.memory.packed import Ends
from attnspec.fast.engines.memory.plan import Pieces, Rates

GROUP = 8
"""Pieces whose weights are held at once."""


def scalar_kernels(backend: str) -> ModuleType:
    """The coefficients' implementation on `backend`, imported on first use."""
    module = "numba_cpu" if backend == "numba" else "triton_scalars"
    return load(f"attnspec.fast.engines.memory.{module}")


@dataclass(frozen=True)
class Deep:
    """One call: its layer widths and pieces. Weights of all layers lie in a row: a state is (heads,
    numbers).
    """

    widths: Sequence[int]
    pieces: Pieces
    loss_scale: float
    before: bool
    group: int

    def layers(self, packed: Tensor) -> list[Tensor]:
        """Matrices (..., inputs, outputs) of all layers, views of `packed` (..., numbers)."""
        found, at = [], 0
        for inputs, outputs in zip(self.widths, self.widths[1:], strict=False):
            part = packed[..., at : at + inputs * outputs]
            found.append(part.unflatten(-1, (inputs, outputs)))
            at += inputs * outputs
        return found


def gelu(x: Tensor) -> Tensor:
    """GELU; in float64 on the CPU, where torch's float32 one is off by many units."""
    wide = x if x.is_cuda else x.double()
    return torch.nn.functional.gelu(wide).to(x.dtype)


def gelu_slope(x: Tensor) -> Tensor:
    below = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return below + x * _density(x)


def gelu_curvature(x: Tensor) -> Tensor:
    return (2 - x * x) * _density(x)


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


@dataclass
class Walked:
    """What a group of pieces leaves behind: entering weights (heads, pieces, numbers), and inputs,
    products and gradients (heads, pieces, size, width) of every layer.
    """

    W: Tensor
    S: Tensor
    base: Tensor
    H: list[Tensor]
    z: list[Tensor]
    Delta: list[Tensor]


def turn_over(
    sequences: Sequence[Ends], states: Sequence[Tensor], leaves: Tensor, enters: Tensor
) -> Iterator[Tensor]:
    """The states with which a walk goes on that leaves one sequence and enters another, if any."""
    for ends, x in zip(sequences, states, strict=True):
        ends.leave(leaves, x)
        yield ends.enter(enters, x)


class Walk:
    """The tokens of a call in pieces, in the dtype of the arithmetic, and the first states, W and S
    (memories, numbers).

    Pieces of packed sequences follow one another, with states (sequences * heads, numbers): where a
    sequence begins, its first states take the place of those that the one before has left.
    """

    def __init__(
        self, call: Deep, W: Tensor, S: Tensor, k: Tensor, v: Tensor, q: Tensor, rates: Rates,
        backend: str,
    ) -> None:  # fmt: skip
        wide, pieces = rates.theta.dtype, call.pieces
        self.call, self.W, self.S, self.packed = call, W, S, pieces.packed
        self.k, self.v = (
            pieces.cut(x.flatten(0, 1).to(wide).contiguous(), 1) for x in (k, v)
        )  # fmt: skip
        self.sequences = self.ends(W, S)
        self.q = self.fold(q.to(wide))
        self.of = scalar_kernels(backend).scalars(rates, pieces, call.before)

    def fold(self, x: Tensor) -> Tensor:
        """(batch, heads, tokens, width) to (memories, pieces, group * size, width)."""
        batch, heads, _, _width = x.shape
        x = self.call.pieces.cut(x.contiguous(), 2)
        x = x.reshape(batch * heads // self.call.group, self.call.group, *x.shape[2:])
        return x.transpose(1, 2).flatten(2, 3)

    def unfold(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `fold`, in the shape (batch, heads) and the dtype of `like`."""
        pieces, width = self.call.pieces, x.shape[-1]
        x = x.unflatten(2, (self.call.group, pieces.size)).transpose(1, 2)
        x = pieces.join(x.reshape(*like.shape[:2], pieces.count, pieces.size, width), 2)
        return x.to(like.dtype).contiguous()

    def of_group(self, x: Tensor, part: slice) -> Tensor:
        """Coefficients (heads, pieces, size, ...) once for each query head of the group."""
        return torch.cat([x[:, part]] * self.call.group, 2)

    def ends(self, *given: Tensor) -> list[Ends]:
        """Those of packed sequences, if there are any."""
        return [] if self.packed is None else [Ends(x, self.k.shape[0]) for x in given]

    def begin(self) -> Tensor:
        """W, S and base (3, heads, numbers) before the first piece."""
        W, S = self.W, self.S
        if self.packed is not None:
            nothing = self.k.new_zeros(self.k.shape[0], W.shape[1])
            W, S = (ends.enter(self.packed.begins(0), nothing) for ends in self.sequences)
        return torch.stack([W, S, W])

    def entered(self, n: int, W: Tensor, base: Tensor) -> Tensor:
        """The base of piece n: W, its weights, or that of the piece before."""
        if self.packed is not None:
            return torch.where(self.packed.table[n, 2] == 0, W, base)
        return base if n % self.call.pieces.per else W

    def group(self, state: Tensor, part: slice) -> tuple[Walked, Tensor]:
        """Pieces `part` one after the other, from W, S and base (3, heads, numbers); also those
        behind them.
        """
        call, product = self.call, torch.matmul
        W, S, base = state
        W_in, S_in, base_in, done = [], [], [], []
        for n in range(part.start, part.stop):
            base = self.entered(n, W, base)
            W_in.append(W)
            S_in.append(S)
            base_in.append(base)
            H, z, Delta = self.surprise(call.layers(base), self.k[:, n], self.v[:, n])
            done.append((H, z, Delta))
            beta, m, f = (x[:, None] for x in self.of.end[:, n].unbind(-1))
            G, other = self.of.end_G[:, n, :, None], self.of.end_n[:, n, :, None]
            in_W, in_S = [], []
            for h, delta in zip(H, Delta, strict=True):
                width = delta.shape[-1]
                both = product(h.mT, torch.cat([G * delta, other * delta], -1))
                in_W.append(both[..., :width].flatten(1))
                in_S.append(both[..., width:].flatten(1))
            W = beta * W + f * S - torch.cat(in_W, -1)
            S = m * S - torch.cat(in_S, -1)
            if self.packed is not None:
                W, S = turn_over(
                    self.sequences, (W, S), self.packed.ends(n), self.packed.begins(n + 1)
                )
        H, z, Delta = (
            [torch.stack([piece[i][layer] for piece in done], 1)
             for layer in range(len(call.widths) - 1)]
            for i in range(3)
        )  # fmt: skip
        weights, momentum, older = (torch.stack(x, 1) for x in (W_in, S_in, base_in))
        walked = Walked(weights, momentum, older, H, z, Delta)
        return walked, torch.stack([W, S, base])

    def surprise(
        self, base: list[Tensor], k: Tensor, v: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Inputs, products and gradients of all layers for keys k and values v."""
        product = torch.matmul
        H, z = [k], [product(k, base[0])]
        for weights in base[1:]:
            H.append(gelu(z[-1]))
            z.append(product(H[-1], weights))
        Delta = [self.call.loss_scale * (z[-1] - v)]
        for layer in reversed(range(len(base) - 1)):
            back = product(Delta[0], base[layer + 1].mT)
            Delta.insert(0, back * gelu_slope(z[layer]))
        return H, z, Delta

    def read(self, walked: Walked, part: slice) -> Tensor:
        """What the queries of the pieces read, (heads, pieces, group * size, dv)."""
        product = torch.matmul
        beta, f = (self.of_group(self.of.rows, part)[..., i, None] for i in (0, 2))
        G, A = self.of_group(self.of.G, part), self.q[:, part]
        W, S = self.call.layers(walked.W), self.call.layers(walked.S)
        for layer in range(len(W)):
            if layer:
                A = gelu(A)
            scores = product(A, walked.H[layer].mT) * G
            A = (
                beta * product(A, W[layer]) + f * product(A, S[layer])
                - product(scores, walked.Delta[layer])
            )  # fmt: skip
        return A


def forward(
    call: Deep, W: Tensor, S: Tensor, k: Tensor, v: Tensor, q: Tensor, rates: Rates, keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (batch, heads, tokens, dv), the last W and S (memories, numbers), and what `backward` needs
    of the states, (groups, 3, heads, numbers), none unless `keep`.
    """
    walk = Walk(call, W, S, k, v, q, rates, backend)
    outputs, kept = [], []
    state = walk.begin() if call.pieces.count else torch.stack([W, S, W])
    for first in range(0, call.pieces.count, GROUP):
        part = slice(first, min(first + GROUP, call.pieces.count))
        if keep:
            kept.append(state)
        walked, state = walk.group(state, part)
        outputs.append(walk.read(walked, part))
    saved = torch.stack(kept) if keep and kept else W.new_empty(0)
    empty = q.new_zeros(*q.shape[:3], v.shape[3])
    y = walk.unfold(torch.cat(outputs, 1), q) if outputs else empty
    if call.pieces.packed is not None:
        last_W, last_S = (ends.left for ends in walk.sequences)
        return y, last_W, last_S, saved
    return y, state[0].clone(), state[1].clone(), saved
