"""The flash engine's argument checks (K14): all of them run before any kernel is launched."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import (
    DTYPES,
    FLOATS,
    INTEGERS,
    check_attention_inputs,
    check_bool,
    check_device,
    check_integer,
    check_mask,
    check_size,
    check_tensor,
)
from attnspec.fast.engines.flash.blocks import BlockLists

LARGEST_HEAD = 256


def check_inputs(q: Any, k: Any, v: Any, backend: str) -> None:
    """q, k and v fit one another, and the backend serves their dtype and head sizes."""
    check_attention_inputs(q, k, v, FLOATS if backend == "numba" else DTYPES)
    for name, what, size in (("q", "d", q.shape[3]), ("v", "dv", v.shape[3])):
        if not 1 <= size <= LARGEST_HEAD:
            raise ValueError(f"{name}: got {what} {size}, expected 1..{LARGEST_HEAD}")


def check_ranges(
    q: Tensor, causal: bool, window: Any, sinks: Any, row_start: Any, row_end: Any = None
) -> None:
    """The options that give each query a range of keys."""
    check_bool("causal", causal)
    if window is not None:
        check_integer("window", window, least=1)
        if not causal:
            raise ValueError(f"window: got {window} without causal=True, expected both or neither")
    check_integer("sinks", sinks, least=0)
    for name, bound in (("row_start", row_start), ("row_end", row_end)):
        if bound is not None:
            check_tensor(name, bound, ("q_tokens",), INTEGERS)
            check_size(name, bound.shape[0], q.shape[2], "q_tokens, as in q")
            check_device(name, bound, "q", q)


def check_masks(q: Tensor, k: Tensor, key_mask: Any, mask: Any) -> Tensor | None:
    """The bool masks; returns `mask` with every axis of the scores, as a view."""
    batch, heads, q_tokens, k_tokens = *q.shape[:3], k.shape[2]
    if key_mask is not None:
        check_tensor("key_mask", key_mask, ("batch", "k_tokens"), (torch.bool,))
        check_size("key_mask", key_mask.shape[0], batch, "batch, as in q")
        check_size("key_mask", key_mask.shape[1], k_tokens, "k_tokens, as in k")
        check_device("key_mask", key_mask, "q", q)
    if mask is None:
        return None
    shape = (batch, heads, q_tokens, k_tokens)
    check_mask("mask", mask, "q", q, shape)
    return mask.expand(shape)


def check_blocks(q: Tensor, k: Tensor, blocks: Any, key_mask: Any, mask: Any) -> None:
    """The lists have a row for every query block; their entries are not looked at."""
    if not isinstance(blocks, BlockLists):
        raise TypeError(f"blocks: got {type(blocks).__name__}, expected BlockLists")
    check_integer("blocks.q_block", blocks.q_block, least=1)
    check_integer("blocks.k_block", blocks.k_block, least=1)
    axes = ("batch", "heads", "q_blocks", "most")
    check_tensor("blocks.index", blocks.index, axes, (torch.int32,))
    check_tensor("blocks.count", blocks.count, axes[:3], (torch.int32,))
    rows = (q.shape[0], q.shape[1], -(-q.shape[2] // blocks.q_block))
    lists = {"blocks.index": blocks.index, "blocks.count": blocks.count}
    if blocks.full is not None:
        check_tensor("blocks.full", blocks.full, axes[:3], (torch.int32,))
        lists["blocks.full"] = blocks.full
        if blocks.q_block % 16 or blocks.k_block % 16:
            raise ValueError(
                f"blocks.full: got blocks of {blocks.q_block} by {blocks.k_block}, "
                "expected multiples of 16"
            )
        if key_mask is not None or mask is not None:
            raise ValueError("blocks.full: got it together with a mask, expected one of the two")
    for name, x in lists.items():
        check_device(name, x, "q", q)
        if tuple(x.shape[:3]) != rows:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {rows} first")


def check_offsets(q: Tensor, k: Tensor, offsets: Any, backend: str) -> tuple[Tensor, Tensor]:
    """The offsets of packed sequences; for Numba as int64, cut to what there is, which Triton's
    kernels do themselves.

    On a CUDA device their values are not looked at, because that would wait for the device.
    """
    if not isinstance(offsets, tuple) or len(offsets) != 2:
        raise TypeError(
            f"offsets: got {type(offsets).__name__}, expected a pair (q_offsets, k_offsets)"
        )
    check_size("q", q.shape[0], 1, "batch of packed sequences")
    checked = []
    for name, x, total in (
        ("q_offsets", offsets[0], q.shape[2]),
        ("k_offsets", offsets[1], k.shape[2]),
    ):
        check_tensor(name, x, ("sequences + 1",), INTEGERS)
        check_device(name, x, "q", q)
        if x.shape[0] < 2:
            raise ValueError(f"{name}: got {x.shape[0]} entries, expected at least 2")
        if not x.is_cuda and not torch.compiler.is_compiling():
            ends = x.tolist()
            rising = all(a <= b for a, b in pairwise(ends))
            if ends[0] != 0 or ends[-1] != total or not rising:
                raise ValueError(
                    f"{name}: got {ends}, expected offsets that increase from 0 to {total}"
                )
        cut = backend == "numba"
        checked.append(x.to(torch.int64).clamp(0, total) if cut else x.contiguous())
    check_size("k_offsets", checked[1].shape[0], checked[0].shape[0], "as many as q_offsets")
    return checked[0], checked[1]


def check_heads(q: Tensor, name: str, x: Any) -> None:
    """One floating-point number for each query head."""
    check_tensor(name, x, ("heads",), FLOATS)
    check_size(name, x.shape[0], q.shape[1], "heads, as in q")
    check_device(name, x, "q", q)


def check_slope_positions(q: Tensor, slopes: Any, slope_positions: Any) -> None:
    """One integer for each query, which only slopes use."""
    if slopes is None:
        raise ValueError("slope_positions: got positions without slopes, expected both or neither")
    check_tensor("slope_positions", slope_positions, ("q_tokens",), INTEGERS)
    check_size("slope_positions", slope_positions.shape[0], q.shape[2], "q_tokens, as in q")
    check_device("slope_positions", slope_positions, "q", q)
