"""MASFormer's plans against its masks, its mask functions, and the room of its cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.flash import flash
from attnspec.fast.patterns import masformer as fast
from attnspec.fast.patterns.masformer_flex import mask_mod
from attnspec.reference.patterns.masformer_spans import block_mask, span_mask

SPANS: list[tuple[Any, ...]] = [
    ("full",), ("block", 16, 0), ("block", 12, 1), ("block", 1, 0), ("block", 5, 3),
    ("block", 64, 0), ("block", 2**40, 0), ("block", 3, 2**40), ("window", 0), ("window", 9),
    ("window", 2**40),
]  # fmt: skip


def tensors(T: int, heads: int = 6, kv_heads: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(T)
    shapes = [(2, heads, T, 8), (2, kv_heads, T, 8), (2, kv_heads, T, 5)]
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("T", [70, 33, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("span", SPANS)
def test_plans_are_one_pass_with_the_mask(T: int, span: tuple[Any, ...], causal: bool) -> None:
    mask = torch.from_numpy(span_mask(T, span, causal))
    given = [x.requires_grad_() for x in tensors(T)]
    results = [
        fast.layer_attend(*given, span, causal, 0.5),
        flash(*given, mask=mask[None], scale=0.5),
    ]
    upstream = [torch.randn_like(x) for x in results[0]]
    gradients = [torch.autograd.grad(result, given, upstream) for result in results]
    for x, y in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("span", SPANS)
def test_mask_functions_are_the_references_mask(span: tuple[Any, ...], causal: bool) -> None:
    T = 33
    seen, zero, token = mask_mod(span, causal), torch.tensor(0), torch.arange(T)
    got = seen(zero, zero, token[:, None], token)
    np.testing.assert_array_equal(got.numpy(), span_mask(T, span, causal))


def test_mask_functions_with_lengths_hide_padding() -> None:
    lengths, token = torch.tensor([9, 3, 0]), torch.arange(9)
    seen = mask_mod(("block", 4, 1), lengths=lengths)
    expected = block_mask(9, 4, 1, lengths=lengths.numpy())
    for row in range(3):
        got = seen(torch.tensor(row), torch.tensor(0), token[:, None], token)
        np.testing.assert_array_equal(got.numpy(), expected[row])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_the_mask_function_agrees() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    span = ("block", 12, 1)
    q, k, v = (x.float() for x in tensors(40, 4, 2))
    block_mask = create_block_mask(mask_mod(span), None, None, 40, 40, device="cpu")
    expected = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    torch.testing.assert_close(fast.layer_attend(q, k, v, span)[0], expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("span", [("full",), ("block", 8, 0), ("block", 4, 1), ("window", 5)])
def test_padding_reaches_no_gradient(span: tuple[Any, ...], causal: bool) -> None:
    T, lengths = 30, torch.tensor([19, 0])
    q, k, v = tensors(T)
    padded = [x.clone() for x in (q, k, v)]
    for x in padded:
        x[0, :, 19:] = torch.nan
        x[1] = torch.nan
        x.requires_grad_()
    out, lse = fast.layer_attend(*padded, span, causal, lengths=lengths)
    upstream = torch.randn(1, 6, 19, 5, dtype=torch.float64)
    gradients = torch.autograd.grad(out[:1, :, :19], padded, upstream)
    alone = [x[:1, :, :19].clone().requires_grad_() for x in (q, k, v)]
    expected = fast.layer_attend(*alone, span, causal)
    torch.testing.assert_close(out[:1, :, :19], expected[0])
    torch.testing.assert_close(lse[:1, :, :19], expected[1])
    assert not out[0, :, 19:].any()
    assert not out[1].any()
    for whole, part in zip(
        gradients, torch.autograd.grad(expected[0], alone, upstream), strict=True
    ):
        torch.testing.assert_close(whole[:1, :, :19], part)
        assert not whole[0, :, 19:].any()
        assert not whole[1].any()


@pytest.mark.parametrize("sizes", [[1] * 90, [40, 1, 1, 60, 5, 1, 20, 22]])
@pytest.mark.parametrize("span", [("block", 20, 0), ("block", 7, 2), ("window", 11)])
def test_a_long_stream_is_prefill(span: tuple[Any, ...], sizes: list[int]) -> None:
    """Long enough to use up the room of the cache, which stays short, more than once."""
    q, k, v = tensors(sum(sizes))
    expected, _ = fast.layer_attend(q, k, v, span)
    cache, first, outs = fast.cache_after(k[:, :, :0], v[:, :, :0], span), 0, []
    for size in sizes:
        new = slice(first, first + size)
        before, kept = cache, cache.k.clone()
        out, cache = fast.decode_step(*(x[:, :, new] for x in (q, k, v)), cache, span)
        torch.testing.assert_close(before.k, kept, rtol=0, atol=0)
        first += size
        outs.append(out)
        rows = fast.cache_rows_needed(first - 1, span)
        torch.testing.assert_close(cache.k, k[:, :, first - rows : first], rtol=0, atol=0)
        torch.testing.assert_close(cache.v, v[:, :, first - rows : first], rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(outs, dim=2), expected)
    assert cache.room is not None
    assert cache.room.buffers[0].shape[2] <= (22 + max(sizes)) * 9 // 8 + 64


def test_two_streams_may_go_on_from_one_cache() -> None:
    span = ("block", 20, 0)
    q, k, v = tensors(40)
    cache = fast.cache_after(k[:, :, :21], v[:, :, :21], span)
    _, cache = fast.decode_step(q[:, :, 21:22], k[:, :, 21:22], v[:, :, 21:22], cache, span)
    first = slice(22, 24)
    (one, _), (other, _) = (
        fast.decode_step(q[:, :, first], sign * k[:, :, first], v[:, :, first], cache, span)
        for sign in (1, -1)
    )
    expected, _ = fast.layer_attend(q, k, v, span)
    torch.testing.assert_close(one, expected[:, :, first])
    flipped = torch.cat([k[:, :, :22], -k[:, :, first]], dim=2)
    expected, _ = fast.layer_attend(q[:, :, :24], flipped, v[:, :, :24], span)
    torch.testing.assert_close(other, expected[:, :, first])


BAD: list[tuple[Any, type, str]] = [
    (lambda: mask_mod(("block", 0, 0)), ValueError, "span's b"),
    (lambda: mask_mod("full"), TypeError, "span"),
    (lambda: mask_mod(("full",), 1), TypeError, "causal"),
]


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_input_is_named(call: Any, error: type, name: str) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        call()
