"""The relative engine's Triton kernels in the interpreter, against its CPU kernels in float64."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.relative import relative
from attnspec.fast.engines.relative.configs import RelativeConfig, use_config

WIDE = RelativeConfig(128, 8, 1)
TILE = RelativeConfig(64, 4, 1)
CASES: dict[str, tuple[int, int, int, bool, int]] = {
    "causal": (70, 70, 69, True, 0),
    "short table": (70, 20, 19, True, 0),
    "noncausal": (33, 65, 32, False, 0),
    "local": (90, 64, 63, True, 16),
    "one token": (1, 3, 2, True, 0),
}
BIASED: dict[str, tuple[int, int, int, int, bool]] = {
    "memory": (20, 70, 70, 69, True),
    "shared short table": (17, 33, 24, 12, False),
    "one query": (1, 70, 70, 69, True),
}


def tensors(tokens: int, rows: int, dtype: torch.dtype, heads: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(tokens)
    shapes = ((1, heads, tokens, 16), (1, 1, tokens, 16), (1, 1, tokens, 24), (heads, rows, 16))
    return [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes]


def run(inputs: list[Tensor], backend: str, **options: Any) -> list[Tensor]:
    out, lse = relative(*inputs, scale=0.3, backend=backend, **options)
    random = torch.Generator().manual_seed(3)
    upstream = [torch.randn(x.shape, generator=random).to(x.dtype) for x in (out, lse)]
    return [out, lse, *torch.autograd.grad([out, lse], inputs, upstream)]


def compare(tokens: int, rows: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = tensors(tokens, rows, dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    for got, expected in zip(
        run(inputs, "triton", **options), run(wide, "numba", **options), strict=True
    ):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str) -> None:
    tokens, rows, zero, causal, block = CASES[name]
    options: dict[str, Any] = {"zero": zero, "causal": causal}
    if block:
        options["row_start"] = (torch.arange(tokens) // block - 1).clamp(min=0) * block
    compare(tokens, rows, torch.float32, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_of_hopper(dtype: torch.dtype) -> None:
    with use_config(forward=WIDE, dq=TILE, dkdv=TILE, dtable=TILE):
        compare(140, 140, dtype, {"zero": 139, "causal": True})


@pytest.mark.parametrize("name", BIASED)
def test_biases(name: str) -> None:
    """A number for each distance and one for each key, for fewer queries than keys."""
    q_tokens, keys, rows, zero, causal = BIASED[name]
    heads = 1 if name.startswith("shared") else 2
    random = torch.Generator().manual_seed(keys)
    shapes = (
        (1, 2, q_tokens, 16), (1, 2, keys, 16), (1, 2, keys, 24), (heads, rows, 16), (heads, rows),
        (1, 2, keys),
    )  # fmt: skip
    inputs = [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    options = {"zero": zero, "causal": causal}
    results = (biased(inputs, "triton", options), biased(wide, "numba", options))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def biased(inputs: list[Tensor], backend: str, options: dict[str, Any]) -> list[Tensor]:
    *tensors, table_bias, key_bias = inputs
    results = relative(
        *tensors, scale=0.3, table_bias=table_bias, key_bias=key_bias, backend=backend, **options
    )
    random = torch.Generator().manual_seed(3)
    upstream = [torch.randn(x.shape, generator=random).to(x.dtype) for x in results]
    return [*results, *torch.autograd.grad(results, inputs, upstream)]
