"""The page of the pointing study: what it asked, what came out, drawn from its numbers."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from pages import evidence, rest
from pictures import Ink, panels

TITLE = "Hulls and tours by pointing"
MECHANISMS = ("pointer_networks",)
NAMES = {"hull": "convex hull", "tsp": "shortest tour"}


def text(results: dict[str, Any]) -> str:
    """The tasks, the budget, a table for each task, and how to read them."""
    s = results["settings"]
    low, high = s["points"]
    done = [run for run in results["runs"] if "cpu_seconds" in run]
    seconds = " and ".join(f"{run['cpu_seconds']:.0f}" for run in done)
    return rest.page(
        "Does a network that can only point at its input learn plane geometry in minutes, and does "
        "what it learnt hold for more points than it has seen? Two small pointer networks are "
        "trained, one on convex hulls and one on shortest tours, with exact answers from the "
        "solvers of :ref:`the chapter <chapter-pointer_networks>`.",
        rest.heading("The budget"),
        f"An LSTM of width {s['width']} reads the points, another one points; no glimpse, the "
        f"points in the order drawn. {s['steps']} steps of {s['batch']} fresh sets of {low} to "
        f"{high} uniform points, Adam with a learning rate of {s['learning_rate']:g} that rises "
        f"and then falls along a cosine, {results['dtype']}, one seed. Training took {seconds} "
        "seconds of CPU time. Width and steps were set by the time at hand and nothing was tuned; "
        "the paper's networks are wider and see a million sets.",
        rest.heading("What came out"),
        f"{s['tested']} sets of points that were not trained on, for each number of points; those "
        f"above {high} are more than any in training. Decoding is greedy or keeps a beam; "
        "constrained, it may not point twice at a point, and a tour must visit all. An invalid "
        "answer counts as wrong. Coverage of hulls and length of tours are means over valid "
        "answers; coverage is left out where more than 1% are invalid, as in the paper.",
        *(_table(run, results) for run in results["runs"] if "tests" in run),
        evidence.measured(results),
        rest.directive(
            "code-block", "console", "$ OMP_NUM_THREADS=1 python docs/studies/pointing.py"
        ),
    )


def _table(run: dict[str, Any], results: dict[str, Any]) -> str:
    hull = run["task"] == "hull"
    quality = "Area covered" if hull else "Length over the shortest"
    rows = [
        (
            str(test["points"]),
            _decoding(test),
            f"{test['valid']:.1%}",
            f"{test['accuracy']:.1%}",
            _quality(test.get("coverage"), 1) if hull else _quality(test["ratio"], 0),
        )
        for test in run["tests"]
    ]
    if not hull:
        rows += [
            (
                str(test["points"]),
                "nearest neighbour",
                f"{test['valid']:.1%}",
                f"{test['accuracy']:.1%}",
                _quality(test["ratio"], 0),
            )
            for test in results["nearest"]
        ]
        rows.sort(key=lambda row: int(row[0]))
    return rest.page(
        rest.heading(NAMES[run["task"]].capitalize(), rest.SUBSECTION),
        rest.table(("Points", "Decoding", "Valid", "Exact", quality), rows, css="figures"),
    )


def _decoding(test: dict[str, Any]) -> str:
    how = "greedy" if test["beam"] == 1 else f"beam of {test['beam']}"
    return f"{how}, constrained" if test["constrained"] else how


def _quality(value: float | None, percent: int) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if percent else f"{value:.3f}"


def draw_curves(results: dict[str, Any], ink: Ink) -> Any:
    """Loss and exact answers while training."""
    figure, (left, right) = panels(2, height=3.0)
    for run, colour in zip(results["runs"], (ink.first, ink.second), strict=False):
        curve = run.get("curve", {"step": [], "loss": [], "accuracy": [], "valid": []})
        left.plot(curve["step"], curve["loss"], color=colour, label=NAMES[run["task"]])
        right.plot(curve["step"], curve["accuracy"], color=colour)
        right.plot(curve["step"], curve["valid"], color=colour, ls=":")
    most = results["settings"]["points"][1]
    left.set(xlabel="step", ylabel="loss, nats a step")
    right.set(xlabel="step", ylabel=f"share of sets of {most} points", ylim=(-0.02, 1.02))
    left.legend(frameon=False)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def draw_answers(results: dict[str, Any], ink: Ink) -> Any:
    """The first test sets, with the exact answer below the network's."""
    runs = [run for run in results["runs"] if run.get("shown")]
    columns = results["settings"]["shown"]
    lines = max(1, len(runs))
    figure, rows = plt.subplots(lines, columns, figsize=(8.4, 2.9 * lines), squeeze=False)
    for run, row in zip(runs, rows, strict=False):
        for panel, case in zip(row, run["shown"], strict=True):
            _draw_answer(panel, run["task"], case, ink)
    return figure


def _draw_answer(panel: Any, task: str, case: dict[str, Any], ink: Ink) -> None:
    points = np.array(case["points"])
    for cycle, options in (
        (case["exact"], {"color": ink.line, "lw": 6, "solid_joinstyle": "round"}),
        (case["answer"], {"color": ink.first, "lw": 1.6}),
    ):
        if cycle:
            panel.plot(*points[[*cycle, cycle[0]]].T, **options)
    panel.scatter(*points.T, s=90, color=ink.second, zorder=3)
    for n, (x, y) in enumerate(points):
        panel.text(x, y, n, ha="center", va="center_baseline", size=6, color="white", zorder=4)
    exact = case["answer"], case["answer"][::-1]
    right = any(_same_cycle(answer, case["exact"]) for answer in exact[: 1 + (task == "tsp")])
    panel.set(title=f"{NAMES[task]}, {'exact' if right else 'wrong'}", xticks=[], yticks=[])
    panel.set_aspect("equal")
    panel.margins(0.1)
    panel.spines[:].set_visible(False)


def _same_cycle(one: list[int], other: list[int]) -> bool:
    return any(one[i:] + one[:i] == other for i in range(max(1, len(one))))


FIGURES = {
    "answers": (
        "The first test sets of the most points in training, decoded greedily and without a "
        "constraint: the network's answer (thin) over the exact one (wide).",
        draw_answers,
    ),
    "curves": (
        "Left, the loss in training. Right, of greedy answers without a constraint, the share that "
        "is exact (lines) and valid (dotted).",
        draw_curves,
    ),
}
