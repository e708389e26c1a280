"""S2-Attention against outside evidence, its own properties and bad input."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.dense import attention as dense
from attnspec.reference.patterns import s2_attention
from attnspec.reference.patterns.s2_attention import s2_attend, s2_attend_backward
from attnspec.reference.patterns.s2_attention_blocks import (
    block_sparse_attend,
    block_sparse_attend_backward,
)
from attnspec.reference.patterns.s2_attention_decoding import (
    State,
    decode_step,
    init_state,
    merge_partitions,
)
from attnspec.reference.patterns.s2_attention_layouts import merge_q, to_csc, to_csr
from attnspec.reference.patterns.s2_attention_patterns import (
    block_pattern,
    is_kv_efficient,
    live_blocks,
    stride_mask,
    token_mask,
    union_coverage,
)

quick = settings(max_examples=20, deadline=None, derandomize=True)


def tensors(
    heads: int = 4, kv_heads: int = 2, T: int = 13, S: int = 13, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = ((2, heads, T, 4), (2, kv_heads, S, 4), (2, kv_heads, S, 5))
    q, k, v = (random.standard_normal(shape) for shape in shapes)
    return q, k, v


def test_patterns_are_those_of_the_authors(golden: Callable[[str], Any]) -> None:
    data = golden("s2_attention__masks")
    for n, case in enumerate(data["meta"]["cases"]):
        b, T, H = case["block_size"], case["seqlen"], case["num_heads"]
        causal, blocks = case.get("causal", True), -(-T // b)
        pattern = block_pattern(
            blocks, blocks, H, case.get("num_kv_heads", H), case["local_blocks"],
            case["vert_stride"], case.get("num_dense_heads", 0), None,
            case.get("head_sliding_offset", 0), case.get("homo_head", False), causal,
        )  # fmt: skip
        expected = data[f"block_mask_{n}"]
        kept = pattern[: len(expected)]
        np.testing.assert_array_equal(kept, expected)
        # Heads that share a pattern come once in the data.
        assert np.all(pattern == kept) or len(expected) == H
        bits = np.packbits(token_mask(kept, b, T, T, causal), axis=-1)
        np.testing.assert_array_equal(bits, data[f"dense_bits_{n}"])
        crow, col = to_csr(kept)
        np.testing.assert_array_equal(crow, data[f"crow_{n}"])
        np.testing.assert_array_equal(col, data[f"col_{n}"])
        assert is_kv_efficient(kept) == bool(data[f"kv_efficient_{n}"])


def test_attention_gradients_and_merge_are_those_of_the_authors(
    golden: Callable[[str], Any],
) -> None:
    case = golden("s2_attention__dense_heads")
    q, k, v = (case[name] for name in ("q", "k", "v"))
    options: dict[str, Any] = {"b": 8, "local": 1, "v_stride": 4, "num_dense_heads": 1}
    for got, name in zip(s2_attend(q, k, v, **options), ("out", "lse"), strict=True):
        np.testing.assert_allclose(got, case[name], atol=2e-6)
    gradients = s2_attend_backward(q, k, v, dout=case["dout"], **options)
    for got, name in zip(gradients, ("dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(got, case[name], atol=1e-5)
    split = case["meta"]["split"]
    parts = []
    for n, keys in enumerate((slice(0, split), slice(split, 35))):
        mask = np.arange(35) < split if n == 0 else np.arange(35) >= split
        part = s2_attend(q, k, v, **options, key_mask=mask[None])
        np.testing.assert_allclose(part[1], case[f"lse{n}"], atol=2e-6, err_msg=str(keys))
        parts.append(part)
    out, lse = merge_partitions(*(np.stack(x) for x in zip(*parts, strict=True)))
    np.testing.assert_allclose(out, case["out"], atol=2e-6)
    np.testing.assert_allclose(lse, case["lse"], atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_dense_attention_with_the_mask_of_the_definition(causal: bool) -> None:
    """Token by token: grouped heads, a dense one, a phase, a chunk of queries and one of keys."""
    b, local, stride, step, offset, q_start, kv_start = 2, 2, 3, 2, 1, 6, 2
    q, k, v = tensors(6, 3, 7, 11)
    mask = np.zeros((6, 7, 11), bool)
    for h, t, u in np.ndindex(*mask.shape):
        c, I, J = h // 2, (q_start + t) // b, (kv_start + u) // b
        back = I - J
        if causal:
            seen = (J + c * step + offset) % stride == 0 or back < local
        else:
            seen = (max(0, back - local + 1) + max(0, -back - local + 1)) % stride == 0
        mask[h, t, u] = (seen or c == 2) and (not causal or kv_start + u <= q_start + t)
    options: dict[str, Any] = {
        "b": b, "local": local, "v_stride": stride, "step": step, "offset": offset,
        "num_dense_heads": 1, "causal": causal, "q_start": q_start, "kv_start": kv_start,
    }  # fmt: skip
    random = np.random.default_rng(1)
    dout, dlse = random.standard_normal((2, 6, 7, 5)), random.standard_normal((2, 6, 7))
    got = (*s2_attend(q, k, v, **options),
           *s2_attend_backward(q, k, v, dout=dout, dlse=dlse, **options))  # fmt: skip
    expected = (*dense.attend(q, k, v, mask=mask),
                *dense.attend_backward(q, k, v, dout, dlse, mask=mask))  # fmt: skip
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"v_stride": 1, "local": 0},
        {"v_stride": 5, "local": 7},
        {"v_stride": 5, "local": 1, "num_dense_heads": 2},
        {"v_stride": 1, "local": 1, "causal": False},
        {"v_stride": 3, "local": (7, 7), "causal": False},
    ],
)
def test_what_is_dense_attention(options: dict[str, Any]) -> None:
    q, k, v = tensors()
    causal = options.get("causal", True)
    for got, expected in zip(
        s2_attend(q, k, v, b=2, **options), dense.attend(q, k, v, causal=causal), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-12)
    ones = np.ones((1, 7, 7), bool)
    np.testing.assert_allclose(
        block_sparse_attend(q, k, v, ones, 2, causal)[0],
        dense.attend(q, k, v, causal=causal)[0],
        atol=1e-12,
    )


@quick
@given(
    M=st.integers(1, 14), H=st.integers(1, 6), v=st.integers(1, 5), local=st.integers(1, 3),
    step=st.integers(1, 3), offset=st.integers(0, 4),
)  # fmt: skip
def test_coverage_balance_and_cost(
    M: int, H: int, v: int, local: int, step: int, offset: int
) -> None:
    pattern = block_pattern(M, M, H, H, local, v, step=step, offset=offset)
    lower = np.tril(np.ones((M, M), bool))
    outside = np.arange(max(M - local, 0))
    covered = all(any((J + c * step + offset) % v == 0 for c in range(H)) for J in outside)
    assert np.array_equal(union_coverage(pattern), lower) == covered
    if M - local >= v:
        assert covered == (len({c * step % v for c in range(H)}) == v)
    dense = block_pattern(M, M, H, H, local, v, min(2, H), step=step, offset=offset)
    assert np.array_equal(union_coverage(dense), lower)
    assert all(is_kv_efficient(x) for x in (pattern, pattern[::-1], dense))
    rows = np.arange(M)
    assert np.all(pattern.sum(axis=2) <= local + -(-(rows + 1) // v))
    if H % v == 0:
        each = block_pattern(M, M, H, H, local, v, step=1, offset=offset)
        window = rows[:, None] - rows < local
        counts = (each & ~window).sum(axis=2)
        assert np.all(np.abs(np.diff(counts, axis=0)) <= 1)
        strided = np.stack([stride_mask(M, c, 1, offset, v) for c in range(H)])
        assert np.all(strided.sum(axis=0) == H // v)
    np.testing.assert_array_equal(
        pattern, block_pattern(M, M, H, H, local, v, step=step, offset=offset + v)
    )
    shifted = block_pattern(M, M, H, H, local, v, step=step, offset=offset + step)
    np.testing.assert_array_equal(shifted[:-1], pattern[1:])
    if H * step % v == 0:
        np.testing.assert_array_equal(shifted[-1], pattern[0])


def test_few_kv_heads_leave_blocks_uncovered() -> None:
    """The default step counts query heads: eight heads on two kv heads have two phases of eight."""
    pattern = block_pattern(16, 16, 8, 2, 1, 8)
    uncovered = np.flatnonzero(~union_coverage(pattern)[15])
    np.testing.assert_array_equal(uncovered, [1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 14])
    assert np.array_equal(
        union_coverage(block_pattern(16, 16, 8, 8, 1, 8)), np.tril(np.ones((16, 16), bool))
    )


def test_a_rank_takes_its_slice_of_all_heads() -> None:
    whole = block_pattern(9, 9, 8, 4, 1, 4, num_dense_heads=1)
    part = block_pattern(9, 9, 8, 4, 1, 4, num_dense_heads=1, active_head_range=(2, 6))
    np.testing.assert_array_equal(part, whole[2:6])


def test_a_block_that_returns_is_not_efficient() -> None:
    pattern = block_pattern(6, 6, 2, 2, 1, 3)
    pattern[1, 5, 1] = not pattern[1, 4, 1]
    assert not is_kv_efficient(pattern)
    assert not is_kv_efficient(pattern[::-1])
    assert is_kv_efficient(pattern[:1])


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_finite_differences_and_lse_counts(causal: bool) -> None:
    inputs = list(tensors(T=7, S=7))
    random = np.random.default_rng(1)
    dout, dlse = random.standard_normal((2, 4, 7, 5)), random.standard_normal((2, 4, 7))
    options: dict[str, Any] = {"b": 2, "local": 1, "v_stride": 2, "causal": causal}

    def loss(*x: np.ndarray) -> float:
        out, lse = s2_attend(*x, **options)
        return float(np.sum(dout * out) + np.sum(dlse * lse))

    gradients = s2_attend_backward(*inputs, dout=dout, dlse=dlse, **options)
    pattern = block_pattern(4, 4, 4, 2, 1, 2, causal=causal)
    by_blocks = block_sparse_attend_backward(*inputs, pattern, 2, dout, dlse, causal)
    for n, gradient in enumerate(gradients):
        np.testing.assert_array_equal(gradient, by_blocks[n])
        direction = random.standard_normal(gradient.shape)
        sides = [
            loss(*(x + s * 1e-6 * direction if i == n else x for i, x in enumerate(inputs)))
            for s in (1, -1)
        ]
        np.testing.assert_allclose(
            np.sum(gradient * direction), (sides[0] - sides[1]) / 2e-6, atol=1e-6
        )


def test_an_unread_block_changes_nothing() -> None:
    q, k, v = tensors(4, 4)
    before, _ = s2_attend(q, k, v, b=2, local=1, v_stride=4)
    read = token_mask(block_pattern(7, 7, 4, 4, 1, 4), 2, 13, 13)
    v[:, :, 4:6] += 1
    after, _ = s2_attend(q, k, v, b=2, local=1, v_stride=4)
    changed = np.any(before != after, axis=(0, 3))
    np.testing.assert_array_equal(changed, read[:, :, 4:6].any(axis=2))


def test_parts_of_the_keys_merge_in_any_order_and_at_any_border() -> None:
    q, k, v = tensors()
    whole = s2_attend(q, k, v, b=2, local=2, v_stride=3)
    edges = [0, 3, 4, 9, 13]
    parts = []
    for first, last in pairwise(edges):
        kept = (np.arange(13) >= first) & (np.arange(13) < last)
        parts.append(s2_attend(q, k, v, b=2, local=2, v_stride=3, key_mask=np.stack([kept] * 2)))
    outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
    pair = merge_partitions(outs[2:], lses[2:])
    nested = [np.concatenate([x[:2], y[None]]) for x, y in zip((outs, lses), pair, strict=True)]
    for made in ((outs, lses), (outs[::-1], lses[::-1]), nested):
        for got, expected in zip(merge_partitions(*made), whole, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-12)
    nothing = merge_partitions(np.full((2, 3, 1), np.nan), np.full((2, 3), -np.inf))
    np.testing.assert_array_equal(nothing[0], np.zeros((3, 1)))
    assert np.all(np.isneginf(nothing[1]))


def test_chunks_are_slices_of_the_whole() -> None:
    q, k, v = tensors(S=13)
    options: dict[str, Any] = {"b": 2, "local": 2, "v_stride": 3, "num_dense_heads": 1}
    out, lse = s2_attend(q, k, v, **options)
    for start in (0, 4, 12):
        part = s2_attend(q[:, :, start : start + 4], k, v, q_start=start, **options)
        np.testing.assert_allclose(part[0], out[:, :, start : start + 4], atol=1e-12)
        np.testing.assert_allclose(part[1], lse[:, :, start : start + 4], atol=1e-12)
    later = s2_attend(q[:, :, 8:], k[:, :, 4:], v[:, :, 4:], q_start=8, kv_start=4, **options)
    kept = np.stack([np.arange(13) >= 4] * 2)
    masked = s2_attend(q, k, v, **options, key_mask=kept)
    np.testing.assert_allclose(later[0], masked[0][:, :, 8:], atol=1e-12)


@pytest.mark.parametrize("dense_heads", [0, 1])
def test_decoding_is_prefill_and_frees_blocks(dense_heads: int) -> None:
    q, k, v = tensors(6, 3, 21, 21)
    options: dict[str, Any] = {
        "b": 2, "local": 2, "v_stride": 3, "step": 1, "offset": 1, "num_dense_heads": dense_heads
    }  # fmt: skip
    out, lse = s2_attend(q, k, v, **options)
    state = init_state(k, v)
    for first, last in ((0, 1), (1, 6), (6, 7), (7, 21)):
        tokens = (x[..., first:last, :] for x in (q, k, v))
        got, logs, state = decode_step(*tokens, state, **options)
        np.testing.assert_allclose(got, out[..., first:last, :], atol=1e-12)
        np.testing.assert_allclose(logs, lse[..., first:last], atol=1e-12)
        for c in range(3):
            kept = state.pos[c][state.pos[c] >= 0]
            blocks = live_blocks(last, c, 2, 2, 3, 1, 1, dense=c >= 3 - dense_heads)
            expected = [t for t in range(last) if t // 2 in blocks]
            np.testing.assert_array_equal(kept, expected)
            np.testing.assert_array_equal(state.k[:, c, : len(kept)], k[:, c, kept])
            assert np.all(state.v[:, c, len(kept) :] == 0)
    assert state.seen == 21


def mask_of_merged(lists: Any, b: int, bm: int, bn: int, tokens: int) -> np.ndarray:
    """The pairs that a kernel with merged rows and the causal order visits."""
    crow, col, micro = lists
    mask = np.zeros((len(crow), tokens, tokens), bool)
    for h in range(len(crow)):
        for tile in range(crow.shape[1] - 1):
            for n in range(crow[h, tile], crow[h, tile + 1]):
                rows = slice(tile * bm, tile * bm + micro[h, n])
                mask[h, rows, col[h, n] * bn : (col[h, n] + 1) * bn] = True
    return mask & np.tril(np.ones((tokens, tokens), bool))


@pytest.mark.parametrize(("bm", "bn"), [(4, 4), (8, 2), (12, 4), (2, 2), (1, 1)])
def test_merged_rows_are_the_pattern_of_efficient_ones(bm: int, bn: int) -> None:
    pattern = block_pattern(7, 7, 4, 4, 2, 3)
    merged = mask_of_merged(merge_q(pattern, 4, bm, bn), 4, bm, bn, 26)
    np.testing.assert_array_equal(merged, token_mask(pattern, 4, 26, 26))


def test_merged_rows_of_a_block_that_returns_are_not() -> None:
    pattern = np.array([[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]], bool)
    merged = mask_of_merged(merge_q(pattern, 4, 8, 4), 4, 8, 4, 16)
    exact = token_mask(pattern, 4, 16, 16)
    assert np.all(merged[exact])
    assert np.any(merged != exact)


@quick
@given(seed=st.integers(0, 99), M=st.integers(0, 6), N=st.integers(0, 6))
def test_lists_hold_the_pattern(seed: int, M: int, N: int) -> None:
    pattern = np.random.default_rng(seed).random((3, M, N)) < 0.4
    crow, col = to_csr(pattern)
    ccol, row = to_csc(pattern)
    rebuilt, columns = np.zeros_like(pattern), np.zeros_like(pattern)
    for h in range(3):
        for I in range(M):
            rebuilt[h, I, col[h, crow[h, I] : crow[h, I + 1]]] = True
        for J in range(N):
            columns[h, row[h, ccol[h, J] : ccol[h, J + 1]], J] = True
    np.testing.assert_array_equal(rebuilt, pattern)
    np.testing.assert_array_equal(columns, pattern)


def test_rows_that_read_nothing_are_zero_and_garbage_is_not_read() -> None:
    q, k, v = tensors(2, 2)
    pattern = np.zeros((1, 7, 7), bool)
    pattern[:, :, 1] = True
    k[:, :, 4:], v[:, :, 4:] = np.nan, np.nan
    out, lse = block_sparse_attend(q, k, v, pattern, 2)
    assert np.all(out[:, :, :2] == 0)
    assert np.all(np.isneginf(lse[:, :, :2]))
    assert np.all(np.isfinite(out))


def test_leading_axes_are_free_and_float32_stays() -> None:
    q, k, v = (x.astype(np.float32) for x in tensors())
    options: dict[str, Any] = {"b": 2, "local": 1, "v_stride": 2}
    out, lse = s2_attend(q, k, v, **options)
    assert out.dtype == lse.dtype == np.float32
    np.testing.assert_array_equal(s2_attend(q[0], k[0], v[0], **options)[0], out[0])
    state = init_state(k[0], v[0])
    step, logs, state = decode_step(q[0], k[0], v[0], state, 2, 1, 2)
    assert step.dtype == logs.dtype == state.k.dtype == np.float32


X = np.zeros((2, 4, 2))
PATTERN = np.ones((2, 2, 2), bool)
STATE = init_state(X, X)
BAD: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], type, str], ...] = (
    (stride_mask, (-1, 0, 1, 0, 2), {}, ValueError, "N"),
    (stride_mask, (4, 0, 0, 0, 2), {}, ValueError, "step"),
    (stride_mask, (4, 0, 1, 0, 0), {}, ValueError, "v"),
    (block_pattern, (4, 4, 3, 2, 1, 2), {}, ValueError, "Hk"),
    (block_pattern, (4, 4, 2, 2, 0, 2), {}, ValueError, "local"),
    (block_pattern, (4, 4, 2, 2, (1, 2), 2), {}, TypeError, "local"),
    (block_pattern, (4, 4, 2, 2, 1, 2, 3), {}, ValueError, "num_dense_heads"),
    (block_pattern, (4, 4, 2, 2, 1, 2, 1), {"homo_head": True}, ValueError, "num_dense_heads"),
    (block_pattern, (4, 4, 2, 2, 1, 2), {"step": 0}, ValueError, "step"),
    (block_pattern, (4, 4, 2, 2, 1, 2), {"offset": 1.0}, TypeError, "offset"),
    (block_pattern, (4, 4, 2, 2, 1, 2), {"active_head_range": (1, 3)}, ValueError,
     "active_head_range"),
    (block_pattern, (4, 4, 2, 2, 1, 2), {"active_head_range": (0, 1.0)}, TypeError,
     "active_head_range"),
    (block_pattern, (4, 4, 2, 2, 1, 2), {"active_head_range": 2}, TypeError, "active_head_range"),
    (block_pattern, (4, 4, 2, 2, 1, 2), {"causal": 1}, TypeError, "causal"),
    (block_pattern, (4, 4, 2, 2, 1, 2), {"homo_head": None}, TypeError, "homo_head"),
    (token_mask, (PATTERN, 2, 4, 4, 1), {}, TypeError, "causal"),
    (live_blocks, (1, 0, 2, 1, 2), {"dense": 1}, TypeError, "dense"),
    (merge_q, (PATTERN, 4, 4, 4, 0), {}, TypeError, "causal"),
    (token_mask, (PATTERN, 2, 5, 4), {}, ValueError, "pattern"),
    (token_mask, (PATTERN, 0, 4, 4), {}, ValueError, "b"),
    (token_mask, (PATTERN, 2, 4, 4), {"q_start": 3}, ValueError, "q_start"),
    (token_mask, (PATTERN * 1, 2, 4, 4), {}, TypeError, "pattern"),
    (is_kv_efficient, (PATTERN[0],), {}, ValueError, "pattern"),
    (is_kv_efficient, (PATTERN, 0), {}, ValueError, "bm"),
    (live_blocks, (-1, 0, 2, 1, 2), {}, ValueError, "t"),
    (union_coverage, (None,), {}, TypeError, "pattern"),
    (to_csr, (PATTERN[0],), {}, ValueError, "pattern"),
    (to_csc, (PATTERN.tolist(),), {}, TypeError, "pattern"),
    (merge_q, (PATTERN, 4, 6, 4), {}, ValueError, "bm"),
    (merge_q, (PATTERN, 4, 4, 3), {}, ValueError, "bn"),
    (merge_q, (PATTERN, 4, 8, 4, False), {}, ValueError, "bm"),
    (block_sparse_attend, (X, X, X, PATTERN[:, :1], 2), {}, ValueError, "pattern"),
    (block_sparse_attend, (X, X, X, np.ones((3, 2, 2), bool), 2), {}, ValueError, "pattern"),
    (block_sparse_attend, (X, X, X[:, :3], PATTERN, 2), {}, ValueError, "v"),
    (block_sparse_attend, (X, X, X, PATTERN, 2), {"key_mask": np.ones(4)}, TypeError, "key_mask"),
    (block_sparse_attend, (X, X, X, PATTERN, 2), {"key_mask": np.ones((2, 4), bool)}, ValueError,
     "key_mask"),
    (s2_attend, (X, X, X), {"b": 0}, ValueError, "b"),
    (s2_attend, (X, X, X), {"v_stride": 0}, ValueError, "v_stride"),
    (s2_attend, (X, X, X), {"kv_start": -64}, ValueError, "kv_start"),
    (s2_attend, (X, X[:1].repeat(3, 0), X), {}, ValueError, "v"),
    (decode_step, (X, X[:, :1], X[:, :1], STATE, 2, 1, 2), {}, ValueError, "k"),
    (decode_step, (X, X, X, STATE._replace(k=X[:1]), 2, 1, 2), {}, ValueError, "state.k"),
    (decode_step, (X, X, X, STATE._replace(pos=np.zeros((1, 3), int)), 2, 1, 2), {}, ValueError,
     "state.pos"),
    (decode_step, (X, X, X, State(X, X, np.zeros((2, 4), int), 4), 2, 0, 2), {}, ValueError,
     "local"),
    (merge_partitions, (X, X), {}, ValueError, "lses"),
    (merge_partitions, (X[:0], X[:0, :, 0]), {}, ValueError, "outs"),
    (merge_partitions, (X, None), {}, TypeError, "lses"),
)  # fmt: skip


@pytest.mark.parametrize(("function", "args", "options", "error", "name"), BAD)
def test_bad_input_is_named(
    function: Any, args: tuple[Any, ...], options: dict[str, Any], error: type, name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        function(*args, **options)


def test_inputs_stay_as_they_are() -> None:
    inputs = tensors()
    copies = [x.copy() for x in inputs]
    s2_attend_backward(*inputs, b=2, local=1, v_stride=2, dout=np.ones((2, 4, 13, 5)))
    decode_step(*inputs, init_state(*inputs[1:]), 2, 1, 2)
    for x, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
    assert s2_attention.MECHANISM.slug == "s2_attention"
