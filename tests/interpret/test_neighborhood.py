"""The neighborhood engine's Triton kernels in the interpreter, against the reference."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import math
from typing import Any

import numpy as np
import pytest
import torch

from attnspec.fast.engines.neighborhood import configs, grid
from attnspec.fast.engines.neighborhood.configs import NeighborhoodConfig, use_config
from attnspec.fast.patterns.neighborhood import na_attend, na_av, na_qk
from attnspec.reference.patterns import neighborhood as spec

SMALL = NeighborhoodConfig(16, 16, 4, 1)
EVERYWHERE = dict.fromkeys(configs.KINDS, SMALL)
GRIDS: tuple[tuple[tuple[int, ...], dict[str, Any], int, int], ...] = (
    ((7,), {"kernel": 3, "stride": 2, "dilation": 2, "causal": True}, 3, 2),
    ((3, 7), {"kernel": (2, 3), "causal": (False, True)}, 0, 1),
)


def wide(x: torch.Tensor) -> np.ndarray:
    found: np.ndarray = x.detach().double().numpy()
    return found


@pytest.mark.parametrize(("shape", "options", "extra", "group"), GRIDS)
def test_fused(shape: tuple[int, ...], options: dict[str, Any], extra: int, group: int) -> None:
    dtype = torch.float16 if extra else torch.float32
    tokens = math.prod(shape)
    torch.manual_seed(tokens)
    sizes = ((1, group, tokens, 5), (1, 1, tokens + extra, 5), (1, 1, tokens + extra, 16))
    inputs = [torch.randn(size).to(dtype).requires_grad_() for size in sizes]
    with use_config(**EVERYWHERE):
        out, lse = na_attend(*inputs, shape, **options, extra=extra, backend="triton")
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        gradients = torch.autograd.grad([out, lse], inputs, [dout, dlse])
    exact = [wide(x) for x in inputs]
    expected = spec.na_attend(*exact, shape, **options, extra=extra)
    wanted = spec.na_backward(
        *exact, shape, **options, dout=wide(dout), dlse=wide(dlse), extra=extra
    )
    tolerance = 2e-2 if dtype == torch.float16 else 1e-5
    for got, want in zip((out, lse, *gradients), (*expected, *wanted), strict=True):
        np.testing.assert_allclose(wide(got), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("shape", "options", "extra", "group"), GRIDS[1:])
def test_unfused(shape: tuple[int, ...], options: dict[str, Any], extra: int, group: int) -> None:
    tokens = math.prod(shape)
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(1, n, tokens, 5, requires_grad=True) for n in (group, 1, 1))
    with use_config(**EVERYWHERE):
        s = na_qk(q, k, shape, **options, backend="triton")
        ds = torch.randn_like(s)
        scored = torch.autograd.grad(s, [q, k], ds)
        p = torch.softmax(s.detach(), -1).requires_grad_()
        out = na_av(p, v, shape, **options, backend="triton")
        dout = torch.randn_like(out)
        valued = torch.autograd.grad(out, [p, v], dout)
    Q, K, V = (wide(x) for x in (q, k, v))
    expected = (
        spec.na_qk(Q, K, shape, **options),
        *spec.na_qk_backward(Q, K, shape, **options, dscores=wide(ds)),
        spec.na_av(wide(p), V, shape, **options),
        *spec.na_av_backward(wide(p), V, shape, **options, dout=wide(dout)),
    )
    for got, want in zip((s, *scored, out, *valued), expected, strict=True):
        np.testing.assert_allclose(wide(got), want, atol=1e-5)


def test_nan_reaches_only_those_who_see_it() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 12, 4, requires_grad=True) for _ in range(3))
    mask = torch.from_numpy(spec.na_mask((12,), 5))
    broken = v.detach().clone()
    broken[0, 0, 8] = math.nan
    with use_config(**EVERYWHERE):
        out, _ = na_attend(q, k, broken, (12,), 5, backend="triton")
        (dq,) = torch.autograd.grad(out.nan_to_num().sum(), q)
    for result in (out, dq):
        hurt = result.isnan().any(-1)[0, 0]
        assert not bool(hurt[~mask[:, 8]].any())
    assert bool(out.isnan().any(-1)[0, 0][mask[:, 8]].all())


def test_fields_in_two_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the fields of both bounds do not fit one word, they take two."""
    torch.manual_seed(0)
    shape = (2, 2, 33)
    q, k, v = (torch.randn(1, 1, 132, 4) for _ in range(3))
    monkeypatch.setattr(grid, "WORD", 20)
    grid.make_plan.cache_clear()
    plan = grid.make_plan(grid.check_grid(shape, shape, 1, 1, False), 64, 64, False)
    assert plan.words == 2
    with use_config(forward=NeighborhoodConfig(64, 64, 4, 1)):
        out, _ = na_attend(q, k, v, shape, shape, backend="triton")
    grid.make_plan.cache_clear()
    expected, _ = spec.na_attend(wide(q), wide(k), wide(v), shape, shape)
    np.testing.assert_allclose(wide(out), expected, atol=1e-5)
