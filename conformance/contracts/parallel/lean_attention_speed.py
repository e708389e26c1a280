"""Benchmarks of lean attention: decoding over long and over ragged contexts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnspec.conformance.bench.inputs import qkv
from attnspec.conformance.bench.model import Benchmark, Cost
from attnspec.conformance.bench.rivals import sdpa, torch_sdpa


def read_once(arguments: Mapping[str, Any]) -> Cost:
    """Keys and values below each length, read once."""
    q, k, v, lengths = (arguments[name] for name in ("q", "k", "v", "lengths"))
    tokens = float(lengths.sum())
    row = k.shape[1] * (k.shape[3] + v.shape[3])
    return Cost(
        2.0 * tokens * q.shape[1] * (k.shape[3] + v.shape[3]), tokens * row * k.element_size()
    )


def workers(found: Any) -> int:
    """One on each multiprocessor, or two where it has as much of memory's rate as on an H200."""
    clock, bits = getattr(found, "memory_clock_rate", 0), getattr(found, "memory_bus_width", 0)
    # Kilohertz, and two transfers a cycle.
    quick = 2e3 * clock * bits / 8 / found.multi_processor_count > 30e9
    return int(found.multi_processor_count) * (2 if quick else 1)


def decode(
    device: str, heads: int, kv_heads: int, d: int, lengths: list[int], **rest: Any
) -> Benchmark:
    keys = max(lengths)

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        shares = {"N": 512, "G": 2}
        if device == "cuda":
            shares = {"N": 128, "G": workers(torch.cuda.get_device_properties(0))}
        arguments = qkv(len(lengths), heads, kv_heads, 1, keys, d, **shares)(device, dtype)
        counts = torch.tensor(lengths, dtype=torch.int32, device=device)
        q, k, v = (arguments.pop(name) for name in ("q", "k", "v"))
        return {"q": q, "k": k, "v": v, "lengths": counts, **arguments}

    name = (
        f"{keys // 1024}k keys"
        if len(lengths) == 1
        else f"batch {len(lengths)}, {keys // 1024}k and 4k keys"
    )
    return Benchmark(
        "lean_attention.attend",
        f"{name}, heads {heads}/{kv_heads}",
        device,
        make,
        read_once,
        settings={"lengths": lengths, "d": d, "heads": heads, "kv_heads": kv_heads},
        **rest,
    )


RIVALS = (sdpa("flash", causal=False), sdpa("cudnn", causal=False))
ONE = tuple(decode("cuda", 32, 8, 128, [keys], rivals=RIVALS) for keys in (8192, 32768, 131072))
BENCHMARKS = (
    *ONE,
    *(each.in_a_graph() for each in ONE),
    decode("cuda", 32, 8, 128, [524288], rivals=RIVALS),
    decode("cuda", 32, 8, 128, [131072] + [4096] * 15, rivals=(sdpa("efficient", lengths=True),)),
    decode("cpu", 8, 8, 64, [65536], dtype="float32", rivals=(torch_sdpa(causal=False),)),
)
