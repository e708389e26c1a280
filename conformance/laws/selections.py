"""Laws of selections: exact ties by the thousand, and what is chosen when scores are equal."""

from __future__ import annotations

from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.laws.regions import check_agreement


def tied(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, values=("ties",))


LAWS = (
    Law(
        "ties",
        "Among equal scores the lower index is chosen, every time.",
        ("K6",),
        tied,
        check_agreement,
        applies=lambda contract, kernel: contract.ranking is not None,
    ),
)
