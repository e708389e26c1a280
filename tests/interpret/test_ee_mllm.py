"""EE-MLLM's layers in the interpreter against the CPU in float64, with and without an audience."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch import Tensor

from attnspec.fast import backend
from attnspec.fast.patterns import ee_mllm as fast

MODES = ("self", "ffn", "frozen")


def layer_of(dtype: torch.dtype, rope: float | None) -> fast.Layer:
    """4 heads of 6, 2 kv heads with values of 8, states of 16 and 10 channels of the FFN."""
    random = torch.Generator().manual_seed(3)

    def made(rows: int, *columns: int) -> Tensor:
        return (torch.randn(rows, *columns, generator=random) / rows**0.5).to(dtype)

    shapes = [(16,), (16, 24), (16, 12), (16, 16), (32, 16), (16,)]
    ffn = made(16, 10), made(16, 10), made(10, 16)
    return fast.Layer(*(made(*shape) for shape in shapes), ffn, 4, 2, rope)


def widened(layer: fast.Layer) -> fast.Layer:
    return fast.Layer(
        *(x.double() for x in layer[:6]), tuple(x.double() for x in layer.ffn), *layer[7:]
    )


def states(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(batch)
    Xt = torch.randn(batch, 16, 5, generator=random).to(dtype).mT
    Xv = torch.randn(batch, 7, 16, generator=random).to(dtype)
    pos = torch.randperm(20, generator=random)[:12]
    return Xt, Xv, pos[:5], pos[5:].to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("image_visible", ["causal", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_a_layer(mode: str, image_visible: str, dtype: torch.dtype) -> None:
    layer = layer_of(dtype, None if mode == "ffn" else 100.0)
    for batch in (1, 2):
        Xt, Xv, pos_t, pos_v = states(batch, dtype)
        copies = Xt.clone(), Xv.clone()
        options = {"mode": mode, "image_visible": image_visible}
        got = fast.layer_step(Xt, Xv, layer, pos_t, pos_v, **options, backend="triton")
        given = Xt.double(), Xv.double(), widened(layer), pos_t, pos_v
        expected = fast.layer_step(*given, **options)
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=bound, atol=bound)
        assert torch.equal(Xt, copies[0])
        assert torch.equal(Xv, copies[1])


def test_gradients_of_a_layer() -> None:
    layer = layer_of(torch.float32, 100.0)
    Xt, Xv, pos_t, pos_v = states(2, torch.float32)

    def gradients(dtype: torch.dtype, kind: str) -> list[Tensor]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in (Xt, Xv, *layer[:6], *layer.ffn)]
        whole = fast.Layer(*leaves[2:8], tuple(leaves[8:]), *layer[7:])
        text, images = fast.layer_step(*leaves[:2], whole, pos_t, pos_v, backend=kind)
        total = (text.sin().sum() + images.cos().sum()).to(dtype)
        return list(torch.autograd.grad(total, leaves))

    for x, y in zip(
        gradients(torch.float32, "triton"), gradients(torch.float64, "numba"), strict=True
    ):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


def test_a_dense_layer() -> None:
    layer = layer_of(torch.float32, 100.0)
    Xt, Xv, pos_t, pos_v = states(2, torch.float32)
    got = fast.dense_step(Xt, Xv, layer, pos_t, pos_v, backend="triton")
    expected = fast.dense_step(Xt.double(), Xv.double(), widened(layer), pos_t, pos_v)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("image_visible", ["causal", "all"])
@pytest.mark.parametrize("placed", [False, True])
def test_composite_attention(placed: bool, image_visible: str) -> None:
    """Queries, keys and values are moved and moved back, and so are their gradients."""
    torch.manual_seed(5)
    text = torch.tensor([c == "t" for c in "ttvvvtvvtt"])
    pos = torch.tensor([3, 9, 4, 1, 7, 0, 2, 11, 5, 20]) if placed else None
    key_mask = torch.rand(2, 10) < 0.8
    given = torch.randn(2, 4, 4, 6), torch.randn(2, 2, 10, 6), torch.randn(2, 2, 10, 5)
    results = []
    for dtype, kind in ((torch.float32, "triton"), (torch.float64, "numba")):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        out, lse = fast.composite_attention(
            *leaves, ~text, pos, image_visible, key_mask=key_mask, backend=kind
        )
        seen = lse.isfinite()
        total = out.sin().sum() + torch.where(seen, lse, 0).cos().sum()
        results.append([out, lse, *torch.autograd.grad(total, leaves)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=1e-5)


def test_launches_of_a_layer() -> None:
    """Places, join and norms, rotation, attention, joined reading, gate; the rest are products."""
    layer = layer_of(torch.float32, 100.0)
    given = states(2, torch.float32)
    before = backend.launch_count()
    fast.layer_step(*given[:2], layer, *given[2:], backend="triton")
    assert backend.launch_count() - before == 6


def test_a_compiled_layer_is_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through the same kernels, and adds products in the same way."""
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    layer = layer_of(torch.float32, 100.0)
    given = states(2, torch.float32)

    def call(Xt: Tensor, Xv: Tensor) -> tuple[Tensor, Tensor]:
        return fast.layer_step(Xt, Xv, layer, *given[2:], backend="triton")

    compiled = torch.compile(call, fullgraph=True, dynamic=False, backend="aot_eager")
    for x, y in zip(compiled(*given[:2]), call(*given[:2]), strict=True):
        assert torch.equal(x, y)
