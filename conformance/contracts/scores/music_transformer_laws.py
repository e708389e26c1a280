"""What relative attention keeps beyond the laws for all: logits in order, whatever lies above."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.contract import Contract
from attnspec.conformance.judge import expect
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial
from attnspec.reference.conventions import causal_mask
from attnspec.reference.scores.music_transformer import global_logits


def _ordered(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, parameters={"causal": True})


def check_ordered(trial: Trial) -> None:
    """The causal logits agree with the reference where j <= i; the others are nobody's."""
    arguments = trial.arguments()
    tokens = trial.case.sizes["tokens"]
    seen = causal_mask(tokens, tokens)

    def masked(**given: Any) -> np.ndarray:
        logits = global_logits(**given)
        return np.where(seen, logits, np.zeros_like(logits))

    expectation = expect(masked, arguments, trial.contract.outputs, trial.case.dtype)
    got = trial.run(arguments)["logits"]
    if got.shape == expectation.truth["logits"].shape:
        got = np.where(seen, got, 0.0)
    trial.compare(trial.contract.outputs, {"logits": got}, expectation)


LAWS = (
    Law(
        "ordered-logits",
        "In the causal order logits are right on and below the diagonal, whatever lies above it.",
        ("K3",),
        _ordered,
        check_ordered,
        applies=lambda contract, kernel: contract.spec.function is global_logits,
    ),
)
