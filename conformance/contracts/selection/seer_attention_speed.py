"""Benchmarks of SeerAttention: prefill with and without its gate, and decoding from few blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import qkv
from attnspec.conformance.bench.model import Benchmark, Cost, Rival
from attnspec.conformance.bench.rivals import flex, sdpa, torch_sdpa
from attnspec.reference.selection.seer_attention_selection import ratio_to_k


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


def gated_inputs(heads: int, kv_heads: int, tokens: int, d: int, b: int, rho: float) -> Any:
    """q, k, v and a random gate without a projection of the queries."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(1)
        Wk = torch.randn(heads, 3 * d, d, generator=generator, device=device) * (3 * d) ** -0.5
        arguments = qkv(1, heads, kv_heads, tokens, tokens, d)(device, dtype)
        return {**arguments, "Wq": None, "Wk": Wk.to(getattr(torch, dtype)), "b": b, "rho": rho}

    return make


def gate_and_pairs(arguments: Mapping[str, Any]) -> Cost:
    """The gate, and attention to the blocks that the ratio keeps; all but the gate moves once."""
    q, k, v, Wk, b = (arguments[name] for name in ("q", "k", "v", "Wk", "b"))
    nb, heads = -(-q.shape[2] // b), q.shape[0] * q.shape[1]
    kept = ratio_to_k(arguments["rho"], nb)
    blocks = sum(R + 1 if nb - 2 <= R else min(R + 1, kept) for R in range(nb))
    pooling = float(3 * k.numel() + q.numel())
    gate = heads * nb * (2.0 * Wk.shape[1] * Wk.shape[2] + 2.0 * nb * Wk.shape[2])
    pairs = 2.0 * heads * blocks * b * b * (q.shape[3] + v.shape[3])
    moved = (q.numel() + k.numel() + v.numel() + heads * q.shape[2] * v.shape[3]) * q.element_size()
    return Cost(pooling + gate + pairs, moved + heads * nb * nb)


def gated(device: str, heads: int, kv_heads: int, tokens: int, d: int, rivals: Any) -> Benchmark:
    """All of it, from queries and keys before their rotation to the output."""
    return Benchmark(
        "seer_attention.attend",
        f"{tokens // 1024}k tokens, gate and a tenth of the 64-blocks",
        device,
        gated_inputs(heads, kv_heads, tokens, d, 64, 0.1),
        gate_and_pairs,
        dtype="bfloat16" if device == "cuda" else "float32",
        rivals=rivals,
        settings={"tokens": tokens, "d": d, "heads": heads, "kv_heads": kv_heads, "rho": 0.1},
    )


def pooled_inputs(heads: int, kv_heads: int, tokens: int, d: int, b: int, rho: float) -> Any:
    """`gated_inputs` without values."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        arguments = gated_inputs(heads, kv_heads, tokens, d, b, rho)(device, dtype)
        return {name: x for name, x in arguments.items() if name != "v"}

    return make


def read_and_marked(arguments: Mapping[str, Any]) -> Cost:
    """Queries and keys are read once for their blocks, whose mask is written."""
    q, k, Wk, b = (arguments[name] for name in ("q", "k", "Wk", "b"))
    nb, heads = -(-q.shape[2] // b), q.shape[0] * q.shape[1]
    gate = heads * nb * (2.0 * Wk.shape[1] * Wk.shape[2] + 2.0 * nb * Wk.shape[2])
    read = (q.numel() + k.numel()) * q.element_size()
    return Cost(float(3 * k.numel() + q.numel()) + gate, float(read + heads * nb * nb))


def chosen_blocks(heads: int, kv_heads: int, tokens: int, d: int, b: int) -> Benchmark:
    """What a choice costs; the attention that it saves is `block_sparse_attend`."""
    return Benchmark(
        "seer_attention.select_blocks",
        f"{tokens // 1024}k tokens, heads {heads}/{kv_heads}, a tenth of the {b}-blocks",
        "cuda",
        pooled_inputs(heads, kv_heads, tokens, d, b, 0.1),
        read_and_marked,
        settings={"tokens": tokens, "d": d, "heads": heads, "kv_heads": kv_heads, "b": b},
    )


def selected_blocks(heads: int, kv_heads: int, tokens: int, d: int, b: int, budget: int) -> Any:
    """One query, a cache, and the random blocks of `b` that hold `budget` tokens a kv head."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        arguments = qkv(1, heads, kv_heads, 1, tokens, d)(device, dtype)
        generator = torch.Generator(device).manual_seed(1)
        order = torch.rand(1, kv_heads, tokens // b, generator=generator, device=device).argsort()
        return {"q_t": arguments.pop("q"), **arguments, "M": order < budget // b, "b": b}

    return make


def read_selected(arguments: Mapping[str, Any]) -> Cost:
    """Keys and values of the selected blocks, read once, and the mask."""
    q, k, v, chosen, b = (arguments[name] for name in ("q_t", "k", "v", "M", "b"))
    tokens, widths = float(chosen.sum()) * b, k.shape[3] + v.shape[3]
    group = q.shape[1] // k.shape[1]
    return Cost(
        2.0 * tokens * group * widths, tokens * widths * k.element_size() + float(chosen.numel())
    )


def gather_then_sdpa(arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Copy the selected tokens out of the cache, then torch's attention; the list is given."""
    import torch

    q, k, v, chosen, b = (arguments[name] for name in ("q_t", "k", "v", "M", "b"))
    tokens = chosen.repeat_interleave(b, 2).nonzero()[:, 2].view(*k.shape[:2], -1, 1)

    def call() -> Any:
        keys, values = (x.gather(2, tokens.expand(-1, -1, -1, x.shape[3])) for x in (k, v))
        grouped = q.shape[1] != k.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped)

    return call


def gathered(device: str, heads: int, kv_heads: int, tokens: int, d: int, b: int) -> Benchmark:
    return Benchmark(
        "seer_attention.decode_attend",
        f"2048 of {tokens // 1024}k tokens, blocks of {b}",
        device,
        selected_blocks(heads, kv_heads, tokens, d, b, 2048),
        read_selected,
        dtype="bfloat16" if device == "cuda" else "float32",
        rivals=(Rival("gather-sdpa", gather_then_sdpa),),
        settings={"tokens": tokens, "d": d, "heads": heads, "kv_heads": kv_heads, "b": b},
    )


DENSE = (sdpa("flash", causal=True), sdpa("cudnn", causal=True))
STEPS = tuple(gathered("cuda", 32, 8, 131072, 128, b) for b in (1, 16, 64))
BENCHMARKS = (
    gated("cuda", 32, 8, 32768, 128, DENSE),
    gated("cpu", 8, 8, 4096, 64, (torch_sdpa(causal=True),)),
    sparse("cuda", 32, 32768, 128, 128, (flex(block_mask, per_head=True), *DENSE)),
    sparse("cuda", 32, 32768, 128, 64, (flex(block_mask, per_head=True), *DENSE)),
    sparse("cuda", 32, 131072, 128, 128, (flex(block_mask, per_head=True), *DENSE)),
    sparse("cpu", 8, 4096, 64, 64, (torch_sdpa(causal=True),)),
    chosen_blocks(32, 8, 131072, 128, 128),
    chosen_blocks(32, 32, 131072, 128, 128),
    *STEPS,
    *(each.in_a_graph() for each in STEPS),
    gathered("cpu", 8, 8, 65536, 64, 64),
)
