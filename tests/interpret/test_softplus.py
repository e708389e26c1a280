"""The softplus engine's Triton kernels in the interpreter, against the formula in float64."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.softplus import Sharpening, softplus

STAGES = {
    "plain": None,
    "sharp": Sharpening(15.0, 3, 1e-8),
    "log space": Sharpening(15.0, 3, 0.0, 1e-6),
    "power 1": Sharpening(1.0, 8, 1e-8),
    "no whole power": Sharpening(2.5, 3, 1e-8),
}


def formula(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, seen: Tensor, **options: Any
) -> Tensor:
    """What the kernels compute, with all weights in memory."""
    second = options["sharpening"]
    if options["normalise"]:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    n = counts[:, None, :, None].double()
    x = 2.0 * n.clamp(min=1).log() * (q @ k.mT)
    s = torch.nn.functional.softplus(x) * seen[:, None]
    a = s / (s.sum(-1, keepdim=True) + 1e-8)
    if second is None:
        return a @ v
    u = n * a - (n > second.warm).double()
    r = torch.where(u > 0, u.clamp(min=1e-99) ** second.power, 0.0)
    r = torch.where(u.amax(-1, keepdim=True) > second.dead, r, 0.0)
    total = r.sum(-1, keepdim=True) + second.eps
    return (r / torch.where(total > 0, total, 1.0)) @ v


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rule", ["causal", "mask", "padding"])
def test_outputs_and_gradients(stage: str, rule: str) -> None:
    random = torch.Generator().manual_seed(1)
    q_tokens, k_tokens = (40, 40) if rule == "causal" else (9, 35)
    shapes = ((1, 2, q_tokens, 16), (1, 1, k_tokens, 16), (1, 1, k_tokens, 24))
    inputs = [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]
    seen = torch.ones(1, q_tokens, k_tokens, dtype=torch.bool)
    options: dict[str, Any] = {"sharpening": STAGES[stage], "normalise": rule != "padding"}
    if rule == "causal":
        seen, options["causal"] = seen.tril(), True
    elif rule == "mask":
        seen = torch.rand(seen.shape, generator=random) > 0.4
        options["mask"] = seen[:, None]
    else:
        seen[..., :7] = False
        options["key_mask"] = seen[:, 0]
    counts = seen.sum(-1).float()
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out = softplus(*inputs, counts, factor=2.0, eps=1e-8, backend="triton", **options)
    got = with_gradients(out, inputs)
    truth = with_gradients(formula(*wide, counts, seen, **options), wide)
    for x, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(x.double(), expected, atol=3e-5, rtol=3e-5)
