"""Benchmarks of Lightning Attention-2: time must grow with the tokens and no faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import flash_linear, sdpa, torch_sdpa, with_backward


def linear_cost(factor: float = 1.0) -> Any:
    """Read q, k, v and write o once; two products with the state a token."""

    def cost(arguments: Mapping[str, Any]) -> Cost:
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        batch, heads, tokens, d = q.shape
        e = v.shape[3]
        moved = bytes_of(q, k, v) + batch * heads * tokens * e * q.element_size()
        return Cost(4.0 * batch * heads * tokens * d * e * factor, moved * factor)

    return cost


def fla(backward: bool = False) -> Rival:
    """flash-linear-attention's simple_gla with constant per-head decay, if it is installed."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        chunk_simple_gla = flash_linear("simple_gla", "chunk_simple_gla")
        q, k, v = (arguments[name].transpose(1, 2).contiguous() for name in ("q", "k", "v"))
        gates = -arguments["s"].to(torch.float32)

        def forward() -> Any:
            return chunk_simple_gla(q, k, v, g_gamma=gates, scale=1.0)[0]

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival("flash-linear-attention", prepare)


def lightning(
    device: str, heads: int, d: int, tokens: int, backward: bool, rivals: Any
) -> Benchmark:
    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=device))
        return {**qkv(1, heads, heads, tokens, tokens, d)(device, dtype), "s": slopes}

    return Benchmark(
        "lightning_attention_2.attend",
        f"{tokens // 1024}k tokens" + (" forward+backward" if backward else ""),
        device,
        make,
        linear_cost(3.0 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": heads},
    )


BENCHMARKS = (
    lightning("cuda", 32, 128, 2048, False, (fla(), sdpa("flash", causal=True))),
    lightning("cuda", 32, 128, 8192, False, (fla(), sdpa("flash", causal=True))),
    lightning("cuda", 32, 128, 131072, False, (fla(),)),
    lightning("cuda", 32, 128, 1048576, False, (fla(),)),
    lightning("cuda", 32, 128, 8192, True, (fla(True), sdpa("flash", True, causal=True))),
    lightning("cuda", 32, 128, 131072, True, (fla(True),)),
    lightning("cpu", 8, 64, 16384, False, (torch_sdpa(causal=True),)),
)
