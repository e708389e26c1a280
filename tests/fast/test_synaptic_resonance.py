"""Synaptic Resonance of packed sequences on the CPU: each of them alone, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.linear.synaptic_resonance import synaptic_resonance, synaptic_resonance_packed

OPTIONS: dict[str, Any] = {"eta": 0.7, "mu": 0.6, "beta": 0.4}


def make(ends: list[int]) -> list[Tensor]:
    """q, k, v and states, of four query heads and two kv heads; a trace of one head is 0."""
    torch.manual_seed(ends[-1])
    shapes: tuple[tuple[int, ...], ...] = ((4, ends[-1], 6), (2, ends[-1], 6), (2, ends[-1], 3))
    many = len(ends) - 1
    made = [torch.randn(x, dtype=torch.float64) for x in (*shapes, (many, 2, 6, 3), (many, 2, 6))]
    made[4][0, 1] = 0
    return made


def alone(ends: list[int], given: list[Tensor], **options: Any) -> list[Tensor]:
    parts = []
    for n, (first, last) in enumerate(pairwise(ends)):
        own = (x[None, :, first:last] for x in given[:3])
        y, state = synaptic_resonance(*own, *(x[n : n + 1] for x in given[3:]), **options)
        parts.append((y[0], *state))
    ys, memories, traces = zip(*parts, strict=True)
    return [torch.cat(ys, 1), torch.cat(memories), torch.cat(traces)]


def packed(ends: list[int], given: list[Tensor], **options: Any) -> list[Tensor]:
    offsets = torch.tensor(ends, dtype=torch.int32)
    y, state = synaptic_resonance_packed(*given[:3], offsets, *given[3:], **options)
    return [y, *state]


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.8, 1.0])
@pytest.mark.parametrize(
    ("ends", "window"),
    [([0, 0, 3, 4, 11], None), ([0, 6, 6], 2), ([0, 0], None), ([0, 1, 2, 2, 2], 1)],
)
def test_packed_sequences_are_alone(
    ends: list[int], window: int | None, lam: float, started: bool
) -> None:
    """With their gradients, through last states too."""
    made = make(ends)
    leaves = [x.requires_grad_() for x in (made if started else made[:3])]
    options = {**OPTIONS, "lam": lam, "window": window}
    got = packed(ends, leaves, **options)
    expected = alone(ends, leaves, **options)
    torch.testing.assert_close(got, expected)
    upstream = [torch.randn_like(x) for x in got]
    wanted = {"materialize_grads": True, "allow_unused": True}
    reached = [
        (x, y, up) for x, y, up in zip(got, expected, upstream, strict=True) if y.requires_grad
    ]
    if reached:
        ours, theirs, ups = map(list, zip(*reached, strict=True))
        torch.testing.assert_close(
            torch.autograd.grad(ours, leaves, ups, **wanted),
            torch.autograd.grad(theirs, leaves, ups, **wanted),
        )


def test_nothing_of_a_neighbour_comes_through() -> None:
    """NaN in one sequence, its state, or that of one without tokens, stays there."""
    ends, made = [0, 3, 7, 7, 12], make([0, 3, 7, 7, 12])
    clean = [x.clone().requires_grad_() for x in made]
    spoilt = [x.clone() for x in made]
    for x in spoilt[:3]:
        x[:, 3:7] = torch.nan
    for x in spoilt[3:]:
        x[1:3] = torch.nan
    for x in spoilt:
        x.requires_grad_()
    upstream = [torch.randn_like(x) for x in packed(ends, made)]
    results = []
    for leaves in (clean, spoilt):
        out = packed(ends, leaves)
        results.append([*out, *torch.autograd.grad(out, leaves, upstream)])
    tokens, sequences = torch.arange(12), torch.tensor([0, 3])
    tokens = tokens[(tokens < 3) | (tokens >= 7)]
    for x, y in zip(*results, strict=True):
        axis, own = (1, tokens) if x.shape[1] == 12 else (0, sequences)
        assert torch.equal(x.index_select(axis, own), y.index_select(axis, own))


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"offsets": torch.tensor([0, 4])}, ValueError, "offsets"),
        ({"offsets": torch.tensor([0, 4, 3, 5])}, ValueError, "offsets"),
        ({"offsets": torch.tensor([0.0, 5.0])}, TypeError, "offsets"),
        ({"offsets": torch.tensor([5])}, ValueError, "offsets"),
        ({"S0": torch.zeros(1, 2, 6, 3, dtype=torch.float64)}, ValueError, "S0"),
        ({"c0": torch.zeros(2, 2, 5, dtype=torch.float64)}, ValueError, "c0"),
        ({"q": torch.zeros(1, 4, 5, 6, dtype=torch.float64)}, ValueError, "q"),
        ({"k": None}, TypeError, "k"),
        ({"window": 0}, ValueError, "window"),
        ({"mu": 1.0}, ValueError, "mu"),
        ({"lam": 2.0}, ValueError, "lam"),
    ],
)
def test_bad_inputs(change: dict[str, Any], error: type[Exception], name: str) -> None:
    q, k, v, S0, c0 = make([0, 2, 5])
    arguments = {"q": q, "k": k, "v": v, "S0": S0, "c0": c0, "offsets": torch.tensor([0, 2, 5])}
    with pytest.raises(error, match=rf"^{name}: got "):
        synaptic_resonance_packed(**{**arguments, **change})
