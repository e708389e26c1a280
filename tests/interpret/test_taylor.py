"""The Taylor engine's Triton kernels in the interpreter against the CPU kernels in float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.taylor import TaylorConfig, step, taylor, use_config

SMALL = TaylorConfig(
    segment=16, rows=16, keys=16, columns=16, features=16, back_rows=16, back_keys=16, sum_rows=16,
    sum_features=16, sum_columns=16,
)  # fmt: skip


def make(q_tokens: int, k_tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(q_tokens)
    shapes = ((1, 2, q_tokens, 3), (1, 1, k_tokens, 3), (1, 1, k_tokens, 20))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def both(inputs: list[Tensor], state: list[Tensor], **options: Any) -> list[list[Tensor]]:
    """Outputs and gradients of the Triton kernels, and of the CPU in float64."""
    results = []
    for backend in ("triton", "numba"):
        dtype = inputs[0].dtype if backend == "triton" else torch.float64
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        first = [x.double().to(dtype if dtype == torch.float64 else torch.float32) for x in state]
        first = [x.requires_grad_() for x in first]
        given = {"state": tuple(first)} if state else {}
        with use_config(SMALL):
            got = taylor(*leaves, scale=0.5, backend=backend, **given, **options)
        outs = [x for x in got if x is not None]
        torch.manual_seed(0)
        ups = [torch.randn(x.shape, dtype=torch.float64) for x in outs]
        ups = [up.half().to(x.dtype) for up, x in zip(ups, outs, strict=True)]
        gradients = torch.autograd.grad(outs, [*leaves, *first], ups)
        results.append([*outs, *gradients])
    return results


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((20, 20), {"causal": True, "dtype": torch.float16}),
        ((5, 19), {"causal": True, "use_norm": False}),
        ((6, 12), {}),
        ((6, 22), {}),
        ((21, 21), {"causal": True, "offsets": torch.tensor([0, 0, 18, 21]), "want_state": True}),
    ],
)
def test_it_is_the_cpu(lengths: tuple[int, int], options: dict[str, Any]) -> None:
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    for got, expected in zip(*both(make(*lengths, dtype), [], **options), strict=True):
        size = expected.abs().max() + 1e-9
        torch.testing.assert_close(got.double() / size, expected / size, rtol=0, atol=tolerance)


def test_masks_hide_keys_and_nan() -> None:
    q, k, v = make(20, 20)
    mask = torch.arange(20)[None] % 4 > 0
    expected = both([q, k, v], [], causal=True, key_mask=mask)[1]
    k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    got = both([q, k, v], [], causal=True, key_mask=mask)[0]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_any_state_is_handed_on_and_differentiated() -> None:
    """Also one that no tokens have made: the features of (a, b) and (b, a) differ."""
    state = [torch.randn(1, 1, 13, 20), torch.rand(1, 1, 13)]
    state[1][..., 0] += 30
    for causal in (True, False):
        pair = both(make(18, 18), state, causal=causal, want_state=True)
        for got, expected in zip(*pair, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


def test_one_token() -> None:
    q, k, v = make(1, 1)
    state = [torch.randn(1, 1, 13, 20), torch.rand(1, 1, 13) + 1]
    got = step(*state, q, k, v, scale=0.5, backend="triton")
    wide = (x.double() for x in (*state, q, k, v))
    for a, b in zip(got, step(*wide, scale=0.5), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_strides_and_empty_tensors() -> None:
    q, k, v = make(20, 20)
    strided = [torch.stack([x, -x], -1)[..., 0].transpose(1, 2).clone().transpose(1, 2) for x in
               (q, k, v)]  # fmt: skip
    with use_config(SMALL):
        for causal in (True, False):
            a = taylor(q, k, v, scale=0.5, causal=causal, backend="triton")[0]
            b = taylor(*strided, scale=0.5, causal=causal, backend="triton")[0]
            torch.testing.assert_close(a, b)
        nothing = taylor(q, k[:, :, :0], v[:, :, :0], scale=0.5, causal=True, backend="triton")[0]
        assert torch.all(nothing == 0)
        assert taylor(q[:, :, :0], k, v, scale=0.5, backend="triton")[0].shape == (1, 2, 0, 20)
