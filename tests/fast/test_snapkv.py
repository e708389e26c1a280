"""SnapKV's fast path against its chapter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from attnspec.fast.cache import snapkv
from attnspec.reference.cache import snapkv as spec
from attnspec.reference.dense.attention import score, visible
from attnspec.reference.primitives.softmax import softmax_lse

BATCH, HEADS, KV_HEADS, T, D, DV = 2, 4, 2, 40, 16, 8


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def tokens(count: int, seed: int = 0) -> list[torch.Tensor]:
    """q, k and v of `count` tokens."""
    random = torch.Generator().manual_seed(seed)
    shapes = (HEADS, D), (KV_HEADS, D), (KV_HEADS, DV)
    return [torch.randn(BATCH, heads, count, d, generator=random) for heads, d in shapes]


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("gqa", ["group_mean", "group_max", "per_query_head"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("C", [12, 40, 41])
def test_prefill_and_steps(pool: str, gqa: str, padded: bool, C: int) -> None:
    q, k, v = tokens(T)
    mask = None
    if padded:
        mask = torch.ones(BATCH, T, dtype=torch.bool)
        mask[0, :33] = False
        for x in (k, v):
            x.masked_fill_(~mask[:, None, :, None], math.nan)
    options: dict[str, Any] = {"w": 4, "C": C, "p": 3, "pool": pool, "gqa": gqa}
    out, state = snapkv.prefill(q, k, v, mask=mask, **options)
    padding = None if mask is None else mask.numpy()
    expected, spec_state = spec.prefill(array(q), array(k), array(v), mask=padding, **options)
    np.testing.assert_allclose(array(out), expected, atol=1e-5)
    for seed in range(1, 4):
        np.testing.assert_array_equal(state.pos.numpy(), spec_state.pos)
        np.testing.assert_allclose(array(state.k), spec_state.k, atol=1e-6)
        assert state.seen == spec_state.seen
        new = tokens(1, seed)
        out, state = snapkv.step(state, *new)
        expected, spec_state = spec.step(spec_state, *(array(x) for x in new))
        np.testing.assert_allclose(array(out), expected, atol=1e-5)


def test_the_stages_give_what_the_fused_pass_gives() -> None:
    q, k, v = tokens(T)
    A = snapkv.window_attention(q, k, 4)
    np.testing.assert_allclose(array(A), spec.window_attention(array(q), array(k), 4), atol=1e-6)
    m = snapkv.pool_scores(snapkv.prefix_scores(A, 4), 5, "max")
    idx = snapkv.select(snapkv.reduce_groups(m, KV_HEADS, "group_mean"), 8)
    k_c, v_c, pos = snapkv.compress(k, v, idx, 4)
    _, state = snapkv.prefill(q, k, v, w=4, C=12, p=5, pool="max")
    for got, want in ((k_c, state.k), (v_c, state.v), (pos, state.pos)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("given", [False, True])
def test_scores_without_the_weights(given: bool) -> None:
    q, k, _ = tokens(T)
    mask = torch.arange(T) >= torch.tensor([[5], [0]])
    scores = score(array(q[:, :, -4:]), array(k))
    lse = softmax_lse(scores, visible(4, T, causal=True, mask=mask.numpy()[:, None, None]))[1]
    left = torch.from_numpy(lse).float() if given else None
    got = snapkv.window_scores(q, k, 4, mask, left)
    padding = mask.numpy()
    for spec_lse in (None, lse):
        expected = spec.window_scores(array(q), array(k), 4, padding, spec_lse)
        np.testing.assert_allclose(array(got), expected, atol=1e-5)


def test_two_continuations_of_one_state_do_not_meet() -> None:
    _, state = snapkv.prefill(*tokens(T), w=4, C=12)
    _, state = snapkv.step(state, *tokens(1, 1))
    _, first = snapkv.step(state, *tokens(1, 2))
    kept = first.k.clone()
    _, second = snapkv.step(state, *tokens(1, 3))
    assert torch.equal(first.k, kept)
    assert not torch.equal(first.k, second.k)
    assert state.k.shape[2] == 13


def test_a_step_writes_behind_the_state_without_moving_it() -> None:
    _, state = snapkv.prefill(*tokens(T), w=4, C=12)
    _, state = snapkv.step(state, *tokens(1, 1))
    _, after = snapkv.step(state, *tokens(1, 2))
    assert after.k.data_ptr() == state.k.data_ptr()


def test_an_empty_state_starts_a_sequence() -> None:
    q, k, v = tokens(1)
    out, state = snapkv.step(snapkv.init_state(k, v), q, k, v)
    torch.testing.assert_close(out, v.repeat_interleave(HEADS // KV_HEADS, 1))
    assert (state.seen, state.pos.unique().tolist()) == (1, [0])


Q, K, V = tokens(9)
STATE = snapkv.init_state(K, V)._replace(seen=3)


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: snapkv.prefill(Q, K, V, w=4, C=4), ValueError, "w"),
        (lambda: snapkv.prefill(Q, K, V, w=0), ValueError, "w"),
        (lambda: snapkv.prefill(Q, K, V, C=1), ValueError, "C"),
        (lambda: snapkv.prefill(Q, K, V, p=4), ValueError, "p"),
        (lambda: snapkv.prefill(Q, K, V, pool="sum"), ValueError, "pool"),
        (lambda: snapkv.prefill(Q, K, V, gqa="mean"), ValueError, "gqa"),
        (lambda: snapkv.prefill(Q, K, V, state=STATE), ValueError, "state"),
        (lambda: snapkv.prefill(Q[:, :, :2], K, V, w=3, C=5), ValueError, "w"),
        (lambda: snapkv.window_attention(Q, K, 9), ValueError, "w"),
        (lambda: snapkv.window_attention(Q, K, 2, torch.ones(2, 9)), TypeError, "mask"),
        (lambda: snapkv.window_scores(Q, K, 2, lse=Q[:, :, :2, 0].double()), TypeError, "lse"),
        (lambda: snapkv.window_scores(Q, K, 2, lse=Q[:, :, :3, 0]), ValueError, "lse"),
        (lambda: snapkv.window_attention(Q, K, 2, torch.ones(1, 9) > 0), ValueError, "mask"),
        (
            lambda: snapkv.window_attention(Q, K, 2, (torch.arange(9) < 5).expand(2, 9)),
            ValueError,
            "mask",
        ),
        (lambda: snapkv.pool_scores(Q[0], 3, "sum"), ValueError, "mode"),
        (lambda: snapkv.reduce_groups(Q[0], 2), ValueError, "Hk"),
        (lambda: snapkv.select(Q[0], 0), ValueError, "n"),
        (lambda: snapkv.select(Q[0], 1, Q[0]), TypeError, "mask"),
        (lambda: snapkv.select(Q[0], 1, torch.ones(3) > 0), ValueError, "mask"),
        (lambda: snapkv.compress(K, V, torch.full((2, 2, 3), 8), 2), ValueError, "idx"),
        (lambda: snapkv.compress(K, V, torch.zeros(2, 3, 1).long(), 2), ValueError, "idx"),
        (lambda: snapkv.compress(K, V[:, :, :3], torch.zeros(2, 2, 1).long(), 2), ValueError, "v"),
        (lambda: snapkv.step(STATE, Q, K, V), ValueError, "q"),
        (lambda: snapkv.prefill(Q.long(), K, V), TypeError, "q"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=f"^{argument}: got "):
        call()
