"""Benchmarks of LongLoRA: training steps and forward passes, beside dense and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from attnspec.conformance.bench.inputs import attention_cost, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Rival
from attnspec.conformance.bench.rivals import flex, sdpa, torch_sdpa, with_backward
from attnspec.reference.patterns.longlora_groups import group_starts


def pairs_a_head(tokens: int, G: int) -> float:
    """How many pairs a head attends to, on average over plain and shifted ones."""
    total = 0.0
    for shifted in (False, True):
        ends = [*group_starts(tokens, G, shifted).tolist(), tokens]
        total += sum((b - a) * (b - a + 1) / 2 for a, b in pairwise(ends))
    return total / 2


def groups(arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """The causal segments as a FlexAttention mask function."""
    G, half = arguments["G"], arguments["q"].shape[1] // 2
    moved = G - G // 2

    def visible(batch: Any, h: Any, i: Any, j: Any) -> Any:
        first = (h >= half) * moved
        return (j <= i) & ((i + first) // G == (j + first) // G)

    return visible


def rolled_sdpa(backward: bool) -> Rival:
    """The paper's way on torch's attention: roll half of the heads, fold groups into the batch.

    Its first rows differ, which costs the same. T must be a multiple of G.
    """

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        G, half = arguments["G"], q.shape[1] // 2

        def fold(x: Any) -> Any:
            if x.shape[1] < 2 * half:
                x = x.repeat_interleave(2 * half // x.shape[1], 1)
            x = torch.cat([x[:, :half], x[:, half:].roll(-(G // 2), 2)], dim=1)
            return x.unflatten(2, (-1, G)).transpose(1, 2).flatten(0, 1)

        def forward() -> Any:
            out = torch.nn.functional.scaled_dot_product_attention(
                fold(q), fold(k), fold(v), is_causal=True
            )
            out = out.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)
            return torch.cat([out[:, :half], out[:, half:].roll(G // 2, 2)], dim=1)

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival("rolled-sdpa", prepare)


def training(
    device: str,
    tokens: int,
    heads: tuple[int, int],
    d: int,
    ratio: int = 4,
    backward: bool = False,
    rivals: Any = (),
) -> Benchmark:
    G = tokens // ratio
    return Benchmark(
        "longlora.grouped_attend",
        f"causal {tokens // 1024}k G={G} heads={heads[0]}/{heads[1]}"
        + (" forward+backward" if backward else ""),
        device,
        qkv(1, *heads, tokens, tokens, d, G=G),
        attention_cost(pairs=pairs_a_head(tokens, G), factor=3.5 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": list(heads), "G": G},
    )


def cuda(tokens: int, kv_heads: int, backward: bool, ratio: int = 4) -> Benchmark:
    rivals = (
        sdpa("flash", backward, causal=True),
        sdpa("cudnn", backward, causal=True),
        rolled_sdpa(backward),
        flex(groups, backward, per_head=True),
    )
    return training("cuda", tokens, (32, kv_heads), 128, ratio, backward, rivals)


CPU_RIVALS = (torch_sdpa(causal=True), rolled_sdpa(False))
BENCHMARKS = (
    cuda(8192, 32, backward=True),
    cuda(32768, 32, backward=True),
    cuda(32768, 8, backward=True),
    cuda(32768, 32, backward=False),
    cuda(65536, 32, backward=False),
    cuda(32768, 32, backward=False, ratio=16),
    training("cpu", 2048, (8, 8), 64, rivals=CPU_RIVALS),
    training("cpu", 2048, (8, 2), 64, rivals=CPU_RIVALS),
)
