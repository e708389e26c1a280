"""Benchmarks of dense softmax attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attnspec.conformance.bench.inputs import attention_cost, bytes_of, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import flex, installed, reference, sdpa, torch_sdpa
from attnspec.reference.dense.attention import attend

LENGTHS = np.geomspace(100, 32768, 64).round().astype(int)
"""Lengths of the packed texts, which come in a fixed random order."""


def in_causal_order(arguments: Mapping[str, Any]) -> Callable[..., Any]:
    return lambda b, h, i, j: j <= i


def dense(
    tokens: int, d: int, kv_heads: int = 32, backward: bool = False, more: tuple[Rival, ...] = ()
) -> Benchmark:
    rivals = (sdpa("flash", backward), sdpa("cudnn", backward), *more)
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


def packed_inputs(device: str, dtype: str) -> dict[str, Any]:
    import torch

    lengths = np.random.default_rng(0).permutation(LENGTHS)
    arguments = qkv(1, 32, 8, int(lengths.sum()), int(lengths.sum()), 128)(device, dtype)
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    packs = {name: x[0] for name, x in arguments.items()}
    return {**packs, "q_offsets": ends, "k_offsets": ends, "causal": True}


def packed_cost(arguments: Mapping[str, Any]) -> Cost:
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    pairs = float(np.sum(LENGTHS * (LENGTHS + 1.0)) / 2)
    return Cost(2.0 * q.shape[0] * pairs * (q.shape[2] + v.shape[2]), bytes_of(q, k, v, q))


def packed_flex(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """FlexAttention with a mask function that compares the texts of two tokens."""
    import torch

    q, ends = arguments["q"], arguments["q_offsets"]
    text = torch.searchsorted(ends, torch.arange(q.shape[1], device=q.device), right=True)
    rival = flex(lambda _: lambda b, h, i, j: (text[i] == text[j]) & (j <= i))
    return rival.prepare({name: arguments[name][None] for name in ("q", "k", "v")})


def packed_torch(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """torch's own attention for packs, which is FlashAttention-2."""
    call = installed("torch", "torch.nn.attention.varlen", "varlen_attn")
    q, k, v = (arguments[name].transpose(0, 1).contiguous() for name in ("q", "k", "v"))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    ends, longest = arguments["q_offsets"], int(LENGTHS.max())
    # The causal order was an argument of its own before it became a window.
    before = "is_causal" in inspect.signature(call).parameters
    order = {"is_causal": True} if before else {"window_size": (-1, 0)}
    return lambda: call(q, k, v, ends, ends, longest, longest, **order)


BENCHMARKS = (
    dense(4096, 128),
    dense(32768, 128),
    dense(32768, 64),
    dense(32768, 256),
    dense(16384, 96),
    dense(16384, 80),
    dense(32768, 128, kv_heads=8),
    dense(32768, 128, kv_heads=4, more=(flex(in_causal_order),)),
    dense(32768, 192, more=(flex(in_causal_order),)),
    dense(32768, 128, backward=True),
    dense(16384, 64, backward=True),
    Benchmark(
        "attention.attend_packed",
        "64 texts of 100 to 32k tokens, d=128 heads=32/8",
        "cuda",
        packed_inputs,
        packed_cost,
        rivals=(Rival("flex", packed_flex), Rival("torch-varlen", packed_torch)),
        settings={"texts": 64, "tokens": int(LENGTHS.sum()), "d": 128, "heads": 32, "kv_heads": 8},
    ),
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
