"""Benchmarks of SeerAttention: the block-sparse kernel at a tenth of the causal blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import qkv
from attnspec.conformance.bench.model import Benchmark, Cost
from attnspec.conformance.bench.rivals import flex, sdpa, torch_sdpa


def random_blocks(heads: int, tokens: int, d: int, b: int, share: float) -> Any:
    """q, k, v and a mask of the diagonal and a random `share` of the causal blocks."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        arguments = qkv(1, heads, heads, tokens, tokens, d)(device, dtype)
        nb = tokens // b
        generator = torch.Generator(device).manual_seed(1)
        chosen = torch.rand(1, heads, nb, nb, generator=generator, device=device) < share
        chosen |= torch.eye(nb, dtype=torch.bool, device=device)
        return {**arguments, "M": chosen.tril(), "b": b}

    return make


def listed_pairs(arguments: Mapping[str, Any]) -> Cost:
    """Arithmetic of the listed blocks; q, k, v and the output move once."""
    q, v, chosen, b = (arguments[name] for name in ("q", "v", "M", "b"))
    pairs = float(chosen.sum()) * b * b
    moved = 2 * (q.numel() + v.numel()) * q.element_size()
    return Cost(2.0 * pairs * (q.shape[3] + v.shape[3]), moved)


def block_mask(arguments: Mapping[str, Any]) -> Callable[..., Any]:
    chosen, b = arguments["M"], arguments["b"]
    return lambda batch, h, i, j: chosen[batch, h, i // b, j // b] & (j <= i)


def sparse(device: str, heads: int, tokens: int, d: int, b: int, rivals: Any) -> Benchmark:
    return Benchmark(
        "seer_attention.block_sparse_attend",
        f"{tokens // 1024}k tokens, a tenth of the {b}-blocks",
        device,
        random_blocks(heads, tokens, d, b, 0.1),
        listed_pairs,
        dtype="bfloat16" if device == "cuda" else "float32",
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": heads, "b": b, "share": 0.1},
    )


DENSE = (sdpa("flash", causal=True), sdpa("cudnn", causal=True))
BENCHMARKS = (
    sparse("cuda", 32, 32768, 128, 128, (flex(block_mask, per_head=True), *DENSE)),
    sparse("cuda", 32, 32768, 128, 64, (flex(block_mask, per_head=True), *DENSE)),
    sparse("cuda", 32, 131072, 128, 128, (flex(block_mask, per_head=True), *DENSE)),
    sparse("cpu", 8, 4096, 64, 64, (torch_sdpa(causal=True),)),
)
