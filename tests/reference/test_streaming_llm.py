"""StreamingLLM against outside evidence, its own properties and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.cache import streaming_llm as stream
from attnspec.reference.conventions import repeat_heads
from attnspec.reference.dense.attention import attend, attend_backward, combine
from attnspec.reference.primitives.softmax import softmax

quick = settings(max_examples=25, deadline=None, derandomize=True)
small = st.integers(0, 5)


def tokens(T: int = 12, H: int = 4, Hk: int = 2, d: int = 6, dv: int = 5, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    shapes = ((2, H, T, d), (2, Hk, T, d), (2, Hk, T, dv))
    return tuple(random.standard_normal(shape) for shape in shapes)


def rotated(x: np.ndarray, base: float = 10000.0) -> np.ndarray:
    return stream.rope(x, np.arange(x.shape[-2]), base)


def test_decoding_is_that_of_the_authors_model_patch(golden: Callable[[str], Any]) -> None:
    case = golden("streaming_llm__decode_mha")
    q, k, v, meta = case["q"], case["k"], case["v"], case["meta"]
    S, R = meta["params"]["start_size"], meta["params"]["recent_size"]
    base = meta["params"]["rope_base"]
    out, trace = stream.streaming_attend(q, k, v, S, R, rope_base=base)
    np.testing.assert_allclose(out, case["out"], atol=meta["tolerance"])
    np.testing.assert_array_equal(k[..., trace[-1], :], case["final_k"])
    np.testing.assert_array_equal(v[..., trace[-1], :], case["final_v"])
    before = [0, *(len(kept) for kept in trace[:-1])]
    np.testing.assert_array_equal(before, case["query_positions"])
    np.testing.assert_array_equal(np.add(before, 1), case["cache_len_before_evict"])


@quick
@given(S=small, R=small, chunk=st.integers(1, 6))
def test_a_stream_that_fits_is_dense(S: int, R: int, chunk: int) -> None:
    q, k, v = tokens(T=S + R)
    out, trace = stream.streaming_attend(q, k, v, S, R, chunk, rope_base=100.0)
    expected, _ = attend(rotated(q, 100.0), rotated(k, 100.0), v, causal=True)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    assert len(trace) == -(-(S + R) // chunk)


@quick
@given(T=st.integers(0, 14), S=small, R=small)
def test_decoding_without_positions_is_the_static_mask(T: int, S: int, R: int) -> None:
    q, k, v = tokens(T)
    out, _ = stream.streaming_attend(q, k, v, S, R)
    expected, _ = attend(q, k, v, mask=stream.sink_window_mask(T, S, R))
    np.testing.assert_allclose(out, expected, atol=1e-12)


@quick
@given(R=small)
def test_without_sinks_it_is_a_sliding_window_at_absolute_positions(R: int) -> None:
    q, k, v = tokens()
    out, _ = stream.streaming_attend(q, k, v, 0, R, rope_base=50.0)
    t = np.arange(12)
    window = (t[None, :] <= t[:, None]) & (t[:, None] - t[None, :] <= R)
    expected, _ = attend(rotated(q, 50.0), rotated(k, 50.0), v, mask=window)
    np.testing.assert_allclose(out, expected, atol=1e-12)


@quick
@given(S=small, R=small, alibi=st.booleans())
def test_decoding_is_attention_at_the_static_distances(S: int, R: int, alibi: bool) -> None:
    q, k, v = tokens()
    slopes = np.array([0.5, 0.25, 0.1, 2.0])
    position: dict[str, Any] = {"alibi_slopes": slopes} if alibi else {"rope_base": 10.0}
    out, _ = stream.streaming_attend(q, k, v, S, R, **position)
    distance = stream.sink_window_distances(12, S, R)
    expected = np.zeros_like(out)
    for t in range(12):
        seen = np.flatnonzero(distance[t] >= 0)
        keys = repeat_heads(k, 4)[..., seen, :]
        query = np.repeat(q[..., t : t + 1, :], len(seen), axis=-2)
        if not alibi:
            query = stream.rope(query, distance[t, seen], 10.0)
        scores = (query * keys).sum(-1)[..., None, :] / np.sqrt(6)
        if alibi:
            scores = scores - slopes[:, None, None] * distance[t, seen]
        expected[..., t : t + 1, :] = combine(softmax(scores), v[..., seen, :])
    np.testing.assert_allclose(out, expected, atol=1e-12)


@quick
@given(chunk=st.integers(1, 6), S=small, R=small)
def test_memory_is_bounded_and_rows_are_numbered(chunk: int, S: int, R: int) -> None:
    q, k, v = tokens()
    _, trace = stream.streaming_attend(q, k, v, S, R, chunk)
    for n, kept in enumerate(trace):
        np.testing.assert_array_equal(kept, stream.evict_rows(min(12, (n + 1) * chunk), S, R))
        assert len(kept) <= S + R


def test_evicted_and_future_tokens_do_not_matter() -> None:
    q, k, v = tokens()
    out, _ = stream.streaming_attend(q, k, v, 2, 3, rope_base=10.0)
    hidden = np.flatnonzero(~stream.sink_window_mask(12, 2, 3)[8])
    k[..., hidden, :], v[..., hidden, :] = 7.0, -7.0
    changed, _ = stream.streaming_attend(q, k, v, 2, 3, rope_base=10.0)
    np.testing.assert_array_equal(changed[..., 8, :], out[..., 8, :])
    assert not np.array_equal(changed[..., 6, :], out[..., 6, :])


def test_stored_nan_that_was_evicted_never_comes_out() -> None:
    q, k, v = tokens()
    out, _ = stream.streaming_attend(q, k, v, 1, 2)
    k[..., 5, :] = v[..., 5, :] = np.nan
    poisoned, _ = stream.streaming_attend(q, k, v, 1, 2)
    clean = [t for t in range(12) if not 5 <= t <= 7]
    np.testing.assert_array_equal(poisoned[..., clean, :], out[..., clean, :])


def test_a_prompt_in_one_call_is_dense_and_then_cut() -> None:
    q, k, v = tokens()
    out, trace = stream.streaming_attend(q, k, v, 2, 3, [10, 1, 1], rope_base=10.0)
    dense, _ = attend(rotated(q, 10.0), rotated(k, 10.0), v, causal=True)
    np.testing.assert_allclose(out[..., :10, :], dense[..., :10, :], atol=1e-12)
    assert [kept.tolist() for kept in trace] == [[0, 1, n - 2, n - 1, n] for n in (9, 10, 11)]
    one_by_one, _ = stream.streaming_attend(q, k, v, 2, 3, rope_base=10.0)
    assert not np.allclose(out[..., 9, :], one_by_one[..., 9, :])


def test_steps_compose_to_the_stream_and_change_nothing() -> None:
    q, k, v = tokens()
    before = [x.copy() for x in (q, k, v)]
    state, outs = stream.init_state(k, v), []
    for new in (slice(0, 5), slice(5, 6), slice(6, 12)):
        kept = state
        q1, k1, v1 = (x[..., new, :] for x in (q, k, v))
        out, state = stream.step(state, q1, k1, v1, 1, 3, rope_base=9.0)
        np.testing.assert_array_equal(kept.k, k[..., kept.pos, :])
        outs.append(out)
    expected, trace = stream.streaming_attend(q, k, v, 1, 3, [5, 1, 6], rope_base=9.0)
    np.testing.assert_array_equal(np.concatenate(outs, axis=-2), expected)
    np.testing.assert_array_equal(state.pos, trace[-1])
    assert state.seen == 12
    for x, copy in zip((q, k, v), before, strict=True):
        np.testing.assert_array_equal(x, copy)


def test_room_made_before_a_turn_keeps_the_numbering() -> None:
    q, k, v = tokens()
    _, state = stream.step(stream.init_state(k, v), q, k, v, 2, 6)
    state = stream.keep_rows(state, stream.evict_rows_for_space(len(state.pos), 3, 2, 6))
    assert state.pos.tolist() == [0, 1, 9, 10, 11]
    _, state = stream.step(state, q[..., :3, :], k[..., :3, :], v[..., :3, :], 2, 6)
    assert state.pos.tolist() == [0, 1, 9, 10, 11, 12, 13, 14]


def test_batch_rows_and_heads_are_independent_and_groups_share() -> None:
    q, k, v = tokens()
    out, _ = stream.streaming_attend(q, k, v, 1, 3, rope_base=10.0)
    swapped, _ = stream.streaming_attend(q[::-1], k[::-1], v[::-1], 1, 3, rope_base=10.0)
    np.testing.assert_array_equal(swapped, out[::-1])
    order = [3, 2, 1, 0]
    turned, _ = stream.streaming_attend(q[:, order], k[:, ::-1], v[:, ::-1], 1, 3, rope_base=10.0)
    np.testing.assert_array_equal(turned, out[:, order])
    wide, _ = stream.streaming_attend(
        q, repeat_heads(k, 4), repeat_heads(v, 4), 1, 3, rope_base=10.0
    )
    np.testing.assert_array_equal(wide, out)
    single, _ = stream.streaming_attend(q[0], k[0], v[0], 1, 3, rope_base=10.0)
    np.testing.assert_allclose(single, out[0], atol=1e-14)


@quick
@given(S=small, R=small, rotary_dims=st.sampled_from([2, 4, 6]), d=st.sampled_from([6, 7]))
def test_channels_that_do_not_turn_are_compared_as_they_are(
    S: int, R: int, rotary_dims: int, d: int
) -> None:
    """The scores are a sum over channels, so turned and plain ones may be told apart."""
    q, k, v = tokens(d=d)
    out, _ = stream.streaming_attend(q, k, v, S, R, rope_base=10.0, rotary_dims=rotary_dims)
    if rotary_dims == d:
        whole, _ = stream.streaming_attend(q, k, v, S, R, rope_base=10.0)
        np.testing.assert_array_equal(out, whole)
    distance, keys = stream.sink_window_distances(12, S, R), repeat_heads(k, 4)
    for t in range(12):
        seen = np.flatnonzero(distance[t] >= 0)
        query = np.repeat(q[..., t : t + 1, :], len(seen), axis=-2)
        turned = stream.rope(query[..., :rotary_dims], distance[t, seen], 10.0)
        products = (turned * keys[..., seen, :rotary_dims]).sum(-1)
        products += (query * keys[..., seen, :])[..., rotary_dims:].sum(-1)
        weights = softmax(products[..., None, :] / np.sqrt(d))
        expected = combine(weights, v[..., seen, :])
        np.testing.assert_allclose(out[..., t : t + 1, :], expected, atol=1e-12)


@pytest.mark.parametrize("position", [{}, {"rope_base": 10.0}, {"alibi_slopes": np.ones(4)}])
@pytest.mark.parametrize("chunk", [1, [5, 1, 6]])
def test_gradient_of_a_stream(position: dict[str, Any], chunk: Any) -> None:
    inputs, random = tokens(), np.random.default_rng(1)
    dout = random.standard_normal((2, 4, 12, 5))
    if position.get("rope_base"):
        position = {**position, "rotary_dims": 4}
    gradients = stream.streaming_attend_backward(*inputs, dout, 2, 3, chunk, **position)
    for n, gradient in enumerate(gradients):
        direction = random.standard_normal(gradient.shape)
        above, below = (
            stream.streaming_attend(
                *(x + (step * direction if n == m else 0) for m, x in enumerate(inputs)),
                2, 3, chunk, **position,
            )[0]
            for step in (1e-5, -1e-5)
        )  # fmt: skip
        slope = ((above - below) / 2e-5 * dout).sum()
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-7, atol=1e-7)


@quick
@given(S=small, R=small)
def test_without_positions_the_gradient_is_that_of_the_static_mask(S: int, R: int) -> None:
    q, k, v = tokens()
    dout = np.random.default_rng(3).standard_normal((2, 4, 12, 5))
    got = stream.streaming_attend_backward(q, k, v, dout, S, R)
    expected = attend_backward(q, k, v, dout, mask=stream.sink_window_mask(12, S, R))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)


@pytest.mark.parametrize("position", [{"rope_base": 10.0}, {"alibi_slopes": np.ones(4)}])
def test_float32_stays_float32(position: dict[str, Any]) -> None:
    q, k, v = (x.astype(np.float32) for x in tokens())
    out, _ = stream.streaming_attend(q, k, v, 1, 3, **position)
    assert out.dtype == np.float32
    for x in stream.streaming_attend_backward(q, k, v, out, 1, 3, **position):
        assert x.dtype == np.float32
    s_h = np.zeros(4, np.float32)
    for x in stream.attend_with_sink_logit(q, k, v, s_h):
        assert x.dtype == np.float32
    for x in stream.attend_with_sink_logit_backward(q, k, v, s_h, None, out):
        assert x.dtype == np.float32
    assert stream.softmax1(q).dtype == np.float32
    assert stream.rope(q, np.arange(12)).dtype == np.float32


Q, K, V = tokens(T=3)
ZERO = np.zeros(4)
EMPTY = stream.init_state(K, V)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: stream.init_state(K[0, 0], V), ValueError, "k"),
    (lambda: stream.init_state(K, V.astype(int)), TypeError, "v"),
    (lambda: stream.keep_rows(EMPTY, np.ones(1)), TypeError, "rows"),
    (lambda: stream.keep_rows(EMPTY, np.zeros(1, int)), ValueError, "rows"),
    (lambda: stream.step(EMPTY, Q, K[:, :, :2], V[:, :, :2]), ValueError, "k"),
    (lambda: stream.step(EMPTY, Q, K[:, :1], V[:, :1]), ValueError, "k"),
    (lambda: stream.step(EMPTY, Q, K, V[..., :2]), ValueError, "v"),
    (lambda: stream.streaming_attend(Q[0], K, V), ValueError, "k"),
    (lambda: stream.streaming_attend(Q, K, V, -1), ValueError, "S"),
    (lambda: stream.streaming_attend(Q, K, V, 1, 2.0), TypeError, "R"),  # type: ignore[arg-type]
    (lambda: stream.streaming_attend(Q, K, V, chunk=0), ValueError, "chunk"),
    (lambda: stream.streaming_attend(Q, K, V, chunk=[2, 2]), ValueError, "chunk"),
    (lambda: stream.streaming_attend(Q, K, V, chunk=[3, 0]), ValueError, "chunk"),
    (lambda: stream.streaming_attend(Q, K, V, rope_base=-1.0), ValueError, "rope_base"),
    (lambda: stream.streaming_attend(Q[..., :5], K[..., :5], V, rope_base=1.0), ValueError, "q"),
    (lambda: stream.streaming_attend(Q, K, V, rotary_dims=2), ValueError, "rotary_dims"),
    (
        lambda: stream.streaming_attend(Q, K, V, rope_base=1.0, rotary_dims=8),
        ValueError,
        "rotary_dims",
    ),
    (lambda: stream.streaming_attend_backward(Q, K, V, Q), ValueError, "dout"),
    (lambda: stream.streaming_attend(Q, K, V, alibi_slopes=ZERO[:3]), ValueError, "alibi_slopes"),
    (lambda: stream.streaming_attend(Q, K, V, alibi_slopes=Q[0, 0]), ValueError, "alibi_slopes"),
    (lambda: stream.streaming_attend(Q, K, V, alibi_slopes=ZERO), ValueError, "alibi_slopes"),
    (
        lambda: stream.streaming_attend(Q, K, V, rope_base=1.0, alibi_slopes=ZERO + 1),
        ValueError,
        "alibi_slopes",
    ),
]


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(name)}: got .*expected"):
        call()
