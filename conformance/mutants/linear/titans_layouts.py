"""Wrong gradients of Titans' layouts and of its granular chunks: paths left out, or cut."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.linear import titans_layout_gradients as layouts
from attnspec.reference.linear.titans_granular_gradients import titans_chunk_granular_backward

MAC, MAG, MAL = (right(f"titans.{name}") for name in ("mac_segment", "mag", "mal"))
GRANULAR = right("titans.titans_chunk_granular")
MAC_BACKWARD, MAG_BACKWARD = layouts.mac_segment_backward, layouts.mag_backward
MAL_BACKWARD, GRANULAR_BACKWARD = layouts.mal_backward, titans_chunk_granular_backward
# Names that mutants replace while they run are kept here as they are.
gate_backward, read_backward = layouts._gate_backward, layouts.mlp_memory_backward


def gate_without_norm(y: Any, h: Any, gains: Any, do: Any) -> Any:
    """The root mean square of what the memory says is taken for a constant."""
    dy, _, dgains = gate_backward(y, h, gains, do)
    h_rms, size = layouts._rms(h)
    opened = 1 / (1 + np.exp(-np.clip(h_rms * gains[1], -80, 80))).astype(y.dtype)
    into = do * layouts._rms(y)[0] * gains[0] * opened * (1 - opened) * gains[1]
    return dy, into / size, dgains


def gate_is_constant(y: Any, h: Any, gains: Any, do: Any) -> Any:
    dy, dh, dgains = gate_backward(y, h, gains, do)
    return dy, 0 * dh, dgains


def asks_for_nothing(W: Any, x: Any, dy: Any) -> Any:
    """What a segment asks the memory for gives no gradient to the segment."""
    dW, dx = read_backward(W, x, dy)
    return dW, 0 * dx


def without(place: int) -> Any:
    """Gradients of which one, or all arrays of one, are zero."""

    def change(gradients: Any) -> Any:
        cut = gradients[place]
        zero = tuple(0 * x for x in cut) if isinstance(cut, tuple) else 0 * cut
        return (*gradients[:place], zero, *gradients[place + 1 :])

    return change


def first_prefix(gradients: Any) -> Any:
    """The prefix gets its gradient as if it had one row."""
    dP = gradients[1]
    return gradients[0], np.where(np.arange(len(dP))[:, None] < 1, dP, 0 * dP), *gradients[2:]


def renewed_each_chunk(arguments: dict[str, Any]) -> None:
    """The inner gradients are believed to be those of each chunk's own weights."""
    if arguments["batch_size"] is None:
        arguments["batch_size"] = arguments["c"]


def mutant(name: str, bug: str, call: Any, backward: Any, operation: str) -> Mutant:
    return Mutant(f"titans.{name}", f"titans.{operation}", "gradient", bug, call, backward=backward)


MUTANTS = (
    mutant("mac-asks-for-nothing", "what is asked of the memory gives no gradient", MAC,
           replacing(MAC_BACKWARD, mlp_memory_backward=asks_for_nothing), "mac_segment"),
    mutant("mac-raw-gate", "the norm before the gate is taken for a constant", MAC,
           replacing(MAC_BACKWARD, _gate_backward=gate_without_norm), "mac_segment"),
    mutant("mag-shut-gate", "the memory gets no gradient through the gate", MAG,
           replacing(MAG_BACKWARD, _gate_backward=gate_is_constant), "mag"),
    mutant("mag-first-prefix", "only the first persistent token has a gradient", MAG,
           spoiling(MAG_BACKWARD, first_prefix), "mag"),
    mutant("mal-no-memory", "the memory's matrices get no gradient", MAL,
           spoiling(MAL_BACKWARD, without(5)), "mal"),
    mutant("mal-no-weights", "the first weights get no gradient", MAL,
           spoiling(MAL_BACKWARD, without(2)), "mal"),
    mutant("granular-renewed", "inner gradients go to each chunk's own weights", GRANULAR,
           altering(GRANULAR_BACKWARD, renewed_each_chunk), "titans_chunk_granular"),
    mutant("granular-no-deta", "the momentum's rate gets no gradient", GRANULAR,
           spoiling(GRANULAR_BACKWARD, without(6)), "titans_chunk_granular"),
)  # fmt: skip
