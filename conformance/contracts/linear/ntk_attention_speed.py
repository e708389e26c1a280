"""Benchmarks of NTK-Attention: a prefix of any length for little more than plain attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import with_backward

INPUTS = ("q", "K", "V", "Z", "k")


def prefixed(heads: int, kv_heads: int, tokens: int, d: int) -> Any:
    """Random tokens and state; k is positive, as it is after training."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        drawn = qkv(1, heads, kv_heads, tokens, tokens, d, causal=True)(device, dtype)
        generator = torch.Generator(device).manual_seed(1)
        Z = torch.randn(heads, d, d, generator=generator, device=device)
        k = torch.rand(heads, d, generator=generator, device=device)
        state = {name: x.to(getattr(torch, dtype)) for name, x in (("Z", Z), ("k", k))}
        return {"q": drawn["q"], "K": drawn["k"], "V": drawn["v"], "causal": True, **state}

    return make


def prefix_cost(factor: float = 1.0) -> Any:
    """Causal softmax attention, and a product of each query's features with Z and k."""

    def cost(arguments: Mapping[str, Any]) -> Cost:
        q, K, V, Z, k = (arguments[name] for name in INPUTS)
        batch, heads, tokens, d = q.shape
        keys, dv = K.shape[2], V.shape[3]
        pairs = tokens * keys - tokens * (tokens - 1) / 2
        per_head = pairs * (d + dv) + tokens * d * (dv + 1)
        out = batch * heads * tokens * dv * q.element_size()
        moved = bytes_of(q, K, V, Z, k) + out
        return Cost(2.0 * batch * heads * per_head * factor, moved * (1 if factor == 1 else 3))

    return cost


def training(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Forward and the gradients of tokens and state."""
    inputs = tuple(arguments[name] for name in INPUTS)
    return with_backward(lambda: function(**arguments), inputs)


def without_prefix(backward: bool = False) -> Rival:
    """torch's attention on the tokens alone: what the prefix is added to."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q, K, V = (arguments[name] for name in INPUTS[:3])
        grouped = q.shape[1] != K.shape[1]

        def forward() -> Any:
            return torch.nn.functional.scaled_dot_product_attention(
                q, K, V, is_causal=True, enable_gqa=grouped
            )

        return with_backward(forward, (q, K, V)) if backward else forward

    return Rival("torch-sdpa without prefix", prepare)


def explicit(length: int) -> Rival:
    """torch's attention with a prefix of `length` real tokens, which prefix tuning would train."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q, K, V = (arguments[name] for name in INPUTS[:3])
        K, V = (torch.cat([torch.randn_like(x[:, :, :length]), x], dim=2) for x in (K, V))
        rows, keys = q.shape[2], K.shape[2]
        mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
        K, V = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (K, V))
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, K, V, attn_mask=mask)

    return Rival(f"torch-sdpa, {length} prefix tokens", prepare)


def ntk(
    device: str, heads: int, kv_heads: int, tokens: int, d: int, backward: bool, rivals: Any
) -> Benchmark:
    return Benchmark(
        "ntk_attention.ntk_attend",
        f"causal {tokens // 1024}k d={d} heads={heads}/{kv_heads}"
        + (" forward+backward" if backward else ""),
        device,
        prefixed(heads, kv_heads, tokens, d),
        prefix_cost(3.5 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=training if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": heads, "kv_heads": kv_heads},
    )


BENCHMARKS = (
    ntk("cuda", 32, 32, 4096, 128, False, (without_prefix(), explicit(1024))),
    ntk("cuda", 32, 8, 16384, 128, False, (without_prefix(), explicit(4096))),
    ntk("cuda", 32, 8, 32768, 128, False, (without_prefix(),)),
    ntk("cuda", 32, 32, 8192, 128, True, (without_prefix(True),)),
    ntk("cpu", 8, 8, 1024, 64, False, (without_prefix(), explicit(1024))),
)
