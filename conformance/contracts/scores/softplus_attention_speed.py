"""Benchmarks of softplus attention, beside softmax attention and the same weights elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import attention_cost, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import reference, sdpa, torch_sdpa, with_backward
from attnspec.reference.scores.softplus_attention import lssa, lssar


def flex_softplus(backward: bool = False) -> Rival:
    """FlexAttention on unit vectors with the log of softplus for its score, which is LSSA."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import math

        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        tokens = q.shape[2]
        lengths = torch.log(torch.arange(1, tokens + 1, device=q.device)) * math.log(q.shape[3])

        def score(x: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return torch.log(torch.nn.functional.softplus(x * lengths[i]))

        blocks = create_block_mask(
            lambda b, h, i, j: j <= i, None, None, tokens, tokens, device=q.device, _compile=True
        )
        compiled = torch.compile(flex_attention, dynamic=False)

        def forward() -> Any:
            a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
            return compiled(a, b, v, score_mod=score, block_mask=blocks, scale=1.0)

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival("flex, log softplus", prepare)


def flex_sharpened(backward: bool = False, p: float = 15, warm: int = 3) -> Rival:
    """LSSAR in two calls of FlexAttention: the second one's score knows the first one's lse.

    The first call needs no output: it averages sixteen zeros, the fewest that are allowed.
    """

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import math

        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        tokens = q.shape[2]
        counts = torch.arange(1.0, tokens + 1, device=q.device)
        lengths = torch.log(counts) * math.log(q.shape[3])
        offsets = (counts > warm).float()
        nothing = v.new_zeros(*v.shape[:3], 16)

        def soften(x: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return torch.log(torch.nn.functional.softplus(x * lengths[i]))

        blocks = create_block_mask(
            lambda b, h, i, j: j <= i, None, None, tokens, tokens, device=q.device, _compile=True
        )
        compiled = torch.compile(flex_attention, dynamic=False)
        options: dict[str, Any] = {"block_mask": blocks, "scale": 1.0, "return_lse": True}

        def forward() -> Any:
            a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
            _, sums = compiled(a, b, nothing, score_mod=soften, **options)

            def sharpen(x: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
                weight = torch.exp(soften(x, b, h, i, j) - sums[b, h, i])
                return p * torch.log((counts[i] * weight - offsets[i]).clamp(min=1e-30))

            out, mass = compiled(a, b, v, score_mod=sharpen, **options)
            return out * torch.sigmoid(mass - math.log(1e-8))[..., None].to(out.dtype)

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival("flex, twice", prepare)


def eager() -> Rival:
    """The formula of LSSA in plain torch, which writes all scores to memory."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import math

        import torch

        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        tokens = q.shape[2]
        lengths = torch.log(torch.arange(1.0, tokens + 1, device=q.device)) * math.log(q.shape[3])

        def forward() -> Any:
            a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
            scores = torch.nn.functional.softplus((a @ b.mT) * lengths[:, None].to(q.dtype)).tril()
            return (scores / (scores.sum(-1, keepdim=True) + 1e-8)) @ v

        return forward

    return Rival("torch, eager", prepare)


def prefill(operation: str, device: str, tokens: int, d: int = 128, backward: bool = False) -> Any:
    heads = 32 if device == "cuda" else 8
    on_gpu = device == "cuda"
    plain = operation == "lssa"

    # Sharpening computes the scores a second time: one product in two more.
    def cost(arguments: Mapping[str, Any]) -> Cost:
        softmax: Cost = attention_cost(factor=3.5 if backward else 1.0)(arguments)
        return Cost(softmax.flops * (1.0 if plain else 1.5), softmax.bytes)

    rivals: tuple[Rival, ...] = (torch_sdpa(), eager(), reference(lssa if plain else lssar))
    if on_gpu:
        rivals = (sdpa("flash", backward), sdpa("cudnn", backward), flex_softplus(backward))
        rivals += () if plain else (flex_sharpened(backward),)
    return Benchmark(
        f"softplus_attention.{operation}",
        f"causal {tokens // 1024}k d={d} heads={heads}" + (" forward+backward" if backward else ""),
        device,
        qkv(1, heads, heads, tokens, tokens, d, causal=True),
        cost,
        dtype="bfloat16" if on_gpu else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": heads},
    )


BENCHMARKS = (
    prefill("lssa", "cuda", 8192),
    prefill("lssa", "cuda", 32768),
    prefill("lssa", "cuda", 8192, d=64),
    prefill("lssa", "cuda", 8192, backward=True),
    prefill("lssar", "cuda", 8192),
    prefill("lssar", "cuda", 32768),
    prefill("lssar", "cuda", 8192, d=64),
    prefill("lssar", "cuda", 8192, backward=True),
    prefill("lssa", "cpu", 1024, d=64),
    prefill("lssar", "cpu", 1024, d=64),
)
