"""The decode engine's Triton kernels in the interpreter, against a plain softmax in float64."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.decode import DecodeConfig, decode, use_config
from attnspec.fast.parallel import lean_attention

INF, NAN = math.inf, math.nan


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    causal: bool = True,
    index: Tensor | None = None,
    page: int = 1,
    bias: Tensor | None = None,
    sink_logit: Tensor | None = None,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """Row by row from the definition; keywords about how the work is split change nothing."""
    batch, heads, q_tokens, d = q.shape
    kv_heads, room = k.shape[1:3]
    out = torch.zeros(batch, heads, q_tokens, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, q_tokens), -INF, dtype=torch.float64)
    for b, h, i in np.ndindex(batch, heads, q_tokens):
        head = h // (heads // kv_heads)
        length = room
        if lengths is not None:
            length = min(int(lengths[b, head] if lengths.dim() == 2 else lengths[b]), room)
        keys = torch.arange(room)
        if index is not None:
            entries = index[b, head].long()[:, None]
            keys = torch.where(entries < 0, room, entries * page + torch.arange(page)).reshape(-1)
        extra = torch.zeros(len(keys)) if bias is None else bias[b, head]
        seen = (keys < length) & (extra > -INF)
        if causal:
            seen &= keys <= i + length - q_tokens
        x = k[b, head, keys[seen]].double() @ q[b, h, i].double() / math.sqrt(d)
        x += extra[seen].double()
        sink = torch.zeros(0) if sink_logit is None else sink_logit[h : h + 1]
        lse[b, h, i] = torch.cat([x, sink.double()]).logsumexp(0)
        out[b, h, i] = torch.exp(x - lse[b, h, i]) @ v[b, head, keys[seen]].double()
    return out, lse


def check(q: Tensor, k: Tensor, v: Tensor, expected: tuple[Tensor, Tensor], **how: Any) -> None:
    out, lse = decode(q, k, v, backend="triton", **{"tile": 16, **how})
    assert out.dtype == q.dtype
    tolerance = 2e-6 if q.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(out.double(), expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected[1].float(), atol=5e-6, rtol=1e-6)


def draw(batch: int, heads: int, kv_heads: int, queries: int, keys: int, d: int, dv: int) -> Any:
    torch.manual_seed(0)
    shapes = (batch, heads, queries, d), (batch, kv_heads, keys, d), (batch, kv_heads, keys, dv)
    return tuple(torch.randn(shape) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ((1, 4, 2, 1, 70, 16, 16), {}),
        ((2, 4, 1, 1, 65, 80, 24), {"workers": 5}),
        ((1, 4, 2, 9, 40, 20, 16), {"workers": 7, "rows": 5}),
        ((1, 4, 2, 9, 40, 20, 16), {"workers": 7, "rows": 5, "order": "paired"}),
        ((1, 2, 1, 6, 4, 16, 16), {"rows": 3}),
        ((1, 2, 1, 4, 33, 16, 16), {"causal": False, "workers": 2}),
        ((2, 2, 1, 1, 1, 1, 1), {}),
        ((1, 1, 1, 1, 300, 16, 16), {"workers": 19}),
        ((1, 2, 1, 20, 20, 16, 16), {"rows": 2, "workers": 9}),
        ((1, 2, 1, 2, 0, 16, 16), {}),
        ((1, 2, 1, 0, 5, 16, 16), {}),
    ],
)
def test_contiguous(dtype: torch.dtype, sizes: tuple[int, ...], how: dict[str, Any]) -> None:
    q, k, v = (x.to(dtype) for x in draw(*sizes))
    check(q, k, v, plain(q, k, v, **how), **how)


@pytest.mark.parametrize("lengths", [[5, 0, 33, 40], [0, 0, 0, 0], [0, 17, 1, 0], [99, 40, 3, 2]])
def test_ragged_batches_do_not_read_beyond_their_lengths(lengths: list[int]) -> None:
    q, k, v = draw(4, 4, 2, 2, 40, 16, 16)
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = NAN, INF
    n = torch.tensor(lengths, dtype=torch.int32)
    sink = torch.randn(4)
    for workers in (1, 5):
        expected = plain(q, k, v, lengths=n)
        check(q, k, v, expected, lengths=n, workers=workers)
    check(q, k, v, plain(q, k, v, lengths=n, sink_logit=sink), lengths=n, sink_logit=sink)


def test_a_batch_too_large_to_be_scanned_at_once() -> None:
    q, k, v = draw(260, 1, 1, 1, 20, 16, 16)
    lengths = torch.randint(0, 20, (260,))
    check(q, k, v, plain(q, k, v, lengths=lengths), lengths=lengths, workers=3)
    few = {"lengths": lengths[:33, None], "workers": 5}
    check(q[:33], k[:33], v[:33], plain(q[:33], k[:33], v[:33], **few), **few)


def test_lengths_of_each_head() -> None:
    q, k, v = draw(2, 4, 2, 3, 40, 16, 16)
    lengths = torch.tensor([[5, 0], [33, 40]])
    check(q, k, v, plain(q, k, v, lengths=lengths), lengths=lengths, workers=3, rows=4)


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gathered(page: int, with_bias: bool) -> None:
    q, k, v = draw(2, 4, 2, 2, 64, 16, 16)
    chosen = [torch.randperm(64 // page)[:11] for _ in range(4)]
    options: dict[str, Any] = {"index": torch.stack(chosen).view(2, 2, 11).int(), "page": page}
    options["index"][0, 0, 3] = -1
    options["index"][1, 1] = -1
    options["lengths"] = torch.tensor([50, 64])
    if with_bias:
        options["bias"] = torch.randn(2, 2, 11 * page)
        options["bias"][0, 1, 2] = -INF
    expected = plain(q, k, v, **options)
    unread = torch.ones(2, 2, 64, dtype=torch.bool)
    for b, head in np.ndindex(2, 2):
        for entry in options["index"][b, head].tolist():
            unread[b, head, entry * page : (entry + 1) * page] &= entry < 0
    k[unread], v[unread] = NAN, NAN
    check(q, k, v, expected, workers=3, **options)


def test_paged() -> None:
    torch.manual_seed(0)
    k_pages, v_pages = torch.randn(2, 20, 8, 2, 16).transpose(2, 3)
    table = torch.randperm(20)[:16].view(2, 8).int()
    k, v = (x[table.long()].transpose(1, 2).reshape(2, 2, 64, 16) for x in (k_pages, v_pages))
    q, lengths = torch.randn(2, 4, 2, 16), torch.tensor([13, 61])
    table[0, 2:] = -1
    options: dict[str, Any] = {"lengths": lengths, "workers": 3}
    expected = plain(q, k, v, lengths=lengths)
    check(q, k_pages, v_pages, expected, block_table=table, **options)
    options |= {"index": torch.randint(0, 15, (2, 2, 6)), "page": 4}
    check(q, k_pages, v_pages, plain(q, k, v, **options), block_table=table, **options)


def test_layouts() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 16, 1).transpose(2, 3)
    fused = torch.randn(1, 50, 3, 2, 16)
    k, v = fused[:, :, 1].transpose(1, 2), fused[:, :, 2].transpose(1, 2)
    check(q, k, v, plain(q, k, v))
    k, v = torch.randn(1, 2, 16, 50).mT, torch.randn(17)[1:].expand(1, 2, 50, 16)
    index = torch.randint(0, 50, (1, 1, 2, 9)).expand(1, 2, 2, 9)[:, :, 0]
    check(q, k, v, plain(q, k, v, index=index), index=index, workers=2)
    bias = torch.zeros(1, 1, 50).masked_fill(torch.arange(50) < 7, -INF).expand(1, 2, 50)
    check(q, k, v, plain(q, k, v, bias=bias), bias=bias)


def test_large_logits_do_not_overflow() -> None:
    q, k, v = draw(1, 2, 1, 1, 70, 16, 16)
    out, lse = decode(1e4 * q, k, v, workers=3, tile=16, backend="triton")
    expected = plain(1e4 * q, k, v)
    torch.testing.assert_close(out.double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected[1], atol=0, rtol=1e-6)


def test_forced_configurations_agree() -> None:
    q, k, v = draw(1, 4, 2, 3, 90, 16, 16)
    expected = plain(q, k, v)
    for tile, rows in ((16, 6), (32, 4), (64, 1)):
        with use_config(DecodeConfig(tile, rows, workers=1, warps=4, stages=2)):
            check(q, k, v, expected, tile=None)


def test_lean_attention() -> None:
    q, k, v = draw(2, 4, 2, 5, 40, 16, 16)
    lengths = torch.tensor([40, 7])
    expected = plain(q, k, v, lengths=lengths)
    for N, G, M, order in ((1, 3, None, "natural"), (20, 5, 2, "paired"), (256, 1, 1, "paired")):
        out, lse = lean_attention.attend(
            q, k, v, lengths, N, G, None, True, M, order, backend="triton"
        )
        torch.testing.assert_close(out.double(), expected[0], atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(lse, expected[1].float(), atol=5e-6, rtol=1e-6)


def test_tiles_must_be_powers_of_two() -> None:
    with pytest.raises(ValueError, match="tile: got 24"):
        decode(*draw(1, 1, 1, 1, 9, 16, 16), tile=24, backend="triton")
