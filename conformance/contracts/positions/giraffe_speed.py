"""Benchmarks of Giraffe: rotation and attention against torch's, and against attention alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import attention_cost, forward_and_backward, qkv
from attnspec.conformance.bench.model import Benchmark, Rival
from attnspec.conformance.bench.rivals import reference, sdpa, torch_sdpa, with_backward
from attnspec.reference.positions.giraffe import attend
from attnspec.reference.positions.giraffe_rotation import rope_basis

SCALE = 16.0
HEADS = 32


def linear(make: Callable[[str, str], dict[str, Any]], d: int) -> Any:
    """The inputs of `make` with linearly scaled frequencies."""

    def with_frequencies(device: str, dtype: str) -> dict[str, Any]:
        import torch

        f = torch.from_numpy(rope_basis(d, scale=SCALE)).to(device)
        return {**make(device, dtype), "f": f}

    return with_frequencies


def rotary(compiled: bool, backward: bool = False) -> Rival:
    """The usual rotation by tables in the dtype of q, then torch's attention; with an argument
    `lam` (q_tokens, 1) queries are multiplied by it.
    """

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        q, k, v, f = (arguments[name] for name in ("q", "k", "v", "f"))
        lam = arguments.get("lam")
        angles = torch.arange(k.shape[2], device=k.device)[:, None] * f.float()
        cos, sin = (table.repeat(1, 2).to(q.dtype) for table in (angles.cos(), angles.sin()))

        def turn(x: Any) -> Any:
            first, second = x.chunk(2, dim=-1)
            return x * cos[-x.shape[2] :] + torch.cat((-second, first), -1) * sin[-x.shape[2] :]

        def forward(q: Any, k: Any, v: Any) -> Any:
            turned = turn(q) if lam is None else turn(q) * lam
            return torch.nn.functional.scaled_dot_product_attention(
                turned, turn(k), v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )

        run = torch.compile(forward, dynamic=False) if compiled else forward
        if backward:
            return with_backward(lambda: run(q, k, v), (q, k, v))
        return lambda: run(q, k, v)

    return Rival("rotary-compiled" if compiled else "rotary-torch", prepare)


def prompt(tokens: int, kv_heads: int = HEADS, d: int = 128, backward: bool = False) -> Benchmark:
    """A layer on one prompt at a scale of 16."""
    return Benchmark(
        "giraffe.attend",
        f"{tokens // 1024}k d={d} heads={HEADS}/{kv_heads}"
        + (" forward+backward" if backward else ""),
        "cuda",
        linear(qkv(1, HEADS, kv_heads, tokens, tokens, d), d),
        attention_cost(pairs=tokens * (tokens + 1) / 2, factor=3.5 if backward else 1.0),
        call=forward_and_backward if backward else None,
        rivals=(
            rotary(compiled=False, backward=backward),
            rotary(compiled=True, backward=backward),
            sdpa("flash", backward, causal=True),
            sdpa("cudnn", backward, causal=True),
        ),
        settings={"tokens": tokens, "d": d, "heads": HEADS, "kv_heads": kv_heads, "scale": SCALE},
    )


BENCHMARKS = (
    prompt(4096),
    prompt(16384),
    prompt(32768, kv_heads=8),
    prompt(16384, backward=True),
    Benchmark(
        "giraffe.xpos_attend",
        "16k d=128 heads=32/32 b=8192",
        "cuda",
        qkv(1, HEADS, HEADS, 16384, 16384, 128, N=16384, b=8192),
        attention_cost(pairs=16384 * 16385 / 2),
        rivals=(sdpa("flash", causal=True), sdpa("cudnn", causal=True)),
        settings={"tokens": 16384, "d": 128, "heads": HEADS, "b": 8192},
    ),
    Benchmark(
        "giraffe.attend",
        "1k d=64 heads=8",
        "cpu",
        linear(qkv(1, 8, 8, 1024, 1024, 64), 64),
        attention_cost(pairs=1024 * 1025 / 2),
        dtype="float32",
        rivals=(rotary(compiled=False), torch_sdpa(causal=True), reference(attend)),
        settings={"tokens": 1024, "d": 64, "heads": 8, "scale": SCALE},
    ),
)
