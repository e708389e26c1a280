"""Dense softmax attention as a layer of a PyTorch model."""

from __future__ import annotations

from torch import Tensor, nn

from attnspec.fast.blocks import Block, Heads, joined
from attnspec.fast.dense.attention import State, attend, step


class AttentionBlock(Block):
    """Causal softmax attention with `heads` heads: x + out(attend(q, k, v)).

    The state holds the keys and values of all tokens; a step writes **in place** behind them, see
    `attnspec.fast.dense.attention.State`.
    """

    def __init__(self, width: int, *, heads: int = 8) -> None:
        super().__init__(width)
        self.heads = Heads(width, heads)
        self.out = nn.Linear(width, width, bias=False)

    def init_state(self, batch: int) -> State:
        """No keys and no values."""
        shape = (batch, self.heads.heads, 0, self.heads.d)
        weight = self.norm.weight
        return State(weight.new_empty(shape), weight.new_empty(shape))

    def state_size(self, tokens: int) -> int:
        return 2 * tokens * self.width

    def mix(self, x: Tensor, state: State | None) -> tuple[Tensor, State | None]:
        q, k, v = self.heads(x)
        if state is None:
            o, _ = attend(q, k, v, causal=True)
        else:
            o, state = step(state, q, k, v)
        return self.out(joined(o)), state
