"""The specialised relative kernel on a CUDA device, beside the one that serves all other calls."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.relative import relative, triton_launch
from attnspec.fast.engines.relative.configs import RelativeConfig, use_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
OTHER = RelativeConfig(64, 4, 2)


class Shape(NamedTuple):
    """Sizes of a call; `local` is the size of its blocks, if rows see only their own and the one
    before.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    d: int
    dv: int
    table_heads: int
    rows: int
    zero: int
    causal: bool
    local: int | None = None


SHAPES = (
    Shape(1, 2, 2, 512, 512, 128, 128, 2, 512, 511, True),
    Shape(2, 4, 2, 300, 300, 64, 64, 1, 100, 99, True),
    Shape(1, 4, 4, 700, 900, 96, 80, 4, 1800, 899, False),
    Shape(1, 2, 1, 200, 70, 128, 64, 2, 300, 150, True),
    Shape(1, 2, 2, 1000, 1000, 64, 128, 2, 200, 199, True, local=128),
    Shape(1, 3, 3, 129, 129, 32, 48, 3, 17, 16, True),
    Shape(1, 2, 2, 1000, 1300, 128, 128, 2, 2600, 1299, False, local=100),
    Shape(2, 40, 40, 500, 500, 128, 128, 1, 500, 499, True),
)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_other_kernel_and_repeats_its_bits(
    shape: Shape, dtype: torch.dtype, biased: bool
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda", generator=generator).to(dtype)

    q = random(shape.batch, shape.heads, shape.queries, shape.d)
    k = random(shape.batch, shape.kv_heads, shape.keys, shape.d)
    v = random(shape.batch, shape.kv_heads, shape.keys, shape.dv)
    table = random(shape.table_heads, shape.rows, shape.d)
    table_bias, key_bias, row_start = None, None, None
    if biased:
        table_bias = 4 * random(shape.table_heads, shape.rows).float()
        key_bias = 4 * random(shape.batch, shape.heads, shape.keys).float()
    if shape.local is not None:
        block = torch.arange(shape.queries, device="cuda") // shape.local
        row_start = (block - 1).clamp(min=0) * shape.local

    def call() -> tuple[Tensor, Tensor]:
        return relative(
            q, k, v, table, zero=shape.zero, causal=shape.causal, row_start=row_start,
            table_bias=table_bias, key_bias=key_bias,
        )  # fmt: skip

    if not triton_launch.can_specialise(q, v):
        pytest.skip("the specialised kernel is for Hopper and Triton 3.6")
    out, lse = call()
    for _ in range(5):
        again, _lse = call()
        assert torch.equal(again, out)
    with use_config(forward=OTHER):
        expected, expected_lse = call()
    # Both round once: two neighbouring numbers at most.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
