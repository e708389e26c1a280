"""SnapKV against outside evidence, its own properties and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.cache import snapkv
from attnspec.reference.conventions import repeat_heads
from attnspec.reference.dense.attention import attend

quick = settings(max_examples=20, deadline=None, derandomize=True)
FLOAT32 = 2e-6  # the sources take the softmax in float32


def tokens(T: int = 20, H: int = 4, Hk: int = 2, d: int = 6, dv: int = 5, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    shapes = ((2, H, T, d), (2, Hk, T, d), (2, Hk, T, dv))
    return tuple(random.standard_normal(shape) for shape in shapes)


def run(q: Any, k: Any, v: Any, prompt: int, **params: Any) -> tuple[np.ndarray, snapkv.State]:
    """Outputs of a prompt and of every token behind it, and the last state."""
    out, state = snapkv.prefill(*(x[..., :prompt, :] for x in (q, k, v)), **params)
    outs = [out]
    for t in range(prompt, q.shape[-2]):
        out, state = snapkv.step(state, *(x[..., t : t + 1, :] for x in (q, k, v)))
        outs.append(out)
    return np.concatenate(outs, axis=-2), state


@pytest.mark.parametrize("name", ["exact_capacity", "gqa_max"])
def test_selection_is_that_of_the_authors(name: str, golden: Callable[[str], Any]) -> None:
    case = golden(f"snapkv__{name}")
    q, k, v, params = case["q"], case["k"], case["v"], case["meta"]["params"]
    w, C, p = params["window_size"], params["max_capacity_prompt"], params["kernel_size"]
    m = snapkv.pool_scores(snapkv.prefix_scores(snapkv.window_attention(q, k, w), w), p, "max")
    np.testing.assert_allclose(m, case["pooled_scores"], atol=FLOAT32)

    # A plateau of equal scores may straddle the cut: there only the scores are determined.
    m = case["pooled_scores"]
    idx = snapkv.select(snapkv.reduce_groups(m, k.shape[-3], "per_query_head"), C - w)
    theirs = np.sort(case["indices"], axis=-1)
    ours, expected = (np.sort(np.take_along_axis(m, i, -1), axis=-1) for i in (idx, theirs))
    np.testing.assert_array_equal(ours, expected)
    above = np.sort(m, axis=-1)[..., -(C - w), None] < m
    for chosen in (idx, theirs):
        hit = np.zeros(m.shape, bool)
        np.put_along_axis(hit, chosen, True, -1)
        assert np.all(hit[above])

    k_c, v_c, pos = snapkv.compress(k, v, theirs, w)
    order = np.argsort(case["indices"], axis=-1)[..., None]
    for kept, source in ((k_c, case["k_out"]), (v_c, case["v_out"])):
        np.testing.assert_array_equal(
            kept[..., : C - w, :], np.take_along_axis(source[..., : C - w, :], order, -2)
        )
        np.testing.assert_array_equal(kept[..., C - w :, :], source[..., C - w :, :])
    assert pos.shape[-1] == C
    _, state = snapkv.prefill(q, k, v, w=w, C=C, p=p, pool="max", gqa="per_query_head")
    assert state.k.shape == case["k_out"].shape
    assert state.v.shape == case["v_out"].shape


def test_selection_is_that_of_kvpress(golden: Callable[[str], Any]) -> None:
    case = golden("snapkv__kvpress_mha")
    q, k, v, params = case["q"], case["k"], case["v"], case["meta"]["params"]
    w, p, T = params["window_size"], params["kernel_size"], k.shape[-2]
    C = int(T * (1 - params["compression_ratio"]))
    m = snapkv.pool_scores(snapkv.prefix_scores(snapkv.window_attention(q, k, w), w), p, "avg")
    np.testing.assert_allclose(m / w, case["scores"][..., : T - w], atol=FLOAT32)
    _, state = snapkv.prefill(q, k, v, w=w, C=C, p=p)
    np.testing.assert_array_equal(state.pos, np.sort(case["indices"], axis=-1))
    order = np.argsort(case["indices"], axis=-1)[..., None]
    np.testing.assert_array_equal(state.k, np.take_along_axis(case["k_out"], order, -2))
    np.testing.assert_array_equal(state.v, np.take_along_axis(case["v_out"], order, -2))


@quick
@given(
    C=st.integers(4, 30),
    w=st.integers(1, 3),
    p=st.sampled_from([1, 3, 7]),
    pool=st.sampled_from(["avg", "max"]),
    gqa=st.sampled_from(["group_mean", "group_max", "per_query_head"]),
)
def test_budget_and_prompt_output(C: int, w: int, p: int, pool: str, gqa: str) -> None:
    q, k, v = tokens()
    out, state = run(q, k, v, 16, w=w, C=C, p=p, pool=pool, gqa=gqa)
    dense, _ = attend(q, k, v, causal=True)
    np.testing.assert_allclose(out[..., :16, :], dense[..., :16, :], atol=1e-12)
    assert state.seen == 20
    slots = min(16, C) + 4
    assert state.k.shape[-2] == state.v.shape[-2] == state.pos.shape[-1] == slots
    assert state.k.shape[-3] == (4 if gqa == "per_query_head" and C <= 16 else 2)
    assert np.all(np.diff(state.pos, axis=-1) > 0)
    np.testing.assert_array_equal(
        state.pos[..., -4 - w :],
        np.broadcast_to(np.arange(16 - w, 20), (*state.pos.shape[:-1], 4 + w)),
    )
    keys = repeat_heads(k, state.k.shape[-3])
    np.testing.assert_array_equal(state.k, np.take_along_axis(keys, state.pos[..., None], -2))
    if C >= 16:
        np.testing.assert_allclose(out, dense, atol=1e-12)


@quick
@given(
    C=st.integers(4, 15),
    more=st.integers(0, 4),
    p=st.sampled_from([1, 3, 5]),
    seed=st.integers(0, 9),
)
def test_a_larger_budget_keeps_what_a_smaller_one_keeps(
    C: int, more: int, p: int, seed: int
) -> None:
    q, k, v = tokens(seed=seed)
    few, many = (
        snapkv.prefill(q, k, v, w=3, C=size, p=p, pool="max")[1].pos for size in (C, C + more)
    )
    for small, large in zip(few.reshape(-1, C), many.reshape(-1, C + more), strict=True):
        assert set(small) <= set(large)


def test_decoding_does_not_depend_on_the_order_of_the_slots() -> None:
    q, k, v = tokens()
    last = tuple(x[..., -1:, :] for x in (q, k, v))
    _, state = snapkv.prefill(q, k, v, w=3, C=9)
    out, _ = snapkv.step(state, *last)
    order = np.random.default_rng(0).permutation(9)
    turned = snapkv.State(
        state.k[..., order, :], state.v[..., order, :], state.pos[..., order], state.seen
    )
    np.testing.assert_allclose(snapkv.step(turned, *last)[0], out, atol=1e-12)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_one_selection_a_group_is_one_a_head_if_the_heads_agree(pool: str) -> None:
    q, k, v = tokens()
    alike = repeat_heads(q[:, ::2], 4)
    outs = [
        run(alike, k, v, 16, w=3, C=8, p=3, pool=pool, gqa=gqa)
        for gqa in ("group_mean", "group_max", "per_query_head")
    ]
    wide = outs[2][1].pos
    for out, state in outs[:2]:
        np.testing.assert_array_equal(np.repeat(state.pos, 2, axis=-2), wide)
        np.testing.assert_allclose(out, outs[2][0], atol=1e-12)
    q, k, v = tokens(Hk=4)
    means, heads = (
        run(q, k, v, 16, w=3, C=8, pool=pool, gqa=gqa) for gqa in ("group_mean", "per_query_head")
    )
    np.testing.assert_array_equal(means[1].pos, heads[1].pos)
    np.testing.assert_array_equal(means[0], heads[0])


def test_selection_does_not_see_values_nor_a_shift_of_all_keys() -> None:
    q, k, v = tokens()
    pos = snapkv.prefill(q, k, v, w=3, C=9)[1].pos
    np.testing.assert_array_equal(snapkv.prefill(q, k, 100 * v, w=3, C=9)[1].pos, pos)
    shift = np.random.default_rng(5).standard_normal(6)
    np.testing.assert_array_equal(snapkv.prefill(q, k + shift, v, w=3, C=9)[1].pos, pos)


@pytest.mark.parametrize("gqa", ["group_mean", "group_max", "per_query_head"])
def test_heads_and_batch_rows_may_be_permuted(gqa: str) -> None:
    q, k, v = tokens()
    out, state = run(q, k, v, 16, w=3, C=9, gqa=gqa)
    heads = [3, 2, 1, 0]
    slots = heads if gqa == "per_query_head" else [1, 0]
    turned, other = run(q[:, heads], k[:, ::-1], v[:, ::-1], 16, w=3, C=9, gqa=gqa)
    np.testing.assert_allclose(turned, out[:, heads], atol=1e-12)
    np.testing.assert_array_equal(other.pos, state.pos[:, slots])
    np.testing.assert_array_equal(other.k, state.k[:, slots])
    alone, single = run(q[1], k[1], v[1], 16, w=3, C=9, gqa=gqa)
    np.testing.assert_allclose(alone, out[1], atol=1e-12)
    np.testing.assert_array_equal(single.pos, state.pos[1])


@quick
@given(
    padding=st.integers(0, 18),
    C=st.integers(4, 20),
    pool=st.sampled_from(["avg", "max"]),
    gqa=st.sampled_from(["group_mean", "per_query_head"]),
)
def test_a_padded_prompt_is_the_prompt_alone(padding: int, C: int, pool: str, gqa: str) -> None:
    q, k, v = tokens()
    params: dict[str, Any] = {"w": 3, "C": C, "p": 3, "pool": pool, "gqa": gqa}
    mask = np.ones((2, 18), bool)
    mask[0, :padding] = False
    for x in (q, k, v):
        x[0, :, :padding] = np.nan
    out, state = run(q, k, v, 18, **params, mask=mask)
    np.testing.assert_array_equal(out[0, :, :padding], 0)
    assert state.seen == 20
    q1, k1, v1 = (x[:1, :, padding:] for x in (q, k, v))
    alone, short = run(q1, k1, v1, 18 - padding, **params)
    np.testing.assert_allclose(out[:1, :, padding:], alone, atol=1e-12)
    # A prompt that is short without its padding keeps one row of slots for each kv head.
    slots = state.pos[0, :: state.pos.shape[1] // short.pos.shape[1]]
    for head, expected in zip(slots, short.pos[0], strict=True):
        np.testing.assert_array_equal(head[head >= 0], expected + padding)
    full, _ = run(q[1:], k[1:], v[1:], 18, **params)
    np.testing.assert_allclose(out[1:], full, atol=1e-12)


def test_more_keys_than_queries() -> None:
    q, k, v = tokens()
    out, state = snapkv.prefill(q[..., -5:, :], k, v, w=3, C=9)
    whole, expected = snapkv.prefill(q, k, v, w=3, C=9)
    np.testing.assert_allclose(out, whole[..., -5:, :], atol=1e-12)
    np.testing.assert_array_equal(state.pos, expected.pos)


def test_float32_stays_float32_and_inputs_stay_as_they_are() -> None:
    q, k, v = (x.astype(np.float32) for x in tokens())
    before = [x.copy() for x in (q, k, v)]
    out, state = run(q, k, v, 16, w=3, C=9)
    A = snapkv.window_attention(q, k, 3)
    m = snapkv.reduce_groups(snapkv.pool_scores(snapkv.prefix_scores(A, 3)), 2)
    assert {x.dtype for x in (out, state.k, state.v, A, m)} == {np.dtype(np.float32)}
    for x, copy in zip((q, k, v), before, strict=True):
        np.testing.assert_array_equal(x, copy)


def test_a_second_prompt_is_refused() -> None:
    q, k, v = tokens()
    out, state = snapkv.prefill(q, k, v, w=3, C=9, state=snapkv.init_state(k, v))
    np.testing.assert_array_equal(out, snapkv.prefill(q, k, v, w=3, C=9)[0])
    with pytest.raises(ValueError, match=r"^state: got .*expected an empty one"):
        snapkv.prefill(q, k, v, w=3, C=9, state=state)


Q, K, V = tokens(T=6)
ONE = tuple(x[..., :1, :] for x in (Q, K, V))
IDX = np.zeros((2, 2, 1), int)
MASK = np.ones((2, 6), bool)
AFTER = snapkv.prefill(Q, K, V, w=1, C=3, p=1)[1]
WIDE = snapkv.prefill(Q, K, V, w=1, C=3, p=1, gqa="per_query_head")[1]
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: snapkv.compress(K[0, 0], V, IDX, 2), ValueError, "k"),
    (lambda: snapkv.compress(K, V[..., 1:, :], IDX, 2), ValueError, "v"),
    (lambda: snapkv.compress(K, V.astype("f4"), IDX, 2), TypeError, "v"),
    (lambda: snapkv.compress(K, V, IDX, 6), ValueError, "w"),
    (lambda: snapkv.compress(K, V, IDX * 1.0, 2), TypeError, "idx"),
    (lambda: snapkv.compress(K, V, IDX[0], 2), ValueError, "idx"),
    (lambda: snapkv.compress(K, V, IDX[:, :1], 2), ValueError, "idx"),
    (lambda: snapkv.compress(K, V, IDX + 4, 2), ValueError, "idx"),
    (lambda: snapkv.compress(K, V, IDX - 1, 2), ValueError, "idx"),
    (lambda: snapkv.init_state(K, 1), TypeError, "v"),  # type: ignore[arg-type]
    (lambda: snapkv.prefill(Q, K, V[..., 1:, :]), ValueError, "v"),
    (lambda: snapkv.prefill(Q, K, V, C=1), ValueError, "C"),
    (lambda: snapkv.prefill(Q, K, V, w=0), ValueError, "w"),
    (lambda: snapkv.prefill(Q, K, V, w=3, C=3), ValueError, "w"),
    (lambda: snapkv.prefill(Q, K, V, p=4), ValueError, "p"),
    (lambda: snapkv.prefill(Q, K, V, pool="maxpool"), ValueError, "pool"),
    (lambda: snapkv.prefill(Q, K, V, gqa="mean"), ValueError, "gqa"),
    (lambda: snapkv.prefill(Q, K, V, mask=MASK[:, 1:]), ValueError, "mask"),
    (lambda: snapkv.step(AFTER, Q, K, V), ValueError, "q"),
    (lambda: snapkv.step(AFTER, ONE[0], K, V), ValueError, "k"),
    (lambda: snapkv.step(AFTER, ONE[0], ONE[1][:, :1], ONE[2][:, :1]), ValueError, "k"),
    (lambda: snapkv.step(AFTER, *(x[:1] for x in ONE)), ValueError, "k"),
    (lambda: snapkv.step(AFTER, ONE[0], ONE[1], ONE[2][..., :2]), ValueError, "v"),
    (lambda: snapkv.step(WIDE, ONE[0][:, :2], ONE[1], ONE[2]), ValueError, "k"),
]


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}: got .*expected"):
        call()
