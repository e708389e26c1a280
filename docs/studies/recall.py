"""Associative recall with every layer of the package: ``python docs/studies/recall.py``.

Small models are trained alike to look up values in the context, each with another mixer of tokens,
and what they recall is set against the size of the state that a decoder would carry. The numbers go
to ``recall.json`` beside this file after every evaluation, so that an interrupted run keeps them.

The task is multi-query associative recall. A sequence of `length` tokens begins with `pairs` pairs
of a key and its value, the keys distinct and all else uniform. In the places that remain, every key
is asked once, at random places in random order, and a filler token is everywhere else. Where a key
is asked, its value is to be predicted; nothing else counts. Chance is one in `values`.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from running import cosine, learn, opening, options, write
from torch import Tensor, nn

from attnspec.fast.blocks import Block
from attnspec.fast.dense.attention_module import AttentionBlock
from attnspec.fast.linear.based_module import ConvolutionBlock, TaylorBlock, WindowBlock
from attnspec.fast.linear.flowformer_module import FlowBlock
from attnspec.fast.linear.lightnet_module import LightNetBlock
from attnspec.fast.linear.lightning_attention_1_module import TransNormerBlock
from attnspec.fast.linear.lightning_attention_2_module import LightningBlock
from attnspec.fast.linear.titans_module import TitansBlock

FILLER = 0


@dataclass(frozen=True)
class Settings:
    """The task and the budget, the same for every model."""

    keys: int = 64
    values: int = 64
    length: int = 64
    pairs: tuple[int, ...] = (4, 8, 16)
    batch: int = 64
    steps: int = 300
    learning_rates: tuple[float, ...] = (2e-3, 8e-3)
    weight_decay: float = 0.01
    warm_up: float = 0.05
    evaluations: int = 20
    tested: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One model: its mixer, its width, and the channels of a head, of Based's features."""

    model: str
    width: int = 64
    d: int = 32
    layout: str = ""
    memory_width: int = 32

    @property
    def size(self) -> str:
        if self.model == "Based":
            return f"width {self.width}, features of {self.d}"
        if self.model == "Titans":
            return f"width {self.width}, memory of {self.memory_width}"
        return f"width {self.width}, heads of {self.d}"

    @property
    def name(self) -> str:
        layout = self.layout.upper() if len(self.layout) == 3 else self.layout
        return f"{self.model} {layout}".strip()


WINDOW = 8
"""Tokens of a window, the own one included, of a segment of MAC and of a chunk of a memory."""


class TNL(nn.Module):
    """TransNormerLLM's block as one layer among others: rows alone, the state left behind.

    It is no `Block`, because it brings a norm and a channel mixer of its own.
    """

    def __init__(self, width: int, *, heads: int, layer: int, n_layers: int) -> None:
        super().__init__()
        self.block = TransNormerBlock(width, heads, layer=layer, n_layers=n_layers)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (batch, tokens, width) of rows x, likewise."""
        return self.block(x)[0]

    def state_size(self, tokens: int) -> int:
        return self.block.state_size(tokens)


def mixers(run: Run) -> list[Block | TNL]:
    """The two mixers of a model."""
    width, heads = run.width, run.width // run.d
    if run.model == "Based":
        heads = max(1, width // 64)
        taylor = TaylorBlock(width, heads=heads, feature_dim=run.d)
        return [taylor, WindowBlock(width, heads=heads, left=WINDOW - 1)]
    make: dict[str, Callable[[int], Block | TNL]] = {
        "attention": lambda layer: AttentionBlock(width, heads=heads),
        "window": lambda layer: WindowBlock(width, heads=heads, left=WINDOW - 1),
        "lightning": lambda layer: LightningBlock(width, heads=heads, layer=layer, n_layers=2),
        "TNL block": lambda layer: TNL(width, heads=heads, layer=layer, n_layers=2),
        "LightNet": lambda layer: LightNetBlock(width, heads=heads),
        "Flowformer": lambda layer: FlowBlock(width, heads=heads),
        "Titans": lambda layer: TitansBlock(
            width, layout=run.layout, memory_width=run.memory_width, depth=1, window=WINDOW,
            segment=WINDOW, chunk=WINDOW,
        ),
    }  # fmt: skip
    return [make[run.model](layer) for layer in range(2)]


RUNS = (
    Run("attention"),
    Run("window"),
    Run("Based", d=8),
    Run("lightning"),
    Run("TNL block"),
    Run("LightNet"),
    Run("Flowformer"),
    *(Run("Titans", layout=layout) for layout in ("mag", "mal", "mac", "memory")),
    *(Run(name, d=8) for name in ("lightning", "LightNet", "Flowformer")),
    Run("Based", d=4),
    Run("attention", width=32),
)
"""All models, in an order that has one of each kind first."""


class Model(nn.Module):
    """Embedding, two mixers with a gated convolution before each, a norm and a linear read-out."""

    def __init__(self, run: Run, settings: Settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1 + settings.keys + settings.values, run.width)
        self.layers = nn.ModuleList()
        for mixer in mixers(run):
            self.layers += [ConvolutionBlock(run.width), mixer]
        self.norm = nn.RMSNorm(run.width)
        self.values = nn.Linear(run.width, settings.values, bias=False)

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Logits (batch, pairs, values) at the places `asked` (batch, pairs)."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        x = x.gather(1, asked[..., None].expand(-1, -1, x.shape[2]))
        return self.values(self.norm(x))

    def state_sizes(self, tokens: int) -> list[int]:
        """Numbers in the state of each layer, for one sequence."""
        return [layer.state_size(tokens) for layer in self.layers]


def draw_batch(
    settings: Settings, pairs: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (size, length), the places asked and the values there (size, pairs) from 0."""
    device = generator.device

    def chosen(most: int) -> Tensor:
        return torch.rand(size, most, device=device, generator=generator).argsort(1)[:, :pairs]

    keys = 1 + chosen(settings.keys)
    values = torch.randint(settings.values, (size, pairs), device=device, generator=generator)
    asked = 2 * pairs + chosen(settings.length - 2 * pairs)
    tokens = torch.full((size, settings.length), FILLER, device=device)
    tokens[:, : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = 1 + settings.keys + values
    return tokens.scatter_(1, asked, keys), asked, values


@torch.no_grad()
def recall(model: Model, settings: Settings, pairs: int, size: int, device: str) -> float:
    """The share of values that the model predicts, of sequences it has not been trained on."""
    generator = torch.Generator(device).manual_seed(settings.seed + 1_000_003)
    right = []
    for first in range(0, size, settings.batch):
        part = min(settings.batch, size - first)
        tokens, asked, values = draw_batch(settings, pairs, part, generator)
        right.append((model(tokens, asked).argmax(2) == values).float().mean(1))
    return float(torch.cat(right).mean())


def train(
    run: Run, settings: Settings, learning_rate: float, device: str, deadline: float
) -> Iterator[dict[str, Any]]:
    """Train one model; its record so far after every evaluation.

    Past the `deadline` (of `time.perf_counter`) training stops, and the record says so.
    """
    torch.manual_seed(settings.seed)
    model = Model(run, settings).to(device)
    generator = torch.Generator(device).manual_seed(settings.seed)
    order = torch.Generator().manual_seed(settings.seed)
    draws = torch.randint(len(settings.pairs), (settings.steps,), generator=order).tolist()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=settings.weight_decay
    )
    schedule = cosine(optimiser, settings.steps, settings.warm_up)
    sizes = model.state_sizes(settings.length)
    curve: dict[str, list[float]] = {"step": [], "loss": [], "recall": []}
    record: dict[str, Any] = {
        "name": run.name,
        "size": run.size,
        **asdict(run),
        "learning_rate": learning_rate,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_numbers": sum(sizes),
        "state_bytes": 4 * sum(sizes),
        "state_numbers_by_layer": sizes,
        "curve": curve,
        "stopped": False,
        "diverged": False,
    }
    every = max(1, settings.steps // settings.evaluations)
    losses: list[Tensor] = []
    trained = seconds = 0.0
    start = time.perf_counter()
    for step, draw in enumerate(draws, 1):
        tokens, asked, values = draw_batch(
            settings, settings.pairs[draw], settings.batch, generator
        )
        logits = model(tokens, asked)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), values.flatten())
        learn(loss, optimiser, schedule)
        losses.append(loss.detach())
        if step % every and step != settings.steps:
            continue
        mean = float(torch.stack(losses).mean())
        seconds += time.perf_counter() - start
        trained += len(losses)
        losses = []
        curve["step"].append(step)
        curve["loss"].append(mean)
        curve["recall"].append(
            recall(model, settings, settings.pairs[-1], settings.tested // 8, device)
        )
        start = time.perf_counter()
        rate_of_tokens = trained * settings.batch * settings.length / seconds
        record |= {"seconds": round(seconds, 2), "tokens_per_second": round(rate_of_tokens)}
        record["stopped"] = start > deadline and step != settings.steps
        record["diverged"] = not math.isfinite(mean)
        yield record
        if record["stopped"] or record["diverged"]:
            break
    record["recall"] = {
        str(pairs): recall(model, settings, pairs, settings.tested, device)
        for pairs in settings.pairs
    }
    yield record


def compile_kernels(run: Run, settings: Settings, device: str) -> None:
    """One step of a model, after which its kernels are in the compiler's cache on disk."""
    short = replace(settings, steps=1, tested=settings.batch)
    for _ in train(run, short, settings.learning_rates[0], device, math.inf):
        pass


def study(
    runs: tuple[Run, ...], settings: Settings, device: str, minutes: float, path: Path
) -> dict[str, Any]:
    """All runs one after the other, within `minutes`; `path` has what is known at any time.

    A model is trained once with each learning rate, and the better one counts.
    """
    start = time.perf_counter()
    end = start + 60 * minutes
    if device == "cuda":
        warm(runs, settings, device)
    results: dict[str, Any] = {
        **opening("recall", device, settings),
        "prepared_seconds": round(time.perf_counter() - start, 1),
        "runs": [],
    }
    left = len(runs) * len(settings.learning_rates)
    for n, run in enumerate(runs):
        nothing = {"name": run.name, "size": run.size, **asdict(run), "tried": []}
        results["runs"].append(nothing)
        tried: list[dict[str, Any]] = []
        for learning_rate in settings.learning_rates:
            now = time.perf_counter()
            deadline, left = now + (end - now) / left, left - 1
            try:
                for record in train(run, settings, learning_rate, device, deadline):
                    if better(record, results["runs"][-1]):
                        results["runs"][-1] = record
                    write(path, results)
                tried.append({"learning_rate": learning_rate, "recall": record["recall"]})
            except Exception as error:
                said = f"{type(error).__name__}: {str(error)[:300]}"
                tried.append({"learning_rate": learning_rate, "error": said})
            results["runs"][-1]["tried"] = tried
        report(results["runs"][-1], n, len(runs))
    results["total_seconds"] = round(time.perf_counter() - start, 1)
    write(path, results)
    return results


def better(record: dict[str, Any], than: dict[str, Any]) -> bool:
    """Whether a record shows more recall: at the end, else nothing is said against the latest."""
    if "recall" not in than or than["learning_rate"] == record["learning_rate"]:
        return True
    return "recall" in record and sum(record["recall"].values()) > sum(than["recall"].values())


def warm(runs: tuple[Run, ...], settings: Settings, device: str) -> None:
    """Compile the kernels of all runs side by side; what fails will fail again and be recorded."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(8, mp_context=spawn) as pool:
        for future in [pool.submit(compile_kernels, run, settings, device) for run in runs]:
            future.exception()


def report(record: dict[str, Any], n: int, runs: int) -> None:
    """A line on a finished run."""
    if "recall" not in record:
        said = "; ".join(one.get("error", "no result") for one in record["tried"])
        print(f"{n + 1:>2}/{runs} {record['name']:<14} {record['size']:<28} {said}", flush=True)
        return
    said = (
        f"{record['state_numbers']:>7} numbers, "
        + ", ".join(f"{pairs}: {share:.3f}" for pairs, share in record["recall"].items())
        + f", {record['seconds']:.1f} s at {record['learning_rate']:g}"
        + (", stopped early" if record["stopped"] else "")
        + (", diverged" if record["diverged"] else "")
    )
    print(f"{n + 1:>2}/{runs} {record['name']:<14} {record['size']:<28} {said}", flush=True)


def smoke() -> tuple[tuple[Run, ...], Settings]:
    """A few steps of one small model of each kind: whether it runs, not what it learns."""
    kinds = {run.name: run for run in RUNS}
    runs = tuple(replace(run, width=16, d=8, memory_width=8) for run in kinds.values())
    settings = Settings(
        keys=16, values=16, length=32, pairs=(2, 4), batch=4, steps=2, evaluations=2, tested=8,
        learning_rates=(1e-3,),
    )  # fmt: skip
    return runs, settings


def main() -> None:
    parser = options(__doc__, __file__, "tiny models, a few steps")
    parser.add_argument("--minutes", type=float, default=60.0, help="limit of the whole study")
    parser.add_argument("--steps", type=int, help="steps of training of every model")
    parser.add_argument("--only", help="run the models whose name contains this")
    given = parser.parse_args()
    runs, settings = smoke() if given.smoke else (RUNS, Settings())
    if given.steps:
        settings = replace(settings, steps=given.steps)
    if given.only:
        runs = tuple(run for run in runs if given.only.lower() in run.name.lower())
    study(runs, settings, given.device, given.minutes, given.json)


if __name__ == "__main__":
    main()
