"""Benchmarks of StreamingLLM: a whole stream with its static view, sinks and window."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import attention_cost, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark
from attnspec.conformance.bench.rivals import flex, sdpa, torch_sdpa


def sinks_and_window(arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """The static view as a FlexAttention mask function."""
    sinks, recent = arguments["S"], arguments["R"]
    return lambda b, h, i, j: (j <= i) & ((j < sinks) | (i - j <= recent))


def stream(
    device: str, tokens: int, heads: int, d: int, S: int, R: int, rivals: Any,
    backward: bool = False,
) -> Benchmark:  # fmt: skip
    return Benchmark(
        "streaming_llm.streaming_attend",
        f"{tokens // 1024}k tokens, {S} sinks, window {R}"
        + (" forward+backward" if backward else ""),
        device,
        qkv(1, heads, heads, tokens, tokens, d, S=S, R=R),
        attention_cost(pairs=float(tokens) * (S + R + 1), factor=3.5 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": heads, "S": S, "R": R},
    )


BENCHMARKS = (
    stream("cuda", 131072, 32, 128, 64, 1023, (flex(sinks_and_window), sdpa("flash", causal=True))),
    stream("cuda", 32768, 32, 128, 4, 2047, (flex(sinks_and_window), sdpa("flash", causal=True))),
    stream("cuda", 131072, 32, 128, 64, 1023, (flex(sinks_and_window, backward=True),), True),
    stream("cpu", 16384, 8, 64, 4, 512, (torch_sdpa(causal=True),)),
)
