"""Plans of Flowformer's kernels in the interpreter, as a device would make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.scan.triton_flows_host import Plan, config


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in buffers that nobody has written."""
    empty = Plan.empty

    def spoilt(plan: Any, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return empty(plan, *shape, dtype=dtype).fill_(torch.nan)

    monkeypatch.setattr(Plan, "empty", spoilt)


def halve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16 bits, as with bfloat16 on a device: operands rounded, sums not."""
    of = Plan.of

    def halved(*given: Tensor) -> Any:
        plan = of(*given)
        plan.half, plan.cfg = True, config(2, given[0].shape[3], True)
        return plan

    monkeypatch.setattr(Plan, "of", halved)
    monkeypatch.setattr(Plan, "product", (torch.float16, tl.float16))
