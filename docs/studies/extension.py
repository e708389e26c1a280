"""Longer contexts with every scheme of positions: ``python docs/studies/extension.py``.

A small model is trained to look up lines in short prompts. Then its positions are changed, scheme
by scheme: as they are and after a few steps of fine-tuning at twice the length it is asked about
prompts of up to eight times the length it was trained on. The numbers go to ``extension.json``
beside this file after every scheme, so that an interrupted run keeps them.

Prompts are those of `attnspec.reference.positions.giraffe_lines`, made short: only lines and
questions are kept; a line is two tokens, its id (two letters, a token each pair) and its number
(in thousands, rounded up, 50 tokens); a question is one token, the id again. After it the number is
to be predicted. In training every line of a prompt is asked for, each question with its answer
behind it; in a test one is. Chance is one in 50.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from running import learn, opening, options, thinned, write
from torch import Tensor, nn

from attnspec.fast.blocks import Heads, joined
from attnspec.fast.linear.based_module import ConvolutionBlock
from attnspec.fast.positions import entropy_abf, giraffe
from attnspec.reference.positions.giraffe_lines import LARGEST, make_lines

LINE = re.compile(r"^line ([a-z]{2}): REGISTER_CONTENT is <(\d+)>$", re.MULTILINE)
QUESTION = re.compile(r"of line ([a-z]{2})\?")
IDS, THOUSAND = 26 * 26, 1000
NUMBERS = LARGEST // THOUSAND


@dataclass(frozen=True)
class Settings:
    """The model and the budget."""

    width: int = 64
    heads: int = 2
    layers: int = 1
    length: int = 32
    batch: int = 64
    steps: int = 600
    learning_rate: float = 8e-3
    tuned_length: int = 64
    tuned_batch: int = 32
    tuned_steps: int = 60
    tuned_rate: float = 1e-3
    tested_lengths: tuple[int, ...] = (32, 64, 96, 128, 192, 256)
    tested: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Scheme:
    """How places become rotations; the fields are the parameters of the operations."""

    name: str
    scale: float = 1.0
    power: float = 0.0
    truncate: float = 0.0
    random: bool = False
    xpos: bool = False
    b: float = 512.0
    base: float = 10000.0
    c: float = math.inf

    def frequencies(self, d: int) -> Tensor:
        return giraffe.rope_basis(d, self.base, self.scale, self.power, self.truncate)


class Layer(nn.Module):
    """A gated convolution, then x + out(attention(norm(x))) with the rotations of a scheme."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.convolution = ConvolutionBlock(width)
        self.norm = nn.RMSNorm(width)
        self.heads = Heads(width, settings.heads)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, places: Tensor, scheme: Scheme, table: int) -> Tensor:
        x = self.convolution(x)
        q, k, v = self.heads(self.norm(x))
        d = q.shape[3]
        if scheme.xpos:
            # xPos pairs neighbouring channels, all else channels m and m + d/2.
            pairs = torch.arange(d, device=x.device).view(2, -1).T.flatten()
            o, _ = giraffe.xpos_attend(
                q[..., pairs], k[..., pairs], v, places, places, N=table, b=scheme.b
            )
        elif scheme.c < math.inf:
            o, _ = entropy_abf.extended_attention(
                q, k, v, layer=0, base=scheme.base, c=scheme.c, n_exempt=0
            )
        else:
            o, _ = giraffe.attend(q, k, v, places, places, scheme.frequencies(d).to(x.device))
        return x + self.out(joined(o))


class Model(nn.Module):
    """Embedding, layers of attention, a norm and a linear read-out of numbers."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(IDS + NUMBERS, settings.width)
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.width)
        self.numbers = nn.Linear(settings.width, NUMBERS, bias=False)
        self.table = 2 * max(settings.tested_lengths)

    def forward(self, tokens: Tensor, asked: Tensor, scheme: Scheme, places: Tensor) -> Tensor:
        """Logits (batch, questions, numbers) at the places `asked` (questions)."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, places, scheme, self.table)
        return self.numbers(self.norm(x[:, asked]))


def draw_batch(
    rng: np.random.Generator, size: int, length: int, questions: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (size, length - 1), the places of the questions, and the answers from 0."""
    lines = length // 2 - questions
    tokens = np.empty((size, length), np.int64)
    for row in tokens:
        prompt, _ = make_lines(rng, lines, "letters")
        found = LINE.findall(prompt)
        ids = np.array([_id(letters) for letters, _ in found])
        numbers = IDS + np.array([(int(value) - 1) // THOUSAND for _, value in found])
        (first,) = np.flatnonzero(ids == _id(QUESTION.findall(prompt)[0]))
        others = rng.permutation(np.delete(np.arange(lines), first))
        order = np.concatenate([np.arange(lines), [first], others[: questions - 1]])
        row[0::2], row[1::2] = ids[order], numbers[order]
    given = torch.from_numpy(tokens).to(device)
    asked = torch.arange(2 * lines, length, 2, device=device)
    return given[:, :-1], asked, given[:, asked + 1] - IDS


def _id(letters: str) -> int:
    first, second = (ord(letter) - ord("a") for letter in letters)
    return 26 * first + second


def places(tokens: Tensor, scheme: Scheme, training: bool) -> Tensor:
    """0, 1, 2, ..., or in training random steps, others for each sequence."""
    if scheme.random and training:
        return giraffe.random_positions(torch.rand(tokens.shape, device=tokens.device))
    return torch.arange(tokens.shape[1], device=tokens.device)


def tests(settings: Settings, device: str) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """By length the prompts, with one question each, that every scheme is asked."""
    found = {}
    for length in settings.tested_lengths:
        rng = np.random.default_rng(settings.seed + 1_000_003 + length)
        found[length] = draw_batch(rng, settings.tested, length, 1, device)
    return found


@torch.no_grad()
def accuracy(
    model: Model, scheme: Scheme, asked_of: dict[int, tuple[Tensor, Tensor, Tensor]]
) -> dict[str, float]:
    """The share of right answers by the length of the prompt."""
    found = {}
    for length, (tokens, asked, answers) in asked_of.items():
        logits = [
            model(part, asked, scheme, places(part, scheme, False))
            for part in tokens.split(max(1, 8192 // length))
        ]
        right = torch.cat(logits).argmax(2) == answers
        found[str(length)] = round(float(right.float().mean()), 4)
    return found


def train(
    model: Model, settings: Settings, schemes: Iterator[Scheme], rate: float, length: int,
    batch: int, steps: int, seed: int, device: str,
) -> list[float]:  # fmt: skip
    """Train with the next scheme in every step; the loss, in nats a question, of every step."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, max(2, steps), pct_start=0.1)
    losses = []
    for _, scheme in zip(range(steps), schemes, strict=False):
        # Prompts of a quarter of the length upwards: few lines are what it learns from first.
        tokens_of_prompt = int(rng.integers(length // 8, length // 2 + 1)) * 2
        questions = tokens_of_prompt // 4
        tokens, asked, answers = draw_batch(rng, batch, tokens_of_prompt, questions, device)
        logits = model(tokens, asked, scheme, places(tokens, scheme, True))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        learn(loss, optimiser, schedule)
        losses.append(loss.item())
    return losses


def constant(scheme: Scheme) -> Iterator[Scheme]:
    while True:
        yield scheme


def fading(scheme: Scheme, steps: int) -> Iterator[Scheme]:
    """xPos at first nearly without a fade, then in even ratios down to the scheme's own."""
    for step in range(steps):
        yield replace(scheme, b=scheme.b * 64 ** (1 - step / max(1, steps - 1)))


def schemes(settings: Settings) -> list[tuple[Scheme, bool, list[Scheme]]]:
    """What is changed, whether the model is tuned with it, and other schemes to test that with."""
    length = settings.length
    plain = Scheme("plain")
    linear = [Scheme(f"linear {scale}", scale=scale) for scale in (2, 4, 8)]
    powers = [Scheme(f"power {power}", power=power) for power in (0.1, 0.5)]
    truncated = Scheme("truncated", truncate=length)
    adjusted = Scheme("adjusted base", base=500_000.0)
    entropy = Scheme("entropy-ABF", base=500_000.0, c=length)
    xpos = Scheme("xPos", xpos=True, b=2.0 * length)
    scattered = Scheme("random", random=True)
    as_is = [plain, *linear, *powers, truncated, adjusted, entropy, xpos]
    tuned = [plain, *linear[:2], *powers, truncated, scattered, adjusted, entropy]
    return [
        *((scheme, False, []) for scheme in as_is),
        *((scheme, True, []) for scheme in tuned[:2]),
        (linear[1], True, [Scheme("linear 6", scale=6), linear[2]]),
        *((scheme, True, []) for scheme in tuned[3:]),
        (Scheme("random, linear 4", scale=4, random=True), True, []),
        (xpos, True, []),
    ]


def study(settings: Settings, device: str, path: Path) -> dict[str, Any]:
    """Train the model, then change it in every way; `path` has what is known at any time."""
    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    model = Model(settings).to(device)
    plain = Scheme("plain")
    losses = train(
        model, settings, constant(plain), settings.learning_rate, settings.length,
        settings.batch, settings.steps, settings.seed, device,
    )  # fmt: skip
    asked_of = tests(settings, device)
    results: dict[str, Any] = {
        **opening("extension", device, settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "numbers": NUMBERS,
        "trained": {"seconds": round(time.perf_counter() - start, 1), "loss": thinned(losses)},
        "runs": [],
    }
    for scheme, tuned, others in schemes(settings):
        since = time.perf_counter()
        changed, record = model, {"tuned": tuned}
        if tuned:
            changed = deepcopy(model)
            losses = train(
                changed, settings,
                fading(scheme, settings.tuned_steps) if scheme.xpos else constant(scheme),
                settings.tuned_rate, settings.tuned_length, settings.tuned_batch,
                settings.tuned_steps, settings.seed + 1, device,
            )  # fmt: skip
            record["loss"] = thinned(losses)
            record["seconds"] = round(time.perf_counter() - since, 1)
        for tested in (scheme, *others):
            given = {k: v for k, v in asdict(tested).items() if v != math.inf}
            found = accuracy(changed, tested, asked_of)
            results["runs"].append(
                {**given, **record, "tested_as": tested.name, "name": scheme.name, "right": found}
            )
            report(results["runs"][-1])
        write(path, results)
    results["total_seconds"] = round(time.perf_counter() - start, 1)
    write(path, results)
    return results


def report(record: dict[str, Any]) -> None:
    """A line on a finished run."""
    how = "tuned" if record["tuned"] else "as is"
    shares = ", ".join(f"{length}: {share:.2f}" for length, share in record["right"].items())
    print(f"{record['name']:<17} {how}, tested {record['tested_as']:<17} {shares}", flush=True)


def main() -> None:
    parser = options(__doc__, __file__, "a tiny model, a few steps")
    parser.add_argument("--steps", type=int, help="steps of training before positions are changed")
    given = parser.parse_args()
    settings = Settings()
    if given.smoke:
        settings = Settings(
            width=16, length=16, batch=2, steps=2, tuned_length=32, tuned_batch=2,
            tuned_steps=2, tested_lengths=(16, 32), tested=4,
        )  # fmt: skip
    if given.steps:
        settings = replace(settings, steps=given.steps)
    study(settings, given.device, given.json)


if __name__ == "__main__":
    main()
