"""Benchmarks of neighborhood attention: images and video, fused and not, beside FlexAttention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import attention_cost, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import flex, reference, with_backward
from attnspec.reference.patterns.neighborhood import na_attend

HEADS, WIDTH = 16, 64


def interior_mask(arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """FlexAttention's mask function for stride 1 and no dilation, none of the axes causal."""
    shape, kernel = arguments["shape"], arguments["kernel"]

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        seen = kv_idx >= 0
        query, key = q_idx, kv_idx
        for X, k in zip(reversed(shape), reversed(kernel), strict=True):
            left, right = k // 2, (k - 1) // 2
            centre = (query % X).clamp(left, X - 1 - right)
            seen = seen & (key % X >= centre - left) & (key % X <= centre + right)
            query, key = query // X, key // X
        return seen

    return mask_mod


def unfold(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """The unfused form in plain torch: every window gathered, two batched products."""
    import torch

    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    coordinates = []
    for X, size in zip(arguments["shape"], arguments["kernel"], strict=True):
        at = torch.arange(X, device=q.device)
        start = at.clamp(size // 2, X - 1 - (size - 1) // 2) - size // 2
        coordinates.append(start[:, None] + torch.arange(size, device=q.device))
    index = coordinates[0]
    for X, more in zip(arguments["shape"][1:], coordinates[1:], strict=True):
        index = index[:, None, :, None] * X + more[None, :, None, :]
        index = index.reshape(index.shape[0] * index.shape[1], -1)
    heads = range(q.shape[1])

    def call() -> Any:
        outs = []
        for h in heads:
            s = torch.einsum("bnd,bnwd->bnw", q[:, h], k[:, h][:, index]) * q.shape[-1] ** -0.5
            outs.append(torch.einsum("bnw,bnwd->bnd", torch.softmax(s, -1), v[:, h][:, index]))
        return torch.stack(outs, 1)

    return call


def unfused_cost(arguments: Mapping[str, Any]) -> Cost:
    """One of the two products: the scores are written once."""
    q = arguments["q"]
    entries = q.shape[0] * q.shape[1] * q.shape[2] * math.prod(arguments["kernel"])
    size = q.element_size()
    return Cost(2.0 * entries * q.shape[3], size * (entries + 2.0 * q.numel()))


def name_of(shape: tuple[int, ...], kernel: tuple[int, ...]) -> str:
    return f"{'x'.join(map(str, shape))} window {'x'.join(map(str, kernel))}"


def fused(
    device: str,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    *rivals: Rival,
    heads: int = HEADS,
    backward: bool = False,
    **options: Any,
) -> Benchmark:
    tokens = math.prod(shape)
    told = "".join(f" {name}={value}" for name, value in options.items())
    return Benchmark(
        "neighborhood.na_attend",
        f"{name_of(shape, kernel)}{told} heads={heads} d={WIDTH}"
        + (" forward+backward" if backward else ""),
        device,
        qkv(1, heads, heads, tokens, tokens, WIDTH, shape=shape, kernel=kernel, **options),
        attention_cost(pairs=float(tokens * math.prod(kernel)), factor=3.5 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"shape": list(shape), "kernel": list(kernel), "heads": heads, **options},
    )


def unfused(device: str, shape: tuple[int, ...], kernel: tuple[int, ...], heads: int) -> Benchmark:
    """The first product alone: the second costs as much, and a softmax lies between."""
    tokens = math.prod(shape)
    make = qkv(1, heads, heads, tokens, tokens, WIDTH, shape=shape, kernel=kernel)
    return Benchmark(
        "neighborhood.na_qk",
        f"{name_of(shape, kernel)} heads={heads} d={WIDTH}",
        device,
        lambda device, dtype: {n: x for n, x in make(device, dtype).items() if n != "v"},
        unfused_cost,
        dtype="bfloat16" if device == "cuda" else "float32",
        settings={"shape": list(shape), "kernel": list(kernel), "heads": heads},
    )


def flex_backward() -> Rival:
    return flex(interior_mask, backward=True)


def unfold_backward(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    inputs = tuple(arguments[name] for name in ("q", "k", "v"))
    return with_backward(unfold(arguments), inputs)


FLEX = flex(interior_mask)
UNFOLD = Rival("torch, windows gathered", unfold)
IMAGE, VIDEO = (256, 256), (32, 64, 64)
BENCHMARKS = (
    fused("cuda", IMAGE, (13, 13), FLEX),
    fused("cuda", IMAGE, (13, 13), flex_backward(), backward=True),
    fused("cuda", IMAGE, (13, 13), dilation=(4, 4)),
    fused("cuda", IMAGE, (16, 16), stride=(16, 16)),
    fused("cuda", VIDEO, (5, 9, 9), FLEX),
    fused("cuda", VIDEO, (5, 9, 9), flex_backward(), backward=True),
    fused("cuda", VIDEO, (5, 9, 9), causal=(True, False, False)),
    fused("cuda", (65536,), (257,), FLEX),
    fused("cuda", (64, 64), (7, 7), FLEX, UNFOLD),
    unfused("cuda", IMAGE, (13, 13), HEADS),
    unfused("cuda", VIDEO, (5, 9, 9), 2),
    fused("cpu", (64, 64), (13, 13), UNFOLD, heads=4),
    fused("cpu", (32, 32), (7, 7), UNFOLD, reference(na_attend), heads=4),
    fused("cpu", (32, 32), (7, 7), Rival("torch, windows gathered", unfold_backward), heads=4,
          backward=True),
    unfused("cpu", (64, 64), (13, 13), 4),
)  # fmt: skip
