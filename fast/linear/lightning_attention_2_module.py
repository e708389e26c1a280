"""Lightning attention as a layer of a PyTorch model: the decay of its heads, a norm and a gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnspec.fast.backend import check_bool
from attnspec.fast.blocks import EPSILON, Block, Heads, joined
from attnspec.fast.linear.lightning_attention_2 import attend, decode_step, layer_slopes


class LightningBlock(Block):
    """Linear attention that forgets: x + out(norm(attend(silu(q), silu(k), v)) * sigmoid(gate)).

    `layer` of `n_layers` sets how fast the heads forget, the lower layers faster; with `decay`
    False none does. The norm is over the whole width, because the mechanism has no denominator. The
    state is one float32 matrix a head, (batch, heads, d, d), d = width / heads.
    """

    slopes: Tensor

    def __init__(
        self,
        width: int,
        *,
        heads: int = 8,
        layer: int = 0,
        n_layers: int = 1,
        decay: bool = True,
    ) -> None:
        super().__init__(width)
        check_bool("decay", decay)
        self.heads = Heads(width, heads)
        slopes = layer_slopes(heads, layer, n_layers) if decay else torch.zeros(heads)
        self.register_buffer("slopes", slopes.float(), persistent=False)
        self.inner_norm = nn.RMSNorm(width, eps=EPSILON)
        self.gate = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def init_state(self, batch: int) -> Tensor:
        """Matrices of zeros."""
        return self.zeros(batch, self.heads.heads, self.heads.d, self.heads.dv)

    def mix(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = self.heads(x)
        q, k = nn.functional.silu(q), nn.functional.silu(k)
        if state is not None and x.shape[1] == 1:
            o, state = decode_step(state, q, k, v, self.slopes)
        else:
            o, state = attend(q, k, v, self.slopes, state)
        return self.out(self.inner_norm(joined(o)) * torch.sigmoid(self.gate(x))), state
