"""TransNormerLLM's layers and modules against the reference, and the rows engine's ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.rows import gated_norm, lift
from attnspec.fast.engines.rows.op import lift_op, norm_op
from attnspec.fast.linear import lightning_attention_1 as fast
from attnspec.fast.linear.lightning_attention_1_module import (
    WEIGHTS,
    TransNormer,
    TransNormerBlock,
)
from attnspec.reference.linear import lightning_attention_1 as spec

FLAGS: tuple[dict[str, Any], ...] = (
    {},
    {"v_activation": True, "gate": "sigmoid", "norm": "layer", "eps": 1e-5},
)


def weights_of(block: TransNormerBlock) -> dict[str, Any]:
    """The reference's parameters of a block."""
    named = {name: getattr(block, name) for name in (*WEIGHTS, "slopes", "theta")}
    return {name: None if x is None else x.detach().numpy() for name, x in named.items()}


def block_of(width: int = 12, heads: int = 3, **options: Any) -> TransNormerBlock:
    torch.manual_seed(width)
    return TransNormerBlock(width, heads, layer=1, n_layers=4, hidden=7, **options).double()


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("lrpe", [False, True])
@pytest.mark.parametrize("T", [1, 63, 65])
def test_block_is_the_references(T: int, lrpe: bool, flags: dict[str, Any]) -> None:
    block = block_of(lrpe=lrpe, **flags)
    x = torch.randn(2, T, 12, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 3, 8 if lrpe else 4, 4, dtype=torch.float64, requires_grad=True)
    outputs = block(x, state, 5)
    params = weights_of(block)
    plain = x.detach().numpy(), params, state.detach().numpy(), 5
    for got, expected in zip(outputs, spec.tnl_block(*plain, **flags), strict=True):
        np.testing.assert_allclose(got.detach().numpy(), expected, atol=1e-10, rtol=1e-10)
    up = [torch.randn_like(y) for y in outputs]
    named = dict(block.named_parameters())
    got = torch.autograd.grad(outputs, [x, state, *named.values()], up)
    dx, dparams, dS0 = spec.tnl_block_backward(*plain, *(u.numpy() for u in up), **flags)
    for gradient, expected in zip(got, [dx, dS0, *(dparams[n] for n in named)], strict=True):
        np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-9, rtol=1e-9)


def test_block_passes_gradcheck() -> None:
    block = block_of(4, 2, lrpe=True)
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    named = {n: p.detach().requires_grad_() for n, p in block.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Any:
        params = dict(zip(named, values, strict=True))
        return torch.func.functional_call(block, params, (x,))

    assert torch.autograd.gradcheck(run, (x, *named.values()), fast_mode=True)


@pytest.mark.parametrize("lrpe", [False, True])
def test_steps_are_the_whole(lrpe: bool) -> None:
    block = block_of(lrpe=lrpe).float()
    x = torch.randn(2, 11, 12)
    whole, last = block(x)
    first, state = block(x[:, :4])
    parts = [first]
    for t in range(4, 11):
        y, state = block.step(x[:, t : t + 1], state, t)
        assert not y.requires_grad
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("lrpe", "numbers"), [(False, 3 * 4 * 4), (True, 3 * 8 * 4)])
def test_state_size_is_that_of_the_state(lrpe: bool, numbers: int) -> None:
    block = block_of(lrpe=lrpe)
    for tokens in (1, 11):
        _, state = block(torch.randn(1, tokens, 12, dtype=torch.float64))
        assert block.state_size(tokens) == state.numel() == numbers


def test_decoder_trains_and_decodes() -> None:
    torch.manual_seed(0)
    model = TransNormer(11, 16, 2, 3)
    assert [block.theta is not None for block in model.blocks] == [True, False, False]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, 11, (2, 20))
    losses = []
    for _ in range(8):
        logits, _ = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.7 * losses[0]
    whole, last = model(tokens)
    logits, states = model(tokens[:, :13])
    parts = [logits]
    for t in range(13, 20):
        logits, states = model.step(tokens[:, t : t + 1], states, t)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states, last, atol=1e-4, rtol=1e-4)


def test_decoder_is_the_references_layers() -> None:
    torch.manual_seed(1)
    model = TransNormer(5, 8, 2, 2, tied=True, lrpe=(True, True)).double()
    tokens = torch.randint(0, 5, (2, 6))
    E = model.embedding.weight.detach().numpy()
    x = 8**0.5 * E[tokens.numpy()]
    for layer, block in enumerate(model.blocks):
        params = weights_of(block)
        np.testing.assert_allclose(params["slopes"], spec.layer_slopes(2, layer, 2), rtol=1e-6)
        x, _ = spec.tnl_block(x, params)
    logits = model(tokens)[0].detach().numpy()
    np.testing.assert_allclose(logits, spec.srms_norm(x) @ E.T, atol=1e-10)


def test_packed_and_padded_are_alone_and_differentiable() -> None:
    torch.manual_seed(2)
    block = block_of(lrpe=True)
    params = {name: getattr(block, name) for name in (*WEIGHTS, "slopes", "theta")}
    x = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    offsets, starts = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 3, 6], dtype=torch.int32)
    y, states = fast.tnl_gla_packed(x, params, offsets, None, starts)
    parts = [
        fast.tnl_gla(x[None, a:b], params, None, int(start))
        for a, b, start in zip(offsets[:-1], offsets[1:], starts, strict=True)
    ]
    torch.testing.assert_close(y, torch.cat([part[0] for part, _ in parts]))
    torch.testing.assert_close(states, torch.cat([state for _, state in parts]))
    up = torch.randn_like(y)
    expected = torch.autograd.grad(torch.cat([part[0] for part, _ in parts]), x, up)
    torch.testing.assert_close(torch.autograd.grad(y, x, up), expected)
    valid = torch.tensor([[False, True, True, False]])
    inner = x[None, :4]
    padded, state = fast.tnl_gla_padded(inner, params, valid)
    alone, last = fast.tnl_gla(inner[:, 1:3], params, None, 1)
    torch.testing.assert_close(padded[:, 1:3], alone)
    torch.testing.assert_close(state, last)
    assert torch.autograd.grad(padded.sum(), x)[0][:1].eq(0).all()


def test_no_tokens() -> None:
    block = block_of(lrpe=True)
    y, state = block(torch.zeros(2, 0, 12, dtype=torch.float64))
    assert y.shape == (2, 0, 12)
    assert not state.any()


def test_half_precision_keeps_its_dtype() -> None:
    block = block_of(lrpe=True).bfloat16()
    y, state = block(torch.randn(1, 5, 12, dtype=torch.bfloat16))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_ops_are_well_registered() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x = torch.randn(1, 2, 5, 4, requires_grad=True)
    u, theta = torch.randn(1, 5, 8), torch.rand(2, 4, requires_grad=True)
    for gate in (None, u):
        torch.library.opcheck(norm_op.op, (x, gate, 1e-6, "numba"), test_utils=checks)
    for lifted in (None, theta):
        arguments = (x, lifted, None, 3, True, "numba")
        torch.library.opcheck(lift_op.op, arguments, test_utils=checks)
    (first,) = torch.autograd.grad(gated_norm(x, eps=1e-6).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        first.sum().backward()


def test_compiles_as_one_graph() -> None:
    block = block_of(lrpe=True).float()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 9, 12)
    torch.testing.assert_close(compiled(x), block(x))


def run_with(**changed: Tensor) -> Any:
    """A block with some of its weights replaced."""
    block = block_of().float()
    params = {name: getattr(block, name) for name in (*WEIGHTS, "slopes", "theta")}
    return fast.tnl_block(torch.zeros(1, 2, 12), {**params, **changed})


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: TransNormerBlock(12, 5), ValueError, "heads"),
        (lambda: TransNormerBlock(12, 3, layer=1), ValueError, "layer"),
        (lambda: TransNormerBlock(12, 3, n_layers=0), ValueError, "n_layers"),
        (lambda: run_with(Wo=torch.zeros(12, 11)), ValueError, "Wo"),
        (lambda: run_with(Wqkvu=torch.zeros(12, 48).half()), TypeError, "Wqkvu"),
        (lambda: run_with(Wd=torch.zeros(7, 11)), ValueError, "Wd"),
        (lambda: run_with(theta=torch.zeros(3, 5)), ValueError, "theta"),
        (lambda: run_with(slopes=torch.zeros(5)), ValueError, "slopes"),
        (lambda: TransNormerBlock(12, 3, gate="tanh"), ValueError, "gate"),
        (lambda: TransNormerBlock(12, 3, decay_rule="none"), ValueError, "decay_rule"),
        (lambda: block_of().step(torch.zeros(1, 2, 12), None, 0), ValueError, "x"),
        (lambda: TransNormer(5, 8, 2, 2, lrpe=(True,)), ValueError, "lrpe"),
        (lambda: TransNormer(5, 8, 2, 1)(torch.zeros(1, 2)), TypeError, "tokens"),
        (lambda: TransNormer(5, 8, 2, 2)(torch.ones(1, 2).long(), ()), ValueError, "states"),
        (lambda: lift(torch.ones(1, 1, 1, 2), torch.ones(1, 1)), ValueError, "theta"),
        (lambda: gated_norm(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1), eps=0.0), ValueError, "u"),
    ],
)
def test_bad_inputs(call: Any, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name}: got "):
        call()
