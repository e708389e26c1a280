"""Entropy-ABF's fast path where the suite does not look: the probe, one graph, bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnspec.fast.positions import entropy_abf as fast
from attnspec.reference.positions import entropy_abf as spec


def qkv(tokens: int = 12, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, 4, tokens, d), (2, 2, tokens, d), (2, 2, tokens, 5))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def test_the_probe_of_last_rows() -> None:
    """Weights of the last query alone, layer by layer, as an analysis of a model collects them."""
    fast_rows, rows = {}, {}
    for tokens in (9, 30, 4):
        q, k, v = qkv(tokens)
        last = q[:, :, -1:]
        layers = [fast.attend(last, k, v, layer=layer, c=6)[1][:, :, 0] for layer in (0, 2)]
        fast_rows[tokens] = torch.stack(layers, 1)
        arrays = [x.double().numpy() for x in (last, k, v)]
        truth = [spec.attend(*arrays, layer=layer, c=6)[1][:, :, 0] for layer in (0, 2)]
        rows[tokens] = np.stack(truth, 1)
    lengths, E = fast.entropy_growth(fast_rows)
    expected_lengths, expected = spec.entropy_growth(rows)
    assert lengths.tolist() == expected_lengths.tolist() == [4, 9, 30]
    np.testing.assert_allclose(E.numpy(), expected, atol=1e-5)


def test_the_weights_are_those_of_the_attention() -> None:
    q, k, v = qkv()
    at = torch.tensor([3, 0, 1, 2, 9, 9, 8, 20, 4, 5, 30, 7])
    options: Any = {"layer": 2, "c": 3, "freqs": torch.tensor([1.0, 0.5, 0.0, 0.01])}
    out, P = fast.attend(q, k, v, at, at, **options)
    torch.testing.assert_close(out, fast.extended_attention(q, k, v, at, at, **options)[0])
    torch.testing.assert_close(P.sum(-1), torch.ones(2, 4, 12))
    z = fast.logits(q, k, at, at, **options).masked_fill(at > at[:, None], -math.inf)
    torch.testing.assert_close(torch.softmax(z, -1), P)


def test_one_graph() -> None:
    q, k, v = qkv()
    at = torch.arange(12) * 3

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plain, _ = fast.extended_attention(q, k, v, layer=2, c=5)
        return plain + fast.extended_attention(q, k, v, at, at, layer=2, c=5)[0]

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), both(q, k, v))


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"causal": 1}, TypeError, "causal"),
        ({"layer": 2.0}, TypeError, "layer"),
        ({"base": 1, "freqs": torch.ones(4)}, ValueError, "base"),
        ({"freqs": torch.ones(3)}, ValueError, "freqs"),
        ({"key_mask": torch.ones(2, 11, dtype=torch.bool)}, ValueError, "key_mask"),
    ],
)
@pytest.mark.parametrize("call", [fast.attend, fast.extended_attention])
def test_bad_input_is_named(call: Any, change: dict[str, Any], error: type, name: str) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        call(*qkv(), **{"layer": 2, **change})
