"""Laws of Synaptic Resonance alone: a state handed over, traces of nothing, packed sequences."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.arrays import flatten, place_arguments
from attnspec.conformance.laws.base import Law, draw_case
from attnspec.conformance.trial import Trial

STATES = {
    "synaptic_resonance.relevance": ("c0",),
    "synaptic_resonance.memory_recurrent": ("S0",),
    "synaptic_resonance.memory_chunked": ("S0",),
}
PACKED = "synaptic_resonance.synaptic_resonance_packed"
TRACED = ("synaptic_resonance.relevance", "synaptic_resonance.synaptic_resonance", PACKED)


def check_resumption(trial: Trial) -> None:
    """Two calls, cut anywhere, the second with the first one's state, are one call."""
    arguments, kind = trial.arguments(), trial.kernel.arrays
    cut = int(trial.case.generator("cut").integers(0, trial.case.sizes["tokens"] + 1))
    results: list[list[Any]] = []
    for rows in (slice(0, cut), slice(cut, None)):
        placed = place_arguments(kind, _part(arguments, rows), "contiguous", trial.case.dtype)
        if results:
            placed |= dict(zip(STATES[trial.contract.operation], results[0][1:], strict=True))
        with trial.guarded():
            results.append(list(flatten(trial.contract.call(trial.kernel.call, placed))))
    axis = -1 if trial.contract.outputs[0].name == "rho" else -2
    by_token = np.concatenate([kind.get(result[0]) for result in results], axis=axis)
    names = [output.name for output in trial.contract.outputs]
    last = kind.get(results[1][1])
    trial.judge(dict(zip(names, (by_token, last), strict=True)), arguments)


def _part(arguments: dict[str, Any], rows: slice) -> dict[str, Any]:
    part = dict(arguments)
    for name in {"q", "k", "v"} & set(arguments):
        part[name] = arguments[name][..., rows, :]
    for name in {"rho", "valid"} & set(arguments):
        if arguments[name] is not None:
            part[name] = arguments[name][..., rows]
    return part


def check_silence(trial: Trial) -> None:
    """Keys of zeros, in front and in between: a trace of zeros makes the next token relevant."""
    arguments = trial.arguments()
    rng = trial.case.generator("silence")
    tokens = trial.case.sizes["tokens"]
    silent = np.arange(tokens) < rng.integers(0, tokens + 1)
    silent |= rng.random(tokens) < 0.2
    trial.check({**arguments, "k": np.where(silent[:, None], 0.0, arguments["k"])})


LAWS = (
    Law(
        "resumption",
        "A sequence cut anywhere goes on from the state of its first part.",
        ("K13",),
        draw_case,
        check_resumption,
        applies=lambda contract, kernel: contract.operation in STATES,
        examples=0.3,
    ),
    Law(
        "silence",
        "While only zero keys were seen, a token is relevant.",
        ("K4",),
        draw_case,
        check_silence,
        applies=lambda contract, kernel: contract.operation in TRACED,
        examples=0.3,
    ),
)
