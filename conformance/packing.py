"""What contracts and laws of sequences laid end to end share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, BadValue
from attnspec.conformance.trial import Trial


def make_offsets(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Cuts anywhere: some sequences have no token."""
    tokens, sequences = case.shape("tokens sequences")
    cuts = np.sort(rng.integers(0, tokens + 1, sequences - 1))
    return np.concatenate([[0], cuts, [tokens]]).astype(np.int64)


def packed_sizes(sizes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """`sizes` with sequences for a batch."""
    return {**{axis: span for axis, span in sizes.items() if axis != "batch"}, "sequences": (1, 4)}


OFFSETS = Array("offsets", make=make_offsets)
PACKED = {"packed": lambda case: case.with_(sizes={"sequences": 3})}
BAD_OFFSETS = (
    ("offsets that stop short", "offsets", lambda a: np.append(a["offsets"][:-1], 0)),
    BadValue("offsets that fall", "offsets", lambda a: np.insert(a["offsets"], 1, 99)),
    ("offsets that are floats", "offsets", lambda a: a["offsets"] + 0.5),
)
NO_SEQUENCES = (
    ("one offset", "offsets", lambda a: a["offsets"][:1]),
    ("no offsets", "offsets", lambda a: None),
)


def judge_alone(
    trial: Trial,
    n: int,
    tokens: Mapping[str, Mapping[str, int]],
    states: tuple[str, ...] = (),
    fill: Mapping[str, float | None] | None = None,
) -> None:
    """Sequence n gives what it gives alone, among others of NaN and with states of NaN.

    `tokens` names for each argument of offsets, that of the queries first, those that it cuts, with
    their axis of tokens from the end; `states` have an axis of sequences in front. `fill` stands in
    for NaN, and None for what is there.
    """
    arguments = trial.arguments()
    among, alone, rows = dict(arguments), dict(arguments), []
    for offsets, axes in tokens.items():
        own = slice(int(arguments[offsets][n]), int(arguments[offsets][n + 1]))
        alone[offsets] = np.array([0, own.stop - own.start])
        rows.append(own)
        for name, axis in axes.items():
            place = (..., own, *[slice(None)] * (-axis - 1))
            others = (fill or {}).get(name, np.nan)
            among[name], alone[name] = _apart(arguments[name], place, place, others)
    for name in states:
        if arguments.get(name) is not None:
            among[name], alone[name] = _apart(arguments[name], n, slice(n, n + 1), np.nan)
    first, *rest = trial.run(among).items()
    got = {first[0]: first[1][..., rows[0], :], **{name: x[n : n + 1] for name, x in rest}}
    trial.judge(got, alone)


def _apart(x: Any, place: Any, cut: Any, fill: float | None) -> tuple[Any, Any]:
    """x with `fill` outside of a place, unless that is None, and what a cut leaves of x."""
    if isinstance(x, tuple):
        parts = [_apart(part, place, cut, fill) for part in x]
        return tuple(among for among, _ in parts), tuple(alone for _, alone in parts)
    among = np.array(x) if fill is None else np.full_like(x, fill)
    among[place] = x[place]
    return among, x[cut]
