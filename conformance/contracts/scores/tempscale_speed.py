"""Benchmarks of TempScale: it must cost what attention without a temperature costs."""

from __future__ import annotations

from attnspec.conformance.bench.inputs import attention_cost, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark
from attnspec.conformance.bench.rivals import reference, sdpa, torch_sdpa
from attnspec.reference.scores.tempscale import tempered_attention


def encoder(tokens: int, d: int = 64, backward: bool = False) -> Benchmark:
    """A layer of an embedding model on one long text."""
    return Benchmark(
        "tempscale.tempered_attention",
        f"{tokens // 1024}k tau=0.8 d={d} heads=16" + (" forward+backward" if backward else ""),
        "cuda",
        qkv(4, 16, 16, tokens, tokens, d, tau=0.8),
        attention_cost(factor=3.5 if backward else 1.0),
        call=forward_and_backward if backward else None,
        rivals=(sdpa("flash", backward, causal=False), sdpa("cudnn", backward, causal=False)),
        settings={"batch": 4, "tokens": tokens, "d": d, "heads": 16, "tau": 0.8},
    )


BENCHMARKS = (
    encoder(8192),
    encoder(32768),
    encoder(8192, backward=True),
    Benchmark(
        "tempscale.tempered_attention",
        "1k tau=0.8 d=64 heads=8",
        "cpu",
        qkv(1, 8, 8, 1024, 1024, 64, tau=0.8),
        attention_cost(),
        dtype="float32",
        rivals=(torch_sdpa(causal=False), reference(tempered_attention)),
        settings={"tokens": 1024, "d": 64, "heads": 8, "tau": 0.8},
    ),
)
