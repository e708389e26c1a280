"""The conformance suite: certify anyone's attention kernel against the reference.

On the command line it is ``attnspec conform``; in Python::

    from attnspec.conformance import Kernel, certify
    report = certify(Kernel("mine", operation="attention.attend", call=f, array="torch"))
    assert report.passed, report.failures[0]
"""

from typing import Any

try:
    from attnspec.conformance.case import Case, SavedCase
    from attnspec.conformance.certification import certify
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
    from attnspec.conformance.runner import PROFILES, Profile
    from attnspec.conformance.violation import Violation
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise

    def __getattr__(name: str) -> Any:
        """The command and whoever asks for a name hear what to install; no one else needs to."""
        if name in __all__:
            raise ImportError(
                'hypothesis is not installed: pip install "attnspec[conformance]"',
                name="hypothesis",
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
