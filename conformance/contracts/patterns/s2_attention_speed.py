"""Benchmarks of S2-Attention: long prefill and training, beside dense and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attnspec.conformance.bench.inputs import attention_cost, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark
from attnspec.conformance.bench.rivals import flex, sdpa, torch_sdpa


def pairs_a_head(tokens: int, heads: int, kv_heads: int, b: int, local: int, v: int) -> float:
    """How many pairs a head reads, on average, of whole blocks and the default step."""
    step = max(1, v // heads)
    row = np.arange(tokens // b)
    outside = np.maximum(row + 1 - local, 0)
    phases = -(np.arange(kv_heads)[:, None] * step) % v
    strided = np.maximum(-((phases - outside) // v), 0).sum() / kv_heads
    window = np.minimum(row, local - 1).sum()
    return float((strided + window) * b * b + len(row) * b * (b + 1) / 2)


def local_and_stride(arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """The causal pattern as a FlexAttention mask function."""
    b, local, v = (arguments[name] for name in ("b", "local", "v_stride"))
    heads, group = arguments["q"].shape[1], arguments["q"].shape[1] // arguments["k"].shape[1]
    step = max(1, v // heads)

    def visible(batch: Any, h: Any, i: Any, j: Any) -> Any:
        strided = (j // b + h // group * step) % v == 0
        return (j <= i) & (strided | (i // b - j // b < local))

    return visible


def ready(
    device: str,
    tokens: int,
    heads: tuple[int, int],
    d: int,
    pattern: tuple[int, int, int],
    backward: bool = False,
    rivals: Any = (),
    batch: int = 1,
) -> Benchmark:
    b, local, v = pattern
    return Benchmark(
        "s2_attention.s2_attend",
        f"causal {tokens // 1024}k b={b} local={local} stride={v} heads={heads[0]}/{heads[1]}"
        + (f" batch={batch}" if batch > 1 else "")
        + (" forward+backward" if backward else ""),
        device,
        qkv(batch, *heads, tokens, tokens, d, b=b, local=local, v_stride=v),
        attention_cost(
            pairs=pairs_a_head(tokens, *heads, b, local, v), factor=3.5 if backward else 1.0
        ),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"batch": batch, "tokens": tokens, "d": d, "heads": list(heads), "b": b,
                  "local": local, "v": v},
    )  # fmt: skip


def cuda(
    tokens: int,
    kv_heads: int,
    pattern: tuple[int, int, int],
    backward: bool,
    heads: int = 32,
    batch: int = 1,
) -> Benchmark:
    rivals = (
        sdpa("flash", backward, causal=True),
        sdpa("cudnn", backward, causal=True),
        flex(local_and_stride, backward, per_head=True),
    )
    return ready("cuda", tokens, (heads, kv_heads), 128, pattern, backward, rivals, batch)


BENCHMARKS = (
    cuda(131072, 32, (64, 8, 16), backward=False),
    cuda(131072, 32, (64, 2, 16), backward=False),
    cuda(131072, 32, (128, 4, 16), backward=False),
    cuda(131072, 16, (64, 8, 16), backward=False),
    cuda(65536, 16, (64, 8, 16), backward=False, heads=16, batch=4),
    cuda(32768, 32, (64, 8, 16), backward=False),
    cuda(32768, 32, (64, 32, 8), backward=False),
    cuda(32768, 32, (64, 8, 16), backward=True),
    ready("cpu", 4096, (8, 8), 64, (64, 4, 8), rivals=(torch_sdpa(causal=True),)),
)
