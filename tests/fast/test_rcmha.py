"""RCMHA's decoding: the room of its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.scores import rcmha as fast

HEADS, DK, TAPS = 3, 4, 3
MODEL = ("w", "c", "R", "b", "u")


def model(tokens: int) -> dict[str, Tensor]:
    """q, k and v of two texts, and the filters and tables for them."""
    random = torch.Generator().manual_seed(tokens)
    shapes = {
        "q": (2, HEADS, tokens, DK), "k": (2, HEADS, tokens, DK), "v": (2, HEADS, tokens, DK),
        "w": (3, DK, TAPS), "c": (3, DK),
        "R": (2 * tokens, HEADS, DK), "b": (2 * tokens, HEADS), "u": (HEADS, DK),
    }  # fmt: skip
    return {
        name: torch.randn(shape, generator=random, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def all_at_once(given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, and the filtered keys and values."""
    q, k, v = (
        fast.depthwise_causal_conv(given[name], given["w"][n], given["c"][n])[0]
        for n, name in enumerate("qkv")
    )
    return fast.relative_attention(q, k, v, given["R"], given["b"], given["u"]), k, v


def feed(given: dict[str, Tensor], state: Any, first: int, last: int) -> tuple[Tensor, fast.State]:
    tokens = (given[name][:, :, first:last] for name in "qkv")
    return fast.step(*tokens, *(given[name] for name in MODEL), state)


@pytest.mark.parametrize("sizes", [[1] * 90, [40, 1, 1, 60, 5, 1, 20, 22]])
def test_a_long_stream_is_one_call(sizes: list[int]) -> None:
    """Long enough to use up the room, which is shared by the steps between two copies."""
    given = model(sum(sizes))
    expected, keys, values = all_at_once(given)
    state, first, outs, rooms = fast.init_state(given["q"], TAPS), 0, [], set()
    for size in sizes:
        before, kept = state, [x.clone() for x in state[:5]]
        out, state = feed(given, state, first, first + size)
        for x, y in zip(before[:5], kept, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
        first += size
        outs.append(out)
        rooms.add(state.k.data_ptr())
    torch.testing.assert_close(torch.cat(outs, dim=2), expected)
    torch.testing.assert_close(state.k, keys)
    torch.testing.assert_close(state.v, values)
    assert len(rooms) == 2


def test_two_streams_may_go_on_from_one_state() -> None:
    given = model(40)
    _, state = feed(given, fast.init_state(given["q"], TAPS), 0, 36)
    other = {**given, "k": torch.cat([given["k"][:, :, :36], -given["k"][:, :, 36:]], dim=2)}
    texts = (given, other)
    outs = [feed(text, state, 36, 40)[0] for text in texts]
    for out, text in zip(outs, texts, strict=True):
        torch.testing.assert_close(out, all_at_once(text)[0][:, :, 36:])


def test_a_state_without_room_is_taken() -> None:
    """Only the fields of the reference's state need be there."""
    given = model(20)
    _, state = feed(given, fast.init_state(given["q"], TAPS), 0, 11)
    bare = fast.State(*(x.clone() for x in state[:5]))
    expected, got = (feed(given, start, 11, 20) for start in (state, bare))
    torch.testing.assert_close(got[0], expected[0])
    assert got[1].key_bias is not None
    torch.testing.assert_close(got[1].key_bias, expected[1].key_bias)


def test_learned_weights_leave_no_gradient() -> None:
    given = {name: x.requires_grad_() for name, x in model(9).items()}
    state = fast.init_state(given["q"], TAPS)
    for first in range(0, 9, 3):
        out, state = feed(given, state, first, first + 3)
        assert not out.requires_grad
        assert not state.k.requires_grad
