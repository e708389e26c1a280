"""The neighborhood engine against plain torch in float64, and its plans against brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from attnspec.fast.engines.neighborhood import check_grid, neighborhood, window_scores
from attnspec.fast.engines.neighborhood.grid import make_plan, unflatten, watchers, window
from attnspec.fast.patterns.neighborhood import merge_attentions, na_attend, na_av, na_mask, na_qk
from attnspec.fast.patterns.neighborhood_flex import neighborhood_mask_mod
from attnspec.reference.patterns import neighborhood as spec

GRIDS: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((2,), {"kernel": 2}),
    ((150,), {"kernel": 130, "causal": True}),
    ((67,), {"kernel": 6, "stride": 5, "dilation": 4}),
    ((9, 70), {"kernel": (3, 7), "stride": (2, 1)}),
    ((11, 13), {"kernel": (4, 3), "dilation": (2, 3), "causal": (True, False)}),
    ((5, 6, 7), {"kernel": (3, 2, 5), "stride": (1, 2, 3), "causal": (False, True, False)}),
)


def tensors(
    tokens: int, extra: int = 0, d: int = 5, dv: int = 7, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    shapes = ((1, 4, tokens, d), (1, 2, tokens + extra, d), (1, 2, tokens + extra, dv))
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked attention in float64, all scores at once."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    s = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)


@pytest.mark.parametrize(("shape", "options"), GRIDS)
@pytest.mark.parametrize("extra", [0, 70])
def test_outputs_and_gradients(shape: tuple[int, ...], options: dict[str, Any], extra: int) -> None:
    tokens = math.prod(shape)
    inputs = tensors(tokens, extra)
    results = na_attend(*inputs, shape, **options, extra=extra)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = torch.cat([na_mask(shape, **options), torch.ones(tokens, extra, dtype=torch.bool)], 1)
    expected = dense(*exact, mask)
    upstream = [torch.randn_like(x) for x in results]
    got = torch.autograd.grad(results, inputs, upstream)
    want = torch.autograd.grad(expected, exact, [x.double() for x in upstream])
    for a, b in zip((*results, *got), (*expected, *want), strict=True):
        torch.testing.assert_close(a.double(), b, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(("shape", "options"), GRIDS)
def test_the_unfused_form_is_the_fused_one(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    inputs = tensors(math.prod(shape))
    q, k, v = inputs
    fused, _ = na_attend(q, k, v, shape, **options)
    unfused = na_av(torch.softmax(na_qk(q, k, shape, **options), -1), v, shape, **options)
    torch.testing.assert_close(fused, unfused)
    upstream = torch.randn_like(fused)
    for a, b in zip(
        torch.autograd.grad(fused, inputs, upstream),
        torch.autograd.grad(unfused, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(("shape", "options"), GRIDS)
def test_the_mask_function_is_the_mask(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    tokens = math.prod(shape)
    mask = create_mask(
        neighborhood_mask_mod(shape, **options, extra=3), 1, 1, tokens, tokens + 3, device="cpu"
    )[0, 0]
    assert bool(mask[:, tokens:].all())
    assert bool((mask[:, :tokens].numpy() == spec.na_mask(shape, **options)).all())


def test_windows_and_watchers_are_inverse() -> None:
    for length in (2, 3, 7, 12):
        for k in range(2, length + 1):
            for s in range(1, k + 1):
                for causal in (False, True):
                    spans = [window(x, length, k, s, causal) for x in range(length)]
                    for u in range(length):
                        seen = [x for x, (start, stop) in enumerate(spans) if start <= u < stop]
                        first, last = watchers(u, length, k, s, causal)
                        assert seen == list(range(first, last)), (length, k, s, causal, u)


def test_plans_fit_their_tiles() -> None:
    for shape, options in GRIDS:
        grid = check_grid(shape, *(options.get(n, d) for n, d in (
            ("kernel", 2), ("stride", 1), ("dilation", 1), ("causal", False))))  # fmt: skip
        for reverse in (False, True):
            plan = make_plan(grid, 64, 32, reverse)
            assert math.prod(plan.box) <= 64
            assert math.prod(plan.walk) <= 32
            assert sum(plan.bits) * (3 - plan.words) <= 30
            assert plan.guards < 1 << 31


def test_a_plan_of_an_image_visits_few_keys() -> None:
    """Boxes of an 8 x 8 tile's windows of 13 x 13: 20 x 20 keys, in seven tiles of 64."""
    grid = check_grid((256, 256), 13, 1, 1, False)
    plan = make_plan(grid, 64, 64, reverse=False)
    assert plan.box == (1, 8, 8)
    assert plan.words == 1
    rows, columns = -(-20 // plan.walk[1]), -(-20 // plan.walk[2])
    assert rows * columns <= 7


def test_nan_reaches_only_those_who_see_it() -> None:
    q, k, v = tensors(40)
    mask = na_mask((40,), 5)
    for name, x in (("k", k), ("v", v)):
        broken = x.detach().clone()
        broken[0, :, 17] = math.nan
        k2, v2 = (broken, v) if name == "k" else (k, broken)
        out, _ = na_attend(q, k2, v2, (40,), 5)
        (dq,) = torch.autograd.grad(out.nan_to_num().sum(), q)
        for result in (out, dq):
            hurt = result.isnan().any(-1)[0, 0]
            assert not bool(hurt[~mask[:, 17]].any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_layouts(dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in tensors(60, dtype=dtype))
    out, lse = na_attend(q, k, v, (6, 10), 3)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    heads_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(na_attend(*heads_last, (6, 10), 3)[0], out)
    expanded = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    assert torch.equal(na_attend(*expanded, (6, 10), 3)[0][1], out[0])


def test_compiled_and_opcheck() -> None:
    inputs = tensors(30)
    call = torch.compile(na_attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        call(*inputs, (5, 6), 3), na_attend(*inputs, (5, 6), 3), atol=0, rtol=0
    )
    grid = check_grid((5, 6), 3, 1, 1, False)
    assert unflatten([int(n) for axis in grid for n in axis]) == grid
    flat = [int(n) for axis in grid for n in axis]
    ops = torch.ops.attnspec
    torch.library.opcheck(ops.neighborhood_forward.default, (*inputs, flat, 0.5, "numba"))
    torch.library.opcheck(ops.window_scores.default, (*inputs[:2], flat, 0.5, "numba"))
    p = torch.rand(1, 4, 30, 9, requires_grad=True)
    torch.library.opcheck(ops.window_values.default, (p, inputs[2], flat, 1.0, "numba"))


def test_scales_and_empty_batches() -> None:
    q, k, v = tensors(20)
    grid = check_grid((20,), 4, 1, 1, False)
    negative, _ = neighborhood(q, k, v, grid, scale=-0.5)
    torch.testing.assert_close(negative, neighborhood(-q, k, v, grid, scale=0.5)[0])
    flat, lse = neighborhood(q, k, v, grid, scale=0.0)
    torch.testing.assert_close(flat[0, 0, 0], v[0, 0, :4].mean(0))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(4)))
    out, lse = na_attend(q[:0], k[:0], v[:0], (20,), 4)
    assert out.shape == (0, 4, 20, 7)
    assert lse.shape == (0, 4, 20)
    assert window_scores(q[:0], k[:0], grid, scale=1.0).shape == (0, 4, 20, 4)


def test_merged_parts_of_half_precision() -> None:
    outs = [torch.full((3, 2), x, dtype=torch.float16) for x in (1.0, 3.0)]
    lses = [torch.tensor([0.0, -math.inf, -math.inf])] * 2
    out, lse = merge_attentions(outs, lses)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out[0].float(), torch.tensor([2.0, 2.0]))
    assert bool(torch.isneginf(lse[1:]).all())
    assert bool((out[1:] == 0).all())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"d": 300}, "q"),
        ({"backend": "cuda"}, "backend"),
        ({"backend": "triton"}, "backend"),
        ({"kernel": 21}, "kernel"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], name: str) -> None:
    d = change.pop("d", 5)
    q, k, v = tensors(20, d=d)
    with pytest.raises(ValueError, match=f"^{name}: got"):
        na_attend(q, k, v, (20,), **{"kernel": 3, **change})
