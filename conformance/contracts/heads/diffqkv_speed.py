"""Benchmarks of DiffQKV attention: prefill, training and selective decode, beside grouped heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import attention_cost, bytes_of, forward_and_backward
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import with_backward


def unequal(
    heads: tuple[int, int, int], queries: int, keys: int, d: int, dv: int, **parameters: Any
) -> Callable[[str, str], dict[str, Any]]:
    """Random q, k and v with (Hq, Hk, Hv) heads."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        shapes = zip("qkv", heads, (queries, keys, keys), (d, d, dv), strict=True)
        arrays = {
            name: torch.randn(1, n, tokens, width, generator=generator, device=device)
            for name, n, tokens, width in shapes
        }
        return {n: x.to(getattr(torch, dtype)) for n, x in arrays.items()} | parameters

    return make


def selective_cost(arguments: Mapping[str, Any]) -> Cost:
    """All of k and, of each query head, c rows of v."""
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    batch, heads, queries, d = q.shape
    rows = batch * heads * queries
    read = rows * min(arguments["c"], v.shape[2]) * v.shape[3]
    pairs = rows * k.shape[2]
    moved = bytes_of(q, k) + min(read, v.numel()) * v.element_size()
    return Cost(2.0 * (pairs * d + read), moved)


def repeated(backward: bool = False) -> Rival:
    """torch's attention on keys and values repeated for every query head."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        causal = bool(arguments.get("causal")) and q.shape[2] == k.shape[2]

        def forward() -> Any:
            K, V = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, K, V, is_causal=causal)

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival("torch-sdpa, repeated heads", prepare)


def prefill(
    device: str, heads: tuple[int, int, int], tokens: int, d: int, dv: int, backward: bool = False
) -> Benchmark:
    return Benchmark(
        "diffqkv.diffqkv_attend",
        f"causal {tokens // 1024}k d={d} dv={dv} heads={'/'.join(map(str, heads))}"
        + (" forward+backward" if backward else ""),
        device,
        unequal(heads, tokens, tokens, d, dv, causal=True),
        attention_cost(factor=3.5 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=(repeated(backward),),
        settings={"tokens": tokens, "d": d, "dv": dv, "heads": list(heads)},
    )


def selective(device: str, heads: tuple[int, int, int], keys: int, c: int) -> Benchmark:
    return Benchmark(
        "diffqkv.selective_attend",
        f"one query, {keys // 1024}k keys, c={c}, heads={'/'.join(map(str, heads))}",
        device,
        unequal(heads, 1, keys, 128, 128, c=c, causal=True),
        selective_cost,
        dtype="bfloat16" if device == "cuda" else "float32",
        rivals=(repeated(),),
        settings={"keys": keys, "c": c, "heads": list(heads)},
    )


BENCHMARKS = (
    prefill("cuda", (32, 4, 16), 8192, 128, 128),
    prefill("cuda", (32, 4, 16), 32768, 128, 128),
    prefill("cuda", (32, 4, 16), 32768, 64, 128),
    prefill("cuda", (32, 4, 16), 8192, 128, 128, backward=True),
    selective("cuda", (32, 4, 16), 32768, 100),
    selective("cuda", (32, 4, 16), 131072, 100),
    prefill("cpu", (8, 2, 4), 1024, 64, 64),
    selective("cpu", (8, 2, 4), 8192, 100),
)
