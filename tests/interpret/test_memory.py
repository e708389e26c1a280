"""The memory engine's Triton kernels in the interpreter against the CPU's in float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from attnspec.fast.backend import launch_count
from attnspec.fast.engines.memory import (
    MemoryConfig,
    memory,
    scalars,
    triton_deep,
    triton_deep_walk,
    use_config,
    weight_path,
)
from attnspec.fast.engines.memory.plan import Pieces, Rates
from attnspec.fast.linear import titans

SMALL = MemoryConfig(piece=16, walk_items=512, tile=16, deep_piece=16, deep_tile=16, deep_read=16)


@pytest.mark.parametrize(
    ("tokens", "b", "d", "dv", "group", "before"),
    [(20, 8, 16, 16, 1, False), (35, 24, 20, 12, 2, True), (1, 1, 16, 40, 1, False)],
)
def test_linear_memory(tokens: int, b: int, d: int, dv: int, group: int, before: bool) -> None:
    torch.manual_seed(tokens)
    shapes = ((1, 1, d, dv), (1, 1, d, dv), (1, 1, tokens, d), (1, 1, tokens, dv),
              (1, group, tokens, d))  # fmt: skip
    W, S, k, v, q = (torch.randn(s) / d**0.5 for s in shapes)
    rates = tuple(torch.rand(1, 1, tokens) for _ in range(3))
    stored = torch.arange(tokens)[None] < max(1, tokens - 3)
    results = []
    for dtype, backend in ((torch.float64, "numba"), (torch.float32, "triton")):
        leaves = [x.to(dtype).requires_grad_() for x in (W, S, k, v, q, *rates)]
        first, momentum, key, value, query, *three = leaves
        with use_config(SMALL):
            y, last_W, last_S = memory(
                (first,), (momentum,), key, value, query, tuple(three), b, before=before,
                stored=stored, backend=backend,
            )  # fmt: skip
            outputs = (y, *last_W, *last_S)
            gradients = torch.autograd.grad(outputs, leaves, [x.detach().cos() for x in outputs])
        results.append([x.detach().double() for x in (*outputs, *gradients)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in buffers that nobody has written."""
    empty = torch.empty

    def spoiled(*shape: Any, **options: Any) -> torch.Tensor:
        out = empty(*shape, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", spoiled)


@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize(
    ("tokens", "b", "widths", "group", "before", "dtype"),
    [
        (20, 8, (16, 16, 16), 1, False, torch.float32),
        (35, 24, (20, 40, 12), 2, True, torch.float32),
        (1, 1, (5, 3, 7), 1, False, torch.float32),
        (130, 200, (4, 20, 8), 1, True, torch.float32),  # a chunk longer than a group of pieces
        (130, 48, (4, 17, 3), 2, False, torch.float32),
        (35, 16, (16, 20, 8), 1, False, torch.float16),
    ],
)
def test_two_layers(
    tokens: int, b: int, widths: tuple[int, ...], group: int, before: bool, dtype: torch.dtype
) -> None:
    """Values and all gradients, of two memories of which the last tokens are not stored."""
    torch.manual_seed(tokens)
    layers = [torch.randn(1, 2, n, m) / n**0.5 for _ in range(2)
              for n, m in itertools.pairwise(widths)]  # fmt: skip
    d, _, dv = widths
    rows = [torch.randn(1, heads, tokens, n) / n**0.5
            for heads, n in ((2, d), (2, dv), (2 * group, d))]  # fmt: skip
    rates = [torch.rand(1, 2, tokens) * top for top in (0.1 / min(b, tokens) ** 0.5, 1.0, 0.5)]
    given = [*layers, *(x.to(dtype) for x in (*rows, *rates))]
    stored = torch.arange(tokens)[None] < max(1, tokens - 3)
    results = []
    for wide, backend in ((True, "numba"), (False, "triton")):
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in given]
        launched = launch_count()
        with use_config(SMALL):
            y, last_W, last_S = memory(
                leaves[:2], leaves[2:4], *leaves[4:7], tuple(leaves[7:]), b, before=before,
                stored=stored, backend=backend,
            )  # fmt: skip
            outputs = (y, *last_W, *last_S)
            upstream = [x.detach().double().cos().to(x.dtype) for x in outputs]
            gradients = torch.autograd.grad(outputs, leaves, upstream)
        results.append([x.detach().double() for x in (*outputs, *gradients)])
    pieces = b // 16 + (b % 16 > 0)
    count = tokens // b * pieces + -(-(tokens % b) // 16)
    # Coefficients once, and three times for the gradient. A walk is a launch a piece and one a
    # group, and is taken again and back; reads are one launch a group, and three back; keys one.
    assert launch_count() - launched == 4 + 3 * count + 8 * -(-count // 8)
    loose = 2e-5 if dtype == torch.float32 else 4e-3
    for got, expected in zip(results[1], results[0], strict=True):
        bound = loose * (1e-3 + float(expected.abs().max()))
        torch.testing.assert_close(got, expected, atol=bound, rtol=0)


@triton.jit
def truncated(x):
    """float32 numbers as matrix units read them for TF32."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def tf32_dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(truncated(a), truncated(b), input_precision="ieee")


def test_queries_and_states_of_16_bits_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In GELU's tail, which is steep relative to its value: an error of z grows by a factor z^2."""
    monkeypatch.setattr(triton_deep_walk, "dot", tf32_dot)
    torch.manual_seed(0)
    q = torch.randn(1, 1, 1, 64).half()
    W = (-4.5 * q.mT / q.float().square().sum()).half(), torch.ones(1, 1, 1, 4).half()
    S = tuple(0.1 * x for x in W)
    q = q.expand(1, 1, 12, 64)
    # Nothing is stored: what is read are the given states times coefficients.
    rates = [torch.zeros(1, 1, 12).half(), *(torch.rand(2, 1, 1, 12).half() / 8)]
    expected = memory(
        [w.double() for w in W], [s.double() for s in S], q.double(), q[..., :4].double(),
        q.double(), [x.double() for x in rates], 16,
    )[0]  # fmt: skip
    y = memory(W, S, q, q[..., :4], q, rates, 16, backend="triton")[0]
    torch.testing.assert_close(y.double(), expected, atol=0, rtol=2.0**-8)


def test_tiles_of_16_bit_inputs_have_sides_of_32() -> None:
    """Smaller products in TF32 are wrong on Hopper: see `least_side`."""
    for dtype, least in ((torch.float16, 32), (torch.float32, 16)):
        k, v, rate = (torch.zeros(1, 1, 3, n, dtype=dtype) for n in (5, 7, 1))
        rates = Rates.of(*[rate[..., 0]] * 3, None, torch.float32)
        pieces = Pieces(3, 1, least)
        with use_config(MemoryConfig()):
            call = triton_deep.Two.of_inputs((5, 3, 7), pieces, k, v, k, rates, 2.0, False)
        for options in (call.owning(), call.going_through()):
            assert {options[side] for side in ("BD", "BV", "BH")} == {least}


def test_rows_apart_and_no_tokens() -> None:
    """Inputs with strides, and a memory that is not asked anything."""
    torch.manual_seed(0)
    W = torch.randn(1, 1, 6, 5) / 3, torch.randn(1, 1, 5, 4) / 3
    k, v, q = (torch.randn(1, 1, n, 20).mT for n in (6, 4, 6))
    rates = 0.02, 0.9, 0.1
    three = tuple(torch.full((1, 1, 20), x) for x in rates)
    expected = titans.titans_chunk_mlp(W, None, k, v, q, three, 8)
    got = titans.titans_chunk_mlp(W, None, k, v, q, three, 8, backend="triton")
    for x, z in zip((got[0], *got[1], *got[2]), (expected[0], *expected[1], *expected[2]),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(x, z, atol=2e-5, rtol=2e-5)
    none = [x[:, :, :0] for x in (k, v, q)]
    y, last, _ = titans.titans_chunk_mlp(
        W, None, *none, tuple(x[..., :0] for x in three), 8, backend="triton"
    )
    assert y.shape == (1, 1, 0, 4)
    assert all(torch.equal(x, z) for x, z in zip(last, W, strict=True))


@pytest.mark.parametrize("widths", [(4, 5, 5, 4), (4, 5, 130)])
def test_other_memories_are_products_of_torch(widths: tuple[int, ...]) -> None:
    """Three layers, or wider ones than the kernels hold: only the coefficients are a kernel."""
    torch.manual_seed(0)
    W = tuple(torch.randn(1, 1, n, m) / n**0.5 for n, m in itertools.pairwise(widths))
    k, v, q = (torch.randn(1, 1, 9, n) for n in (widths[0], widths[-1], widths[0]))
    rates = tuple(torch.full((1, 1, 9), x) for x in (0.05, 0.9, 0.1))
    launched = launch_count()
    got = titans.titans_chunk_mlp(W, None, k, v, q, rates, 4, backend="triton")[0]
    assert launch_count() == launched + 1
    expected = titans.titans_chunk_mlp(W, None, k, v, q, rates, 4)[0]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_scalars() -> None:
    results = []
    for dtype, backend in ((torch.float64, "numba"), (torch.float32, "triton")):
        torch.manual_seed(0)
        rates = [torch.rand(2, 7).to(dtype).requires_grad_() for _ in range(3)]
        outputs = scalars(*rates, backend=backend)
        gradients = torch.autograd.grad(outputs, rates, [x.detach().cos() for x in outputs])
        results.append([x.detach().double() for x in (*outputs, *gradients)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_weight_path() -> None:
    results = []
    for dtype, backend in ((torch.float64, "numba"), (torch.float32, "triton")):
        torch.manual_seed(0)
        shapes = ((2, 9), (2, 9), (2, 4, 9), (2, 4), (2, 4))
        inputs = [torch.rand(s).to(dtype).requires_grad_() for s in shapes]
        outputs = weight_path(*inputs, backend=backend)
        gradients = torch.autograd.grad(outputs, inputs, [x.detach().cos() for x in outputs])
        results.append([x.detach().double() for x in (*outputs, *gradients)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
