"""SinkLoRA against outside evidence, its own properties and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.conventions import causal_mask, repeat_heads
from attnspec.reference.dense import attention as dense
from attnspec.reference.patterns import sinklora
from attnspec.reference.patterns.longlora import grouped_attend
from attnspec.reference.patterns.longlora_groups import s2_mask
from attnspec.reference.patterns.sinklora import sf_attend, sf_attend_backward
from attnspec.reference.patterns.sinklora_h2o import (
    State,
    h2o_accumulate,
    h2o_budgets,
    h2o_keep,
    h2o_mask_step,
    h2o_step,
    init_state,
)
from attnspec.reference.patterns.sinklora_heads import (
    segment_and_reassemble,
    sf_head_kind,
    sf_mask,
)
from attnspec.reference.patterns.sinklora_prompt import h2o_global_mask, h2o_local_mask
from attnspec.reference.primitives.softmax import merge, softmax
from tests.differences import differences

quick = settings(max_examples=20, deadline=None, derandomize=True)


def tensors(
    T: int = 16, H: int = 4, Hk: int = 2, batch: int = 2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = ((batch, H, T, 4), (batch, Hk, T, 4), (batch, Hk, T, 3))
    q, k, v = (random.standard_normal(shape) for shape in shapes)
    return q, k, v


def calls(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, sizes: list[int], hh: int, rec: int, **options: Any
) -> tuple[np.ndarray, list[State]]:
    """The outputs of a text in calls of such sizes, and the state after each."""
    state, outs, states, first = init_state(k, v), [], [], 0
    for size in sizes:
        new = slice(first, first + size)
        out, state = h2o_step(
            q[..., new, :], k[..., new, :], v[..., new, :], state, hh, rec, **options
        )
        outs.append(out)
        states.append(state)
        first += size
    return np.concatenate(outs, axis=-2), states


def test_cache_is_that_of_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("sinklora__h2o_drop_a")
    params, atol = case["meta"]["params"], case["meta"]["tolerance"]
    q, k, v = (case[name] for name in ("q", "k", "v"))
    sizes = [params["prefill_chunk"]] * q.shape[-2]
    out, states = calls(q, k, v, sizes, params["hh_size"], params["recent_size"])
    np.testing.assert_allclose(out, case["out"], atol=atol)
    for state, kept in zip(states, case["kept"], strict=True):
        np.testing.assert_array_equal(state.pos, kept[:, : state.pos.shape[1]])
        assert np.all(kept[:, state.pos.shape[1] :] == -1)
    np.testing.assert_allclose(states[-1].a, case["final_score"], atol=atol)


def test_global_statistic_is_that_of_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("sinklora__h2o_global_a")
    params, atol = case["meta"]["params"], case["meta"]["tolerance"]
    q, k, v = (case[name] for name in ("q", "k", "v"))
    T = q.shape[-2]
    hh, rec = h2o_budgets(T, params["heavy_ratio"], params["recent_ratio"])
    assert (hh, rec) == (params["heavy_budget"], params["recent_budget"])
    scores = dense.score(q, k)
    mask = h2o_global_mask(softmax(scores, causal_mask(T, T)), hh, rec)
    np.testing.assert_allclose(softmax(scores, mask), case["probs"], atol=atol)
    np.testing.assert_allclose(dense.attend(q, k, v, mask=mask)[0], case["out"], atol=atol)


@pytest.mark.parametrize(
    ("H", "rho", "plain"),
    [(32, 0.5, 24), (2, 0.5, 2), (2, 0.0, 1), (7, 0.5, 5), (8, 1.0, 8), (20, 0.7, 17), (1, 0.0, 0),
     (8, 0.26, 6), (1, 1.0, 1)],
)  # fmt: skip
def test_shifted_heads_are_the_last(H: int, rho: float, plain: int) -> None:
    np.testing.assert_array_equal(sf_head_kind(H, rho), [0] * plain + [1] * (H - plain))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("wrap", [True, False])
def test_without_returned_heads_and_sinks_it_is_longlora(wrap: bool, causal: bool) -> None:
    q, k, v = tensors()
    variant = "roll" if wrap else "segments"
    want = grouped_attend(q, k, v, 4, variant, None, causal)
    for x, y in zip(sf_attend(q, k, v, 4, 0, 0.0, wrap, causal), want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)
    plain = s2_mask(16, 4, 2, "segments", causal)[0]
    np.testing.assert_array_equal(sf_mask(16, 4, 4, 0, 1.0, wrap, causal), [plain] * 4)
    everything = np.broadcast_to(causal_mask(16, 16) if causal else True, (4, 16, 16))
    mask = sf_mask(16, 4, 4, 16, 0.0, wrap, causal)
    leak = s2_mask(16, 4, 4, "roll") if wrap else np.zeros_like(mask)
    np.testing.assert_array_equal(mask, everything | leak)


@given(
    T=st.integers(0, 20), G=st.integers(1, 9), H=st.integers(1, 5), s=st.integers(0, 6),
    rho=st.floats(0, 1), wrap=st.booleans(), causal=st.booleans(),
)  # fmt: skip
@quick
def test_masks(T: int, G: int, H: int, s: int, rho: float, wrap: bool, causal: bool) -> None:
    if wrap:
        G *= 2
        T = T // G * G
    mask = sf_mask(T, G, H, s, rho, wrap, causal)
    assert mask.shape == (H, T, T)
    order = causal_mask(T, T) if causal else np.ones((T, T), bool)
    assert np.all(mask[:, :, :s] >= order[:, :s])
    assert np.all(mask[:, :s] >= order[:s])
    assert np.all(mask.sum(-1) >= np.minimum(s, np.arange(T) + 1))
    assert np.all(np.einsum("htt->ht", mask))
    if causal:
        ahead = mask & ~order
        shifted, g = sf_head_kind(H, rho) == 1, G // 2
        assert not np.any(ahead[~shifted])
        assert not np.any(ahead[:, g:] if wrap else ahead)
        if wrap and T:
            assert np.all(ahead[shifted, :g].sum(-1) == np.minimum(g, T - np.arange(g) - 1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s", [0, 1, 4, 7])
def test_groups_and_sinks_merge(s: int, causal: bool) -> None:
    q, k, v = tensors(13, 6, 3)
    mask = sf_mask(13, 4, 6, s, 0.5, False, causal)
    sink = mask & (np.arange(13) < s)
    parts = [dense.attend(q, k, v, mask=part) for part in (mask & ~sink, sink)]
    for x, y in zip(sf_attend(q, k, v, 4, s, causal=causal), merge(*parts[0], *parts[1]),
                    strict=True):  # fmt: skip
        np.testing.assert_allclose(x, y, atol=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_rolled_heads_are_blocks_of_rows(rho: float) -> None:
    q, k, v = tensors(16, 4, 4)
    rolled = [segment_and_reassemble(x, 4, rho, -1) for x in (q, k, v)]
    blocks = [x.reshape(2, 4, 4, 4, -1) for x in rolled]
    out, _ = dense.attend(*blocks, causal=True)
    out = segment_and_reassemble(out.reshape(2, 4, 16, 3), 4, rho, 1)
    np.testing.assert_allclose(sf_attend(q, k, v, 4, 0, rho, True)[0], out, atol=1e-12)


def test_roll_and_back() -> None:
    q, _, _ = tensors(12)
    for rho in (0.0, 0.5, 0.9):
        there = segment_and_reassemble(q, 6, rho, -1)
        np.testing.assert_array_equal(segment_and_reassemble(there, 6, rho, 1), q)
        shifted = sf_head_kind(4, rho) == 1
        np.testing.assert_array_equal(there[:, ~shifted], q[:, ~shifted])
        np.testing.assert_array_equal(there[:, shifted], np.roll(q[:, shifted], -3, axis=2))


@pytest.mark.parametrize(("wrap", "causal"), [(False, True), (True, True), (False, False)])
def test_gradient_is_the_slope(wrap: bool, causal: bool) -> None:
    inputs = tensors(8, 4, 2, 1)
    options = (4, 1, 0.0, wrap, causal, 0.7)
    random = np.random.default_rng(1)
    dout, dlse = random.standard_normal((1, 4, 8, 3)), random.standard_normal((1, 4, 8))
    gradients = sf_attend_backward(*inputs, *options, dout=dout, dlse=dlse)

    def loss() -> float:
        out, lse = sf_attend(*inputs, *options)
        return float(np.sum(out * dout) + np.sum(lse * dlse))

    for x, gradient in zip(inputs, gradients, strict=True):
        np.testing.assert_allclose(gradient, differences(loss, x, 1e-6), atol=1e-7)


@given(
    T=st.integers(1, 16), chunk=st.integers(1, 6), hh=st.integers(0, 4), rec=st.integers(0, 5),
    group=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
@quick
def test_kept_rows(T: int, chunk: int, hh: int, rec: int, group: int, seed: int) -> None:
    q, k, v = tensors(T, 2 * group, 2, 1, seed)
    sizes = [min(chunk, T - first) for first in range(0, T, chunk)]
    _, states = calls(q, k, v, sizes, hh, rec)
    C, gone, seen = hh + rec, np.zeros((2, T), bool), 0
    for size, state in zip(sizes, states, strict=True):
        seen += size
        assert state.seen == seen
        assert state.pos.shape == state.a.shape == state.k.shape[1:3] == (2, min(seen, C))
        assert np.all(np.diff(state.pos, axis=1) > 0)
        for head in range(2):
            kept = set(state.pos[head].tolist())
            assert kept >= set(range(max(0, seen - rec), seen)) or C == 0
            assert not any(gone[head, sorted(kept)])
            gone[head, sorted(set(range(seen)) - kept)] = True
            np.testing.assert_array_equal(state.k[0, head], k[0, head, state.pos[head]])
            np.testing.assert_array_equal(state.v[0, head], v[0, head, state.pos[head]])
        total = np.sum(state.a, axis=1)
        if seen <= C:
            np.testing.assert_allclose(total, seen * group)
        assert np.all(total <= seen * group + 1e-9)


def test_a_large_cache_is_dense_attention() -> None:
    q, k, v = tensors(12, 4, 2, 1)
    want = dense.attend(q, k, v, causal=True)[0]
    out, states = calls(q, k, v, [5, 1, 1, 3, 2], 4, 8)
    np.testing.assert_allclose(out, want, atol=1e-12)
    weights = softmax(dense.score(q, k), causal_mask(12, 12))
    received = weights.sum(2).reshape(2, 2, 12).sum(1)
    np.testing.assert_allclose(states[-1].a, received, atol=1e-12)


def test_without_heavy_rows_it_is_a_window() -> None:
    q, k, v = tensors(12, 4, 2, 1)
    t = np.arange(12)
    window = causal_mask(12, 12) & (t[:, None] - t <= 3)
    out, _ = calls(q, k, v, [1] * 12, 0, 3)
    np.testing.assert_allclose(out, dense.attend(q, k, v, mask=window)[0], atol=1e-12)


def test_prompt_in_one_call_or_token_by_token() -> None:
    for T, same in ((7, True), (12, False)):
        q, k, v = tensors(T, 4, 2, 1)
        whole, single = (calls(q, k, v, sizes, 3, 3)[1][-1] for sizes in ([T], [1] * T))
        assert np.array_equal(whole.pos, single.pos) == same
        if same:
            np.testing.assert_allclose(whole.a, single.a, atol=1e-12)


def test_heads_may_change_places() -> None:
    q, k, v = tensors(14, 3, 3, 1)
    order = [2, 0, 1]
    _, states = calls(q, k, v, [1] * 14, 2, 3)
    _, moved = calls(*(x[:, order] for x in (q, k, v)), [1] * 14, 2, 3)
    np.testing.assert_array_equal(moved[-1].pos, states[-1].pos[order])
    assert len({tuple(row) for row in states[-1].pos.tolist()}) > 1


def test_dropped_tokens_are_gone() -> None:
    q, k, v = tensors(14, 2, 1, 1)
    before, states = calls(q, k, v, [1] * 14, 2, 2)
    gone = np.setdiff1d(np.arange(8), states[7].pos[0])
    k[..., gone, :], v[..., gone, :] = 9.0, -9.0
    first = states[7]
    for t in range(8, 14):
        new = slice(t, t + 1)
        out, first = h2o_step(q[..., new, :], k[..., new, :], v[..., new, :], first, 2, 2)
        np.testing.assert_array_equal(out, before[..., new, :])


@pytest.mark.parametrize("sizes", [[1] * 14, [6, 1, 1, 4, 2], [14]])
def test_mask_form_keeps_the_same(sizes: list[int]) -> None:
    q, k, v = tensors(14, 4, 2, 1, seed=3)
    out, states = calls(q, k, v, sizes, 2, 3)
    a, kept = np.zeros((2, 0)), np.zeros((2, 0), bool)
    first = 0
    for size, state in zip(sizes, states, strict=True):
        new, n = slice(first, first + size), first + size
        seen = np.ones((2, n), bool)
        seen[:, :first] = kept
        mask = repeat_heads(seen[:, None, :], 4) & causal_mask(size, n)
        P = softmax(dense.score(q[..., new, :], k[..., :n, :]), mask)
        np.testing.assert_allclose(dense.combine(P, v[..., :n, :]), out[..., new, :], atol=1e-12)
        a, kept = h2o_mask_step(a, P, kept, 2, 3)
        rows = np.broadcast_to(np.arange(n), kept.shape)
        np.testing.assert_array_equal(rows[kept].reshape(2, -1), state.pos)
        np.testing.assert_allclose(a[kept].reshape(2, -1), state.a, atol=1e-12)
        assert not np.any(a[~kept])
        first = n


def test_cache_relative_positions_are_those_of_the_rows() -> None:
    q, k, v = tensors(10, 2, 2, 1)
    turned = {"rope_base": 100.0}
    out, states = calls(q, k, v, [4, 1, 1, 1, 1, 1, 1], 2, 2, **turned)
    plain, _ = calls(q, k, v, [4, 1, 1, 1, 1, 1, 1], 2, 2)
    assert not np.allclose(out, plain)
    np.testing.assert_array_equal(states[-1].k[0, 0], k[0, 0, states[-1].pos[0]])
    later = h2o_step(q[..., :1, :], k[..., :1, :], v[..., :1, :], states[-1], 2, 2, **turned)
    old = states[-1]._replace(pos=states[-1].pos + 50, seen=60)
    moved = h2o_step(q[..., :1, :], k[..., :1, :], v[..., :1, :], old, 2, 2, **turned)
    np.testing.assert_array_equal(later[0], moved[0])


def test_local_choice_is_causal() -> None:
    scores = np.random.default_rng(0).standard_normal((2, 3, 12, 12))
    for hh in (0, 1, 4, 12, 15):
        mask = h2o_local_mask(scores, hh)
        assert np.all(mask.sum(-1) == min(hh, 12))
        changed = scores.copy()
        changed[..., 7:, :] *= -2.0
        changed[np.broadcast_to(~causal_mask(12, 12), changed.shape)] = np.nan
        np.testing.assert_array_equal(mask[..., :8, :], h2o_local_mask(changed, hh)[..., :8, :])
    assert np.all(h2o_local_mask(scores, 4)[..., :4, :4])


def test_global_choice_looks_ahead() -> None:
    random = np.random.default_rng(0)
    scores = random.standard_normal((1, 1, 10, 10))
    seen = causal_mask(10, 10)
    mask = h2o_global_mask(softmax(scores, seen), 2, 1)
    scores[..., 7:, 4] += 50.0
    other = h2o_global_mask(softmax(scores, seen), 2, 1)
    assert np.any(mask[..., 6, :] != other[..., 6, :])
    band = h2o_global_mask(softmax(scores, seen), 0, 2)
    np.testing.assert_array_equal(band.sum(-1)[0, 0], np.minimum(np.arange(10), 2) + 1)


def test_a_share_that_is_almost_a_whole_number() -> None:
    assert 0.07 * 100 > 7
    assert sf_head_kind(200, 0.07).sum() == 93


Q, K, V = tensors(8, batch=1)
STATE = h2o_step(Q, K, V, init_state(K, V), 2, 2)[1]
P = softmax(np.zeros((1, 4, 2, 6)))
A, KEPT = np.ones((2, 4)), np.ones((2, 4), bool)
BAD: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], type, str], ...] = (
    (sf_head_kind, (0,), {}, ValueError, "H"),
    (sf_head_kind, (4, "1/2"), {}, TypeError, "rho"),
    (sf_head_kind, (4, 1.5), {}, ValueError, "rho"),
    (sf_mask, (-1, 2, 2), {}, ValueError, "T"),
    (sf_mask, (8, 0, 2), {}, ValueError, "G"),
    (sf_mask, (8, 3, 2), {"wrap": True}, ValueError, "G"),
    (sf_mask, (9, 2, 2), {"wrap": True}, ValueError, "G"),
    (sf_mask, (8, 2, 2.0), {}, TypeError, "H"),
    (sf_mask, (8, 2, 2, -1), {}, ValueError, "s"),
    (sf_mask, (8, 2, 2), {"wrap": 1}, TypeError, "wrap"),
    (sf_mask, (8, 2, 2), {"causal": None}, TypeError, "causal"),
    (segment_and_reassemble, ([1.0], 4, 0.5, 1), {}, TypeError, "x"),
    (segment_and_reassemble, (Q, 3, 0.5, 1), {}, ValueError, "G"),
    (segment_and_reassemble, (Q, 6, 0.5, 1), {}, ValueError, "G"),
    (segment_and_reassemble, (Q, 4, 2, 1), {}, ValueError, "rho"),
    (segment_and_reassemble, (Q, 4, 0.5, 0), {}, ValueError, "sign"),
    (sf_attend, (None, K, V, 4), {}, TypeError, "q"),
    (sf_attend, (Q, K[..., :-1, :], V[..., :-1, :], 4), {}, ValueError, "k"),
    (sf_attend, (Q, K, V, 2.0), {}, TypeError, "G"),
    (sf_attend, (Q, K, V, 4), {"s": True}, TypeError, "s"),
    (sf_attend, (Q, K, V, 4), {"rho": -0.1}, ValueError, "rho"),
    (sf_attend, (Q, K, V, 6), {"wrap": True}, ValueError, "G"),
    (sf_attend_backward, (Q, K, V, 4), {"dout": None}, TypeError, "dout"),
    (init_state, (K, None), {}, TypeError, "v"),
    (h2o_accumulate, (A, P, 3), {}, ValueError, "P"),
    (h2o_accumulate, (A, np.concatenate([P, P]), 2), {}, ValueError, "P"),
    (h2o_accumulate, (None, P[..., :1], 2), {}, ValueError, "P"),
    (h2o_accumulate, (A, P, 0), {}, ValueError, "w"),
    (h2o_accumulate, (A[:, 1:], P, 2), {}, ValueError, "a"),
    (h2o_accumulate, (np.ones((3, 4)), P, 2), {}, ValueError, "a"),
    (h2o_accumulate, (A[None], P, 2), {}, ValueError, "a"),
    (h2o_accumulate, (A, P, 2, 4), {}, ValueError, "kv_heads"),
    (h2o_accumulate, (None, P, 2, 3), {}, ValueError, "kv_heads"),
    (h2o_keep, (A, 5), {}, ValueError, "a"),
    (h2o_keep, ([1.0], 1), {}, TypeError, "a"),
    (h2o_keep, (A, 4, -1), {}, ValueError, "hh"),
    (h2o_keep, (A, 4, 1, 1.0), {}, TypeError, "rec"),
    (h2o_step, (Q, K, V[..., 1:, :], STATE), {}, ValueError, "v"),
    (h2o_step, (Q[..., 1:, :], K, V, STATE), {}, ValueError, "k"),
    (h2o_step, (Q[..., :0, :], K[..., :0, :], V[..., :0, :], STATE), {}, ValueError, "q"),
    (h2o_step, (*(np.concatenate([x, x]) for x in (Q, K, V)), STATE), {}, ValueError, "q"),
    (h2o_step, (Q, K, V[..., 1:], STATE), {}, ValueError, "v"),
    (h2o_step, (Q, K, V, STATE, -1), {}, ValueError, "hh"),
    (h2o_step, (Q, K, V, STATE, 1, None), {}, TypeError, "rec"),
    (h2o_step, (Q, K, V, STATE), {"rope_base": 0.0}, ValueError, "rope_base"),
    (h2o_step, (Q, K, V, (K, V)), {}, TypeError, "state"),
    (h2o_step, (Q, K, V, STATE._replace(a=A[:, 1:])), {}, ValueError, "state.a"),
    (h2o_step, (Q, K, V, STATE._replace(pos=STATE.pos[:1])), {}, ValueError, "state.pos"),
    (h2o_mask_step, (A, P, None), {}, ValueError, "kept"),
    (h2o_mask_step, (None, P, KEPT), {}, ValueError, "a"),
    (h2o_mask_step, (A, P, KEPT[:, 1:]), {}, ValueError, "kept"),
    (h2o_mask_step, (A, P, A), {}, TypeError, "kept"),
    (h2o_local_mask, (Q, 1), {}, ValueError, "scores"),
    (h2o_local_mask, (P[..., :2], 1.0), {}, TypeError, "hh"),
    (h2o_global_mask, (Q, 1, 1), {}, ValueError, "P"),
    (h2o_global_mask, (P[..., :2], 1, -1), {}, ValueError, "rec"),
    (h2o_budgets, (-1,), {}, ValueError, "T"),
    (h2o_budgets, (4, "1"), {}, TypeError, "heavy_ratio"),
    (h2o_budgets, (4, 0.1, -0.1), {}, ValueError, "recent_ratio"),
)  # fmt: skip


@pytest.mark.parametrize(("function", "args", "options", "error", "name"), BAD)
def test_bad_input_is_named(
    function: Any, args: tuple[Any, ...], options: dict[str, Any], error: type, name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        function(*args, **options)


def test_inputs_stay_as_they_are() -> None:
    arrays = (Q, K, V, A, P, KEPT, *STATE[:4])
    copies = [x.copy() for x in arrays]
    sf_attend_backward(Q, K, V, 4, wrap=True, dout=np.ones((1, 4, 8, 3)))
    h2o_step(Q, K, V, STATE, 2, 2)
    h2o_mask_step(A, P, KEPT, 1, 1)
    for x, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
    assert sinklora.MECHANISM.slug == "sinklora"
    later = h2o_step(Q, K, V, STATE)[1]
    assert not any(np.shares_memory(x, y) for x, y in zip(later[:4], STATE[:4], strict=True))
