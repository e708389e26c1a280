"""Flowformer as a layer of a PyTorch model: causal Flow-Attention between two projections."""

from __future__ import annotations

from torch import Tensor, nn

from attnspec.fast.blocks import Block, Heads, joined
from attnspec.fast.linear.flowformer import FlowState, flow_attend_causal, flow_decode_step


class FlowBlock(Block):
    """x + out(flow_attend_causal(q, k, v)); projections with a bias, d = width / heads."""

    def __init__(self, width: int, *, heads: int = 8) -> None:
        super().__init__(width)
        self.heads = Heads(width, heads, bias=True)
        self.out = nn.Linear(width, width)

    def init_state(self, batch: int) -> FlowState:
        """All flows 0."""
        heads, d = self.heads.heads, self.heads.d
        sb, sa, sbO, saI = (self.zeros(batch, heads, d) for _ in range(4))
        se, N = self.zeros(batch, heads), self.zeros(batch, heads)
        return FlowState(sb, sa, sbO, saI, se, self.zeros(batch, heads, d, self.heads.dv), N)

    def mix(self, x: Tensor, state: FlowState | None) -> tuple[Tensor, FlowState]:
        q, k, v = self.heads(x)
        if state is not None and x.shape[1] == 1:
            o, state = flow_decode_step(state, q, k, v)
        else:
            o, state = flow_attend_causal(q, k, v, state)
        return self.out(joined(o)), state
