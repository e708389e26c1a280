"""S2-Attention's lists of blocks against its patterns, and what only the fast path has."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.patterns import s2_attention as fast
from attnspec.fast.patterns.s2_attention_flex import mask_mod
from attnspec.fast.patterns.s2_attention_plan import distance_lists, rows_a_tile, stride_lists
from attnspec.reference.patterns.s2_attention_patterns import block_pattern, token_mask


def tensors(T: int, S: int, heads: int = 4, kv_heads: int = 2, d: int = 8) -> list[Tensor]:
    random = torch.Generator().manual_seed(T)
    shapes = [(1, heads, T, d), (1, kv_heads, S, d), (1, kv_heads, S, d)]
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


def unpacked(lists: Any, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """bool (heads, tiles, columns): what is listed, and what is listed as seen whole."""
    index, count = lists.index[0], lists.count[0]
    full = count if lists.full is None else lists.full[0]
    made = [np.zeros((*count.shape, columns), bool) for _ in range(2)]
    for h, i in np.ndindex(*count.shape):
        entries = index[h, i, : count[h, i]].tolist()
        assert len(set(entries)) == len(entries)
        assert entries[: full[h, i]] == sorted(entries[: full[h, i]])
        assert entries[full[h, i] :] == sorted(entries[full[h, i] :])
        made[0][h, i, entries] = True
        made[1][h, i, entries[: full[h, i]]] = True
    return made[0], made[1]


@pytest.mark.parametrize(("local", "v"), list(product([1, 2, 3, 9], [2, 3, 5])))
@pytest.mark.parametrize(
    ("rows", "columns", "first"), [(7, 7, 0), (3, 9, 6), (5, 4, -1), (4, 6, 9)]
)
def test_stride_lists_are_the_pattern(
    local: int, v: int, rows: int, columns: int, first: int
) -> None:
    kv_block = max(0, -first)
    phases = -(torch.arange(3) * 2 + 1 + kv_block) % v
    lists, starts = stride_lists(phases, rows, columns, 16, local, v, first, 1, first >= 0)
    assert starts is None
    expected = block_pattern(
        rows, columns, 3, 3, local, v, step=2, offset=1, q_block=first + kv_block,
        kv_block=kv_block,
    )  # fmt: skip
    listed, whole = unpacked(lists, columns)
    np.testing.assert_array_equal(listed, expected)
    if first >= 0:
        before = np.arange(columns) < np.arange(rows)[:, None] + first
        np.testing.assert_array_equal(whole, listed & before)


@pytest.mark.parametrize(("local", "v"), list(product([2, 3, 4, 9], [2, 3, 5])))
@pytest.mark.parametrize(("rows", "first"), [(6, 0), (7, 0), (3, 4), (1, 0)])
def test_merged_lists_are_the_pattern(local: int, v: int, rows: int, first: int) -> None:
    """What is whole is read by both rows; the rest, with the row starts, gives what is missing."""
    b, columns = 16, rows + first
    phases = -(torch.arange(3) + 1) % v
    lists, starts = stride_lists(phases, rows, columns, b, local, v, first, 2, True)
    assert starts is not None
    assert lists.q_block == 2 * b
    listed, whole = unpacked(lists, columns)
    tokens = rows * b
    tile = np.arange(tokens) // (2 * b)
    key = np.arange(columns * b)
    seen_whole, seen = (x[:, tile][:, :, key // b] for x in (whole, listed & ~whole))
    ruled = (key >= starts[:tokens].numpy()[:, None]) & (
        key <= first * b + np.arange(tokens)[:, None]
    )
    pattern = block_pattern(rows, columns, 3, 3, local, v, step=1, offset=1, q_block=first)
    expected = token_mask(pattern, b, tokens, columns * b, q_start=first * b)
    np.testing.assert_array_equal(seen_whole | (seen & ruled), expected)


def test_when_rows_share_a_tile() -> None:
    assert rows_a_tile(64, 8, True) == 2
    assert rows_a_tile(64, 1, True) == 1
    assert rows_a_tile(64, 8, False) == 1
    assert rows_a_tile(128, 8, True) == 1


@pytest.mark.parametrize(("left", "right", "v"), [(1, 1, 2), (2, 1, 3), (3, 4, 5)])
def test_distance_lists_are_the_pattern(left: int, right: int, v: int) -> None:
    lists = distance_lists(6, 8, 16, left, right, v, 2, torch.device("cpu"))
    expected = block_pattern(6, 8, 1, 1, (left, right), v, causal=False, q_block=2)
    np.testing.assert_array_equal(unpacked(lists, 8)[0], expected)


OPTIONS: list[dict[str, Any]] = [
    {"b": 16, "local": 2, "v_stride": 3},
    {"b": 16, "local": 3, "v_stride": 2, "num_dense_heads": 1, "offset": 1},
    {"b": 8, "local": 1, "v_stride": 4, "step": 2},
    {"b": 16, "local": 2, "v_stride": 4, "homo_head": True},
    {"b": 8, "local": (2, 1), "v_stride": 3, "causal": False},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("T", "S"), [(70, 70), (35, 83)])
def test_ready_and_free_patterns_agree(options: dict[str, Any], T: int, S: int) -> None:
    """Also in their gradients: merged lists with lists of the pattern, which are not merged."""
    start = 48 if S > T else 0
    b, causal = options["b"], options.get("causal", True)
    pattern = fast.block_pattern(
        -(-T // b), -(-S // b), 4, 2, options["local"], options["v_stride"],
        options.get("num_dense_heads", 0), options.get("step"), options.get("offset", 0),
        options.get("homo_head", False), causal, start // b,
    )  # fmt: skip
    given = [x.requires_grad_() for x in tensors(T, S)]
    results = [
        fast.s2_attend(*given, **options, q_start=start),
        fast.block_sparse_attend(*given, pattern, b, causal, q_start=start),
    ]
    upstream = [torch.randn_like(x) for x in results[0]]
    gradients = [torch.autograd.grad(result, given, upstream) for result in results]
    for x, y in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("options", OPTIONS)
def test_mask_function_is_the_references_mask(options: dict[str, Any]) -> None:
    b, causal = options["b"], options.get("causal", True)
    pattern = block_pattern(
        3, 5, 4, 2, options["local"], options["v_stride"], options.get("num_dense_heads", 0),
        options.get("step"), options.get("offset", 0), options.get("homo_head", False), causal,
        2, 1,
    )  # fmt: skip
    T, S = 3 * b - 3, 5 * b - 2
    expected = token_mask(pattern, b, T, S, causal, 2 * b, b)
    seen = mask_mod(4, 2, **options, q_start=2 * b, kv_start=b)
    head, row, key = torch.arange(4)[:, None, None], torch.arange(T)[:, None], torch.arange(S)
    np.testing.assert_array_equal(seen(torch.tensor(0), head, row, key).numpy(), expected)


def test_mask_function_of_a_causal_pattern_has_no_right_window() -> None:
    with pytest.raises(TypeError, match=r"^local: got \(2, 1\)"):
        mask_mod(4, 2, local=(2, 1))


def test_a_state_can_be_continued_twice() -> None:
    """Steps write into spare room; a second continuation moves to room of its own."""
    q, k, v = tensors(12, 12)
    options = {"b": 2, "local": 2, "v_stride": 3}
    state = fast.init_state(k, v)
    _, _, state = fast.decode_step(*(x[:, :, :9] for x in (q, k, v)), state, **options)
    late = [x[:, :, 9:] for x in (q, k, v)]
    first, _, _ = fast.decode_step(*late, state, **options)
    fast.decode_step(late[0], -late[1], -late[2], state, **options)
    again, _, _ = fast.decode_step(*late, state, **options)
    torch.testing.assert_close(first, again)
    whole, _ = fast.s2_attend(q, k, v, **options)
    torch.testing.assert_close(first, whole[:, :, 9:])
