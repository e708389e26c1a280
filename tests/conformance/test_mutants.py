"""Every mutant is killed by the law that claims it; every law is needed by some mutant."""

from __future__ import annotations

import pytest

from attnspec.conformance.killing import PROFILE, kill
from attnspec.conformance.laws import laws
from attnspec.conformance.mutants import Mutant, mutants
from attnspec.conformance.runner import Task, run_task
from attnspec.reference import mechanisms

CONTROLS = (
    "chunk-length", "dsf-rows", "flow-order", "flow-others", "gated-delta", "prefix-shift",
)  # fmt: skip


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: mutant.name)
def test_the_claiming_law_kills(mutant):
    outcome = kill(mutant)
    assert outcome.tried, f"law {mutant.law!r} does not apply to {mutant.operation}"
    assert not outcome.survived, f"{mutant.name} survives {mutant.law!r}: {mutant.bug}"


@pytest.mark.parametrize(
    "mutant", [m for m in mutants() if m.law in CONTROLS], ids=lambda mutant: mutant.name
)
def test_a_control_needs_no_reference(mutant):
    """What it must not be is found by the case's own numbers, before the judge is asked."""
    kernel = mutant.kernel
    failure = run_task(Task(kernel, laws()[mutant.law], kernel.dtypes[0]), PROFILE).failure
    assert failure is not None
    assert "must not be" in failure.violation.message


def test_a_mutant_that_slips_is_not_killed():
    def slips(scores, tau=1.0):
        raise NameError("name 'tua' is not defined")

    mutant = Mutant("slips", "tempscale.temper", "agreement", "none of its own", slips)
    assert kill(mutant).survived


def test_every_law_is_needed():
    # Compilation and graph capture need torch kernels; limits and cells need claims of a kernel.
    needed = {mutant.law for mutant in mutants()}
    assert set(laws()) - needed <= {"compiled", "graph"}


@pytest.mark.parametrize("slug", list(mechanisms()))
def test_every_mechanism_has_mutants(slug):
    assert sum(mutant.operation.startswith(f"{slug}.") for mutant in mutants()) >= 4


def test_names_are_unique():
    names = [mutant.name for mutant in mutants()]
    assert len(set(names)) == len(names)
