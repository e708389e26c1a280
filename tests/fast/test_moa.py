"""MoA's fast path where the suite does not look: masks of FlexAttention, writes in place, scipy."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from attnspec.fast.engines import columns
from attnspec.fast.patterns import moa
from attnspec.fast.patterns.moa_flex import mask_mod
from attnspec.fast.patterns.moa_influence import EPSILON
from attnspec.reference.patterns.moa_influence import block_influence
from attnspec.reference.patterns.moa_masks import moa_block_mask, moa_token_mask


def tokens(T: int, H: int = 4, Hk: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(T)
    return tuple(torch.randn(2, n, T, 8) for n in (H, Hk, Hk))


@pytest.mark.parametrize("T", [1, 13, 24])
@pytest.mark.parametrize("granularity", ["token", "block"])
def test_the_mask_function_is_the_references_mask(granularity: str, T: int) -> None:
    s, c, block = (0, 8, 4), (4, 8, 12), 4
    if granularity == "token":
        s, c = (0, 3, 1), (5, 1, 9)
        mask = moa_token_mask(T, s, c)
    else:
        mask = moa_block_mask(T, s, c, block)
    visible = mask_mod(s, c, 2, granularity=granularity, block=block)
    heads, t = torch.arange(6)[:, None, None], torch.arange(T)
    got = visible(torch.tensor(0), heads, t[:, None], t)
    np.testing.assert_array_equal(got.numpy(), np.repeat(mask, 2, axis=0))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_takes_the_mask_function() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = tokens(32)
    s, c = (0, 4), (8, 12)
    blocks = create_block_mask(mask_mod(s, c, 2), 1, 4, 32, 32, device="cpu", BLOCK_SIZE=16)
    out = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)
    torch.testing.assert_close(out, moa.moa_attend(q, k, v, s, c)[0], atol=1e-5, rtol=1e-5)


def test_writing_in_place_is_writing() -> None:
    _, k, v = tokens(20)
    plan = (1, 3), (4, 6)
    real = torch.rand(2, 20) < 0.7
    kept = ours = moa.init_cache(k, v, *plan)
    ours = ours._replace(k=ours.k.clone(), v=ours.v.clone())
    slots = ours.k
    for first, last in ((0, 9), (9, 10), (10, 11), (11, 11), (11, 20)):
        part = (k[:, :, first:last], v[:, :, first:last], *plan, real[:, first:last])
        kept = moa.cache_update(kept, *part)
        ours = moa.update_in_place(ours, *part)
        assert ours.k is slots
        for x, y in zip(kept, ours, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_a_padded_token_leaves_the_slot_it_would_have_taken() -> None:
    _, k, v = tokens(3)
    plan = (1, 1), (1, 2)
    cache = moa.cache_update(moa.init_cache(k, v, *plan), k, v, *plan)
    nothing = torch.zeros(2, 1, dtype=torch.bool)
    after = moa.cache_update(cache, k[:, :, :1] * torch.nan, v[:, :, :1], *plan, nothing)
    for x, y in zip(cache, after, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_equal_rules_side_by_side_and_apart_agree() -> None:
    q, k, v = tokens(40, H=8, Hk=4)
    q.requires_grad_()
    gradients = []
    for order in ([0, 1, 2, 3], [0, 2, 1, 3]):
        rows = [2 * h + i for h in order for i in range(2)]
        s, c = ([(4, 4, 1, 1)[h] for h in order], [(8, 8, 3, 3)[h] for h in order])
        out, _ = moa.moa_attend(q[:, rows], k[:, order], v[:, order], s, c)
        gradients.append(torch.autograd.grad(out.square().sum(), q)[0])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_plans_may_be_tensors_of_the_cpu() -> None:
    q, k, v = tokens(40)
    _, s, c = moa.cache_sizes(torch.tensor([8.0, 0.0]), torch.tensor([0.0, 0.5]), 40, 0, 2, 4, 2)
    out, _ = moa.moa_attend(q, k, v, s, c)
    expected, _ = moa.moa_attend(q, k, v, tuple(s.tolist()), tuple(c.tolist()))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_decoding_reads_pages_of_the_slots_of_long_caches() -> None:
    """Sizes as the rules give them: multiples of 64, which are the pages of the block table."""
    q, k, v = tokens(330)
    plan = (64, 64), (64, 192)
    cache = moa.cache_update(moa.init_cache(k, v, *plan), k, v, *plan)
    out, lse = moa.decode(q[:, :, -1:], cache, *plan)
    expected = moa.moa_attend(q, k, v, *plan)
    torch.testing.assert_close(out, expected[0][:, :, -1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected[1][:, :, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eps", [EPSILON, 0.0])
@pytest.mark.parametrize("scale", [None, 0.0])
def test_influence_with_the_smallest_epsilons(eps: float, scale: float | None) -> None:
    """In float64, where 1 - P is exact enough to be divided by."""
    q, k, v = (x.double() for x in tokens(24))
    g = torch.randn(2, 4, 24, 8, dtype=torch.float64)
    got = moa.block_influence(q, k, v, g, 4, eps=eps, scale=scale)
    arrays = (x.numpy() for x in (q, k, v, g))
    expected = block_influence(*arrays, 4, eps=eps, scale=scale)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)


def test_the_influence_of_earlier_blocks_does_not_feel_later_tokens() -> None:
    q, k, v = tokens(24)
    g = torch.randn(2, 4, 24, 8)
    before = moa.block_influence(q, k, v, g, 6)
    for x in (q, k, v, g):
        x[:, :, 18:] = torch.nan
    after = moa.block_influence(q, k, v, g, 6)
    torch.testing.assert_close(after[:, :, :3], before[:, :, :3], rtol=0, atol=0)


def test_a_search_without_scipy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"scipy is not installed.*pip install scipy"):
        moa.search(torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.ones(1))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("g", {"g": torch.zeros(2, 4, 8, 7)}),
        ("g", {"g": torch.zeros(2, 4, 8, 8, dtype=torch.float64)}),
        ("block", {"block": 0}),
        ("q", {"block": 3}),
    ],
)
def test_the_engine_names_what_is_wrong(name: str, change: dict[str, Any]) -> None:
    q, k, v = tokens(8)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "g": q, "block": 4, "eps": 0.1}
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
        columns.block_influence(**{**arguments, **change})


def test_opcheck() -> None:
    q, k, v = tokens(8)
    op = torch.ops.attnspec.block_influence.default
    torch.library.opcheck(op, (q, k, v, q, 4, 0.1, 0.5, "numba"))
