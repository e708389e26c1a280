"""The scan's specialised kernels on a CUDA device: against a sum over pairs in float64, beside the
kernels that they stand in for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.scan import configs, triton_host, triton_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SCALE, SEGMENT = 0.5, 256
NAMES = ("out", "final", "dq", "dk", "dv", "ddecay", "dreads", "dwrites", "dstate")
Inputs = dict[str, Any]


def inputs(
    dtype: torch.dtype, decay: str, heads: int, kv_heads: int, d: int, dv: int, weights: bool
) -> Inputs:
    """What `triton_host.forward` takes, of 700 tokens; decays of some tokens are resets."""
    torch.manual_seed(d + dv + heads)

    def rows(h: int, width: int) -> Tensor:
        return torch.randn(2, h, 700, width, device="cuda").to(dtype)

    gates = -torch.rand(2, heads, 700, device="cuda") / 8
    gates[:, :, 150::190] = -torch.inf
    weight = torch.rand(2, heads, 700, device="cuda") if weights else None
    return {
        "q": rows(heads, d) * d**-0.5,
        "k": rows(kv_heads, d),
        "v": rows(kv_heads, dv),
        "slopes": torch.rand(heads, device="cuda") / 8 if decay == "constant" else None,
        "log_decay": gates if decay == "token" else None,
        "reads": weight,
        "writes": weight,
        "state": torch.randn(2, heads, d, dv, device="cuda"),
        "offsets": None,
    }


def run(given: Inputs, dout: Tensor, dfinal: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients, under the configuration in force."""
    out, final = triton_host.forward(**given, scale=SCALE, block=0)
    gradients = triton_host.backward(
        dout, dfinal, **given, final=final, scale=SCALE, block=0,
        decay_gradient=given["log_decay"] is not None,
    )  # fmt: skip
    return dict(zip(NAMES, (out, final, *gradients), strict=True))


def exact(given: Inputs, dout: Tensor, dfinal: Tensor) -> dict[str, Tensor]:
    """The same from all pairs of tokens, in float64."""
    x = {
        name: value.double().requires_grad_() if isinstance(value, Tensor) else None
        for name, value in given.items()
    }
    heads = given["q"].shape[1]
    q, k, v = x["q"], *(x[n].repeat_interleave(heads // x[n].shape[1], 1) for n in "kv")
    sums = torch.zeros(2, heads, 700, device="cuda", dtype=torch.float64)
    if x["slopes"] is not None:
        sums = -x["slopes"][:, None] * torch.arange(1, 701, device="cuda").expand_as(sums)
    if x["log_decay"] is not None:
        sums = x["log_decay"].clamp_min(-120).cumsum(2)
    decay = (sums[..., :, None] - sums[..., None, :]).exp().tril()
    written = v if x["writes"] is None else v * x["writes"][..., None]
    out = (q @ k.mT * decay) @ written + sums.exp()[..., None] * (q @ x["state"])
    if x["reads"] is not None:
        out = out * x["reads"][..., None]
    left = (sums[..., -1:] - sums).exp()[..., None]
    final = (k * left).mT @ written + sums[..., -1, None, None].exp() * x["state"]
    torch.autograd.backward((SCALE * out, final), (dout.double(), dfinal.double()))
    wanted = ("q", "k", "v", "log_decay", "reads", "writes", "state")
    gradients = [torch.empty(0) if x[name] is None else x[name].grad for name in wanted]
    return dict(zip(NAMES, (SCALE * out, final, *gradients), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("decay", ["none", "constant", "token"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "dv"),
    [(2, 2, 128, 128), (3, 1, 128, 256), (4, 2, 64, 64), (2, 2, 96, 64), (2, 1, 112, 80)],
)
@pytest.mark.parametrize("weights", [False, True])
def test_specialised_kernels(
    dtype: torch.dtype, decay: str, heads: int, kv_heads: int, d: int, dv: int, weights: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = inputs(dtype, decay, heads, kv_heads, d, dv, weights)
    dout = torch.randn(2, heads, 700, dv, device="cuda").to(dtype)
    dfinal = torch.randn(2, heads, d, dv, device="cuda")
    found: list[bool] = []
    known = triton_plan.Call.specialises

    def specialises(call: triton_plan.Call, *tensors: Tensor) -> bool:
        found.append(known(call, *tensors))
        return found[-1]

    monkeypatch.setattr(triton_plan.Call, "specialises", specialises)
    table = configs.TOKEN if decay == "token" else configs.CONSTANT
    with configs.use_config(replace(table, segment=SEGMENT)):
        first, again = (run(given, dout, dfinal) for _ in range(2))
    assert any(found)
    found.clear()
    with configs.use_config(replace(table, segment=SEGMENT, specialised=0)):
        other = run(given, dout, dfinal)
    assert not any(found)
    reference = exact(given, dout, dfinal)
    for name, x in first.items():
        assert torch.equal(x, again[name]), f"{name} differs from run to run"
        if not x.numel():
            continue
        right = reference[name].detach().to(x.device)
        errors = [float((y.double() - right).norm() / right.norm()) for y in (x, other[name])]
        assert errors[0] <= 1.25 * errors[1] + torch.finfo(dtype).eps / 16, (name, errors)
