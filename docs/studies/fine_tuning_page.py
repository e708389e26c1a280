"""The page of the fine-tuning study: what it asked, what came out, drawn from its numbers."""

from __future__ import annotations

from typing import Any

from pages import evidence, rest
from pictures import Ink, panels

from attnspec.reference.patterns.sinklora import sf_head_kind

TITLE = "Fine-tuning to a longer context"
MECHANISMS = ("longlora", "sinklora", "attention")
NEEDS = ("transformers",)
MARKERS = {"dense": "o", "S2-Attn": "s", "SF-Attn": "^"}
STYLES = {"all": "-", "LoRA": ":", "LoRA+": "--"}


def text(results: dict[str, Any]) -> str:
    """The language, the model, the budget, a table of all runs, and how to read it."""
    s = results["settings"]
    short, long = s["length"], s["tuned_length"]
    least, most = s["phrases"]
    return rest.page(
        f"A Llama that was trained on {short} tokens is to read {long}. What does it lose when the "
        "fine-tuning sees only groups of tokens, and when adapters take the place of its weights?",
        rest.heading("The language"),
        f"A document has {least} to {most} phrases of its own, each {s['phrase']} random tokens of "
        f"{s['vocabulary']}, and is one phrase after another, each drawn uniformly; numbers of "
        "phrases are even in their logarithm. A phrase can be foretold once it has been read, and "
        "the longer the context, the more of them have: the loss falls along the text if the model "
        "uses all of it.",
        rest.heading("The model"),
        f"LlamaForCausalLM of transformers {results['transformers']}, {s['layers']} layers, width "
        f"{s['width']}, {s['heads']} heads, {results['parameters']:,} parameters, all attention "
        "through :func:`attnspec.fast.transformers.register`. Before fine-tuning its positions are "
        f"divided by {-(-long // short)} (linear interpolation). Groups have {results['group']} "
        f"tokens, in segments; S2-Attn shifts {s['heads'] - s['heads'] // 2} heads, SF-Attn "
        f"{int(sf_head_kind(s['heads']).sum())} and has {s['sinks']} sinks. Adapters are of rank "
        f"{s['r']} at the four projections of attention; LoRA+ also trains embeddings and norms. "
        "The input layer adds an embedding of the token before, so that a small model learns in "
        "minutes to find what followed a token.",
        rest.heading("The budget"),
        f"{s['steps']} steps of {s['batch']} documents of {short} tokens with a learning rate of "
        f"{s['learning_rate']:g}, then {s['tuned_steps']} of {s['tuned_batch']} documents of "
        f"{long} tokens with {s['tuned_rate']:g}; AdamW, {results['dtype']}, one seed, the same "
        "documents for every run. The rate was not tuned for any of them, and adapters often like "
        "a higher one than whole models. With one seed, differences of a few hundredths are not "
        "told from noise. The language, the input layer and the training of the short model were "
        "settled by trial, until it learned in this budget. Whether it had stopped improving was "
        "not tested: some of what fine-tuning gains may be more training.",
        rest.heading("What came out"),
        f"Loss in nats a token, with dense attention, on {s['tested']} documents not trained on, "
        "by how many tokens come before. Pairs are those of tokens that attend in training, of "
        "those of dense attention. At this size the groups save no time that matters: seconds are "
        "those of a small model on short texts, and none is a measure of the kernels.",
        rest.table(
            ("Fine-tuning", "Trained", "Pairs", *_bins(s), "Seconds"),
            [_row(run, results) for run in results["runs"]],
            css="figures",
        ),
        _summary(results),
        evidence.measured(results),
        rest.directive("code-block", "console", "$ python docs/studies/fine_tuning.py"),
    )


def _bins(settings: dict[str, Any]) -> list[str]:
    edges = range(0, settings["tuned_length"], settings["bin"])
    return [f"{edge} to {edge + settings['bin']}" for edge in edges]


def _row(run: dict[str, Any], results: dict[str, Any]) -> list[str]:
    tuned = "attention" in run
    return [
        run["name"],
        f"{run['trained']:,}" if tuned else "",
        f"{results['pairs'][run['attention']]:.0%}" if tuned else "",
        *(f"{loss:.2f}" for loss in run["loss"]),
        f"{run['seconds']:.0f}" if tuned else "",
    ]


def _summary(results: dict[str, Any]) -> str:
    """The losses at the end of the text, grouped and dense, of what is trained."""
    last = {run["name"]: run["loss"][-1] for run in results["runs"]}
    bin_ = _bins(results["settings"])[-1]
    parts = []
    for weights in STYLES:
        names = [f"{attention}, {weights}" for attention in MARKERS]
        if all(name in last for name in names):
            figures = ", ".join(
                f"{attention} {last[f'{attention}, {weights}']:.2f}" for attention in MARKERS
            )
            parts.append(f"{weights}: {figures}")
    before = ", ".join(f"{name} {last[name]:.2f}" for name in ("none", "none, interpolated"))
    return f"After {bin_} tokens: without fine-tuning {before}; {'; '.join(parts)}."


def draw_context(results: dict[str, Any], ink: Ink) -> Any:
    """Loss by the tokens before, a panel for each way of training weights."""
    s = results["settings"]
    figure, axes = panels(3, height=3.4, sharey=True)
    middles = [edge + s["bin"] / 2 for edge in range(0, s["tuned_length"], s["bin"])]
    colours = _colours(ink)
    for panel, weights in zip(axes, STYLES, strict=True):
        for run in results["runs"]:
            if run["weights"] == "none":
                style = "-" if run["name"] == "none" else ":"
                panel.plot(
                    middles, run["loss"], color=ink.text, lw=0.9, ls=style, label=run["name"]
                )
            elif run["weights"] == weights:
                panel.plot(
                    middles, run["loss"], color=colours[run["attention"]], lw=1.1,
                    marker=MARKERS[run["attention"]], ms=4, label=run["attention"],
                )  # fmt: skip
        panel.axvline(s["length"], color=ink.line, lw=0.8)
        panel.set(xlabel="tokens before", title=f"{weights} trained")
    axes[0].set_ylabel("loss, nats a token")
    axes[-1].legend(frameon=False, fontsize=8)
    return figure


def draw_curves(results: dict[str, Any], ink: Ink) -> Any:
    """Losses while fine-tuning; those of groups are losses with groups."""
    figure, (axes,) = panels(1, height=3.4)
    colours = _colours(ink)
    for run in results["runs"]:
        if "curve" in run:
            x, y = zip(*run["curve"], strict=True)
            axes.plot(
                x, y, color=colours[run["attention"]], ls=STYLES[run["weights"]], lw=1.1,
                label=run["name"],
            )  # fmt: skip
    axes.set(xlabel="step of fine-tuning", ylabel="loss in training, nats a token")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


FIGURES = {
    "context": (
        "Loss by the number of tokens before, with dense attention, for what fine-tuning trained "
        "and what it attended to; the vertical line is the length of the first training.",
        draw_context,
    ),
    "curves": (
        "The loss while fine-tuning, each with the attention of its training.",
        draw_curves,
    ),
}


def _colours(ink: Ink) -> dict[str, str]:
    return {"dense": ink.first, "S2-Attn": ink.second, "SF-Attn": ink.third}
