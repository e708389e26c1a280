"""Titans on the memory engine: against the reference in float64, odd lengths, gradients, ops."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.memory import scalars, weight_path
from attnspec.fast.engines.memory.op import memory_op, path_op, scalars_op
from attnspec.fast.engines.memory.plan import Pieces
from attnspec.fast.linear import titans as fast
from attnspec.reference.linear import titans as spec

Inputs = tuple[Any, ...]


def draw(T: int, depth: int, dtype: torch.dtype = torch.float64, group: int = 2) -> Inputs:
    torch.manual_seed(T + depth)
    widths = [3, *[5] * (depth - 1), 4]
    W = tuple(0.5 * torch.randn(2, 2, a, b, dtype=dtype) for a, b in itertools.pairwise(widths))
    S = tuple(0.1 * torch.randn_like(w) for w in W)
    k, v = 0.5 * torch.randn(2, 2, T, 3, dtype=dtype), torch.randn(2, 2, T, 4, dtype=dtype)
    q = torch.randn(2, 2 * group, T, 3, dtype=dtype)
    rates = tuple(top * torch.rand(2, 2, T, dtype=dtype) for top in (0.1, 1.0, 0.5))
    return W, S, k, v, q, rates


def leaves(x: Any) -> list[Any]:
    return [leaf for item in x for leaf in leaves(item)] if isinstance(x, tuple) else [x]


def plain(x: Any) -> Any:
    return tuple(plain(item) for item in x) if isinstance(x, tuple) else x.detach().numpy()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("T", "b"), [(1, 1), (63, 16), (65, 64), (150, 100), (70, 5)])
@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
def test_forward_and_gradients(depth: int, T: int, b: int, read: str) -> None:
    inputs = draw(T, depth)
    tensors = [x.requires_grad_() for x in leaves(inputs)]
    outputs = fast.titans_chunk_mlp(*inputs, b, read=read)
    expected = spec.titans_chunk_mlp(*plain(inputs), b, read=read)
    up = [torch.randn_like(x) for x in leaves(outputs)]
    got = torch.autograd.grad(leaves(outputs), tensors, up)
    dy, *states = (x.numpy() for x in up)
    gradients = spec.titans_chunk_mlp_backward(
        *plain(inputs), b, dy, tuple(states[:depth]), tuple(states[depth:]), read=read
    )
    for x, y in zip([*leaves(outputs), *got], [*leaves(expected), *leaves(gradients)], strict=True):
        np.testing.assert_allclose(x.detach().numpy(), y, atol=1e-9, rtol=1e-9)


def test_no_tokens() -> None:
    W, S, k, v, q, rates = draw(0, 2)
    y, last, momentum = fast.titans_chunk_mlp(W, S, k, v, q, rates, 4)
    assert y.shape == (2, 4, 0, 4)
    assert all(torch.equal(x, z) for x, z in zip((*last, *momentum), (*W, *S), strict=True))


def test_padding_and_strides() -> None:
    W, S, k, v, q, rates = draw(20, 2)
    valid = torch.rand(2, 20) < 0.6
    expected = spec.titans_chunk_mlp(*plain((W, S, k, v, q, rates)), 3, valid=valid.numpy())
    for x in (k, v, q):
        x[~valid[:, None].expand(x.shape[:3])] = torch.nan
    strided = [x.mT.contiguous().mT for x in (k, v, q)]
    got = fast.titans_chunk_mlp(W, S, *strided, rates, 3, valid=valid)
    for x, y in zip(leaves(got), leaves(expected), strict=True):
        np.testing.assert_allclose(x.numpy(), y, atol=1e-10)


@pytest.mark.parametrize(("c", "period"), [(1, 4), (2, 4), (3, None), (4, 4), (30, 30)])
def test_granular_chunks(c: int, period: int | None) -> None:
    W, S, k, v, q, (theta, eta, alpha) = draw(21, 2)
    rates = (theta, eta[..., : 21 // c], alpha[..., : 21 // c])
    got = fast.titans_chunk_granular(W, S, k, v, q, *rates, c, period)
    expected = spec.titans_chunk_granular(*plain((W, S, k, v, q, *rates)), c, period)
    for x, y in zip(leaves(got), leaves(expected), strict=True):
        np.testing.assert_allclose(x.numpy(), y, atol=1e-10)


def test_first_weights_may_be_shared() -> None:
    W, S, k, v, q, rates = draw(9, 2)
    shared = [w[0, 0].clone().requires_grad_() for w in W]
    full = tuple(w.detach().expand(2, 2, *w.shape).clone().requires_grad_() for w in shared)
    one, each = (fast.titans_chunk_mlp(tuple(w), S, k, v, q, rates, 4)[0] for w in (shared, full))
    torch.testing.assert_close(one, each)
    upstream = torch.randn_like(one)
    got = torch.autograd.grad(one, shared, upstream)
    apart = torch.autograd.grad(each, full, upstream)
    torch.testing.assert_close(got, tuple(x.sum((0, 1)) for x in apart))


def test_pieces_cut_and_join() -> None:
    x = torch.arange(2 * 75, dtype=torch.float32).reshape(2, 75)
    for b, size in ((10, 4), (16, 8), (75, 64), (100, 32), (1, 1)):
        pieces = Pieces(75, b, size)
        assert torch.equal(pieces.join(pieces.cut(x, 1), 1), x)


def test_decoding_continues_a_call() -> None:
    W, S, k, v, q, rates = draw(9, 2, torch.float32)
    whole, last, momentum = fast.titans_chunk_mlp(W, S, k, v, q, rates, 4)
    part = fast.titans_chunk_mlp(
        W, S, *(x[:, :, :8] for x in (k, v, q)), tuple(x[..., :8] for x in rates), 4
    )
    state = fast.MemoryState(part[1], part[1], part[2])
    now = [x[:, :, 8:] for x in (q, k, v)]
    y, state = fast.decode_step(state, *now, tuple(x[..., 8:] for x in rates), 4)
    torch.testing.assert_close(torch.cat([part[0], y], 2), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((state.W, state.S), (last, momentum), atol=1e-5, rtol=1e-5)


def test_weight_path_gradient() -> None:
    shapes = ((3, 7), (3, 7), (3, 4, 7), (3, 4), (3, 4))
    inputs = [torch.rand(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(weight_path, inputs)


def test_scalars_gradient() -> None:
    rates = [torch.rand(2, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(scalars, rates)


def test_ops_are_well_registered() -> None:
    W, S, k, v, q, rates = draw(10, 1, torch.float32)
    packed = [x[0].flatten(2).clone().requires_grad_() for x in (W, S)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        memory_op.op, (*packed, k, v, q, *rates, None, None, [3, 4], 4, 2.0, False, True, "numba"),
        test_utils=checks,
    )  # fmt: skip
    flat = [x.flatten(0, 1) for x in rates]
    torch.library.opcheck(scalars_op.op, (*flat, "numba"), test_utils=checks)
    states = [torch.randn(2, 5) for _ in range(2)]
    path = (*states, torch.randn(2, 3, 5), torch.rand(2, 3), torch.rand(2, 3), "numba")
    torch.library.opcheck(path_op.op, path, test_utils=checks)


def test_compiles_as_one_graph() -> None:
    inputs = draw(10, 1, torch.float32)
    compiled = torch.compile(
        lambda *x: fast.titans_chunk_mlp(*x, 4)[0], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*inputs), fast.titans_chunk_mlp(*inputs, 4)[0])


def test_layers_train_a_few_steps() -> None:
    from attnspec.fast.linear.titans_module import TitansBlock

    for layout in ("mac", "mal", "memory"):
        torch.manual_seed(0)
        block = TitansBlock(16, layout=layout, memory_width=8, prefix=2, window=4, segment=8)
        optimiser = torch.optim.Adam(block.parameters(), lr=1e-2)
        x = torch.randn(2, 20, 16)
        losses = []
        for _ in range(4):
            loss = (block(x)[:, :-1] - x[:, 1:]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        assert all(p.grad is not None for p in block.parameters()), layout
        assert losses[-1] < losses[0], layout


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"b": 0}, ValueError, "b"),
        ({"rates": (0.1, 2.0, 0.0)}, ValueError, "rates.eta"),
        ({"rates": None}, TypeError, "rates"),
        ({"W0": ()}, ValueError, "W0"),
        ({"backend": "triton"}, ValueError, "backend"),
    ],
)
def test_bad_inputs(change: dict[str, Any], error: type[Exception], name: str) -> None:
    names = ("W0", "S0", "k", "v", "q", "rates")
    arguments: dict[str, Any] = {**dict(zip(names, draw(4, 2), strict=True)), "b": 2, **change}
    with pytest.raises(error, match=rf"^{name}: got "):
        fast.titans_chunk_mlp(**arguments)


def test_half_precision_keeps_its_dtype() -> None:
    W, _S, k, v, q, _rates = draw(6, 1, torch.float32)
    half: list[Tensor] = [x.bfloat16() for x in (k, v, q)]
    y, last, _ = fast.titans_chunk_linear(W[0], None, *half, (0.1, 0.5, 0.0), 4)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)


def test_granular_gradients_may_be_beyond_half_precision() -> None:
    W, S, k, v, q, (theta, eta, alpha) = draw(4, 2, torch.float32)
    half = [x.half() for x in (k, v, q, theta / 1000, eta, alpha)]
    grown = tuple(300 * w for w in W)
    got = fast.titans_chunk_granular(grown, S, *half, 1, 1)
    wide = [x.double() for x in half]
    states = [tuple(w.double() for w in x) for x in (grown, S)]
    expected = spec.titans_chunk_granular(*plain((*states, *wide)), 1, 1)
    assert all(torch.isfinite(x).all() for x in leaves(got[1:]))
    for x, y in zip(leaves(got[1]), leaves(expected[1]), strict=True):
        np.testing.assert_allclose(x.numpy(), y, rtol=1e-2, atol=1e-3 * np.abs(y).max())
