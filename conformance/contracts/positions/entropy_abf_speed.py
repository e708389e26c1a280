"""Benchmarks of Entropy-ABF: rotation, row scale and attention against attention alone."""

from __future__ import annotations

from attnspec.conformance.bench.inputs import attention_cost, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark
from attnspec.conformance.bench.rivals import reference, sdpa, torch_sdpa
from attnspec.reference.positions.entropy_abf import extended_attention


def prompt(tokens: int, kv_heads: int = 32, backward: bool = False) -> Benchmark:
    """A scaled layer on one prompt beyond the old window of 4096."""
    return Benchmark(
        "entropy_abf.extended_attention",
        f"{tokens // 1024}k d=128 heads=32/{kv_heads}" + (" forward+backward" if backward else ""),
        "cuda",
        qkv(1, 32, kv_heads, tokens, tokens, 128, layer=2),
        attention_cost(pairs=tokens * (tokens + 1) / 2, factor=3.5 if backward else 1.0),
        call=forward_and_backward if backward else None,
        rivals=(sdpa("flash", backward, causal=True), sdpa("cudnn", backward, causal=True)),
        settings={"tokens": tokens, "d": 128, "heads": 32, "kv_heads": kv_heads},
    )


BENCHMARKS = (
    prompt(16384),
    prompt(32768, kv_heads=8),
    prompt(16384, backward=True),
    Benchmark(
        "entropy_abf.extended_attention",
        "1k d=64 heads=8",
        "cpu",
        qkv(1, 8, 8, 1024, 1024, 64, layer=2, c=256),
        attention_cost(pairs=1024 * 1025 / 2),
        dtype="float32",
        rivals=(torch_sdpa(causal=True), reference(extended_attention)),
        settings={"tokens": 1024, "d": 64, "heads": 8},
    ),
)
