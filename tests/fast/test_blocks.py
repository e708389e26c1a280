"""Layers for PyTorch models: steps say what forward says, gradients are the formulas'."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast.blocks import Block, joined, numbers
from attnspec.fast.dense.attention_module import AttentionBlock
from attnspec.fast.linear.based_module import Based, ConvolutionBlock, TaylorBlock, WindowBlock
from attnspec.fast.linear.flowformer_module import FlowBlock
from attnspec.fast.linear.lightnet_module import LightNetBlock
from attnspec.fast.linear.lightning_attention_2_module import LightningBlock
from attnspec.fast.linear.titans_module import TitansBlock

WIDTH, TOKENS = 8, 15
KINDS = ("convolution", "linear", "convolution", "window")
small_titans = partial(
    TitansBlock, WIDTH, memory_width=4, hidden=5, prefix=2, window=4, segment=6, chunk=4, filters=3
)
BLOCKS: dict[str, Callable[[], Any]] = {
    "attention": lambda: AttentionBlock(WIDTH, heads=2),
    "taylor": lambda: TaylorBlock(WIDTH, heads=2, feature_dim=3),
    "window": lambda: WindowBlock(WIDTH, heads=2, left=3),
    "convolution": lambda: ConvolutionBlock(WIDTH, inner=6, taps=3),
    "based": lambda: Based(WIDTH, KINDS, heads=2, feature_dim=3, left=3),
    "lightning": lambda: LightningBlock(WIDTH, heads=2, layer=0, n_layers=2),
    "lightning without decay": lambda: LightningBlock(WIDTH, heads=2, decay=False),
    "lightnet": lambda: LightNetBlock(WIDTH, heads=2, rank=3),
    "flow": lambda: FlowBlock(WIDTH, heads=2),
    "mac": lambda: small_titans(layout="mac", depth=1),
    "deep mac": lambda: small_titans(layout="mac", depth=2),
    "mag": lambda: small_titans(layout="mag", depth=1),
    "deep mag": lambda: small_titans(layout="mag", depth=2),
    "mal": lambda: small_titans(layout="mal", depth=1),
    "long prefix": lambda: TitansBlock(WIDTH, layout="mal", depth=1, prefix=6, window=4, chunk=4),
    "memory": lambda: small_titans(layout="memory", depth=1),
    "no prefix": lambda: TitansBlock(WIDTH, layout="memory", memory_width=4, prefix=0, chunk=4),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return BLOCKS[name]().to(dtype), torch.randn(2, TOKENS, WIDTH, dtype=dtype)


@pytest.mark.parametrize("name", BLOCKS)
def test_steps_say_what_forward_says(name: str) -> None:
    block, x = made(name, torch.float32)
    state, rows, one = block.init_state(2), [], block.init_state(1)
    for first, last in ((0, 6), (6, 7), (7, 8), (8, TOKENS)):
        y, state = block.step(x[:, first:last], state)
        rows.append(y)
        _, one = block.step(x[:1, first:last], one)
        assert numbers(one) == block.state_size(last)
    torch.testing.assert_close(torch.cat(rows, 1), block(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_few_steps_of_training_help(name: str) -> None:
    block, x = made(name, torch.float32)
    optimiser = torch.optim.Adam(block.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = (block(x)[:, :-1] - x[:, 1:]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None for p in block.parameters())
    assert losses[-1] < losses[0]


def tril(x: Tensor) -> Tensor:
    return torch.ones_like(x).tril() * x


def dense_formula(block: Any, x: Tensor, keep: Tensor) -> Tensor:
    q, k, v = block.heads(x)
    s = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~keep, -torch.inf)
    return block.out(joined(s.softmax(-1) @ v))


def attention_formula(block: AttentionBlock, x: Tensor) -> Tensor:
    return dense_formula(block, x, torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())


def window_formula(block: WindowBlock, x: Tensor) -> Tensor:
    keep = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    return dense_formula(block, x, keep.tril() & keep.triu(-block.left))


def taylor_formula(block: TaylorBlock, x: Tensor) -> Tensor:
    q, k, v = block.heads(x)
    s = q @ k.mT / q.shape[3] ** 0.5
    w = tril(1 + s + s * s / 2)
    return block.out(joined(w / w.sum(-1, keepdim=True) @ v))


def convolution_formula(block: ConvolutionBlock, x: Tensor) -> Tensor:
    mixed, gate = (x @ block.into).chunk(2, -1)
    channels = block.filters.shape[0]
    mixed = torch.nn.functional.conv1d(
        torch.nn.functional.pad(mixed.mT, (block.taps - 1, 0)), block.filters[:, None],
        groups=channels,
    ).mT  # fmt: skip
    return (torch.nn.functional.silu(mixed) * gate) @ block.out


def lightning_formula(block: LightningBlock, x: Tensor) -> Tensor:
    q, k, v = block.heads(x)
    q, k = torch.nn.functional.silu(q), torch.nn.functional.silu(k)
    ages = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    decay = tril(torch.exp(-block.slopes[:, None, None] * ages.clamp(min=0)))
    o = block.inner_norm(joined((q @ k.mT * decay) @ v))
    return block.out(o * torch.sigmoid(block.gate(x)))


def lightnet_formula(block: LightNetBlock, x: Tensor) -> Tensor:
    q, k, v = block.heads(x)
    weights = torch.exp(k[:, :, None] - k.logcumsumexp(2)[:, :, :, None])
    weights = weights * torch.ones(TOKENS, TOKENS).tril()[:, :, None]
    o = torch.einsum("bhtd,bhtsd,bhse->bhte", torch.nn.functional.silu(q), weights, v)
    return block.out(block.inner_norm(joined(o)) * torch.sigmoid(block.gate(x)))


def flow_formula(block: FlowBlock, x: Tensor) -> Tensor:
    q, k, v = block.heads(x)
    a, b, eps = q.sigmoid(), k.sigmoid(), 1e-6
    N = torch.arange(1.0, TOKENS + 1, dtype=x.dtype)[:, None]

    def flow(to: Tensor, of: Tensor) -> Tensor:
        return ((to + eps) * (of.cumsum(2) + eps)).sum(-1, keepdim=True)

    I, O = flow(a, b), flow(b, a)
    Ih, Oh = flow(a, b * N / O) / N, flow(b, a * N / I) / N
    e = Oh.clamp(-1, 1).exp()
    values = N * e / e.cumsum(2) * v
    return block.out(joined(Ih.sigmoid() * ((tril(a @ b.mT) @ values) / I)))


FORMULAS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "attention": attention_formula,
    "window": window_formula,
    "taylor": taylor_formula,
    "convolution": convolution_formula,
    "lightning": lightning_formula,
    "lightnet": lightnet_formula,
    "flow": flow_formula,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_outputs_and_gradients_are_the_formulas(name: str) -> None:
    block, x = made(name)
    x.requires_grad_()
    upstream = torch.randn_like(x)
    leaves = [x, *block.parameters()]
    y = block(x)
    expected = x + FORMULAS[name](block, block.norm(x))
    torch.testing.assert_close(y, expected, atol=1e-9, rtol=1e-9)
    got = torch.autograd.grad(y, leaves, upstream)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_a_memory_is_gradient_descent_with_momentum() -> None:
    """MAG of a linear memory whose gradient point follows every token, token by token in torch."""
    torch.manual_seed(0)
    block = TitansBlock(WIDTH, memory_width=4, depth=1, chunk=1, prefix=0, window=TOKENS).double()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    rows = block.norm(x)
    q, k, v = (rows[0] @ m for m in block.mem)
    q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    theta, eta, alpha = (rate[0] for rate in block.step_sizes(rows))
    W = block.first[0]
    S, read = torch.zeros_like(W), []
    for t in range(TOKENS):
        surprise = 2 * k[t, :, None] * (k[t] @ W - v[t])
        S = eta[t] * S - theta[t] * surprise
        W = (1 - alpha[t]) * W + S
        read.append(q[t] @ W)
    Q, K, V = (rows[0] @ m for m in block.attn)
    s = (Q @ K.mT / WIDTH**0.5).masked_fill(torch.ones(TOKENS, TOKENS).triu(1) > 0, -torch.inf)

    def rms(y: Tensor) -> Tensor:
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)

    gated = rms(s.softmax(-1) @ V) * rms(torch.stack(read)).sigmoid()
    expected = x[0] + block.out(gated)
    y = block(x)[0]
    torch.testing.assert_close(y, expected, atol=1e-9, rtol=1e-9)
    upstream, leaves = torch.randn_like(y), list(block.parameters())
    got = torch.autograd.grad(y, leaves, upstream, allow_unused=True)
    wanted = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    for one, other, leaf in zip(got, wanted, leaves, strict=True):
        if other is None:
            assert any(leaf is gain for gain in block.gains)
        else:
            torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: AttentionBlock(0), ValueError, "width"),
        (lambda: AttentionBlock(8, heads=3), ValueError, "heads"),
        (lambda: TaylorBlock(8, feature_dim=0), ValueError, "feature_dim"),
        (lambda: WindowBlock(8, left=-1), ValueError, "left"),
        (lambda: ConvolutionBlock(8, taps=0), ValueError, "taps"),
        (lambda: ConvolutionBlock(8, inner=True), TypeError, "inner"),
        (lambda: Based(8, ("dense",)), ValueError, "kinds"),
        (lambda: LightningBlock(8, layer=2, n_layers=2), ValueError, "layer"),
        (lambda: LightningBlock(8, decay=1), TypeError, "decay"),  # type: ignore[arg-type]
        (lambda: LightNetBlock(8, rank=0), ValueError, "rank"),
        (lambda: TitansBlock(8, layout="max"), ValueError, "layout"),
        (
            lambda: TitansBlock(8, layout="mac", tokenwise=False).init_state(1),
            ValueError,
            "tokenwise",
        ),
        (lambda: FlowBlock(8)(torch.zeros(2, 8)), ValueError, "x"),
        (lambda: FlowBlock(8)(torch.zeros(1, 2, 7)), ValueError, "x"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name}: got "):
        make()


def test_a_block_needs_a_mixer() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Block(8)  # type: ignore[abstract]
