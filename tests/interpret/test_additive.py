"""The additive engine's Triton kernels in the interpreter, against the formula in float64."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import math

import pytest
import torch

from attnspec.fast.engines.additive import additive_lse, additive_scores
from attnspec.fast.engines.additive.configs import AdditiveConfig, use_config

DTYPES = (torch.float32, torch.float16)
SMALL = AdditiveConfig(rows=4, columns=8, channels=4, num_warps=1, programs=8)
SHAPES = [(2, 7, 3, 5), (1, 1, 1, 1), (1, 33, 9, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", ["no", "slots", "pairs"])
def test_scores_lse_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, masked: str) -> None:
    batch, slots, steps, width = shape
    torch.manual_seed(slots)
    k = torch.randn(batch, width, slots).to(dtype).transpose(1, 2)
    tensors = [k, torch.randn(batch, steps, width).to(dtype), torch.randn(width).to(dtype)]
    exact = [x.double().requires_grad_() for x in tensors]
    tensors = [x.requires_grad_() for x in tensors]
    mask = None
    if masked != "no":
        mask = torch.rand(batch, 1 if masked == "slots" else steps, slots) > 0.3
        mask[..., 0] = True
    target = torch.randint(slots, (batch, steps))
    with use_config(SMALL):
        results = (
            additive_scores(*tensors, backend="triton"),
            *additive_lse(*tensors, target, mask=mask, backend="triton"),
        )
        upstream = [torch.randn_like(x) for x in results]
        gradients = torch.autograd.grad(results, tensors, upstream)
    scores = torch.tanh(exact[1][:, :, None] + exact[0][:, None]) @ exact[2]
    hidden = torch.zeros_like(scores, dtype=torch.bool) if mask is None else ~mask.expand_as(scores)
    seen = scores.masked_fill(hidden, -math.inf)
    at_target = seen.gather(2, target[..., None])[..., 0]
    expected = (scores, torch.logsumexp(seen, 2), at_target)
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    # A constant -inf has no gradient; the formula's would be NaN.
    constant = [torch.isneginf(x) for x in expected]
    finite = [x.masked_fill(at, 0) for x, at in zip(expected, constant, strict=True)]
    wanted = torch.autograd.grad(finite, exact, [x.double() for x in upstream])
    tolerance = 2e-2 if dtype == torch.float16 else 1e-5
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def test_an_upstream_of_zero_is_not_read() -> None:
    k, q, v = torch.randn(1, 3, 4), torch.randn(1, 2, 4), torch.randn(4)
    k[:, 1] = torch.nan
    tensors = [x.requires_grad_() for x in (k, q, v)]
    out = additive_scores(*tensors, backend="triton")
    dout = torch.tensor([[[1.0, 0.0, 1.0]]]).expand_as(out)
    for gradient in torch.autograd.grad(out, tensors, dout):
        assert gradient.isfinite().all()
