"""StreamingLLM on the CPU kernels and on FlexAttention against the reference, call by call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from attnspec.fast.cache import streaming_llm as fast
from attnspec.fast.cache.streaming_llm_flex import mask_mod, score_mod
from attnspec.reference.cache import streaming_llm as reference
from tests.flex_cases import close, flex, mask_grid, score_grid, uncompiled

CALLS: list[Any] = [1, 4, [17] + [1] * 13, [1, 2, 3, 5, 8, 11], 30]
T = 30


def stream(d: int = 8) -> list[np.ndarray]:
    random = np.random.default_rng(d)
    return [
        random.standard_normal((2, heads, T, width)) for heads, width in ((4, d), (2, d), (2, 5))
    ]


@pytest.mark.parametrize("chunk", CALLS, ids=str)
@pytest.mark.parametrize(("S", "R"), [(3, 6), (0, 5), (2, 0), (4, 40)])
@pytest.mark.parametrize("positions", ["none", "rope", "alibi"])
def test_stream(chunk: Any, S: int, R: int, positions: str) -> None:
    q, k, v = stream()
    slopes = np.array([0.5, 0.25, 0.125, 0.0625]) if positions == "alibi" else None
    base = 100.0 if positions == "rope" else None
    expected, kept = reference.streaming_attend(q, k, v, S, R, chunk, base, slopes)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    tilt = None if slopes is None else torch.from_numpy(slopes)
    out, trace = fast.streaming_attend(*tensors, S, R, chunk, base, tilt)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-12)
    assert [rows.tolist() for rows in trace] == [rows.tolist() for rows in kept]
    assert trace[-1].tolist() == kept[-1].tolist()
    state, first = fast.init_state(*tensors[1:]), 0
    for size in reference.call_sizes(T, chunk):
        new = [x[:, :, first : first + size] for x in tensors]
        out, state = fast.step(state, *new, S, R, rope_base=base, alibi_slopes=tilt)
        np.testing.assert_allclose(out.numpy(), expected[:, :, first : first + size], atol=1e-12)
        first += size
    assert state.pos.tolist() == kept[-1].tolist()
    assert state.seen == T


@pytest.mark.parametrize(("d", "rotary_dims"), [(8, 4), (7, 6), (8, 8)])
@pytest.mark.parametrize("chunk", [1, [17] + [1] * 13], ids=str)
def test_some_channels_turn(d: int, rotary_dims: int, chunk: Any) -> None:
    q, k, v = stream(d)
    turned = {"rope_base": 50.0, "rotary_dims": rotary_dims}
    expected, _ = reference.streaming_attend(q, k, v, 3, 6, chunk, **turned)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    out, _ = fast.streaming_attend(*tensors, 3, 6, chunk, **turned)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-12)
    state, first = fast.init_state(*tensors[1:]), 0
    for size in reference.call_sizes(T, chunk):
        new = [x[:, :, first : first + size] for x in tensors]
        out, state = fast.step(state, *new, 3, 6, **turned)
        np.testing.assert_allclose(out.numpy(), expected[:, :, first : first + size], atol=1e-12)
        first += size


def test_stream_gradient() -> None:
    """Rotated sinks and window, merged: against differences of the reference."""
    tensors = [torch.from_numpy(x).requires_grad_() for x in stream(4)]
    upstream = np.random.default_rng(0).standard_normal((2, 4, T, 5))
    out, _ = fast.streaming_attend(*tensors, 2, 5, 3, 50.0)
    gradients = torch.autograd.grad(out, tensors, torch.from_numpy(upstream))
    step = 1e-6
    for x, gradient in zip(tensors, gradients, strict=True):
        direction = np.random.default_rng(1).standard_normal(x.shape)
        ends = []
        for sign in (1, -1):
            moved = [
                t.detach().numpy() + (sign * step * direction if t is x else 0.0) for t in tensors
            ]
            ends.append(np.sum(reference.streaming_attend(*moved, 2, 5, 3, 50.0)[0] * upstream))
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose((gradient.numpy() * direction).sum(), slope, rtol=1e-5)


@pytest.mark.parametrize("masked", ["no", "keys", "pairs"])
def test_sink_logit(masked: str) -> None:
    q, k, v = stream()
    random = np.random.default_rng(3)
    s_h, dout, dlse = (random.standard_normal(n) for n in (4, (2, 4, T, 5), (2, 4, T)))
    shape = {"no": None, "keys": (2, 1, 1, T), "pairs": (2, 1, T, T)}[masked]
    mask = None if shape is None else random.random(shape) < 0.5
    given = [torch.from_numpy(x) for x in (q, k, v, s_h)]
    seen = None if mask is None else torch.from_numpy(mask)
    got = (
        *fast.attend_with_sink_logit(*given, seen),
        *fast.attend_with_sink_logit_backward(
            *given, seen, torch.from_numpy(dout), torch.from_numpy(dlse)
        ),
    )
    expected = (
        *reference.attend_with_sink_logit(q, k, v, s_h, mask),
        *reference.attend_with_sink_logit_backward(q, k, v, s_h, mask, dout, dlse),
    )
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x.numpy(), y, atol=1e-12)


def test_softmax1() -> None:
    x, dout = np.array([[-800.0, 0.5], [900.0, -np.inf]]), np.array([[1.0, 2.0], [3.0, 4.0]])
    given = torch.from_numpy(x), torch.from_numpy(dout)
    for axis in (0, 1):
        np.testing.assert_allclose(
            fast.softmax1(given[0], axis=axis).numpy(), reference.softmax1(x, axis=axis)
        )
        np.testing.assert_allclose(
            fast.softmax1_backward(*given, axis=axis).numpy(),
            reference.softmax1_backward(x, dout, axis=axis),
        )


def test_rows() -> None:
    for T, m, S, R in ((9, 0, 2, 3), (9, 4, 2, 3), (3, 1, 5, 7), (9, 3, 2, 3), (5, 0, 4, 0)):
        expected = reference.evict_rows_for_space(T, m, S, R)
        assert fast.evict_rows_for_space(T, m, S, R).tolist() == expected.tolist()
    assert fast.evict_rows_range(6, 1, 4).tolist() == [0, 4, 5]
    assert [x.tolist() for x in fast.cache_positions(3, 2)] == [[3, 4], [0, 1, 2, 3, 4]]
    assert (fast.sink_window_mask(9, 2, 3).numpy() == reference.sink_window_mask(9, 2, 3)).all()
    distances = fast.sink_window_distances(9, 2, 3).numpy()
    assert (distances == reference.sink_window_distances(9, 2, 3)).all()


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (ValueError, "S: got -1", {"S": -1}),
        (TypeError, "R: got 2.5", {"R": 2.5}),
        (ValueError, "chunk: got 31", {"chunk": [31]}),
        (ValueError, "rope_base: got 0", {"rope_base": 0.0}),
        (ValueError, "rotary_dims: got 4 without", {"rotary_dims": 4}),
        (ValueError, "rotary_dims: got 3", {"rope_base": 9.0, "rotary_dims": 3}),
        (ValueError, "rotary_dims: got 10", {"rope_base": 9.0, "rotary_dims": 10}),
        (TypeError, "rotary_dims: got 4.0", {"rope_base": 9.0, "rotary_dims": 4.0}),
        (ValueError, "alibi_slopes: got a slope", {"alibi_slopes": torch.zeros(4)}),
        (ValueError, "alibi_slopes: got 3", {"alibi_slopes": torch.ones(3)}),
    ],
)
def test_refusals(error: type[Exception], message: str, wrong: dict[str, Any]) -> None:
    q, k, v = (torch.from_numpy(x) for x in stream())
    with pytest.raises(error, match=message):
        fast.streaming_attend(q, k, v, **wrong)


def test_refusals_of_rows_and_sinks() -> None:
    q, k, v = (torch.from_numpy(x) for x in stream())
    _, state = fast.step(fast.init_state(k, v), q, k, v, 2, 3)
    assert fast.keep_rows(state, torch.tensor([0, 4])).pos.tolist() == [0, 29]
    for rows in (torch.tensor([5]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=r"rows: got .*expected rows in 0\.\.4"):
            fast.keep_rows(state, rows)
    with pytest.raises(TypeError, match="rows: got dtype"):
        fast.keep_rows(state, torch.ones(2))
    with pytest.raises(TypeError, match="s_h: got NoneType"):
        fast.attend_with_sink_logit_backward(q, k, v, None, None, q)  # type: ignore[arg-type]


def seen_by(S: int, R: int, chunk: Any) -> np.ndarray:
    """bool (T, T): equal weights on unit values show what a stream's tokens see."""
    zero, unit = np.zeros((1, T, 2)), np.eye(T)[None]
    return reference.streaming_attend(zero, zero, unit, S, R, chunk)[0][0] > 0


@pytest.mark.parametrize("chunk", CALLS, ids=str)
@pytest.mark.parametrize(("S", "R"), [(3, 6), (0, 5), (2, 0), (4, 40), (0, 0)])
def test_mask_function(chunk: Any, S: int, R: int) -> None:
    got = mask_grid(mask_mod(S, R, chunk), 1, 1, T, T)[0, 0]
    np.testing.assert_array_equal(got, seen_by(S, R, chunk))
    if chunk == 1:
        np.testing.assert_array_equal(got, reference.sink_window_mask(T, S, R))


@pytest.mark.parametrize(("S", "R"), [(3, 6), (0, 5), (2, 0), (4, 40)])
def test_score_function_by_distance(S: int, R: int) -> None:
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
    got = score_grid(score_mod(slopes, S, R), torch.ones(1, 2, T, T, dtype=torch.float64))
    seen = reference.sink_window_mask(T, S, R)
    distances = np.where(seen, reference.sink_window_distances(T, S, R), 0)
    close(np.where(seen, got[0], 1.0), 1 - slopes.numpy()[:, None, None] * distances)


def test_score_function_without_eviction() -> None:
    slopes, at = torch.tensor([0.5, 2.0], dtype=torch.float64), np.arange(9)
    got = score_grid(score_mod(slopes, 4, 9), torch.zeros(1, 2, 9, 9, dtype=torch.float64))
    close(got[0], reference.alibi_bias(slopes.numpy(), at, at))


@uncompiled
@pytest.mark.parametrize("chunk", CALLS, ids=str)
@pytest.mark.parametrize("tilted", [True, False])
def test_flex_attention_of_a_stream(chunk: Any, tilted: bool) -> None:
    arrays = stream()
    slopes = np.array([0.5, 0.25, 0.125, 0.0625]) if tilted else None
    score = None if slopes is None else score_mod(torch.from_numpy(slopes), 3, 6, chunk)
    tensors = [torch.from_numpy(x) for x in arrays]
    out, _ = flex(*tensors, mask=mask_mod(3, 6, chunk), score=score)
    close(out, reference.streaming_attend(*arrays, 3, 6, chunk, alibi_slopes=slopes)[0])


@uncompiled
def test_sink_logit_behind_flex_attention() -> None:
    """It is in the denominator only, so a factor by lse puts it in."""
    arrays, s_h = stream(), np.array([0.5, -1.0, 2.0, 0.0])
    out, lse = flex(*(torch.from_numpy(x) for x in arrays), mask=mask_mod(3, 6))
    share = torch.sigmoid(lse - torch.from_numpy(s_h)[:, None])
    mask = reference.sink_window_mask(T, 3, 6)
    close(share[..., None] * out, reference.attend_with_sink_logit(*arrays, s_h, mask)[0])
