"""LightNet on the CPU: gates and summary against plain torch in float64, gradients, custom ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.scan import additive_gates, time_summary
from attnspec.fast.engines.scan.additive import gates_op
from attnspec.fast.engines.scan.summary import read_op, summary_op
from attnspec.fast.linear.lightnet import (
    decode_step,
    lightnet_causal,
    lightnet_noncausal,
    md_lrpe,
)
from attnspec.reference.linear import lightnet as spec


def tensors(tokens: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(tokens)
    shapes = ((1, 4, tokens, 5), (1, 2, tokens, 5), (1, 2, tokens, 3))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def plain_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query's softmax over the past, channel by channel."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    rows = []
    for t in range(k.shape[2]):
        means = k[:, :, : t + 1].softmax(2).mT @ v[:, :, : t + 1]
        rows.append(q[:, :, t, None] @ means)
    return torch.cat(rows, 2)


@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_causal_and_noncausal(tokens: int) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(tokens))
    whole = q @ (k.softmax(2).mT @ v).repeat_interleave(2, 1)
    for got, expected in (
        (lightnet_causal(q, k, v)[0], plain_causal(q, k, v)),
        (lightnet_noncausal(q, k, v), whole),
    ):
        torch.testing.assert_close(got, expected)
        up = torch.randn_like(got)
        gradients = torch.autograd.grad(got, (q, k, v), up, retain_graph=True)
        wanted = torch.autograd.grad(expected, (q, k, v), up, retain_graph=True)
        torch.testing.assert_close(gradients, wanted)


def test_gradients_of_gates() -> None:
    _, k, v = tensors(6)
    z0 = torch.randn(1, 2, 5, dtype=torch.float64)
    leaves = (k.requires_grad_(), z0.requires_grad_())
    assert torch.autograd.gradcheck(additive_gates, leaves)
    assert torch.autograd.gradcheck(lambda x: additive_gates(x)[:2], (k,))
    assert torch.autograd.gradcheck(lambda *x: time_summary(*x)[0], (k, v.requires_grad_()))


def test_a_gradient_flows_through_the_state() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(8))
    whole = lightnet_causal(q, k, v)[0][:, :, 5:]
    _, state = lightnet_causal(*(x[:, :, :5] for x in (q, k, v)))
    parts = lightnet_causal(*(x[:, :, 5:] for x in (q, k, v)), state)[0]
    torch.testing.assert_close(parts, whole)
    up = torch.randn_like(whole)
    torch.testing.assert_close(
        torch.autograd.grad(parts, (k, v), up), torch.autograd.grad(whole, (k, v), up)
    )


def test_decode_is_prefill_and_16_bits_are_close() -> None:
    q, k, v = tensors(12, torch.bfloat16)
    state = (torch.zeros(1, 4, 5, 3), torch.full((1, 4, 5), -torch.inf))
    rows = []
    for t in range(12):
        o, state = decode_step(state, *(x[:, :, t : t + 1] for x in (q, k, v)))
        rows.append(o)
    expected = plain_causal(*(x.double() for x in (q, k, v)))
    torch.testing.assert_close(torch.cat(rows, 2).double(), expected, rtol=3e-2, atol=3e-2)


def test_the_last_axis_of_an_odd_width_gets_fewer_angles() -> None:
    torch.manual_seed(0)
    x, theta = torch.randn(2, 3, 7, 5, dtype=torch.float64), torch.rand(3, 3, dtype=torch.float64)
    got = md_lrpe(x, theta, (2, 3), 1)
    torch.testing.assert_close(
        got, torch.from_numpy(spec.md_lrpe(x.numpy(), theta.numpy(), (2, 3), 1))
    )


def test_an_unknown_logit_spoils_nothing_before_it() -> None:
    q, k, v = tensors(9)
    k[0, 0, 4, 2] = torch.nan
    o, _ = lightnet_causal(q, k, v)
    assert o[:, :, :4].isfinite().all()
    assert o[:, :2, 4:].isnan().all()
    assert o[:, 2:].isfinite().all()


def test_custom_ops() -> None:
    _, k, v = tensors(4, torch.float32)
    k, v = k.requires_grad_(), v.requires_grad_()
    torch.library.opcheck(gates_op.op, (k, None, "numba"))
    torch.library.opcheck(gates_op.op, (k, torch.zeros(1, 2, 5), "numba"))
    torch.library.opcheck(summary_op.op, (k, v, "numba"))
    small = torch.randn(*k.shape[:2], k.shape[3], 7).to(k.dtype).requires_grad_()
    torch.library.opcheck(read_op.op, (k, small, "numba"))
