"""Pointer networks that learn geometry: ``python docs/studies/pointing.py``.

Two small networks are trained, one to draw the convex hull of points in a square and one to find
their shortest tour, from exact answers that a solver gives as they go. They are tested on other
points, more of them than in training too. The numbers go to ``pointing.json`` beside this file
after every evaluation, so that an interrupted run keeps them.

The network is that of the paper: an LSTM reads the points in the order given, another one starts
from its last state and points, and the softmax of additive scores over the encoder's states is the
answer's next position. There is no glimpse. Slot 0 is the end of a hull; a tour ends by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from running import cosine, learn, opening, options, write
from torch import Tensor, nn

from attnspec.fast.scores.pointer_networks import (
    is_permutation,
    pointer_cross_entropy,
    pointer_log_probs,
    pointer_scores,
    tour_length,
    tsp_target,
)
from attnspec.fast.scores.pointer_networks_decoding import beam_decode, greedy_decode, step_limit
from attnspec.fast.scores.pointer_networks_tasks import hull_targets, hulls_metrics
from attnspec.reference.scores.pointer_networks_tours import nearest_neighbour_tour

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Settings:
    """The same for both tasks; every batch has one number of points, each number as often.

    `hulls` and `tours` are the numbers of points in the tests.
    """

    points: tuple[int, int] = (5, 10)
    hulls: tuple[int, ...] = (5, 10, 15, 20)
    tours: tuple[int, ...] = (5, 10, 12)
    width: int = 128
    batch: int = 128
    steps: int = 4000
    learning_rate: float = 3e-3
    warm_up: float = 0.02
    evaluations: int = 40
    tested: int = 1000
    beam: int = 4
    shown: int = 3
    seed: int = 0


class PointerNetwork(nn.Module):
    """Encoder and decoder of one LSTM layer each around a pointer of half their width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(2, width, bias=False)
        self.encoder = nn.LSTM(width, width, batch_first=True)
        self.decoder = nn.LSTM(width, width, batch_first=True)
        self.start, self.end = (nn.Parameter(0.08 * torch.randn(width)) for _ in range(2))
        half = width // 2
        self.W1, self.W2 = (
            nn.Parameter(torch.randn(half, width) / math.sqrt(width)) for _ in range(2)
        )
        self.v = nn.Parameter(torch.randn(half) / math.sqrt(half))

    def encode(self, points: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """What slots feed the decoder and what they are pointed at by, both
        (batch, n + 1, width), and the decoder's first state.
        """
        embedded = self.embed(points)
        states, last = self.encoder(embedded)
        start, end = (x.expand(len(points), 1, -1) for x in (self.start, self.end))
        return torch.cat([start, embedded], 1), torch.cat([end, states], 1), last

    def loss(self, points: Tensor, targets: Tensor) -> Tensor:
        """The loss, in nats a step, of `targets` int64 (batch, steps), slots, -1 behind the end."""
        inputs, e, state = self.encode(points)
        real = targets >= 0
        slots = targets.clamp(min=0)
        last = nn.functional.pad(slots[:, :-1], (1, 0))
        d, _ = self.decoder(inputs.gather(1, last[..., None].expand(-1, -1, e.shape[2])), state)
        return pointer_cross_entropy(e, d, self.W1, self.W2, self.v, slots, target_mask=real)

    def step(self, state: State, last: Tensor) -> tuple[Tensor, State]:
        """Log-probabilities (rows, n + 1) after slots `last` int64 (rows), and the next state."""
        inputs, e, h, c = state
        x = inputs[torch.arange(len(last), device=last.device), last]
        d, (h, c) = self.decoder(x[:, None], (h[None], c[None]))
        logp = pointer_log_probs(pointer_scores(e, d, self.W1, self.W2, self.v), None)
        return logp[:, 0], (inputs, e, h[0], c[0])

    @torch.no_grad()
    def answer(self, task: str, points: Tensor, constraint: str | None, beam: int = 1) -> Tensor:
        """Slots int64 (batch, most), -1 behind the end."""
        inputs, e, (h, c) = self.encode(points)
        state, n = (inputs, e, h[0], c[0]), points.shape[1]
        limit = step_limit(task, n)
        if beam == 1:
            return greedy_decode(self.step, state, n, constraint, limit)[0]
        return beam_decode(self.step, state, n, beam, constraint, limit)[0][:, 0]


def solve(task: str, points: Tensor) -> Tensor:
    """The exact answers, slots int64 (batch, steps), -1 behind the end."""
    if task == "tsp":
        return 1 + tsp_target(points)
    hull = hull_targets(points)
    slots = nn.functional.pad(torch.where(hull < 0, -1, 1 + hull), (0, 1), value=-1)
    vertices = (hull >= 0).sum(1, keepdim=True)
    return slots.scatter(1, vertices, 0)[:, : int(vertices.max()) + 1]


def judge(task: str, points: Tensor, slots: Tensor) -> dict[str, float | None]:
    """How good answers are: hulls by accuracy and area, tours by their length over the optimum."""
    if task == "hull":
        valid, accuracy, coverage = hulls_metrics(points, (slots - 1).clamp(min=-1))
        share = float(valid.float().mean())
        return {
            "valid": share,
            "accuracy": float(accuracy.mean()),
            "coverage": float(coverage[valid].mean()) if share >= 0.99 else None,
        }
    valid = is_permutation(slots - 1, points.shape[1])
    best = tour_length(points, tsp_target(points))
    # Of an answer that ends at once no length is taken, so any index does.
    ratio = tour_length(points, (slots - 1).clamp(min=0)) / best
    return {
        "valid": float(valid.float().mean()),
        "accuracy": float((valid & (ratio < 1 + 1e-5)).float().mean()),
        "ratio": float(ratio[valid].mean()) if bool(valid.any()) else None,
    }


def tested_points(settings: Settings, n: int) -> Tensor:
    """The points (tested, n, 2) that the networks are tested on, drawn on the CPU."""
    generator = torch.Generator().manual_seed(1_000_003 + n + settings.seed)
    return torch.rand(settings.tested, n, 2, generator=generator)


def judged(
    model: PointerNetwork, task: str, settings: Settings, n: int, device: str
) -> list[dict[str, Any]]:
    """Every way of decoding on `n` points."""
    points = tested_points(settings, n)
    rows = []
    for constraint, beam in ((None, 1), (task, 1), (task, settings.beam)):
        slots = model.answer(task, points.to(device), constraint, beam).cpu()
        rows.append(
            {"points": n, "constrained": constraint is not None, "beam": beam}
            | judge(task, points, slots)
        )
    return rows


def train(task: str, settings: Settings, device: str) -> Iterator[dict[str, Any]]:
    """Train one network; its record so far after every evaluation."""
    torch.manual_seed(settings.seed)
    model = PointerNetwork(settings.width).to(device)
    generator = torch.Generator().manual_seed(settings.seed)
    low, high = settings.points
    numbers = torch.randint(low, high + 1, (settings.steps,), generator=generator).tolist()
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    schedule = cosine(optimiser, settings.steps, settings.warm_up)
    curve: dict[str, list[Any]] = {"step": [], "loss": [], "accuracy": [], "valid": []}
    record: dict[str, Any] = {
        "task": task,
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
    }
    seconds, losses = 0.0, list[Tensor]()
    start = time.process_time()
    for step, n in enumerate(numbers, 1):
        points = torch.rand(settings.batch, n, 2, generator=generator)
        targets = solve(task, points)
        loss = model.loss(points.to(device), targets.to(device))
        learn(loss, optimiser, schedule, norm=2.0)
        losses.append(loss.detach())
        if step % max(1, settings.steps // settings.evaluations) and step != settings.steps:
            continue
        seconds += time.process_time() - start
        points = tested_points(settings, high)
        score = judge(task, points, model.answer(task, points.to(device), None).cpu())
        curve["step"].append(step)
        curve["loss"].append(round(float(torch.stack(losses).mean()), 4))
        curve["accuracy"].append(score["accuracy"])
        curve["valid"].append(score["valid"])
        record["cpu_seconds"] = round(seconds, 1)
        yield record
        losses, start = [], time.process_time()
    record["tests"] = []
    for n in settings.hulls if task == "hull" else settings.tours:
        record["tests"] += judged(model, task, settings, n, device)
        yield record
    record["shown"] = shown(model, task, settings, device)
    yield record


def shown(
    model: PointerNetwork, task: str, settings: Settings, device: str
) -> list[dict[str, Any]]:
    """The first answers to the test with the most points of training, greedy and unconstrained."""
    points = tested_points(settings, settings.points[1])[: settings.shown]
    slots = model.answer(task, points.to(device), None).cpu()
    exact = solve(task, points)
    return [
        {
            "points": [[round(x, 4) for x in point] for point in where.tolist()],
            "answer": [slot - 1 for slot in answer.tolist() if slot > 0],
            "exact": [slot - 1 for slot in true.tolist() if slot > 0],
        }
        for where, answer, true in zip(points, slots, exact, strict=True)
    ]


def nearest_neighbours(settings: Settings) -> list[dict[str, Any]]:
    """A baseline for tours: always on to the nearest point left."""
    rows = []
    for n in settings.tours:
        points = tested_points(settings, n)
        tours = torch.stack([torch.from_numpy(nearest_neighbour_tour(p.numpy())) for p in points])
        rows.append({"points": n} | judge("tsp", points, 1 + tours))
    return rows


def study(settings: Settings, device: str, path: Path) -> None:
    """Both tasks; `path` has what is known at any time."""
    results: dict[str, Any] = {
        **opening("pointing", device, settings),
        "nearest": nearest_neighbours(settings),
        "runs": [],
    }
    for task in ("hull", "tsp"):
        results["runs"].append({"task": task})
        for record in train(task, settings, device):
            results["runs"][-1] = record
            write(path, results)
            if "tests" not in record:
                last = {name: values[-1] for name, values in record["curve"].items()}
                print(task, last, f"{record['cpu_seconds']} s of CPU", flush=True)
        for row in results["runs"][-1]["tests"]:
            print(task, row, flush=True)


SMOKE = Settings(
    points=(5, 6), hulls=(5, 7), tours=(5, 7), width=16, batch=8, steps=4, evaluations=2, tested=8
)
"""Whether it runs, not what it learns."""


def main() -> None:
    parser = options(__doc__, __file__, "tiny networks, a few steps")
    parser.add_argument("--steps", type=int, help="steps of training, of both networks")
    parser.add_argument("--width", type=int, help="width of their LSTM layers")
    given = parser.parse_args()
    settings = SMOKE if given.smoke else Settings()
    changes = {"steps": given.steps, "width": given.width}
    settings = replace(settings, **{name: n for name, n in changes.items() if n})
    study(settings, given.device, given.json)


if __name__ == "__main__":
    main()
