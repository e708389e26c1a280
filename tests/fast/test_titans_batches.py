"""Titans over packed sequences on the memory engine: against the reference in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from attnspec.fast.engines.memory.op import memory_op
from attnspec.fast.engines.memory.packed import NOBODY, Packed, most_pieces
from attnspec.fast.engines.memory.plan import Pieces
from attnspec.fast.linear import titans as fast
from attnspec.reference.linear import titans as spec


def draw(lengths: list[int], depth: int, leading: tuple[int, ...] = (), group: int = 2) -> Any:
    total, sequences = sum(lengths), len(lengths)
    torch.manual_seed(total + depth)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    widths = [3, *[5] * (depth - 1), 4]
    leading = leading or (sequences, 2)
    W = tuple(0.5 * torch.randn(*leading, a, b).double() for a, b in itertools.pairwise(widths))
    S = tuple(0.1 * torch.randn_like(w) for w in W)
    k, v, q = (torch.randn(heads, total, n).double()
               for heads, n in ((2, 3), (2, 4), (2 * group, 3)))  # fmt: skip
    rates = tuple(top * torch.rand(2, total).double() for top in (0.1, 1.0, 0.5))
    return W, S, 0.5 * k, v, q, rates, offsets


def leaves(x: Any) -> list[Any]:
    return [leaf for item in x for leaf in leaves(item)] if isinstance(x, tuple) else [x]


def plain(x: Any) -> Any:
    return tuple(plain(item) for item in x) if isinstance(x, tuple) else x.detach().numpy()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize(
    ("lengths", "b"),
    [([3, 0, 5], 2), ([0, 70, 1, 0], 100), ([150, 90], 80), ([1], 1), ([20, 20], 5)],
)
def test_forward_and_gradients(
    depth: int, leading: tuple[int, ...], lengths: list[int], b: int
) -> None:
    *inputs, offsets = draw(lengths, depth, leading)
    tensors = [x.requires_grad_() for x in leaves(tuple(inputs))]
    outputs = fast.titans_packed_mlp(*inputs, offsets, b)
    given = plain((*inputs, offsets))
    expected = spec.titans_packed_mlp(*given, b)
    up = [torch.randn_like(x) for x in leaves(outputs)]
    got = torch.autograd.grad(leaves(outputs), tensors, up)
    dy, *states = (x.numpy() for x in up)
    gradients = spec.titans_packed_mlp_backward(
        *given, b, dy, tuple(states[:depth]), tuple(states[depth:])
    )
    for x, y in zip([*leaves(outputs), *got], [*leaves(expected), *leaves(gradients)], strict=True):
        np.testing.assert_allclose(x.detach().numpy(), y, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("lengths", [[0], [0, 0]])
def test_no_tokens(lengths: list[int]) -> None:
    W, S, *rest = draw(lengths, 2)
    inputs = [x.requires_grad_() for x in (*W, *S)]
    y, last, momentum = fast.titans_packed_mlp(W, S, *rest, 4)
    assert y.shape == (4, 0, 4)
    assert all(torch.equal(x, z) for x, z in zip((*last, *momentum), (*W, *S), strict=True))
    up = [torch.randn_like(x) for x in inputs]
    got = torch.autograd.grad((*last, *momentum), inputs, up)
    assert all(torch.equal(x, z) for x, z in zip(got, up, strict=True))


def test_strides_and_32_bit_offsets() -> None:
    W, S, k, v, q, rates, offsets = draw([7, 4, 9], 1)
    expected = fast.titans_packed_linear(W[0], S[0], k, v, q, rates, offsets, 3)
    strided = [x.mT.contiguous().mT for x in (k, v, q)]
    got = fast.titans_packed_linear(W[0], S[0], *strided, rates, offsets.int(), 3)
    for x, z in zip(got, expected, strict=True):
        torch.testing.assert_close(x, z)


@pytest.mark.parametrize(("b", "size"), [(1, 1), (5, 4), (16, 16), (20, 16), (100, 64), (300, 16)])
def test_pieces(b: int, size: int) -> None:
    """Those of the table are those of each sequence, in a row, and no more than is thought."""
    rng = np.random.default_rng(b)
    for sequences in range(1, 6):
        lengths = rng.integers(0, 90, sequences) * (rng.random(sequences) < 0.8)
        ends = [0, *np.cumsum(lengths).tolist()]
        packed = Packed.of(torch.tensor(ends), ends[-1], b, size)
        expected = []
        for n, length in enumerate(lengths):
            alone = Pieces(int(length), b, size)
            starts, counts = (x.tolist() for x in alone.places(torch.device("cpu")))
            rows = [
                [ends[n] + start, tokens, i % alone.per, NOBODY, NOBODY]
                for i, (start, tokens) in enumerate(zip(starts, counts, strict=True))
            ]
            if rows:
                rows[0][3], rows[-1][4] = n, n
            expected += rows
        excess = packed.count + 1 - len(expected)
        assert packed.count == most_pieces(ends[-1], sequences, b, size)
        assert packed.table.tolist() == [*expected, *[[ends[-1], 0, 0, NOBODY, NOBODY]] * excess]
        if ends[-1]:
            x, pieces = torch.rand(2, ends[-1], 3), Pieces(ends[-1], b, size, packed)
            assert torch.equal(pieces.join(pieces.cut(x, 1), 1), x)


def test_op_is_well_registered() -> None:
    W, S, k, v, q, rates, offsets = draw([4, 0, 6], 1)
    packed = [x[0].flatten(2).float().requires_grad_() for x in (W, S)]
    tokens = [x[None].float() for x in (k, v, q, *rates)]
    torch.library.opcheck(
        memory_op.op, (*packed, *tokens, None, offsets, [3, 4], 4, 2.0, False, True, "numba"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


def test_compiles_as_one_graph() -> None:
    inputs = draw([4, 0, 6], 2)
    compiled = torch.compile(
        lambda *x: fast.titans_packed_mlp(*x, 4)[0], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*inputs), fast.titans_packed_mlp(*inputs, 4)[0])


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"offsets": torch.tensor([0, 5, 7])}, ValueError, "offsets"),
        ({"offsets": torch.tensor([0, 9, 8])}, ValueError, "offsets"),
        ({"offsets": torch.tensor([0])}, ValueError, "offsets"),
        ({"offsets": [0, 8]}, TypeError, "offsets"),
        ({"W0": ()}, ValueError, "W0"),
        ({"W0": (torch.zeros(5, 2, 3, 4),)}, ValueError, "W0"),
        ({"S0": (torch.zeros(3, 5),)}, ValueError, "S0"),
        ({"rates": (0.1, 2.0, 0.0)}, ValueError, "rates.eta"),
        ({"k": torch.zeros(1, 2, 8, 3)}, ValueError, "k"),
        ({"b": 0}, ValueError, "b"),
    ],
)
def test_bad_inputs(change: dict[str, Any], error: type[Exception], name: str) -> None:
    names = ("W0", "S0", "k", "v", "q", "rates", "offsets")
    arguments: dict[str, Any] = dict(zip(names, draw([3, 0, 5], 1), strict=True))
    with pytest.raises(error, match=rf"^{name}: got "):
        fast.titans_packed_mlp(**{**arguments, "b": 2, **change})
