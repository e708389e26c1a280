"""What the scripts of the studies share: options, records, steps of training."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnspec.conformance.bench.run import provenance


def options(doc: str, script: str, smoke: str) -> argparse.ArgumentParser:
    """What every script is given: a device, the file for its numbers, whether it is a `smoke`."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result = Path(script).with_suffix(".json")
    parser.add_argument("--json", type=Path, default=result, help="where the numbers go")
    parser.add_argument("--smoke", action="store_true", help=smoke)
    return parser


def need(package: str, install: str) -> None:
    """End the script unless `package` is there, and say how to `install` it."""
    if importlib.util.find_spec(package) is None:
        raise SystemExit(f"this study needs {package}: pip install {install}")


def opening(study: str, device: str, settings: Any) -> dict[str, Any]:
    """What the numbers of a study depend on, before there are any."""
    return {
        "study": study,
        **provenance(),
        "device": device,
        "dtype": "float32",
        "settings": asdict(settings),
    }


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file in one piece."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def learn(
    loss: Tensor,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    norm: float = 1.0,
) -> None:
    """One step down the gradient of the loss, which is cut to `norm`."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(trained, norm)
    optimiser.step()
    schedule.step()


def cosine(
    optimiser: torch.optim.Optimizer, steps: int, warm_up: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rates that rise linearly in a share `warm_up` of the steps, then half a cosine."""
    rise = max(1.0, warm_up * steps)

    def rate(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1.0, steps - rise))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, rate)


def thinned(losses: list[float], points: int = 30) -> list[list[float]]:
    """Means of the losses of at most `points` stretches, each with its last step."""
    every = max(1, math.ceil(len(losses) / points))
    return [
        [first + len(part), round(sum(part) / len(part), 4)]
        for first in range(0, len(losses), every)
        if (part := losses[first : first + every])
    ]
