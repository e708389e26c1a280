"""The page of the recall study: what it asked, what came out, drawn from its numbers."""

from __future__ import annotations

from typing import Any

from pages import evidence, rest
from pictures import Ink, panels

TITLE = "Recall and the size of the state"
MECHANISMS = (
    "attention",
    "based",
    "lightning_attention_2",
    "lightning_attention_1",
    "lightnet",
    "flowformer",
    "titans",
)
MARKERS = "osD^>vP*Xh<"

SEEDS = (
    "One seed says little of a model that has only begun to learn. Separate runs with seeds 1 and "
    "2, all else equal, in no figure and in no table here, the better rate each time: of 16 pairs "
    "Based with 8 features recalled 53.1% and 50.7%, far more than in the table, the TNL block "
    "4.1% and 2.0%, less than there, lightning with heads of 32 9.0% and 7.8%. So the order of "
    "these three is not settled by the table."
)
LONGER = (
    "Titans MAG and MAC do not learn the task within this budget. A separate run of those two, "
    "with 900 steps and all else equal, on one thread of a machine of two cores (AMD EPYC, commit "
    "27c0f71), says what more steps give; it is in no figure and in no table here. At 0.002 MAG "
    "recalled 70.9%, 53.5% and 32.6% of 4, 8 and 16 pairs; MAC 2.9%, 2.9% and 2.5%, just beginning "
    "to learn. At 0.008 MAG stayed at guessing, and MAC failed once its numbers were not finite, "
    "as it did in the run of the table."
)


def text(results: dict[str, Any]) -> str:
    """The task, the budget, a table of all runs, and how to read it."""
    s = results["settings"]
    hardest = str(s["pairs"][-1])
    *fewer, most = map(str, s["pairs"])
    pairs = f"{', '.join(fewer)} or {most}"
    rates = " and ".join(f"{rate:g}" for rate in s["learning_rates"])
    return rest.page(
        "Can a layer look up in the context what it was told there, and how much must a decoder "
        "carry for it? Models of two mixers, all else equal, are trained on one task with one "
        "budget.",
        rest.heading("The task"),
        f"Multi-query associative recall in {s['length']} tokens. A sequence begins with {pairs} "
        "pairs, each number as often, of a key and a value, the keys distinct among "
        f"{s['keys']}, the values uniform among {s['values']}. In the places that remain every key "
        "is asked once, at a random place, in random order; all else is one filler token. The loss "
        f"and the recall are those of the values asked for; guessing recalls 1 in {s['values']}.",
        rest.heading("The models"),
        "An embedding, two times a gated convolution of three tokens and the mixer, a norm, a "
        "linear read-out; no positions and no MLP. Only the TNL block, the block of "
        "TransNormerLLM, is taken whole: lightning attention with its own norms, a position (LRPE) "
        "in the first of its two layers and a gated MLP behind each, hence the most parameters. "
        "Based is one Taylor layer and one window layer. "
        "A window holds 8 tokens, a segment and a chunk of Titans too; its memories are linear.",
        rest.heading("The budget"),
        f"{s['steps']} steps of {s['batch']} fresh sequences, AdamW with a learning rate that "
        f"rises and then falls along a cosine, {results['dtype']}, one seed. The better of two "
        f"rates counts, {rates}; nothing else was tuned for any mixer. A low figure says what was "
        "learnt within this budget, not the best that a mixer can do. A difference of a few points "
        "is noise, and of some models far more: see the seeds below.",
        rest.heading("What came out"),
        "Recall of sequences not trained on, by the number of pairs. The state is what the layers "
        f"of the whole model carry for one sequence after {s['length']} tokens, in numbers of four "
        "bytes.",
        rest.table(
            (
                "Model",
                "Size",
                "Parameters",
                "State, numbers",
                *_heads(s),
                "Rate",
                "Note",
            ),
            [_row(run, s) for run in results["runs"]],
            css="figures",
        ),
        _best(results, hardest),
        _guessing(results),
        SEEDS,
        LONGER,
        evidence.measured(results),
        rest.directive("code-block", "console", "$ python docs/studies/recall.py"),
    )


def _heads(settings: dict[str, Any]) -> list[str]:
    return [f"{pairs} pairs" for pairs in settings["pairs"]]


def _row(run: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    failures = {t["learning_rate"]: t["error"] for t in run.get("tried", ()) if "error" in t}
    if "recall" not in run:
        reason = f"failed: {next(iter(failures.values()))}" if failures else "interrupted"
        blank = [""] * (3 + len(settings["pairs"]))
        return [run["name"], run["size"], *blank, rest.escape(reason)]
    done = run["curve"]["step"][-1]
    note = f"out of time after {done} steps" if run["stopped"] else ""
    if run["diverged"]:
        note = f"diverged within {done} steps"
    note = "; ".join([*([note] if note else []), *(f"failed at {rate:g}" for rate in failures)])
    return [
        run["name"],
        run["size"],
        f"{run['parameters']:,}",
        f"{run['state_numbers']:,}",
        *(f"{run['recall'][str(pairs)]:.1%}" for pairs in settings["pairs"]),
        f"{run['learning_rate']:g}",
        note,
    ]


def _best(results: dict[str, Any], pairs: str) -> str:
    """Which runs nothing smaller beats, in words."""
    done = sorted(
        (run for run in results["runs"] if "recall" in run), key=lambda run: run["state_numbers"]
    )
    frontier: list[dict[str, Any]] = []
    for run in done:
        if not frontier or run["recall"][pairs] > frontier[-1]["recall"][pairs]:
            frontier.append(run)
    if not frontier:
        return ""
    steps = (
        f"{run['name']} ({run['size']}) {run['recall'][pairs]:.1%} with {run['state_numbers']:,}"
        for run in frontier
    )
    return f"The frontier at {pairs} pairs, by numbers of state: {'; '.join(steps)}."


def _guessing(results: dict[str, Any]) -> str:
    """Which runs are not clearly better than guessing, in words."""
    most = 2 / results["settings"]["values"]
    runs = [
        f"{run['name']} ({run['size']})"
        for run in results["runs"]
        if "recall" in run and max(run["recall"].values()) < most
    ]
    return f"Less than twice what guessing recalls: {'; '.join(runs)}." if runs else ""


def draw_frontier(results: dict[str, Any], ink: Ink) -> Any:
    """Recall at the most pairs against the numbers in the state, a mark a mixer."""
    figure, (axes,) = panels(1, height=4.2)
    pairs = str(results["settings"]["pairs"][-1])
    for marker, (name, runs) in zip(MARKERS, _by_name(results).items(), strict=False):
        points = sorted((r["state_numbers"], r["recall"][pairs]) for r in runs if "recall" in r)
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker=marker, color=_colour(name, ink), lw=0.8, label=name)
    axes.axhline(1 / results["settings"]["values"], color=ink.text, lw=0.8, ls=":")
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.02, 1.02)
    axes.set(xlabel="numbers in the state", ylabel=f"recall of {pairs} pairs")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_curves(results: dict[str, Any], ink: Ink) -> Any:
    """Loss and recall while training, of the first run of every mixer."""
    figure, axes = panels(2, height=3.4)
    for marker, (name, runs) in zip(MARKERS, _by_name(results).items(), strict=False):
        curve = runs[0].get("curve", {"step": []})
        for panel, what in zip(axes, ("loss", "recall"), strict=True):
            if curve["step"]:
                panel.plot(
                    curve["step"], curve[what], marker=marker, ms=3, lw=1,
                    color=_colour(name, ink), label=name,
                )  # fmt: skip
            panel.set(xlabel="step", ylabel=what)
    axes[0].set_ylabel("loss, nats a question")
    axes[1].set_ylabel(f"recall of {results['settings']['pairs'][-1]} pairs")
    axes[1].set_ylim(-0.02, 1.02)
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


FIGURES = {
    "frontier": (
        "Recall of the most pairs against the numbers that a decoder carries; up and to the left "
        "is better, the dotted line is guessing. Points of one mixer differ in width, heads or "
        "memory.",
        draw_frontier,
    ),
    "curves": (
        "Left, the loss in training; right, the recall of the most pairs, of the first size of "
        "every mixer.",
        draw_curves,
    ),
}


def _by_name(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        found.setdefault(run["name"], []).append(run)
    return found


def _colour(name: str, ink: Ink) -> str:
    """The baselines in the colour of text, Titans in one accent, the linear mixers in two."""
    if name in ("attention", "window"):
        return ink.text
    if name.startswith("Titans"):
        return ink.third
    return ink.second if name == "Based" else ink.first
