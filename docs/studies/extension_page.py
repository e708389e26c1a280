"""The page of the extension study: what it asked, what came out, drawn from its numbers."""

from __future__ import annotations

from typing import Any

from pages import evidence, rest
from pictures import Ink, panels

TITLE = "Longer contexts by other positions"
MECHANISMS = ("giraffe", "entropy_abf")
MARKERS = "osD^vP*Xh<>pd8"


def text(results: dict[str, Any]) -> str:
    """The task, the model, the schemes, two tables, and how to read them."""
    s = results["settings"]
    short, longer = s["length"], s["tuned_length"]
    return rest.page(
        f"A model has learned to look up lines in prompts of {short} tokens. How does it fare on "
        "longer ones, when its positions are changed, and when it is then tuned a little?",
        rest.heading("The task"),
        "The Lines of Giraffe, simplified so that a small model can learn them in minutes. The "
        "prompts are those of ``make_lines`` with ids of two letters, of which lines and question "
        "are kept: a line is two tokens, its id and its number in thousands, a question is one, "
        f"the id. Answers are one token of {results['numbers']}, so that guessing is right in "
        f"{1 / results['numbers']:.0%}, and naming any number of the prompt in "
        f"{_named(s['tested_lengths'][0]):.0%} at {s['tested_lengths'][0]} tokens and "
        f"{_named(s['tested_lengths'][-1]):.0%} at {s['tested_lengths'][-1]}. In training every "
        "line is asked for at the end of a prompt, in a test one is. A longer prompt has more "
        "lines, so that it is harder with any positions.",
        rest.heading("The model"),
        f"{s['layers']} layer{'s' * (s['layers'] > 1)} of a gated convolution of three tokens and "
        f"attention, width {s['width']}, {s['heads']} heads of {s['width'] // s['heads']} "
        f"channels, {results['parameters']:,} parameters. The convolution tells a number which id "
        "is before it; attention finds the line by its id, whatever the distance. Nothing here "
        "needs attention to tell near from far: a model of language does, and slow rotations, "
        "which cost nothing in this study, may cost it something. The model is trained "
        f"for {s['steps']} steps of {s['batch']} prompts of up to {short} tokens with rotary "
        "positions of base 10000.",
        rest.heading("The schemes"),
        rest.bullets(
            (
                "*linear s*: positions divided by s; *power*: frequencies shrunk by "
                "``(1 - m / M) ** power``.",
                f"*truncated*: frequencies without a full turn in {short} tokens are replaced or "
                "dropped.",
                "*random*: random steps between positions while tuning, whole ones in tests.",
                f"*xPos*: amplitudes with a scale base of {2 * short}, reached while tuning from "
                "64 times that in even ratios.",
                "*adjusted base*: base 500000 in place of 10000; *entropy-ABF*: with it, queries "
                f"beyond {short} tokens scaled by the logarithm of their position, in all layers.",
            )
        ),
        f"Tuned means {s['tuned_steps']} more steps of {s['tuned_batch']} prompts of up to "
        f"{longer} tokens with the scheme, at a learning rate of {s['tuned_rate']:g}. One seed, "
        f"{results['dtype']}. The model and its first training were settled by a few trials "
        "(without the convolution it had not learned in this budget); no rate of tuning, scale, "
        f"power or scale base was. With {s['tested']} prompts a length, {100 * _error(s):.0f} "
        "points are one standard error at a half.",
        rest.heading("What came out"),
        f"Right answers by tokens of the prompt; the model was trained on {short}.",
        rest.table(
            ("As is", *map(str, s["tested_lengths"])),
            [_row(run) for run in results["runs"] if not run["tuned"]],
            css="figures",
        ),
        f"Tuned at up to {longer} tokens:",
        rest.table(
            ("Tuned with", *map(str, s["tested_lengths"])),
            [_row(run) for run in results["runs"] if run["tuned"]],
            css="figures",
        ),
        _best(results),
        evidence.measured(results),
        rest.directive("code-block", "console", "$ python docs/studies/extension.py"),
    )


def _named(length: int) -> float:
    """How often a number drawn from the lines of a prompt is right, were they all different."""
    return 1 / (length // 2 - 1)


def _error(settings: dict[str, Any]) -> float:
    return 0.5 / settings["tested"] ** 0.5


def _row(run: dict[str, Any]) -> list[str]:
    return [_label(run), *(f"{share:.1%}" for share in run["right"].values())]


def _label(run: dict[str, Any]) -> str:
    other = "" if run["tested_as"] == run["name"] else f", tested with {run['tested_as']}"
    return f"{run['name']}{other}"


def _best(results: dict[str, Any]) -> str:
    """What is ahead at the longest prompts, beside the plain model, in words."""
    length = str(results["settings"]["tested_lengths"][-1])
    said = []
    for tuned, how in ((False, "as is"), (True, "tuned")):
        runs = sorted(
            (run for run in results["runs"] if run["tuned"] == tuned),
            key=lambda run: -run["right"][length],
        )
        named = [f"{_label(run)} ({run['right'][length]:.1%})" for run in runs]
        plain = [f"plain ({run['right'][length]:.1%})" for run in runs if run["name"] == "plain"]
        if runs and plain:
            said.append(f"{how} {named[0]}, {plain[0]}, last {named[-1]}")
    return f"Ahead at {length} tokens: {'; '.join(said)}." if said else ""


def draw_lengths(results: dict[str, Any], ink: Ink) -> Any:
    """Right answers by the length of the prompt: as is on the left, tuned on the right."""
    s = results["settings"]
    figure, axes = panels(2, height=4.4, sharey=True)
    for panel, tuned in zip(axes, (False, True), strict=True):
        runs = [run for run in results["runs"] if run["tuned"] == tuned]
        for marker, run in zip(MARKERS, runs, strict=False):
            x = [int(length) for length in run["right"]]
            panel.plot(
                x, list(run["right"].values()), marker=marker, ms=4, lw=1,
                color=_colour(run, ink), ls="-" if run["tested_as"] == run["name"] else ":",
                label=_label(run).replace(", tested with linear", ", tested at"),
            )  # fmt: skip
        panel.axvline(s["length"], color=ink.line, lw=0.8)
        panel.axhline(1 / results["numbers"], color=ink.text, lw=0.8, ls=":")
        panel.set_xscale("log", base=2)
        panel.set_xticks(s["tested_lengths"], [str(length) for length in s["tested_lengths"]])
        panel.set(xlabel="tokens of the prompt", title="tuned" if tuned else "as is")
        panel.set_ylim(-0.02, 1.02)
        panel.legend(
            frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3
        )
    axes[1].axvline(s["tuned_length"], color=ink.line, lw=0.8)
    axes[0].set_ylabel("right answers")
    return figure


FIGURES = {
    "lengths": (
        "Right answers by the length of the prompt, on the left with other positions alone, on the "
        "right after a few steps of tuning with them. Vertical lines are the lengths of training "
        "and tuning, the dotted one is guessing.",
        draw_lengths,
    ),
}


def _colour(run: dict[str, Any], ink: Ink) -> str:
    """The plain model in the colour of text, the families of schemes in one accent each."""
    if run["name"] == "plain":
        return ink.text
    if run["name"].startswith("linear"):
        return ink.first
    if run["name"].startswith(("power", "truncated")):
        return ink.second
    return ink.third
