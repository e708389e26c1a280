"""StreamingLLM on the CPU kernels against the reference, whole streams and call by call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from attnspec.fast.cache import streaming_llm as fast
from attnspec.reference.cache import streaming_llm as reference

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
        (ValueError, "alibi_slopes: got a slope", {"alibi_slopes": torch.zeros(4)}),
        (ValueError, "alibi_slopes: got 3", {"alibi_slopes": torch.ones(3)}),
    ],
)
def test_refusals(error: type[Exception], message: str, wrong: dict[str, Any]) -> None:
    q, k, v = (torch.from_numpy(x) for x in stream())
    with pytest.raises(error, match=message):
        fast.streaming_attend(q, k, v, **wrong)
