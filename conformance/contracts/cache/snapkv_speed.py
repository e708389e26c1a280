"""Benchmarks of SnapKV: what scoring and selection add to a prefill, and the smaller cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnspec.conformance.bench.inputs import attention_cost, bytes_of, qkv
from attnspec.conformance.bench.model import Benchmark, Cost
from attnspec.conformance.bench.rivals import sdpa, torch_sdpa


def keys_once(arguments: Mapping[str, Any]) -> Cost:
    """Window scores read the keys once and write one weight for each row and key."""
    q, k, w = arguments["q"], arguments["k"], arguments["w"]
    rows = q.shape[0] * q.shape[1] * w * k.shape[2]
    return Cost(2.0 * rows * k.shape[3], bytes_of(k) + rows * k.element_size())


def window_inputs(device: str, dtype: str) -> dict[str, Any]:
    arguments = qkv(1, 32, 8, 131072, 131072, 128)(device, dtype)
    return {"q": arguments["q"], "k": arguments["k"], "w": 64}


BENCHMARKS = (
    Benchmark(
        "snapkv.prefill",
        "32k tokens to 2k slots, heads 32/8",
        "cuda",
        qkv(1, 32, 8, 32768, 32768, 128, w=32, C=2048, p=7, pool="max"),
        attention_cost(pairs=32768 * 32769 / 2),
        rivals=(sdpa("flash", causal=True), sdpa("cudnn", causal=True)),
        settings={"tokens": 32768, "d": 128, "heads": 32, "kv_heads": 8, "w": 32, "C": 2048},
    ),
    Benchmark(
        "snapkv.window_attention",
        "last 64 rows of 128k tokens, heads 32/8",
        "cuda",
        window_inputs,
        keys_once,
        settings={"tokens": 131072, "d": 128, "heads": 32, "kv_heads": 8, "w": 64},
    ),
    Benchmark(
        "snapkv.prefill",
        "4k tokens to 512 slots, heads 8/2",
        "cpu",
        qkv(1, 8, 2, 4096, 4096, 64, w=32, C=512),
        attention_cost(pairs=4096 * 4097 / 2),
        dtype="float32",
        rivals=(torch_sdpa(causal=True),),
        settings={"tokens": 4096, "d": 64, "heads": 8, "kv_heads": 2, "w": 32, "C": 512},
    ),
)
