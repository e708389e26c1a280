"""The specialised kernel on a CUDA device: lists and sinks against a mask, with a NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, BlockLists, flash
from attnspec.fast.patterns.s2_attention import block_pattern, s2_attend
from attnspec.fast.selection.seer_attention import block_sparse_attend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
HEADS, KV_HEADS = 4, 2


def tokens(blocks: Tensor, b: int, T: int) -> Tensor:
    """The mask of tokens of a mask of blocks, causal."""
    return blocks.repeat_interleave(b, -1).repeat_interleave(b, -2)[..., :T, :T].tril()


def windowed(window: int, sinks: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """A window with sinks, and its mask of tokens."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = flash(q, k, v, causal=True, window=window, sinks=sinks)
        key = torch.arange(q.shape[2], device=q.device)
        seen = (key > key[:, None] - window) | (key < sinks)
        return out, seen.expand(*q.shape[:2], -1, -1).tril()

    return attend


def strided(b: int, local: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """S2-Attention, and its mask of tokens."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n = -(-q.shape[2] // b)
        blocks = block_pattern(n, n, HEADS, KV_HEADS, local, 3)
        seen = tokens(blocks.to(q.device)[None], b, q.shape[2])
        return s2_attend(q, k, v, b, local, 3)[0], seen.expand(q.shape[0], -1, -1, -1)

    return attend


def chosen(b: int, empty: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Blocks at random, in SeerAttention; every other row may have none."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n = -(-q.shape[2] // b)
        blocks = torch.rand(q.shape[0], HEADS, n, n, device=q.device) < 0.4
        if empty:
            blocks[:, :, ::2] = False
        return block_sparse_attend(q, k, v, blocks, b)[0], tokens(blocks, b, q.shape[2])

    return attend


@pytest.mark.parametrize("config", list(SPECIALISED_CONFIGS))
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(
    ("T", "d", "attend"),
    [
        (1300, 128, strided(64, 2)),
        (1300, 64, strided(64, 4)),
        (900, 80, strided(128, 1)),
        (1300, 128, chosen(128, empty=False)),
        (1300, 128, chosen(128, empty=True)),
        (2000, 64, chosen(256, empty=True)),
        (1300, 128, windowed(300, 64)),
        (1300, 128, windowed(100, 200)),
        (900, 80, windowed(700, 5)),
        (900, 64, windowed(1, 1)),
    ],
)
def test_whoever_is_seen_counts(
    T: int, d: int, attend: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype,
    config: str,
) -> None:  # fmt: skip
    torch.manual_seed(T)
    q, k, v = (
        torch.randn(2, heads, T, d, device="cuda").to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    v[:, 1, T // 2, 3] = torch.nan
    with SPECIALISED_CONFIGS[config]():
        out, seen = attend(q, k, v)
    K, V = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = (q.double() @ K.transpose(2, 3) * d**-0.5).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    expected = weights @ V.nan_to_num(0.0)
    tainted = (seen & V.isnan().any(-1)[:, :, None]).any(-1)
    assert torch.equal(out[..., 3].isnan(), tainted)
    assert not out[~tainted].isnan().any()
    error = (out.double() - expected)[~tainted].abs().max()
    assert error <= BOUNDS[dtype] * expected[~tainted].abs().max()


def test_rows_that_read_nothing_are_empty() -> None:
    q, k, v = (torch.randn(1, HEADS, 700, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    blocks = torch.zeros(1, HEADS, 6, 6, device="cuda", dtype=torch.bool)
    for config in SPECIALISED_CONFIGS.values():
        with config():
            out, lse = block_sparse_attend(q, k, v, blocks, 128)
        assert bool((out == 0).all())
        assert bool((lse == -torch.inf).all())


def test_blocks_seen_whole_are_asked_no_rule() -> None:
    """A list may say that rows see keys that the window and the order would hide."""

    q, k, v = (torch.randn(1, 1, 256, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    index = torch.tensor([[[[1, 0], [0, 1]]]], device="cuda", dtype=torch.int32)
    one = torch.ones(1, 1, 2, device="cuda", dtype=torch.int32)
    blocks = BlockLists(index, one, 128, 128, one)
    for config in SPECIALISED_CONFIGS.values():
        with config():
            out, _ = flash(q, k, v, causal=True, window=5, blocks=blocks)
        halves = [(q[:, :, :128], slice(128, 256)), (q[:, :, 128:], slice(0, 128))]
        expected = torch.cat(
            [flash(half, k[:, :, keys], v[:, :, keys])[0] for half, keys in halves], 2
        )
        torch.testing.assert_close(out, expected, atol=2e-3, rtol=0)
