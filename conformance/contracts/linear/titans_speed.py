"""Benchmarks of Titans: chunks against the rule token by token, and against compiled torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of
from attnspec.conformance.bench.model import Benchmark, Cost, Rival


def _layers(arguments: Mapping[str, Any], name: str = "W0") -> tuple[Any, ...]:
    given = arguments[name]
    return given if isinstance(given, tuple) else (given,)


def cost(factor: float = 1.0) -> Any:
    """Inputs and outputs once; a token's forward pass twice, its gradient and its store."""

    def of(arguments: Mapping[str, Any]) -> Cost:
        k, v, q = (arguments[name] for name in ("k", "v", "q"))
        layers = _layers(arguments)
        numbers = sum(w.shape[-2] * w.shape[-1] for w in layers)
        back = sum(w.shape[-2] * w.shape[-1] for w in layers[1:])
        tokens = k.shape[0] * k.shape[1] * k.shape[2]
        products = tokens * (numbers * 3 + back) + q.shape[0] * q.shape[1] * q.shape[2] * numbers
        moved = bytes_of(k, v, q, *arguments["rates"], *layers, *layers) + bytes_of(q)
        return Cost(2.0 * products * factor, moved * factor)

    return of


def _chunk(torch: Any, W: Any, S: Any, k: Any, v: Any, q: Any, rates: Any) -> Any:
    """One chunk of the rule in plain torch, with coefficients in closed form by cumulative scans.

    The forms divide by nothing, but loop over the chunk's tokens.
    """
    theta, eta, alpha = rates
    C = k.shape[2]
    column = torch.arange(C, device=k.device)
    n = G = torch.zeros_like(theta)
    beta = m = torch.ones_like(theta[..., 0])
    f = torch.zeros_like(beta)
    rows: list[Any] = []
    for t in range(C):
        kept, carried = 1 - alpha[..., t], eta[..., t]
        m = carried * m
        n = torch.where(column == t, theta, carried[..., None] * n)
        beta, f, G = kept * beta, kept * f + m, kept[..., None] * G + n
        rows.append((beta, f, G))
    Beta, F = (torch.stack([row[i] for row in rows], -1)[..., None] for i in range(2))
    square = torch.stack([row[2] for row in rows], -2)
    H, z = [k], [k @ W[0].to(k.dtype)]
    gelu = torch.nn.functional.gelu
    for w in W[1:]:
        H.append(gelu(z[-1]))
        z.append(H[-1] @ w.to(k.dtype))
    Delta = [2.0 * (z[-1] - v)]
    for layer in reversed(range(len(W) - 1)):
        x = z[layer].float()
        slope = 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * 0.3989423
        Delta.insert(0, (Delta[0] @ W[layer + 1].to(k.dtype).mT) * slope.to(k.dtype))
    A = q
    for i, (w, s) in enumerate(zip(W, S, strict=True)):
        A = gelu(A) if i else A
        scores = ((A @ H[i].mT).float() * square).to(k.dtype)
        A = (Beta * (A @ w.to(k.dtype)) + F * (A @ s.to(k.dtype))).to(k.dtype) - scores @ Delta[i]
    last_G, last_n = square[..., -1, :, None], n[..., None]
    new_W, new_S = [], []
    for w, s, h, e in zip(W, S, H, Delta, strict=True):
        stored, moved = (h.mT @ (x * e).to(k.dtype) for x in (last_G, last_n))
        new_W.append(beta[..., None, None] * w + f[..., None, None] * s - stored)
        new_S.append(m[..., None, None] * s - moved)
    return A, new_W, new_S


def _parts(arguments: Mapping[str, Any]) -> Any:
    rates = tuple(x.float() for x in arguments["rates"])
    return _layers(arguments), *(arguments[name] for name in ("k", "v", "q")), rates


def compiled_chunks() -> Rival:
    """The chunk form in torch, each chunk compiled and called one after the other."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        W0, k, v, q, rates = _parts(arguments)
        b = arguments["b"]
        step = torch.compile(lambda *x: _chunk(torch, *x), dynamic=False)

        def run() -> Any:
            W: Any = [w.float() for w in W0]
            S: Any = [torch.zeros_like(w) for w in W]
            outputs = []
            for first in range(0, k.shape[2], b):
                rows = slice(first, first + b)
                three = tuple(x[:, :, rows] for x in rates)
                y, W, S = step(W, S, k[:, :, rows], v[:, :, rows], q[:, :, rows], three)
                outputs.append(y)
            return torch.cat(outputs, 2)

        return run

    return Rival("torch-compiled-chunks", prepare)


def sequential() -> Rival:
    """The rule of the linear memory token by token in torch."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        (first,), k, v, q, rates = _parts(arguments)
        b = arguments["b"]
        theta, eta, alpha = (x[..., None, None] for x in rates)

        def run() -> Any:
            W = base = first.float()
            S, outputs = torch.zeros_like(W), []
            for t in range(k.shape[2]):
                now = slice(t, t + 1)
                base = W if t % b == 0 else base
                key, value = k[:, :, now].float(), v[:, :, now].float()
                S = eta[:, :, t] * S - theta[:, :, t] * (key.mT @ (2.0 * (key @ base - value)))
                W = (1 - alpha[:, :, t]) * W + S
                outputs.append(q[:, :, now].float() @ W)
            return torch.cat(outputs, 2).to(q.dtype)

        return run

    return Rival("torch-token-by-token", prepare)


def make(heads: int, tokens: int, widths: tuple[int, ...], b: int) -> Any:
    """A batch of one, with rates as a model has them."""

    def inputs(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Any:
            return torch.randn(shape, generator=generator, device=device)

        layers = tuple(draw(1, heads, a, c) / a**0.5 for a, c in itertools.pairwise(widths))
        width = widths[0]
        k, q = (torch.nn.functional.normalize(draw(1, heads, tokens, width), dim=-1)
                for _ in range(2))  # fmt: skip
        rates = [torch.sigmoid(draw(1, heads, tokens) + shift) for shift in (-2.0, 1.0, -4.0)]
        kind = getattr(torch, dtype)
        return {
            "W0": layers[0] if len(layers) == 1 else layers,
            "S0": None,
            "k": k.to(kind),
            "v": draw(1, heads, tokens, widths[-1]).to(kind),
            "q": q.to(kind),
            "rates": tuple(x.to(kind) for x in rates),
            "b": b,
        }

    return inputs


def _trained(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """The timed call: the operation and all its gradients."""
    import torch

    leaves = [arguments[name].requires_grad_() for name in ("k", "v", "q")]
    leaves += [x.requires_grad_() for x in (*arguments["rates"], *_layers(arguments))]
    upstream = torch.randn_like(function(**arguments)[0])
    return lambda: torch.autograd.grad(function(**arguments)[0], leaves, upstream)


def titans(
    device: str, heads: int, tokens: int, widths: tuple[int, ...], *, b: int = 64,
    trained: bool = False, narrow: bool = False, rivals: tuple[Rival, ...] = (),
) -> Benchmark:  # fmt: skip
    """A deep memory's numbers are float32 unless they are `narrow`; the linear one's are 16-bit."""
    deep = len(widths) > 2
    shape = "x".join(map(str, widths))
    long = f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)
    return Benchmark(
        f"titans.titans_chunk_{'mlp' if deep else 'linear'}",
        f"{shape} {long} tokens" + " bf16" * narrow + " forward+backward" * trained,
        device,
        make(heads, tokens, widths, b),
        cost(3.0 if trained else 1.0),
        dtype="bfloat16" if device == "cuda" and (narrow or not deep) else "float32",
        call=_trained if trained else None,
        rivals=rivals,
        settings={"tokens": tokens, "heads": heads, "widths": shape, "b": b},
    )


BENCHMARKS = (
    titans("cuda", 16, 8192, (128, 128), rivals=(sequential(), compiled_chunks())),
    titans("cuda", 16, 8192, (64, 64), rivals=(sequential(), compiled_chunks())),
    titans("cuda", 16, 131072, (128, 128)),
    titans("cuda", 16, 1048576, (128, 128)),
    titans("cuda", 16, 8192, (128, 128), trained=True),
    titans("cuda", 16, 8192, (64, 256, 64), rivals=(compiled_chunks(),)),
    titans("cuda", 16, 8192, (64, 256, 64), trained=True),
    titans("cuda", 16, 8192, (64, 256, 64), narrow=True, rivals=(compiled_chunks(),)),
    titans("cuda", 16, 8192, (64, 256, 64), narrow=True, trained=True),
    titans("cuda", 16, 131072, (64, 256, 64), narrow=True),
    titans("cpu", 4, 1024, (64, 64), rivals=(sequential(),)),
    titans("cpu", 4, 1024, (64, 128, 64)),
)
