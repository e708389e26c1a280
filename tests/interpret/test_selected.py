"""DiffQKV's selective attention on Triton, in the interpreter, beside that of the CPU."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch

from attnspec.fast.heads import diffqkv

CASES: list[dict[str, Any]] = [
    {"causal": True, "renormalise": True},
    {"scale": -0.7, "tokens": 3, "causal": True, "masked": True},
    {"heads": (4, 2, 1), "keys": 70, "c": 90},
]


@pytest.mark.parametrize("case", CASES)
def test_as_on_the_cpu(case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    keys, tokens, c = case.get("keys", 1100), case.get("tokens", 1), case.get("c", 9)
    H, Hk, Hv = case.get("heads", (6, 2, 3))
    q, k = torch.randn(2, H, tokens, 20), torch.randn(2, Hk, 20, keys).mT
    v = torch.randn(2, keys, Hv, 5).transpose(1, 2)
    options = {name: case[name] for name in ("causal", "scale", "renormalise") if name in case}
    if case.get("masked"):
        options["key_mask"] = torch.rand(2, keys) > 0.4
        v = v.masked_fill(~options["key_mask"][:, None, :, None], torch.nan)
    got, expected = (
        diffqkv.selective_attend(q, k, v, c, **options, backend=backend)
        for backend in ("triton", "numba")
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
