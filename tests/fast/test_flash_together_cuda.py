"""All gradients in one specialised kernel, on a CUDA device: against all pairs in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.flash import flash, triton_launch
from attnspec.fast.engines.flash.configs import APART, TOGETHER, use_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
Gradients = tuple[Tensor, ...]


class Call(NamedTuple):
    """Shapes and rules of a call."""

    heads: tuple[int, int]
    tokens: tuple[int, int]
    widths: tuple[int, int]
    window: int | None = None
    sinks: int = 0
    causal: bool = True
    sink_logit: bool = False
    batch: int = 1


CALLS = [
    Call((4, 4), (1000, 1000), (128, 128)),
    Call((4, 2), (1000, 1000), (64, 64), batch=2),
    Call((8, 2), (700, 1100), (128, 128)),
    Call((4, 1), (513, 513), (80, 96)),
    Call((4, 4), (600, 900), (128, 128), causal=False),
    Call((4, 2), (64, 129), (128, 64), causal=False),
    Call((4, 4), (1300, 1300), (128, 128), window=300, sinks=64),
    Call((4, 2), (1300, 1300), (128, 64), window=300, sinks=200),
    Call((4, 2), (900, 2500), (64, 128), window=100, sinks=5),
    Call((4, 4), (1100, 1100), (128, 128), window=500),
    Call((2, 2), (300, 300), (20, 36), window=1, sinks=1),
    Call((4, 2), (700, 700), (128, 128), window=200, sinks=3, sink_logit=True),
    # Enough keys for programs that sum over the heads of a group.
    Call((4, 2), (1200, 16500), (64, 64), window=1500),
    Call((2, 1), (1500, 33000), (64, 64)),
]


@pytest.fixture(autouse=True)
def known() -> None:
    """Only where the specialised kernel runs is there anything to see."""
    q = torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.float16)
    if triton_launch.arch(q) != 90 or not triton_launch.SPEAKS_GLUON:
        pytest.skip("the specialised kernel is for Hopper and Triton 3.6")


def operands(call: Call, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    """q, k and v, and sink logits if there are to be some."""
    torch.manual_seed(sum(call.tokens))
    (H, Hk), (Tq, Tk), (d, dv) = call.heads, call.tokens, call.widths
    shapes = (H, Tq, d), (Hk, Tk, d), (Hk, Tk, dv)
    given = [torch.randn(call.batch, *s, device="cuda").to(dtype).requires_grad_() for s in shapes]
    logits = torch.randn(H, device="cuda").requires_grad_() if call.sink_logit else None
    return given, logits


def upstream(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of the output and of lse."""
    shape = (call.batch, call.heads[0], call.tokens[0])
    dout = torch.randn(*shape, call.widths[1], device="cuda").to(dtype)
    return dout, torch.randn(*shape, device="cuda")


def gradients(
    call: Call, given: list[Tensor], logits: Tensor | None, above: tuple[Tensor, Tensor], how: Any
) -> Gradients:
    leaves = [*given, *([] if logits is None else [logits])]
    with use_config(backward=how):
        outputs = flash(
            *given, causal=call.causal, window=call.window, sinks=call.sinks, sink_logit=logits
        )
        return torch.autograd.grad(outputs, leaves, above)


def seen(call: Call) -> Tensor:
    """Who sees whom, (Tq, Tk)."""
    Tq, Tk = call.tokens
    position = torch.arange(Tq, device="cuda")[:, None] + Tk - Tq
    key = torch.arange(Tk, device="cuda")
    visible = torch.ones(Tq, Tk, device="cuda", dtype=torch.bool)
    if call.causal:
        visible &= key <= position
    if call.window is not None:
        visible &= (key > position - call.window) | (key < call.sinks)
    return visible


def exact(
    call: Call, given: list[Tensor], logits: Tensor | None, above: tuple[Tensor, Tensor]
) -> Gradients:
    leaves = [x.detach().double().requires_grad_() for x in given]
    group = call.heads[0] // call.heads[1]
    q, k, v = leaves[0], *(x.repeat_interleave(group, 1) for x in leaves[1:])
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~seen(call), -torch.inf)
    if logits is not None:
        leaves.append(logits.detach().double().requires_grad_())
        beside = leaves[3][:, None, None].expand(call.batch, -1, scores.shape[2], 1)
        scores = torch.cat([scores, beside], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()[..., : k.shape[2]]
    return torch.autograd.grad((weights @ v, lse), leaves, [x.double() for x in above])


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_those_of_all_pairs(call: Call, dtype: torch.dtype) -> None:
    given, logits = operands(call, dtype)
    above = upstream(call, dtype)
    expected = exact(call, given, logits, above)
    found = gradients(call, given, logits, above, TOGETHER)
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).abs().max() <= BOUNDS[dtype] * y.abs().max()
    again = gradients(call, given, logits, above, TOGETHER)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("call", [CALLS[0], CALLS[4], CALLS[7]])
def test_a_nan_reaches_those_that_see_it(call: Call) -> None:
    """As the kernels apart have it, to the bit: they compute everything again."""
    given, _ = operands(call, torch.bfloat16)
    with torch.no_grad():
        for place, x in enumerate(given):
            x[:, 0, 200 + 30 * place, 3 + place] = torch.nan
    above = upstream(call, torch.bfloat16)
    found = gradients(call, given, None, above, TOGETHER)
    expected = gradients(call, given, None, above, APART)
    for x, y in zip(found, expected, strict=True):
        assert 0 < y.isnan().sum() < y.numel()
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_a_graph_replays_with_other_data() -> None:
    call = CALLS[6]
    given, _ = operands(call, torch.float16)
    above = upstream(call, torch.float16)
    gradients(call, given, None, above, TOGETHER)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = gradients(call, given, None, above, TOGETHER)
    with torch.no_grad():
        for x in given:
            x.copy_(torch.randn_like(x))
    graph.replay()
    expected = gradients(call, given, None, above, TOGETHER)
    assert all(torch.equal(x, y) for x, y in zip(kept, expected, strict=True))
