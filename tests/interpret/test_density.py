"""The density engine's Triton kernels in the interpreter, against the CPU's in float64."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import replace
from typing import Any

import pytest
import torch

from attnspec.fast.engines.density.configs import DensityConfig, use_config
from attnspec.fast.scores.gaussian_attention import multi_head

SMALL = DensityConfig(tile=32, once=16, step=16, wide=4, slim=4, least=2, programs=4, vector=2)
CONFIGS = {
    "held": SMALL,
    "walked": replace(SMALL, held=0, programs=1),
    "divided": replace(SMALL, held=0, tile=8, step=8, programs=64),
}
CASES: list[tuple[tuple[int, ...], int, dict[str, Any]]] = [
    ((2, 7, 5), 1, {}),
    ((3, 11), 1, {"combine": "sum"}),
    ((2, 6, 3), 1, {"exact_mask": True, "clamp": "none"}),
    ((2, 21), -1, {"eps": 0.1}),
    ((1, 34, 3), 1, {"eps": 0.3, "combine": "sum"}),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, on entries beyond the end
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("shape", "axis", "options"), CASES)
def test_values_and_gradients(
    shape: tuple[int, ...], axis: int, options: dict[str, Any], config: str, masked: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(shape[1])
    x = torch.randn(shape).to(dtype)
    params = 0.3 * torch.randn(2, 2), 0.7 + torch.rand(2, 2)
    mask = torch.rand(shape) > 0.25 if masked else None
    inputs = [a.requires_grad_() for a in (x, *params)]
    exact = [a.detach().double().requires_grad_() for a in inputs]
    upstream = torch.randn(2, *shape).to(dtype)
    with use_config(CONFIGS[config]):
        out = multi_head(inputs[0], axis, (inputs[1], inputs[2]), mask, backend="triton", **options)
        got = torch.autograd.grad(list(out), inputs, list(upstream))
    truth = multi_head(exact[0], axis, (exact[1], exact[2]), mask, **options)
    gradients = torch.autograd.grad(list(truth), exact, list(upstream.double()))
    loose = 1e-3 if dtype == torch.float32 else 2e-2
    for a, b in zip((*out, *got), (*truth, *gradients), strict=True):
        scale = 1 + float(b.detach().abs().max())
        torch.testing.assert_close(a.double(), b, rtol=loose, atol=loose * scale)
