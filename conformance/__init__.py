"""The conformance suite: certify anyone's attention kernel against the reference.

On the command line it is ``attnspec conform``; in Python::

    from attnspec.conformance import Kernel, certify
    report = certify(Kernel("mine", operation="attention.attend", call=f, array="torch"))
    assert report.passed, report.failures[0]
"""

from attnspec.conformance.case import Case, SavedCase
from attnspec.conformance.contract import (
    Array,
    Contract,
    Output,
    Ranking,
    Stream,
    find_contract,
)
from attnspec.conformance.kernel import Kernel, Known
from attnspec.conformance.report import Failure, Report, Result
from attnspec.conformance.runner import PROFILES, Profile, certify
from attnspec.conformance.violation import Violation

__all__ = [
    "PROFILES",
    "Array",
    "Case",
    "Contract",
    "Failure",
    "Kernel",
    "Known",
    "Output",
    "Profile",
    "Ranking",
    "Report",
    "Result",
    "SavedCase",
    "Stream",
    "Violation",
    "certify",
    "find_contract",
]
