"""LightNet on the CPU: gates and summary against plain torch in float64, gradients, custom ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.scan import additive_gates, time_summary
from attnspec.fast.engines.scan.additive import gates_op
from attnspec.fast.engines.scan.summary import read_op, summary_op
from attnspec.fast.linear.lightnet import (
    additive_rule,
    decode_step,
    lightnet_causal,
    lightnet_noncausal,
    lightnet_packed,
    md_lrpe,
    md_tpe,
    vector_decay_packed,
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
    torch.library.opcheck(gates_op.op, (k, None, None, "numba"))
    torch.library.opcheck(gates_op.op, (k, torch.zeros(1, 2, 5), None, "numba"))
    packed = (torch.zeros(3, 2, 5), torch.tensor([0, 1, 1, 4]))
    torch.library.opcheck(gates_op.op, (k.detach().requires_grad_(), *packed, "numba"))
    torch.library.opcheck(summary_op.op, (k, v, "numba"))
    small = torch.randn(*k.shape[:2], k.shape[3], 7).to(k.dtype).requires_grad_()
    torch.library.opcheck(read_op.op, (k, small, "numba"))


def test_packed_sequences_are_alone() -> None:
    """Gradients too; in the middle one the values are unknown."""
    q, k, v = (x[0].requires_grad_() for x in tensors(9))
    offsets = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
    state = (torch.randn(3, 4, 5, 3).double(), torch.randn(3, 4, 5).double())
    alone = [slice(0, 4), slice(6, 9)]
    spoilt = v.detach().clone().index_fill(1, torch.tensor([4, 5]), torch.nan).requires_grad_()
    o, (S, z) = lightnet_packed(q, k, spoilt, offsets, state)
    assert o[:, 4:6].isnan().all()
    for n, rows in zip((0, 2), alone, strict=True):
        own = (x[None, :, rows] for x in (q, k, v))
        one, after = lightnet_causal(*own, (state[0][n, None], state[1][n, None]))
        torch.testing.assert_close((o[:, rows], S[n], z[n]), (one[0], after[0][0], after[1][0]))
        up = torch.randn_like(one[0])
        got = torch.autograd.grad(o[:, rows], (q, k, spoilt), up, retain_graph=True)
        wanted = torch.autograd.grad(one[0], (q, k, v), up)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a[:, rows], b[:, rows])


def test_gradients_of_the_rule_and_of_filters() -> None:
    """Of states too, and of a chain of two calls."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(1, 2, 6, n).double().requires_grad_() for n in (3, 3, 2, 3))

    def halves(*x: Tensor) -> Tensor:
        first, state = additive_rule(*(y[:, :, :4] for y in x))
        return torch.cat([first, additive_rule(*(y[:, :, 4:] for y in x), state)[0]], 2)

    assert torch.autograd.gradcheck(halves, (q, k, v, g))
    torch.testing.assert_close(halves(q, k, v, g), additive_rule(q, k, v, g)[0])
    x = torch.randn(1, 2, 3, 4).double().requires_grad_()
    params = (*torch.randn(2, 2, 3).double().unbind(), torch.rand(2).double())
    leaves = [p.requires_grad_() for p in params]
    assert torch.autograd.gradcheck(lambda x, *p: md_tpe(x, [p], (1,)), (x, *leaves))


def test_offsets_are_checked() -> None:
    q, k, v = (x[0] for x in tensors(9))
    for offsets in ([0, 5, 4, 9], [0, 8], [0]):
        with pytest.raises(ValueError, match="offsets"):
            lightnet_packed(q, k, v, torch.tensor(offsets))
    with pytest.raises(ValueError, match="offsets"):
        vector_decay_packed(q, q, q, -q.abs(), torch.tensor([1, 9]))
    empty = lightnet_packed(q[:, :0], k[:, :0], v[:, :0], torch.tensor([0, 0, 0]))
    assert empty[0].shape == (4, 0, 3)
    assert torch.all(empty[1][1] == -torch.inf)
