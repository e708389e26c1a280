"""Benchmarks of Synaptic Resonance: what a memory adds to attention, and long contexts behind a
window. They measure this project's reconstruction; the paper reports no speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import flex, sdpa, torch_sdpa, with_backward


def resonance_cost(factor: float = 1.0) -> Any:
    """The pairs of the softmax, and two products of a token with the memory."""

    def cost(arguments: Mapping[str, Any]) -> Cost:
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        batch, heads, tokens, d = q.shape
        dv, w = v.shape[3], min(arguments.get("window") or tokens, tokens)
        pairs = tokens * w - w * (w - 1) / 2
        flops = 2.0 * batch * tokens * d * dv * (heads + k.shape[1])
        flops += 2.0 * batch * heads * pairs * (d + dv)
        moved = bytes_of(q, k, v) + batch * heads * tokens * dv * q.element_size()
        return Cost(flops * factor, moved * (1 if factor == 1 else 3))

    return cost


def gates_cost(arguments: Mapping[str, Any]) -> Cost:
    """Keys are read and gates written; a few operations a number."""
    k = arguments["k"]
    return Cost(8.0 * k.numel(), bytes_of(k) + 4.0 * k[..., 0].numel())


def memory_cost(arguments: Mapping[str, Any]) -> Cost:
    """Two products of a token with the memory; q, k, v are read and m is written."""
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    batch, heads, tokens, d = q.shape
    flops = 2.0 * batch * tokens * d * v.shape[3] * (heads + k.shape[1])
    out = batch * heads * tokens * v.shape[3] * q.element_size()
    return Cost(flops, bytes_of(q, k, v) + out)


def plain(compiled: bool, backward: bool = False) -> Rival:
    """The quadratic form in torch: relevance by a masked product, attention with its memory."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch
        from torch.nn.functional import normalize, scaled_dot_product_attention

        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        eta, lam, mu, beta = 0.1, 0.99, 0.9, 0.5
        tokens, group = q.shape[2], q.shape[1] // k.shape[1]
        gap = torch.arange(tokens, device=q.device)
        gap = gap[:, None] - gap - 1
        window = arguments.get("window") or tokens
        seen = (gap >= -1) & (gap < window - 1)

        def powers(base: float) -> Any:
            return torch.where(gap >= 0, base ** gap.clamp(min=0).float(), 0.0)

        def forward() -> Any:
            qh, kh = normalize(q.float(), dim=-1), normalize(k.float(), dim=-1)
            trace = (1 - mu) * powers(mu) @ kh
            rho = torch.relu((kh * normalize(trace, dim=-1)).sum(-1))
            rho = torch.cat([torch.ones_like(rho[:, :, :1]), rho[:, :, 1:]], 2)
            keys = (eta * rho[..., None] * kh).to(q.dtype).repeat_interleave(group, 1)
            values = v.repeat_interleave(group, 1)
            pairs = (qh.to(q.dtype) @ keys.mT) * powers(lam).to(q.dtype)
            o = scaled_dot_product_attention(
                q, k.repeat_interleave(group, 1), values, attn_mask=seen
            )
            return o + beta * (pairs @ values)

        call = torch.compile(forward, dynamic=False) if compiled else forward
        return with_backward(call, (q, k, v)) if backward else call

    return Rival("torch.compile" if compiled else "plain torch", prepare)


def _windowed(arguments: Mapping[str, Any]) -> Callable[..., Any]:
    window = arguments["window"]
    return lambda b, h, i, j: (i >= j) & (i - j < window)


def without_memory(rival: Rival) -> Rival:
    return Rival(f"{rival.name} without memory", rival.prepare)


def whole(
    device: str, heads: int, kv_heads: int, tokens: int, d: int, window: int | None,
    backward: bool, rivals: tuple[Rival, ...],
) -> Benchmark:  # fmt: skip
    parameters = {} if window is None else {"window": window}
    return Benchmark(
        "synaptic_resonance.synaptic_resonance",
        f"{tokens // 1024}k d={d} heads={heads}/{kv_heads}"
        + (f" window={window}" if window else "")
        + (" forward+backward" if backward else ""),
        device,
        qkv(1, heads, kv_heads, tokens, tokens, d, **parameters),
        resonance_cost(3.5 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": heads, "kv_heads": kv_heads},
    )


def part(name: str, device: str, tokens: int, d: int, cost: Any) -> Benchmark:
    """A step alone: relevance of kv heads, or the memory of all heads."""
    memory = name == "memory_chunked"
    heads, kv_heads = (32, 8) if device == "cuda" else (8, 2)

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        drawn = qkv(1, heads, kv_heads, tokens, tokens, d)(device, dtype)
        if not memory:
            return {"k": drawn["k"]}
        return {**drawn, "rho": torch.rand(1, kv_heads, tokens, device=device)}

    return Benchmark(
        f"synaptic_resonance.{name}",
        f"{tokens // 1024}k d={d} heads={heads}/{kv_heads}",
        device,
        make,
        cost,
        dtype="bfloat16" if device == "cuda" else "float32",
        settings={"tokens": tokens, "d": d, "heads": heads, "kv_heads": kv_heads},
    )


SDPA, FLEX = without_memory(sdpa("flash", causal=True)), without_memory(flex(_windowed))
TRAINED = without_memory(sdpa("flash", True, causal=True))
BENCHMARKS = (
    whole("cuda", 32, 8, 4096, 128, None, False, (SDPA, plain(False), plain(True))),
    whole("cuda", 32, 8, 16384, 128, None, False, (SDPA,)),
    whole("cuda", 32, 8, 16384, 128, 1024, False, (FLEX,)),
    whole("cuda", 32, 8, 131072, 128, 1024, False, (FLEX,)),
    whole("cuda", 32, 8, 4096, 128, None, True, (TRAINED, plain(True, True))),
    whole("cuda", 32, 8, 16384, 128, 1024, True, (without_memory(flex(_windowed, True)),)),
    part("relevance", "cuda", 131072, 128, gates_cost),
    part("memory_chunked", "cuda", 131072, 128, memory_cost),
    part("memory_chunked", "cuda", 1048576, 128, memory_cost),
    whole("cpu", 8, 2, 1024, 64, None, False, (
        without_memory(torch_sdpa(causal=True)), plain(False))),
    whole("cpu", 8, 2, 8192, 64, 256, False, ()),
    part("relevance", "cpu", 8192, 64, gates_cost),
)  # fmt: skip
