"""LightNet as a layer of a PyTorch model: causal, with a norm and a gate of low rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnspec.fast.backend import check_integer
from attnspec.fast.blocks import EPSILON, Block, Heads, joined
from attnspec.fast.linear.lightnet import decode_step, lightnet_causal


class LightNetState(NamedTuple):
    """Running means S (batch, heads, d, d) and their log weights z (batch, heads, d), float32."""

    S: Tensor
    z: Tensor


class LightNetBlock(Block):
    """x + out(norm(lightnet_causal(silu(q), k, v)) * sigmoid(x U1 U2)), d = width / heads.

    U1 leads to `rank` channels, d by default. The norm is over the whole width.
    """

    def __init__(self, width: int, *, heads: int = 8, rank: int | None = None) -> None:
        super().__init__(width)
        self.heads = Heads(width, heads)
        rank = self.heads.d if rank is None else rank
        check_integer("rank", rank, least=1)
        self.inner_norm = nn.RMSNorm(width, eps=EPSILON)
        self.gate = nn.Sequential(
            nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        )
        self.out = nn.Linear(width, width, bias=False)

    def init_state(self, batch: int) -> LightNetState:
        """No weight yet: z is -inf."""
        shape = (batch, self.heads.heads, self.heads.d)
        return LightNetState(self.zeros(*shape, self.heads.dv), self.zeros(*shape) - torch.inf)

    def mix(self, x: Tensor, state: LightNetState | None) -> tuple[Tensor, LightNetState]:
        q, k, v = self.heads(x)
        q = nn.functional.silu(q)
        if state is not None and x.shape[1] == 1:
            o, after = decode_step(state, q, k, v)
        else:
            o, after = lightnet_causal(q, k, v, state)
        y = self.inner_norm(joined(o)) * torch.sigmoid(self.gate(x))
        return self.out(y), LightNetState(*after)
