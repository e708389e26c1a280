"""Benchmarks of Gaussian attention: a layer should cost what reading and writing its input does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import with_backward


def features(batch: int, tokens: int, width: int, axis: int) -> Any:
    """Encoder outputs (batch, tokens, width), four heads of five Gaussians as after their start."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        x, c = (
            torch.randn(*shape, generator=generator, device=device)
            for shape in ((batch, tokens, width), (4, 5))
        )
        params = torch.zeros_like(c), c.exp()
        return {"x": x.to(getattr(torch, dtype)), "axis": axis, "params": params}

    return make


def layer_cost(backward: bool) -> Any:
    """x is read, the result and the weights are written; backward, dout is read and dx written."""

    def cost(arguments: Mapping[str, Any]) -> Cost:
        x = arguments["x"]
        return Cost(x.numel() * (36.0 if backward else 12.0), bytes_of(x) * (6 if backward else 3))

    return cost


def training(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Forward and the gradients of x and the parameters."""
    inputs = arguments["x"], *arguments["params"]
    return with_backward(lambda: function(**arguments), inputs)


def plain(compiled: bool, backward: bool, collapsed: bool) -> Rival:
    """The layer in torch: a loop over heads and Gaussians, or one softmax of collapsed ones."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        x, axis, (delta, c) = (arguments[name] for name in ("x", "axis", "params"))

        def head(z: Any, delta: Any, c: Any) -> Any:
            mu = z.mean(axis, keepdim=True)
            var = z.var(axis, keepdim=True) + 1e-8
            if collapsed:
                lam = (c**-2).sum()
                centre = (delta * c**-2).sum() / lam
                return torch.softmax(-lam * (z - mu - centre) ** 2 / (2 * var), axis)
            w = torch.ones_like(z)
            for k in range(len(c)):
                y = (z - mu - delta[k]) / var.sqrt()
                w = w * torch.exp(-(y**2) / (2 * c[k] ** 2)) / (2 * math.pi * c[k] ** 2).sqrt()
            return w / w.sum(axis, keepdim=True).clamp(min=1e-8)

        def layer() -> Any:
            chunk = x.shape[axis] // len(c)
            sizes = [chunk] * (len(c) - 1) + [x.shape[axis] - chunk * (len(c) - 1)]
            w = torch.cat(
                [
                    head(z.float(), delta[m], c[m]).to(x.dtype)
                    for m, z in enumerate(x.split(sizes, axis))
                ],
                axis,
            )
            return x * w, w

        call = torch.compile(layer) if compiled else layer
        return with_backward(call, (x, delta, c)) if backward else call

    name = "torch, collapsed" if collapsed else "torch, as the authors"
    return Rival(name + (", compiled" if compiled else ""), prepare)


def layer(device: str, shape: tuple[int, int, int], axis: int, backward: bool) -> Benchmark:
    batch, tokens, width = shape
    return Benchmark(
        "gaussian_attention.multi_head",
        f"{batch}x{tokens}x{width} along {'time' if axis == 1 else 'features'}"
        + (" forward+backward" if backward else ""),
        device,
        features(batch, tokens, width, axis),
        layer_cost(backward),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=training if backward else None,
        rivals=(
            plain(False, backward, False),
            *((plain(True, backward, True),) if device == "cuda" else ()),
            plain(False, backward, True),
        ),
        settings={"batch": batch, "tokens": tokens, "width": width, "heads": 4, "gaussians": 5},
    )


BENCHMARKS = (
    layer("cuda", (32, 1500, 1024), 1, False),
    layer("cuda", (32, 1500, 1024), 1, True),
    layer("cuda", (32, 1500, 1024), 2, False),
    layer("cuda", (32, 1500, 1024), 2, True),
    layer("cuda", (1, 131072, 1024), 1, False),
    layer("cpu", (2, 500, 256), 1, False),
    layer("cpu", (2, 500, 256), 2, True),
)
