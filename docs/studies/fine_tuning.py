"""Fine-tuning to four times the context, in groups: ``python docs/studies/fine_tuning.py``.

A small Llama of the transformers library, its weights random, learns a language at a short context
and is then fine-tuned at four times that length, its positions interpolated: with dense attention,
with LongLoRA's groups and with SinkLoRA's, training all weights, adapters, or adapters with
embeddings and norms. Whatever it was trained with, it is tested with dense attention. The numbers
go to ``fine_tuning.json`` beside this file after every run, so that an interrupted study keeps
them.

The language: every document has a few or many phrases of its own, random sequences of tokens, and
is one phrase after another, each drawn uniformly. A phrase can be foretold once it has been read,
so that the loss falls with the length of the context for as long as there are phrases not yet met.
"""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from running import learn, need, opening, options, thinned, write
from torch import Tensor, nn

from attnspec.fast.backend import launch_count
from attnspec.fast.patterns.longlora import choose_group_size, interpolation_factor, s2_mask
from attnspec.fast.patterns.longlora_adapters import adapt, merge
from attnspec.fast.patterns.sinklora import sf_mask
from attnspec.fast.transformers import register


@dataclass(frozen=True)
class Settings:
    """The language, the model and the budget."""

    vocabulary: int = 128
    phrases: tuple[int, int] = (2, 40)
    phrase: int = 6
    width: int = 64
    heads: int = 4
    layers: int = 2
    length: int = 64
    batch: int = 32
    steps: int = 400
    learning_rate: float = 4e-3
    tuned_length: int = 256
    tuned_batch: int = 8
    tuned_steps: int = 100
    tuned_rate: float = 1e-3
    warm_up: int = 20
    r: int = 8
    alpha: float = 16.0
    sinks: int = 4
    tested: int = 128
    bin: int = 32
    seed: int = 0

    @property
    def group(self) -> int:
        return choose_group_size(self.tuned_length)


WEIGHTS = {"all": None, "LoRA": "", "LoRA+": "embed,norm"}
"""What is trained: all, or adapters and the parameters with one of these in their names."""
IMPLEMENTATIONS = {"dense": "attnspec", "S2-Attn": "study_s2", "SF-Attn": "study_sf"}
"""Attention in training, by the name under which the library knows it."""


def draw_batch(settings: Settings, size: int, length: int, generator: torch.Generator) -> Tensor:
    """Tokens (size, length) of as many documents, cut out at a random place of a phrase.

    Numbers of phrases are even in their logarithm.
    """
    device, (least, most) = generator.device, settings.phrases
    many = length // settings.phrase + 2
    dictionary = torch.randint(
        settings.vocabulary, (size, most, settings.phrase), generator=generator, device=device
    )
    spread = torch.rand(size, 1, generator=generator, device=device)
    own = (least * (most / least) ** spread).round()
    chosen = (torch.rand(size, many, generator=generator, device=device) * own).long()
    text = dictionary.gather(1, chosen[..., None].expand(-1, -1, settings.phrase)).flatten(1)
    start = int(torch.randint(settings.phrase, (), generator=generator, device=device))
    return text[:, start : start + length]


class PairEmbedding(nn.Module):
    """An embedding of each token and one, added to it, of the token before.

    With it a layer can find what followed a token; else two have to learn that together, which
    takes a small Llama many more steps.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.token, self.before = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        for embedding in (self.token, self.before):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        before = nn.functional.pad(self.before(tokens[:, :-1]), (0, 0, 1, 0))
        return self.token(tokens) + before


def make_model(settings: Settings, factor: float = 1.0) -> Any:
    """A Llama with random weights whose positions are divided by `factor`."""
    import transformers

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if factor > 1:
        rope |= {"rope_type": "linear", "factor": factor}
    config = transformers.LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.tuned_length,
        rope_parameters=rope,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=settings.width**-0.5,
        attn_implementation="attnspec",
    )
    model = transformers.LlamaForCausalLM(config)
    model.set_input_embeddings(PairEmbedding(settings.vocabulary, settings.width))
    return model


def train(
    model: Any, settings: Settings, rate: float, length: int, batch: int, steps: int, seed: int,
    device: str,
) -> list[float]:  # fmt: skip
    """Train what requires a gradient; the loss, in nats a token, of every step."""
    generator = torch.Generator(device).manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / settings.warm_up)
    )
    losses = []
    model.train()
    for _ in range(steps):
        tokens = draw_batch(settings, batch, length, generator)
        loss = model(tokens, labels=tokens, use_cache=False).loss
        learn(loss, optimiser, schedule)
        losses.append(loss.item())
    return losses


@torch.no_grad()
def losses_by_context(model: Any, settings: Settings, device: str) -> list[float]:
    """Mean loss of the tokens that follow 0 to `bin` others, `bin` to twice that, and so on."""
    model.eval()
    model.set_attn_implementation(IMPLEMENTATIONS["dense"])
    generator = torch.Generator(device).manual_seed(settings.seed + 1_000_003)
    sums = torch.zeros(settings.tuned_length, device=device)
    for first in range(0, settings.tested, settings.tuned_batch):
        size = min(settings.tuned_batch, settings.tested - first)
        tokens = draw_batch(settings, size, settings.tuned_length + 1, generator)
        logits = model(tokens[:, :-1], use_cache=False).logits
        losses = nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        sums += losses.sum(0)
    means = (sums / settings.tested).unflatten(0, (-1, settings.bin)).mean(1)
    return [round(x, 4) for x in means.tolist()]


def pairs_share(settings: Settings) -> dict[str, float]:
    """Pairs of tokens that attend in training, by attention, of those of dense attention."""
    T, G, H = settings.tuned_length, settings.group, settings.heads
    dense = H * T * (T + 1) // 2
    masks = {"S2-Attn": s2_mask(T, G, H), "SF-Attn": sf_mask(T, G, H, s=settings.sinks)}
    shares = {name: round(int(mask.sum()) / dense, 4) for name, mask in masks.items()}
    return {"dense": 1.0, **shares}


def tune(
    base: Any, settings: Settings, attention: str, weights: str, device: str
) -> dict[str, Any]:
    """Fine-tune a copy of the short model; its record."""
    torch.manual_seed(settings.seed)
    model = lengthened(base, settings)
    names = WEIGHTS[weights]
    if names is not None:
        adapt(model, settings.r, settings.alpha, trainable_params=names)
    model.set_attn_implementation(IMPLEMENTATIONS[attention])
    start, launched = time.perf_counter(), launch_count()
    losses = train(
        model, settings, settings.tuned_rate, settings.tuned_length, settings.tuned_batch,
        settings.tuned_steps, settings.seed + 1, device,
    )  # fmt: skip
    record = {
        "name": f"{attention}, {weights}",
        "attention": attention,
        "weights": weights,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "launches": launch_count() - launched,
        "seconds": round(time.perf_counter() - start, 1),
        "curve": thinned(losses),
    }
    return record | {"loss": losses_by_context(merge(model), settings, device)}


def lengthened(base: Any, settings: Settings) -> Any:
    """A copy of the short model that reads the long context, its positions interpolated."""
    factor = interpolation_factor(settings.tuned_length, settings.length)
    model = make_model(settings, factor).to(base.device)
    model.load_state_dict(deepcopy(base.state_dict()))
    return model


def study(settings: Settings, device: str, path: Path) -> dict[str, Any]:
    """Train the short model, then fine-tune it in every way; `path` has what is known so far."""
    import transformers

    start = time.perf_counter()
    register()
    register("study_s2", mechanism="longlora", G=settings.group)
    register("study_sf", mechanism="sinklora", G=settings.group, s=settings.sinks)
    torch.manual_seed(settings.seed)
    base = make_model(settings).to(device)
    losses = train(
        base, settings, settings.learning_rate, settings.length, settings.batch, settings.steps,
        settings.seed, device,
    )  # fmt: skip
    results: dict[str, Any] = {
        **opening("fine_tuning", device, settings),
        "transformers": transformers.__version__,
        "group": settings.group,
        "parameters": sum(p.numel() for p in base.parameters()),
        "pairs": pairs_share(settings),
        "base": {"seconds": round(time.perf_counter() - start, 1), "curve": thinned(losses)},
        "runs": [],
    }

    def keep(record: dict[str, Any]) -> None:
        results["runs"].append(record)
        write(path, results)
        shown = " ".join(f"{loss:.2f}" for loss in record["loss"])
        print(f"{record['name']:<24} {shown}  {record.get('seconds', 0):.0f} s", flush=True)

    for name, model in (("none", base), ("none, interpolated", lengthened(base, settings))):
        keep({"name": name, "weights": "none", "loss": losses_by_context(model, settings, device)})
    for weights in WEIGHTS:
        for attention in IMPLEMENTATIONS:
            keep(tune(base, settings, attention, weights, device))
    results["total_seconds"] = round(time.perf_counter() - start, 1)
    write(path, results)
    return results


def main() -> None:
    parser = options(__doc__, __file__, "a tiny model, a few steps")
    parser.add_argument("--steps", type=int, help="steps of training at the short context")
    given = parser.parse_args()
    need("transformers", '"attnspec[transformers]"')
    settings = Settings()
    if given.smoke:
        settings = Settings(
            vocabulary=16, phrases=(2, 4), phrase=3, width=16, heads=2, length=8, batch=2, steps=2,
            tuned_length=32, tuned_batch=2, tuned_steps=2, tested=2, bin=8,
        )  # fmt: skip
    if given.steps:
        settings = replace(settings, steps=given.steps)
    study(settings, given.device, given.json)


if __name__ == "__main__":
    main()
