"""Forward-mode derivatives are refused: a custom op would drop them without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnspec.fast.dense.attention import attend
from attnspec.fast.linear.lightning_attention_2 import attend_left
from attnspec.fast.patterns.masformer import layer_attend

REFUSAL = "q: got a tangent of forward-mode differentiation"
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "attention": lambda q, k, v: attend(q, k, v, causal=True)[0],
    "lightning_attention_2": lambda q, k, v: attend_left(q, k, v, torch.ones(2)),
    "masformer": lambda q, k, v: layer_attend(q, k, v, span=("window", 3))[0],
}


@pytest.fixture
def operands() -> list[Tensor]:
    return [torch.randn(1, 2, 8, 16) for _ in range(3)]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch, in entering jvp
@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_is_refused(name: str, operands: list[Tensor]) -> None:
    q, k, v = operands
    call = CALLS[name]
    call(q, k, v)  # an equal kind of call that was checked before
    with pytest.raises(TypeError, match=REFUSAL):
        torch.func.jvp(lambda x: call(x, k, v), (q,), (q,))
    with forward_ad.dual_level():
        call(q, k, v)
        with pytest.raises(TypeError, match=REFUSAL):
            call(forward_ad.make_dual(q, q), k, v)
