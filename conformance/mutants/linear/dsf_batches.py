"""Wrong kernels of `dsf` over packed sequences: states that run on, ends in the wrong place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right
from attnspec.conformance.mutants.linear.dsf_gradients import starts_constant, without_last
from attnspec.reference.conventions import check_offsets
from attnspec.reference.linear import dsf_batches, dsf_rnn, dsf_rnn_batches, dsf_ssm
from attnspec.reference.linear.dsf_mixers import feature_map

LINEAR = right("dsf.linear_attention_packed")
S6 = right("dsf.s6_packed")
SSD = right("dsf.ssd_packed")
QLSTM = right("dsf.qlstm_packed")
LRU = right("dsf.rg_lru_packed")
BLOCK = 8


def spoilt(packed: Any, wrong: Callable[[Any, dict[str, Any]], Any]) -> Any:
    """What `wrong` makes of the right results and of the arguments by name."""

    def call(*args: Any, **options: Any) -> Any:
        given: dict[str, Any] = {}
        made = altering(packed, given.update)(*args, **options)
        return wrong(made, given)

    return call


def running_on(packed: Any, whole: Any) -> Any:
    """The state runs on from one sequence to the next where none is handed in."""

    def wrong(made: Any, given: dict[str, Any]) -> Any:
        rest = {name: x for name, x in given.items() if name != "offsets"}
        if any(rest.get(name) is not None for name in ("h0", "state")):
            return made
        return whole(**rest)[0], made[1]

    return spoilt(packed, wrong)


def running_back(packed: Any, whole: Any) -> Any:
    """The gradient of the state runs on into the sequence before where none is handed in."""

    def call(**a: Any) -> Any:
        if a["h0"] is not None:
            return packed(**a)
        rest = {name: x for name, x in a.items() if name not in ("offsets", "dh")}
        return whole(**rest)

    return call


def first_state_for_all(given: dict[str, Any]) -> None:
    """Every sequence starts from the state of the first."""
    h0 = given["h0"]
    if isinstance(h0, np.ndarray) and len(h0) == len(given["offsets"]) - 1:
        given["h0"] = np.repeat(h0[:1], len(h0), axis=0)


def ends_of_blocks(given: dict[str, Any]) -> None:
    """A sequence starts with the block that holds its first token."""
    offsets = given["offsets"]
    if isinstance(offsets, np.ndarray) and offsets.dtype.kind == "i" and len(offsets) > 2:
        given["offsets"] = np.concatenate(
            [offsets[:1], offsets[1:-1] // BLOCK * BLOCK, offsets[-1:]]
        )


def multiplied(made: Any, given: dict[str, Any]) -> Any:
    """A state is cleared by a decay of 0, which leaves NaN as it is."""
    y, h = made
    spent = np.zeros_like(y)
    for first in given["offsets"][1:-1]:
        spent[first:] += 0 * np.sum(given["z"][:first], axis=0)
    return y + spent, h


def last_row_for_all(made: Any, given: dict[str, Any]) -> Any:
    """All last states are that behind the last token."""
    y, h = made
    return y, np.repeat(h[-1:], len(h), axis=0)


def nothing_left(made: Any, given: dict[str, Any]) -> Any:
    """A sequence without tokens leaves a state of 0."""
    y, h = made
    return y, np.where(np.diff(given["offsets"])[:, None] == 0, np.zeros_like(h), h)


def sum_runs_on(made: Any, given: dict[str, Any]) -> Any:
    """Values start anew with each sequence, their normaliser does not."""
    y, pair = made
    if given["state"] is not None:
        return made
    phi, psi = feature_map(given["q"]), feature_map(given["k"])
    sums = np.cumsum(psi, axis=-2)
    eta = np.einsum("...i,...i->...", phi, sums)
    own = [
        np.einsum("...i,...i->...", phi[..., rows, :], np.cumsum(psi[..., rows, :], axis=-2))
        for rows in check_offsets("offsets", given["offsets"], phi.shape[-2])
    ]
    return (y * (np.concatenate(own, axis=-1) / eta)[..., None]).astype(y.dtype), pair


def of_the_last(backward: Any, place: int) -> Any:
    """What sequences share has the gradient of the last one alone."""

    def call(**a: Any) -> Any:
        made = list(backward(**a))
        first = a["offsets"][-2]
        late = {**a, "dy": np.array(a["dy"])}
        late["dy"][:first] = 0
        if a["dh"] is not None:
            late["dh"] = np.array(a["dh"])
            late["dh"][:-1] = 0
        made[place] = backward(**late)[place]
        return tuple(made)

    return call


def mutant(name: str, law: str, bug: str, call: Any, backward: Any = None) -> Mutant:
    operation, _, short = name.partition(":")
    return Mutant(f"dsf.packed-{short}", f"dsf.{operation}", law, bug, call, backward)


RUNS_ON = "The state runs on into the next sequence."
STRADDLES = "A sequence starts with the block that holds its first token."
MUTANTS = (
    mutant("ssd_packed:ssd-runs-on", "alone", RUNS_ON,
           running_on(SSD, right("dsf.ssd_scan"))),
    mutant("ssd_packed:ssd-straddles", "agreement", STRADDLES, altering(SSD, ends_of_blocks)),
    mutant("ssd_packed:one-start", "continued", "All start from the first state.",
           altering(SSD, first_state_for_all)),
    mutant("linear_attention_packed:linear-runs-on", "alone", RUNS_ON,
           running_on(LINEAR, right("dsf.linear_attention"))),
    mutant("linear_attention_packed:sum-runs-on", "agreement",
           "The normaliser does not start anew.", spoilt(LINEAR, sum_runs_on)),
    mutant("s6_packed:s6-runs-on", "alone", RUNS_ON, running_on(S6, right("dsf.s6_scan"))),
    mutant("s6_packed:one-end", "continued", "All last states are the last token's.",
           spoilt(S6, last_row_for_all)),
    mutant("qlstm_packed:multiplied", "alone", "NaN survives a decay of 0.",
           spoilt(QLSTM, multiplied)),
    mutant("qlstm_packed:nothing-left", "agreement", "No tokens leave a state of 0.",
           spoilt(QLSTM, nothing_left)),
    mutant("rg_lru_packed:lru-runs-on", "alone", RUNS_ON, running_on(LRU, right("dsf.rg_lru"))),
    mutant("rg_lru_packed:lru-straddles", "agreement", STRADDLES, altering(LRU, ends_of_blocks)),
    mutant("ssd_packed:ssd-back", "gradient", "The gradient runs into the sequence before.", SSD,
           running_back(dsf_batches.ssd_packed_backward, dsf_ssm.ssd_scan_backward)),
    mutant("linear_attention_packed:last-sums", "gradient", "Last sums have no gradient.", LINEAR,
           without_last(dsf_batches.linear_attention_packed_backward, "dz")),
    mutant("s6_packed:rates-of-one", "gradient", "A has the gradient of the last sequence.", S6,
           of_the_last(dsf_batches.s6_packed_backward, 1)),
    mutant("qlstm_packed:qlstm-back", "gradient", "The gradient runs into the sequence before.",
           QLSTM, running_back(dsf_rnn_batches.qlstm_packed_backward, dsf_rnn.qlstm_backward)),
    mutant("qlstm_packed:power-of-one", "gradient", "alpha has the gradient of the last sequence.",
           QLSTM, of_the_last(dsf_rnn_batches.qlstm_packed_backward, 4)),
    mutant("rg_lru_packed:fixed-starts", "gradient", "States handed in count as constants.", LRU,
           starts_constant(dsf_rnn_batches.rg_lru_packed_backward)),
)  # fmt: skip
