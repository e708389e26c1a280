"""Giraffe's fast path where the suite does not look: far amplitudes, one graph, one turn a key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.positions import giraffe


def qkv(tokens: int = 40, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, tokens, 16), (2, 2, tokens, 16), (2, 2, tokens, 16))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_amplitudes_beyond_float16(dtype: torch.dtype) -> None:
    """A scale base of 1 over 40 positions: amplitudes from 1e-11 to 1e11, and logits that fade."""
    q, k, v = qkv(dtype=dtype)
    options: Any = {"N": 40, "b": 1}
    out, lse = giraffe.xpos_attend(q, k, v, **options)
    truth, true_lse = giraffe.xpos_attend(*(x.double() for x in (q, k, v)), **options)
    assert out.dtype == dtype
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(out.double(), truth, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), true_lse, atol=tolerance, rtol=tolerance)


def test_gradients_of_half_inputs_have_their_dtype() -> None:
    inputs = [x.requires_grad_() for x in qkv(dtype=torch.float16)]
    out, _ = giraffe.xpos_attend(*inputs, N=40, b=2)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(g.dtype == torch.float16 and bool(g.isfinite().all()) for g in gradients)


def test_one_graph() -> None:
    q, k, v = qkv(20)
    f = giraffe.rope_basis(16, scale=4.0, truncate=64)
    at = torch.arange(20) * 1.5

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = giraffe.attend(q, k, v, at, at, f)
        return out + giraffe.xpos_attend(q, k, v, N=20)[0]

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), both(q, k, v))


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_keys_are_turned_once(chunk: int) -> None:
    """Steps, on either engine, continue a prompt; an old state may be continued twice."""
    q, k, v = qkv()
    f = giraffe.rope_basis(16, power=0.5)
    at = torch.arange(40)
    whole, _ = giraffe.attend(q, k, v, at, at, f)
    state = giraffe.init_state(k, v)
    for t in range(0, 40, chunk):
        rows = slice(t, min(t + chunk, 40))
        new = (x[:, :, rows] for x in (q, k, v))
        out, following = giraffe.step(state, *new, at[rows], f)
        new = (x[:, :, rows] for x in (q, k, v))
        again, state = giraffe.step(state, *new, at[rows], f)
        torch.testing.assert_close(out, whole[:, :, rows])
        torch.testing.assert_close(again, out)
        torch.testing.assert_close(following.k, state.k)


def test_random_positions_are_not_kept_in_half_precision() -> None:
    with pytest.raises(TypeError, match=r"^u: got dtype torch\.float16, expected"):
        giraffe.random_positions(torch.rand(2, 9).half())
    p = giraffe.random_positions(torch.full((1, 2048), 0.9))
    assert bool((p.diff() > 0).all())
