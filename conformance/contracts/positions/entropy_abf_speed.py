"""Benchmarks of Entropy-ABF: rotation, row scale and attention against attention alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attnspec.conformance.bench.inputs import attention_cost, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Rival
from attnspec.conformance.bench.rivals import reference, sdpa, torch_sdpa
from attnspec.conformance.contracts.positions.giraffe_speed import rotary
from attnspec.reference.positions.entropy_abf import extended_attention
from attnspec.reference.positions.entropy_abf_rotation import rope_frequencies, row_scale


def scaled(rival: Rival) -> Rival:
    """A rival that rotates, given the frequencies and the row scale, as the authors' code does."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q = arguments["q"]
        f = torch.from_numpy(rope_frequencies(q.shape[-1])).to(q.device)
        scale = row_scale(np.arange(q.shape[2]), arguments.get("c", 4096))[:, None]
        lam = torch.from_numpy(scale).to(q.device, q.dtype)
        return rival.prepare({**arguments, "f": f, "lam": lam})

    return Rival(rival.name, prepare)


def prompt(tokens: int, kv_heads: int = 32, backward: bool = False) -> Benchmark:
    """A scaled layer on one prompt beyond the old window of 4096."""
    return Benchmark(
        "entropy_abf.extended_attention",
        f"{tokens // 1024}k d=128 heads=32/{kv_heads}" + (" forward+backward" if backward else ""),
        "cuda",
        qkv(1, 32, kv_heads, tokens, tokens, 128, layer=2),
        attention_cost(pairs=tokens * (tokens + 1) / 2, factor=3.5 if backward else 1.0),
        call=forward_and_backward if backward else None,
        rivals=(
            scaled(rotary(compiled=False, backward=backward)),
            scaled(rotary(compiled=True, backward=backward)),
            sdpa("flash", backward, causal=True),
            sdpa("cudnn", backward, causal=True),
        ),
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
        rivals=(
            scaled(rotary(compiled=False)),
            torch_sdpa(causal=True),
            reference(extended_attention),
        ),
        settings={"tokens": 1024, "d": 64, "heads": 8},
    ),
)
