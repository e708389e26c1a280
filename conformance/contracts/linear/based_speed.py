"""Benchmarks of Based: prefill, training and decode, beside exact attention and other kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival, Unavailable
from attnspec.conformance.bench.rivals import flash_linear, sdpa, torch_sdpa, with_backward


def packed(d: int) -> int:
    """Features of d channels, each pair once."""
    return (d + 1) * (d + 2) // 2


def prefill_cost(factor: float = 1.0) -> Any:
    """q, k, v read and o written once; a token enters the state, and reads it, by its features."""

    def cost(arguments: Mapping[str, Any]) -> Cost:
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        batch, heads, tokens, d = q.shape
        dv = v.shape[3]
        moved = bytes_of(q, k, v) + batch * heads * tokens * dv * q.element_size()
        flops = 4.0 * batch * heads * tokens * packed(d) * dv
        return Cost(flops * factor, moved * factor)

    return cost


def step_cost(arguments: Mapping[str, Any]) -> Cost:
    """The state read and written once."""
    S, zk = arguments["S"], arguments["zk"]
    return Cost(4.0 * S.numel(), 2 * bytes_of(S, zk))


def fla(form: str, backward: bool = False) -> Rival:
    """flash-linear-attention's Based, "parallel" or "fused_chunk", if it is installed."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        chosen = flash_linear("based", f"{form}_based")
        q, k, v = (arguments[name].transpose(1, 2).contiguous() for name in ("q", "k", "v"))

        def forward() -> Any:
            return chosen(q, k, v)

        return with_backward(forward, (q, k, v)) if backward else forward

    return Rival(f"flash-linear-attention {form}", prepare)


def quadratic() -> Rival:
    """The same weights over all pairs, in plain torch."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        q, k, v = (arguments[name] for name in ("q", "k", "v"))
        if q.shape[1] * q.shape[2] ** 2 * 4 > 2**34:
            raise Unavailable("the matrix of all pairs is larger than 16 GiB")

        def forward() -> Any:
            s = (q @ k.mT) * q.shape[3] ** -0.5
            w = (1 + s + 0.5 * s * s).tril()
            return (w @ v) / w.sum(-1, keepdim=True)

        return forward

    return Rival("torch, all pairs", prepare)


def softmax_step(context: int) -> Rival:
    """One token of exact attention over a cache of `context` tokens (FlashAttention-2 in torch)."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        v = arguments["v"]
        batch, heads, _, width = v.shape
        q = torch.randn(batch, heads, 1, width, dtype=v.dtype, device=v.device)
        K, V = (torch.randn_like(q.expand(-1, -1, context, -1)) for _ in range(2))
        backend = SDPBackend.FLASH_ATTENTION if v.is_cuda else SDPBackend.MATH

        def call() -> Any:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, K, V)

        return call

    return Rival(f"softmax over {context // 1024}k keys", prepare)


def prefill(
    device: str, heads: int, tokens: int, d: int, dv: int, backward: bool, rivals: Any
) -> Benchmark:
    return Benchmark(
        "based.based_attend",
        f"causal {tokens // 1024}k d={d} dv={dv}" + (" forward+backward" if backward else ""),
        device,
        qkv(1, heads, heads, tokens, tokens, d, dv, causal=True),
        prefill_cost(3.0 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=forward_and_backward if backward else None,
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "dv": dv, "heads": heads},
    )


def decode(device: str, batch: int, heads: int, d: int, dv: int, context: int) -> Benchmark:
    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        drawn = qkv(batch, heads, heads, 1, 1, d, dv)(device, dtype)
        D = 1 + d + d * d
        generator = torch.Generator(device).manual_seed(1)
        S = torch.randn(batch, heads, D, dv, generator=generator, device=device)
        zk = torch.zeros(batch, heads, D, device=device)
        zk[..., 0] = context
        return {"S": S, "zk": zk, **drawn}

    return Benchmark(
        "based.based_decode_step",
        f"batch {batch}, {heads} heads d={d} dv={dv}",
        device,
        make,
        step_cost,
        dtype="bfloat16" if device == "cuda" else "float32",
        rivals=(softmax_step(context),),
        settings={"batch": batch, "heads": heads, "d": d, "dv": dv, "context": context},
    )


STEPS = (decode("cuda", 128, 16, 16, 64, 8192), decode("cuda", 1, 16, 16, 64, 8192))
BENCHMARKS = (
    prefill("cuda", 32, 2048, 16, 128, False, (fla("parallel"), sdpa("flash", causal=True))),
    prefill("cuda", 32, 16384, 16, 128, False, (fla("parallel"), fla("fused_chunk"), quadratic())),
    prefill("cuda", 32, 131072, 16, 128, False, (fla("fused_chunk"),)),
    prefill("cuda", 32, 1048576, 16, 128, False, ()),
    prefill("cuda", 32, 16384, 16, 128, True, (fla("parallel", True),)),
    prefill("cuda", 32, 131072, 16, 128, True, (fla("fused_chunk", True),)),
    *STEPS,
    *(each.in_a_graph() for each in STEPS),
    prefill("cpu", 8, 4096, 16, 64, False, (quadratic(), torch_sdpa(causal=True))),
    decode("cpu", 4, 16, 16, 64, 8192),
)
