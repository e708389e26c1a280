"""Laws of the packed operations of `dsf`: sequences are alone, and go on from their states."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.contract import Contract
from attnspec.conformance.contracts.linear.dsf_batches import CONTRACTS
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.packing import judge_alone
from attnspec.conformance.trial import Trial

OPERATIONS = {contract.operation for contract in CONTRACTS}


def _anywhere(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype)


def _several(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, axes={"sequences": st.integers(2, 4)})


def _tokens(trial: Trial, arguments: dict[str, Any]) -> dict[str, int]:
    """The axis of tokens of each argument that has one."""
    heads = "kv_heads" in trial.case.sizes
    total = int(arguments["offsets"][-1])
    axis = 1 if heads else 0
    return {
        name: axis
        for name, x in arguments.items()
        if isinstance(x, np.ndarray)
        and name not in ("A", "D", "a", "lam", "offsets", "h0")
        and x.shape[axis] == total
    }


def check_alone(trial: Trial) -> None:
    """A packed sequence gives, among others of NaN and with states of NaN, what it gives alone.

    Steps of NaN would be refused: those are large.
    """
    arguments = trial.arguments()
    tokens = {name: axis - arguments[name].ndim for name, axis in _tokens(trial, arguments).items()}
    for n in range(trial.case.sizes["sequences"]):
        judge_alone(trial, n, {"offsets": tokens}, ("h0", "state"), {"Delta": 1e4})


def check_continued(trial: Trial) -> None:
    """Sequences cut in two, the rest packed behind the states that the first parts leave."""
    if trial.case.dtype not in ("float32", "float64"):
        # What is handed on would be rounded, as inputs of the second part are.
        return
    arguments = trial.arguments()
    offsets, axes = arguments["offsets"], _tokens(trial, arguments)
    rng = trial.case.generator("cuts")
    cuts = [int(rng.integers(first, last + 1)) for first, last in pairwise(offsets)]
    results: list[Any] = []
    handed: dict[str, Any] = {}
    for starts, stops in ((offsets[:-1], cuts), (cuts, offsets[1:])):
        chosen = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        part = {**arguments, **handed}
        for name, axis in axes.items():
            part[name] = np.take(arguments[name], chosen, axis=axis)
        lengths = np.subtract(stops, starts)
        part["offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        outputs = trial.run(part)
        results.append((chosen, outputs))
        handed = {"state": (outputs["h"], outputs["z"])} if "z" in outputs else {"h0": outputs["h"]}
    axis = results[0][1]["y"].ndim - 2
    places = np.argsort(np.concatenate([chosen for chosen, _ in results]))
    y = np.concatenate([outputs["y"] for _, outputs in results], axis=axis)
    trial.judge({**results[1][1], "y": np.take(y, places, axis=axis)}, arguments)


LAWS = (
    Law(
        "dsf-alone",
        "A packed sequence does not feel its neighbours, whatever they hold.",
        ("K1", "K11"),
        _several,
        check_alone,
        applies=lambda contract, kernel: contract.operation in OPERATIONS,
        examples=0.4,
    ),
    Law(
        "dsf-continued",
        "Packed sequences go on from their states, at every split.",
        ("K13",),
        _anywhere,
        check_continued,
        applies=lambda contract, kernel: contract.operation in OPERATIONS,
        examples=0.3,
    ),
)
