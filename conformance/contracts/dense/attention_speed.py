"""Benchmarks of dense softmax attention."""

from __future__ import annotations

from attnspec.conformance.bench.inputs import attention_cost, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark
from attnspec.conformance.bench.rivals import reference, sdpa, torch_sdpa
from attnspec.reference.dense.attention import attend


def dense(tokens: int, d: int, kv_heads: int = 32, backward: bool = False) -> Benchmark:
    rivals = (sdpa("flash", backward), sdpa("cudnn", backward))
    return Benchmark(
        "attention.attend",
        f"causal {tokens // 1024}k d={d} heads=32/{kv_heads}"
        + (" forward+backward" if backward else ""),
        "cuda",
        qkv(1, 32, kv_heads, tokens, tokens, d, causal=True),
        attention_cost(factor=3.5 if backward else 1.0),
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": 32, "kv_heads": kv_heads},
    )


BENCHMARKS = (
    dense(4096, 128),
    dense(32768, 128),
    dense(32768, 64),
    dense(32768, 256),
    dense(16384, 96),
    dense(16384, 80),
    dense(32768, 128, kv_heads=8),
    dense(32768, 128, backward=True),
    dense(16384, 64, backward=True),
    Benchmark(
        "attention.attend",
        "causal 1k d=64 heads=8",
        "cpu",
        qkv(1, 8, 8, 1024, 1024, 64, causal=True),
        attention_cost(),
        dtype="float32",
        rivals=(torch_sdpa(), reference(attend)),
        settings={"tokens": 1024, "d": 64, "heads": 8, "kv_heads": 8},
    ),
    Benchmark(
        "attention.attend",
        "causal 4k d=64 heads=8",
        "cpu",
        qkv(1, 8, 8, 4096, 4096, 64, causal=True),
        attention_cost(),
        dtype="float32",
        rivals=(torch_sdpa(),),
        settings={"tokens": 4096, "d": 64, "heads": 8, "kv_heads": 8},
    ),
)
