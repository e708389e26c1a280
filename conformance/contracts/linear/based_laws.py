"""Laws of Based alone: chunks and splits change nothing, states add, and what scores feel."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_anywhere, draw_case
from attnspec.conformance.trial import Trial
from attnspec.conformance.violation import Violation
from attnspec.reference.linear.based import (
    based_attend,
    based_chunk,
    based_packed,
    based_state_update,
)


def _of(*functions: Any) -> Any:
    return lambda contract, kernel: contract.spec.function in functions


def _plain(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, options=(), values=("normal", "structured"))


def check_chunks(trial: Trial) -> None:
    """Chunks of one token, of a few, of all and of more than there are."""
    arguments = trial.arguments()
    tokens = trial.case.sizes["tokens"]
    for chunk in (1, 3, 16, 64, max(tokens, 1), tokens + 3):
        changed = {**arguments, "chunk": chunk}
        trial.judge(trial.run(changed), {**arguments, "chunk": 1})


def check_handover(trial: Trial) -> None:
    """The first part's state, given to the second part, makes the whole."""
    arguments = trial.arguments()
    tokens = trial.case.sizes["tokens"]
    cut = int(trial.case.generator("cut").integers(0, tokens + 1))
    first, last = (
        {**arguments, **{name: arguments[name][..., rows, :] for name in ("q", "k", "v")}}
        for rows in (slice(None, cut), slice(cut, None))
    )
    before = trial.run(first)
    after = trial.run({**last, "S0": before["S"], "zk0": before["zk"]})
    whole = np.concatenate([before["o"], after["o"]], axis=-2)
    # States in 16 bits, as this law hands them on, are inputs of the second half.
    if trial.case.dtype in ("float32", "float64"):
        trial.judge({**after, "o": whole}, {**arguments, "chunk": 1})


def check_count(trial: Trial) -> None:
    """zk[0] counts the tokens, exactly."""
    arguments = trial.arguments()
    for name in ("S", "zk", "S0", "zk0"):
        if arguments.get(name) is not None:
            arguments[name] = np.zeros_like(arguments[name])
    got = trial.run(arguments)["zk"][..., 0]
    if "offsets" in arguments:
        counts = np.diff(arguments["offsets"])[:, None]
    else:
        counts = np.array(arguments["k"].shape[-2])
    if not np.array_equal(got, np.broadcast_to(counts, got.shape)):
        raise Violation("zk", "zk[0] is not the number of tokens")


def check_mean(trial: Trial) -> None:
    """Queries of 0 give the mean of the values seen, whatever the keys are."""
    arguments = trial.arguments()
    arguments["q"] = np.zeros_like(arguments["q"])
    trial.check(arguments)
    if trial.contract.spec.function is based_attend:
        other = {**arguments, "k": np.zeros_like(arguments["k"])}
        trial.judge(trial.run(arguments), other)


def check_not_shift_invariant(trial: Trial) -> None:
    """Unlike softmax: one vector added to all keys changes the weights and the answer."""
    arguments = trial.arguments()
    arguments.update(causal=False, eps=0.0, use_norm=True, scale=1.0)
    q, k, v = (np.array(arguments[name]) for name in ("q", "k", "v"))
    if k.shape[-2] < 2 or not q.shape[-2]:
        return
    q[...] = 0
    k[...] = 0
    v[...] = 0
    q[..., 0], k[..., 0, 0], v[..., 0, :] = 1, 1, 1
    shifted = {**arguments, "q": q, "k": k + 1, "v": v}
    before, after = trial.run({**arguments, "q": q, "k": k, "v": v}), trial.run(shifted)
    trial.judge(after, shifted)
    if np.any(np.abs(before["o"] - after["o"]) < 1e-3):
        raise Violation("o", "adding a vector to all keys changed nothing: is this softmax?")


LAWS = (
    Law(
        "taylor-chunks",
        "No result depends on how long a chunk is.",
        ("K9",),
        draw_anywhere,
        check_chunks,
        applies=_of(based_chunk),
        examples=0.3,
    ),
    Law(
        "taylor-handover",
        "The state of one part continues in the next, at every split.",
        ("K13",),
        _plain,
        check_handover,
        applies=_of(based_chunk),
        examples=0.3,
    ),
    Law(
        "taylor-count",
        "The first entry of zk is the number of tokens seen.",
        ("K13",),
        _plain,
        check_count,
        applies=_of(based_chunk, based_packed, based_state_update),
        examples=0.2,
    ),
    Law(
        "taylor-mean",
        "Queries of 0 weigh all values equally.",
        ("K4",),
        _plain,
        check_mean,
        applies=_of(based_attend, based_chunk),
        examples=0.2,
    ),
    Law(
        "taylor-shift",
        "Adding a vector to all keys is felt.",
        ("K5",),
        _plain,
        check_not_shift_invariant,
        applies=_of(based_attend),
        examples=0.1,
    ),
)
