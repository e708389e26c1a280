"""Benchmarks of pointer networks: the additive score and the loss that never stores it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.model import Benchmark, Cost, Rival


def states(batch: int, steps: int, slots: int, width: int) -> Any:
    """Encoder and decoder states, weights and targets."""

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        kind = getattr(torch, dtype)

        def normal(*shape: int) -> Any:
            return torch.randn(shape, generator=generator, device=device).to(kind)

        scale = width**-0.5
        return {
            "e": normal(batch, slots, width),
            "d": normal(batch, steps, width),
            "W1": normal(width, width) * scale,
            "W2": normal(width, width) * scale,
            "v": normal(width),
            "targets": torch.randint(slots, (batch, steps), generator=generator, device=device),
        }

    return make


def tanh_cost(arguments: Mapping[str, Any]) -> Cost:
    """Two projections, and add, tanh and multiply-add for each step, slot and channel."""
    e, d = arguments["e"], arguments["d"]
    batch, slots, width = e.shape
    steps = d.shape[1]
    projections = 2.0 * batch * (slots + steps) * width * width
    moved = (e.numel() + d.numel() + 2 * width * width) * e.element_size()
    return Cost(projections + 4.0 * batch * steps * slots * width, moved)


def eager() -> Rival:
    """The same loss in plain torch, which stores (batch, steps, slots, width)."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        e, d, W1, W2, v, targets = (arguments[n] for n in ("e", "d", "W1", "W2", "v", "targets"))

        def call() -> Any:
            hidden = torch.tanh((e @ W1.T)[:, None] + (d @ W2.T)[:, :, None])
            logp = torch.log_softmax((hidden @ v).float(), -1)
            return -logp.gather(-1, targets[..., None]).mean()

        return call

    return Rival("torch", prepare)


def loss(device: str, batch: int, steps: int, slots: int, width: int) -> Benchmark:
    return Benchmark(
        "pointer_networks.pointer_cross_entropy",
        f"batch {batch}, {steps} steps, {slots} slots, width {width}",
        device,
        states(batch, steps, slots, width),
        tanh_cost,
        dtype="bfloat16" if device == "cuda" else "float32",
        rivals=(eager(),),
        settings={"batch": batch, "steps": steps, "slots": slots, "width": width},
    )


BENCHMARKS = (
    loss("cuda", 128, 51, 51, 256),
    loss("cuda", 16, 512, 512, 256),
    loss("cpu", 16, 51, 51, 128),
)
