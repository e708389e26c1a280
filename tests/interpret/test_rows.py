"""The rows engine's Triton kernels in the interpreter against the CPU kernels in float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.engines.rows import (
    RowsConfig,
    gated_norm,
    join_normed,
    join_read,
    joined,
    lift,
    positive,
    silu_gate,
    turn,
    use_config,
)
from attnspec.fast.engines.select import inverse
from attnspec.fast.linear.lightning_attention_1 import (
    layer_slopes,
    lrpe_frequencies,
    tnl_block,
    tnl_gla_packed,
    tnl_gla_padded,
)


def gradients(function: Any, inputs: list[Tensor], upstream: Tensor, backend: str) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def compare(function: Any, inputs: list[Tensor], upstream: Tensor, bound: float = 2e-5) -> None:
    got = gradients(function, inputs, upstream, "triton")
    expected = gradients(function, [x.double() for x in inputs], upstream, "numba")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound * 10)


@pytest.mark.parametrize(("d", "eps"), [(1, 0.1), (20, 0.0)])
def test_norm(d: int, eps: float) -> None:
    torch.manual_seed(d)
    o, wide = torch.randn(2, 3, 3, d), torch.randn(2, 3, 12 * d)
    o[0, :, 2] = 0
    u, up = wide[..., 3 * d : 6 * d], torch.randn(2, 3 * d, 3).mT
    with use_config(RowsConfig(64, 1)):
        compare(
            lambda o, backend: gated_norm(o, eps=eps, backend=backend), [o.mT.contiguous().mT], up
        )
        compare(lambda o, u, backend: gated_norm(o, u, eps=eps, backend=backend), [o, u], up)


def test_rows_wider_than_a_tile() -> None:
    torch.manual_seed(0)
    o, up = torch.randn(1, 1, 2, 1100), torch.randn(1, 2, 1100)
    compare(lambda o, backend: gated_norm(o, eps=1e-6, backend=backend), [o], up)
    theta = torch.rand(1, 1100)
    up = torch.randn(1, 1, 2, 2200)
    compare(lambda x, t, backend: lift(x, t, offset=3, backend=backend), [o, theta], up)


@pytest.mark.parametrize(("activate", "placed"), [(False, True), (True, False)])
def test_lift(activate: bool, placed: bool) -> None:
    torch.manual_seed(1)
    x = 3 * torch.randn(2, 5, 3, 10).transpose(1, 2)[..., ::2]
    positions = torch.tensor([0, 7, 3, 3, 1]) if placed else None
    options: dict[str, Any] = {"activate": activate, "positions": positions, "offset": 2}
    with use_config(RowsConfig(32, 1)):
        up = torch.randn(2, 3, 10, 5).mT
        theta = torch.rand(3, 5)
        compare(lambda x, t, backend: lift(x, t, backend=backend, **options), [x, theta], up)
        compare(lambda x, backend: lift(x, backend=backend, **options), [x], up[..., :5])


def test_half_precision() -> None:
    x, theta = torch.randn(1, 2, 4, 8).half(), lrpe_frequencies(2, 8).float()
    got = lift(x, theta, activate=True, backend="triton")
    expected = lift(x.double(), theta, activate=True)
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(
        gated_norm(x, eps=1e-6, backend="triton").double(),
        gated_norm(x.double(), eps=1e-6),
        rtol=2e-3,
        atol=2e-3,
    )


TURNS: list[dict[str, Any]] = [
    {},
    {"neighbours": True, "decay": (40, 8.0)},
    {"rotary_dims": 6, "warmth": (7.0, 0.5), "base": 20.0},
    {"neighbours": True, "rotary_dims": 6, "warmth": (float("inf"), 0.5)},
]


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("options", TURNS)
def test_turn(options: dict[str, Any], placed: bool) -> None:
    """Both operands and their gradients, from strided inputs, a few heads a program."""
    torch.manual_seed(len(options))
    q, k = torch.randn(2, 19, 4, 10).transpose(1, 2), torch.randn(2, 2, 23, 20)[..., ::2]
    half = options.get("rotary_dims", 10) // 2
    places: dict[str, Any] = {}
    if placed:
        far = 40 if "decay" in options else 200_000
        places["pq"], places["pk"] = torch.randint(-5, far, (2, 19)), 30 * torch.rand(23)
        places["f"] = torch.rand(half)
    up, up_k = torch.randn(2, 4, 10, 19).mT, torch.randn(2, 2, 23, 10)
    for which in (0, 1):

        def one(q: Tensor, k: Tensor, backend: str, which: int = which) -> Tensor:
            return turn(q, k, **places, **options, backend=backend)[which]

        with use_config(RowsConfig(64, 1)):
            compare(one, [q, k], (up, up_k)[which], 2e-6)


def test_turn_alone_and_rounded_once() -> None:
    x, p = torch.randn(2, 3, 5, 8).bfloat16(), torch.arange(3.0, 8.0).half()
    both, _ = turn(x, x, p, p, backend="triton")
    alone, empty = turn(x, None, p, dtype=torch.float32, backend="triton")
    assert both.dtype == torch.bfloat16
    assert empty.numel() == 0
    expected, _ = turn(x.double(), None, p)
    torch.testing.assert_close(alone.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(both.double(), expected, rtol=8e-3, atol=1e-2)


def test_a_block_and_packed_sequences() -> None:
    torch.manual_seed(2)
    shapes = {"Wqkvu": (8, 32), "Wo": (8, 8), "Wv": (8, 6), "Wu": (8, 6), "Wd": (6, 8)}
    params: dict[str, Tensor] = {n: torch.randn(s) / s[0] ** 0.5 for n, s in shapes.items()}
    params["slopes"] = layer_slopes(2, 0, 3).float()
    params["theta"] = lrpe_frequencies(2, 4).float()
    wide = {name: x.double() for name, x in params.items()}
    x = torch.randn(1, 9, 8)
    for got, expected in zip(
        tnl_block(x, params, backend="triton"), tnl_block(x.double(), wide), strict=True
    ):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    offsets, starts = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 5, 2])
    for got, expected in zip(
        tnl_gla_packed(x[0], params, offsets, None, starts, backend="triton"),
        tnl_gla_packed(x[0].double(), wide, offsets, None, starts),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_gradients_of_batches(packed: bool) -> None:
    """Those of tokens, weights and the state before, through the state behind too."""
    torch.manual_seed(3)
    names = ("Wqkvu", "Wo", "slopes", "theta")
    weights = [torch.randn(8, 32) / 8**0.5, torch.randn(8, 8) / 8**0.5]
    weights += [layer_slopes(2, 0, 3).float(), lrpe_frequencies(2, 4).float()]
    x, states = torch.randn(2, 6, 8), torch.randn(2, 2, 8, 4)
    valid = torch.tensor([[False, True, True, True, True, True], [True] * 4 + [False] * 2])
    offsets, starts = torch.tensor([0, 4, 6]), torch.tensor([5, 2])
    results = []
    for backend, dtype in (("triton", torch.float32), ("numba", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, states, *weights)]
        params = dict(zip(names, leaves[2:], strict=True))
        if packed:
            outs = tnl_gla_packed(leaves[0][0], params, offsets, leaves[1], starts, backend=backend)
        else:
            outs = tnl_gla_padded(leaves[0], params, valid, leaves[1], 3, backend=backend)
        torch.manual_seed(4)
        ups = [torch.randn(out.shape).to(out.dtype) for out in outs]
        results.append([*outs, *torch.autograd.grad(outs, leaves, ups)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_positive_features(dtype: torch.dtype) -> None:
    """Of strided rows, to another dtype, with a gradient; NaN stays NaN."""
    x = (3 * torch.randn(2, 5, 3, 7)).to(dtype).transpose(1, 2).requires_grad_()
    y = positive(x, torch.float32, backend="triton")
    expected = positive(x.double(), torch.float32, backend="numba")
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)
    up = torch.randn_like(y)
    got, right = (torch.autograd.grad(z, x, up)[0] for z in (y, expected))
    torch.testing.assert_close(got, right)
    assert positive(torch.full((1, 1, 1, 1), torch.nan), dtype, backend="triton").isnan().all()
    assert positive(x[:, :, :0], dtype, backend="triton").shape == (2, 3, 0, 7)


@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 16, 100), (0, 4, 4)])
def test_gate(shape: tuple[int, ...]) -> None:
    """Whole words and ragged ones, from strided inputs."""
    torch.manual_seed(shape[0])
    g, u = 3 * torch.randn(shape).transpose(0, 1), torch.randn(shape).transpose(0, 1)
    up = torch.randn(shape[1], shape[2], shape[0]).mT
    compare(lambda g, u, backend: silu_gate(g, u, backend=backend), [g, u], up)
    half = silu_gate(g.half(), u.half(), backend="triton")
    expected = silu_gate(g.half().double(), u.half().double())
    torch.testing.assert_close(half.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("D", "eps"), [(16, 1e-6), (7, 0.0)])
def test_joined_and_normed(D: int, eps: float, dtype: torch.dtype) -> None:
    torch.manual_seed(D)
    a, b = torch.randn(2, D, 5).to(dtype).mT, torch.randn(2, 3, 2, D)[:, :, 0].to(dtype)
    gain = torch.randn(2 * D).to(dtype)[::2]
    order, row_order = torch.randperm(8), torch.randperm(3)
    numbers = order, inverse(order), row_order, inverse(row_order)
    got = join_normed(a, b, gain, eps, *numbers, backend="triton")
    expected = join_normed(a.double(), b.double(), gain.double(), eps, *numbers)
    assert torch.equal(got[0], torch.cat([a, b], 1))
    bound = 1e-6 if dtype == torch.float32 else 1e-3
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=bound, atol=bound)


def test_a_norm_that_no_register_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    a, order = torch.randn(1, 2, 8), torch.tensor([1, 0])
    none = a[:, :0], order[:0]
    given = (a, none[0], torch.ones(8), 1e-6, order, order, none[1], none[1])
    expected = join_normed(*given, backend="triton")
    monkeypatch.setattr(joined, "WIDEST", 4)
    for x, y in zip(join_normed(*given, backend="triton"), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("d", [8, 5])
@pytest.mark.parametrize(("images", "text"), [(0, 3), (18, 2), (4, 0)])
def test_joined_reading(images: int, text: int, d: int) -> None:
    """Of grouped heads; with the same gradients as if there were no kernel."""
    torch.manual_seed(d)
    v = torch.randn(2, images + text, 2, d).transpose(1, 2)
    out = torch.randn(2, 6, d, text).mT
    place, row_place = torch.randperm(images + text), torch.randperm(text)
    read = join_read(v, out, place, row_place, backend="triton")
    own = v[:, :, place[:images]].repeat_interleave(3, 1)
    expected = torch.cat([own, out[:, :, row_place]], 2).transpose(1, 2).flatten(2)
    assert torch.equal(read, expected)
    assert torch.equal(join_read(v, out, place, row_place), expected)
